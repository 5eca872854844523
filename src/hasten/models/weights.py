"""A decoder's weights from safetensors files, single or sharded, checked against its config.

Names and shapes of everything are compared with what the config wants before any weight is
read. Reading goes module by module through short-lived memory maps, so loading never holds
much more than the finished model. A folder may hold dense weights, or quantized ones under
compressed-tensors' names (`weight_packed`, `weight_scale`). Pickled weights are never opened.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open

from hasten.artifact import ModelRef, TensorInfo
from hasten.config import SCHEMES, Scheme
from hasten.errors import UsageError, WeightsError
from hasten.models.config import DecoderConfig
from hasten.quantization.packing import PER_WORD, unpack_int4
from hasten.quantization.rtn import QuantizedWeight, group_size_for, quantize, weight_bits

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"

DENSE_DTYPES = ("F64", "F32", "F16", "BF16")

MAX_SHOWN = 3
"""Tensors named in one message; more are counted."""


@dataclass(frozen=True)
class LinearWeight:
    """One linear layer's weight, dense in the decoder's dtype or quantized, and its bias."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None


def layer_prefix(index: int) -> str:
    """The name that a layer's tensors begin with."""
    return f"model.layers.{index}"


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    """All linear layers by module name: out_features, in_features, has a bias."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, int, bool]] = {}
    for index in range(config.num_layers):
        prefix = layer_prefix(index)
        shapes |= {
            f"{prefix}.self_attn.q_proj": (q_size, hidden, config.qkv_bias),
            f"{prefix}.self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
            f"{prefix}.self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
            f"{prefix}.self_attn.o_proj": (hidden, q_size, config.o_bias),
            f"{prefix}.mlp.gate_proj": (inner, hidden, config.mlp_bias),
            f"{prefix}.mlp.up_proj": (inner, hidden, config.mlp_bias),
            f"{prefix}.mlp.down_proj": (hidden, inner, config.mlp_bias),
        }
    return shapes | {HEAD: (config.vocab_size, hidden, False)}


def norm_shapes(config: DecoderConfig) -> dict[str, int]:
    """All norms by module name, with the length of their weight."""
    norms = {}
    for index in range(config.num_layers):
        prefix = layer_prefix(index)
        norms[f"{prefix}.input_layernorm"] = config.hidden_size
        norms[f"{prefix}.post_attention_layernorm"] = config.hidden_size
        if config.qk_norm:
            norms[f"{prefix}.self_attn.q_norm"] = norms[f"{prefix}.self_attn.k_norm"] = config.head_dim
    return norms | {FINAL_NORM: config.hidden_size}


class WeightReader:
    """Reads a model's modules in one precision.

    Raises (when constructed):
        WeightsError: a tensor is missing, has another shape than the config wants, or another kind.
        UsageError: the folder holds quantized weights of another scheme.
    """

    def __init__(self, model: ModelRef, config: DecoderConfig, scheme: Scheme) -> None:
        self.model, self.config, self.scheme = model, config, scheme
        self.dtype = getattr(torch, scheme.activation)
        self.is_quantized = any(name.endswith(".weight_scale") for name in model.tensors)
        self.linears = linear_shapes(config)
        if self.is_quantized:
            _check_scheme(model, scheme)
        expected = self._expected()
        _check_present(model, expected)
        _check_shapes(model, expected)
        _check_unexpected(model, expected, self.linears, config)

    @property
    def shares_embedding(self) -> bool:
        """Whether the embedding is looked up in the quantized head."""
        return self.config.tied_head and self.scheme.is_quantized

    def bits(self, module: str) -> int:
        """Bits of a linear layer's weights in this precision."""
        return weight_bits(self.scheme, module, self.linears[module][1])

    def linear(self, module: str) -> LinearWeight:
        """A linear layer's weight, quantized here if the folder has it dense."""
        bias = self.tensor(f"{module}.bias").to(self.dtype) if self.linears[module][2] else None
        if self.is_quantized:
            return LinearWeight(self._stored(module), bias)
        name = f"{EMBEDDING if module == HEAD and self.config.tied_head else module}.weight"
        weight = self.tensor(name)
        if self.scheme.is_quantized:
            return LinearWeight(quantize(weight, self.bits(module)), bias)
        return LinearWeight(weight.to(self.dtype), bias)

    def norm(self, module: str) -> torch.Tensor:
        return self.tensor(f"{module}.weight").float()

    def embedding(self) -> torch.Tensor:
        """The embedding table in the file's dtype; it stays in the file, memory-mapped."""
        return self.tensor(f"{EMBEDDING}.weight")

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as the file has it; its memory is the file's map."""
        path = self.model.path / self.model.tensors[name].file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"cannot read tensor {name} from {path}: {error}") from error

    def _stored(self, module: str) -> QuantizedWeight:
        scale = self.tensor(f"{module}.weight_scale").to(torch.bfloat16)
        if self.bits(module) == 8:
            return QuantizedWeight(self.tensor(f"{module}.weight").clone(), scale, 8)
        packed = self.tensor(f"{module}.weight_packed")
        return QuantizedWeight(unpack_int4(packed, self.linears[module][1]), scale, 4)

    def _expected(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Every tensor that must be there, with its shape and the dtypes that it may have."""
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        for module, (rows, columns, has_bias) in self.linears.items():
            if has_bias:
                expected[f"{module}.bias"] = ((rows,), DENSE_DTYPES)
            if not self.is_quantized:
                if not (module == HEAD and self.config.tied_head):
                    expected[f"{module}.weight"] = ((rows, columns), DENSE_DTYPES)
            elif self.bits(module) == 8:
                expected[f"{module}.weight"] = ((rows, columns), ("I8",))
                expected[f"{module}.weight_scale"] = ((rows, 1), DENSE_DTYPES)
            else:
                groups = columns // (group_size_for(columns) or columns)
                expected[f"{module}.weight_packed"] = ((rows, -(-columns // PER_WORD)), ("I32",))
                expected[f"{module}.weight_scale"] = ((rows, groups), DENSE_DTYPES)
                expected[f"{module}.weight_shape"] = ((2,), ("I64",))
        for module, length in norm_shapes(self.config).items():
            expected[f"{module}.weight"] = ((length,), DENSE_DTYPES)
        if not (self.is_quantized and self.config.tied_head):
            shape = (self.config.vocab_size, self.config.hidden_size)
            expected[f"{EMBEDDING}.weight"] = (shape, DENSE_DTYPES)
        return expected


def check_weights(model: ModelRef, config: DecoderConfig) -> None:
    """Compares a Hugging Face folder's tensors with its config, from the headers alone.

    Raises:
        WeightsError: a tensor is missing, or has another shape than the config wants; names it and both shapes.
    """
    WeightReader(model, config, SCHEMES["bf16"])


def stored_scheme(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The scheme of quantized weights, None for dense ones."""
    if any(name.endswith(".weight_packed") for name in tensors):
        return "w4a16"
    return "w8a16" if any(name.endswith(".weight_scale") for name in tensors) else None


def _check_scheme(model: ModelRef, scheme: Scheme) -> None:
    stored = stored_scheme(model.tensors)
    if stored != scheme.name:
        allowed = [name for name in SCHEMES if name == stored]
        raise UsageError(
            f"{model.path} holds weights quantized to {stored}, which cannot run as {scheme.name}: "
            f"ask for {', '.join(allowed)} or give the original model"
        )


def _check_present(model: ModelRef, expected: Mapping[str, object]) -> None:
    missing = [name for name in expected if name not in model.tensors]
    if missing:
        raise WeightsError(f"{model.path}: {_listed(missing)} in no weights file: config.json and weights disagree")


def _check_shapes(model: ModelRef, expected: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]) -> None:
    for name, (shape, dtypes) in expected.items():
        found = model.tensors[name]
        if found.shape != shape:
            raise WeightsError(
                f"{model.path}: tensor {name} has shape {list(found.shape)} in {found.file}, "
                f"config.json wants {list(shape)}"
            )
        if found.dtype not in dtypes:
            raise WeightsError(
                f"{model.path}: tensor {name} has dtype {found.dtype} in {found.file}; allowed: {', '.join(dtypes)}"
            )


def _check_unexpected(
    model: ModelRef, expected: Mapping[str, object], linears: Mapping[str, object], config: DecoderConfig
) -> None:
    unknown = []
    for name in _unexpected(model, expected, config):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer.group(1)) >= config.num_layers:
            raise WeightsError(f"{model.path}: tensor {name} is past config.json's {config.num_layers} layers")
        if name.removesuffix(".bias") in linears:
            raise WeightsError(f"{model.path}: tensor {name} is in the weights, but config.json says it has no bias")
        unknown.append(name)
    if unknown:
        logger.warning("%s: %s not part of the model and ignored", model.path, _listed(unknown))


def _unexpected(model: ModelRef, expected: Mapping[str, object], config: DecoderConfig) -> Iterator[str]:
    for name in model.tensors:
        is_tied_head = config.tied_head and name == f"{HEAD}.weight"
        if name not in expected and not is_tied_head and not name.endswith("rotary_emb.inv_freq"):
            yield name


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    shown = ", ".join(names[:MAX_SHOWN])
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{more} are"
