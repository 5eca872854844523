"""The decoder of all supported families: one graph, driven by DecoderConfig's flags.

The projections q, k, v are one product, and so are gate and up: a layer is four products. The
rows of q and k are reordered at load (see `kernels.rotary`). A forward runs a whole step:
prefill chunks and decode tokens together. It keeps no state; what a sequence remembers is in
the KV cache that the caller passes.

The embedding table of a dense scheme stays in its file, memory-mapped, as a step reads a few
of its rows; a tied embedding of a quantized scheme is looked up in the quantized head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hasten.artifact import inspect
from hasten.config import scheme_named
from hasten.errors import UsageError
from hasten.kernels.attention import AttentionPlan, paged_attention, plan_attention
from hasten.kernels.kv_cache import KVCache, write_kv
from hasten.kernels.linear import Int8Linear, Linear, Scratch, dense_linear, quantized_linear
from hasten.kernels.rms_norm import RMSNorm
from hasten.kernels.rotary import interleave_rows, rotate
from hasten.kernels.silu_mul import silu_mul
from hasten.models.batch import Batch
from hasten.models.config import DecoderConfig
from hasten.models.rotary import rotation
from hasten.models.weights import FINAL_NORM, HEAD, LinearWeight, WeightReader, layer_prefix
from hasten.quantization.rtn import QuantizedWeight


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's operators, packed.

    Args:
        qk_norm: over q's and k's heads together, with a weight row for each head.
    """

    input_norm: RMSNorm
    qkv: Linear
    qk_norm: RMSNorm | None
    o: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear
    window: int | None


class Decoder:
    """A loaded model. `dtype` is that of the activations and of the KV cache."""

    def __init__(
        self,
        *,
        config: DecoderConfig,
        dtype: torch.dtype,
        embed: Callable[[torch.Tensor], torch.Tensor],
        layers: tuple[DecoderLayer, ...],
        norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config, self.dtype = config, dtype
        self._embed, self._layers, self._norm, self._head = embed, layers, norm, head
        self._rotation = rotation(config.rotary, "cpu")
        self._scale = config.head_dim**-0.5

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads."""
        linears = [each for layer in self._layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(linear.weight_bytes for linear in (*linears, self._head))

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Runs one step and writes its keys and values into the cache, in place.

        Returns:
            float32 [len(batch.logits_indices), vocab_size].
        """
        hidden = self._embed(batch.token_ids)
        rotations = self._rotation(batch.positions)
        plans = self._plan(batch, kv_cache.block_size)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            keys, values = kv_cache.keys[index], kv_cache.values[index]
            q = self._project(layer, hidden, rotations, batch.slot_mapping, keys, values)
            if index == last:
                if not batch.logits_indices.numel():  # only the cache was wanted
                    return torch.empty(0, self.config.vocab_size)
                attended = paged_attention(q, keys, values, plans[layer.window], self._scale)
                if batch.logits_indices.numel() != hidden.shape[0]:
                    attended = attended.index_select(0, batch.logits_indices)
                    hidden = hidden.index_select(0, batch.logits_indices)
            else:
                attended = paged_attention(q, keys, values, plans[layer.window], self._scale)
            hidden = layer.o(attended, hidden)
            hidden = layer.down(silu_mul(layer.gate_up(layer.mlp_norm(hidden))), hidden)
        return self._head(self._norm(hidden)).float()

    def _project(
        self,
        layer: DecoderLayer,
        hidden: torch.Tensor,
        rotations: torch.Tensor,
        slot_mapping: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Queries [num_tokens, heads, head_dim], rotated; keys and values go to the cache."""
        num_heads, num_kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = layer.qkv(layer.input_norm(hidden)).view(-1, num_heads + 2 * num_kv_heads, dim)
        qk, v = heads.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), 1)
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        q, k = rotate(qk, rotations).split_with_sizes((num_heads, num_kv_heads), 1)
        write_kv(keys, values, k, v, slot_mapping)
        return q

    def _plan(self, batch: Batch, block_size: int) -> dict[int | None, AttentionPlan]:
        return {
            window: plan_attention(
                batch.cu_seqlens_q,
                batch.context_lens,
                batch.block_tables,
                block_size=block_size,
                window=window,
                dtype=self.dtype,
            )
            for window in set(self.config.layer_windows)
        }


def load_decoder(path: Path, scheme: str, device: str) -> Decoder:
    """Loads a Hugging Face folder, quantizing it if the scheme says so, or an engine folder.

    Raises:
        ModelError: no model, an unsupported one, or weights that contradict its config.
        UsageError: an unknown scheme, one that the folder's weights are not in, or a device
            that is not there.
    """
    if device != "cpu":
        raise UsageError(f"the native engine has no device {device!r}; allowed: cpu")
    model = inspect(path)
    config = DecoderConfig.from_hf(model.config)
    reader = WeightReader(model, config, scheme_named(scheme))
    with torch.inference_mode():
        scratch = Scratch()
        head = _pack(config, reader, (HEAD,), scratch)
        layers = tuple(_load_layer(config, reader, index, scratch) for index in range(config.num_layers))
        return Decoder(
            config=config,
            dtype=reader.dtype,
            embed=_embedding(reader, head),
            layers=layers,
            norm=RMSNorm(reader.norm(FINAL_NORM), config.rms_norm_eps, reader.dtype),
            head=head,
        )


def _embedding(reader: WeightReader, head: Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    if reader.shares_embedding:
        assert isinstance(head, Int8Linear), "the head has 8 bits in every quantized scheme"
        return head.rows
    table, dtype = reader.embedding(), reader.dtype
    return lambda token_ids: table.index_select(0, token_ids).to(dtype)


def _load_layer(config: DecoderConfig, reader: WeightReader, index: int, scratch: Scratch) -> DecoderLayer:
    prefix = layer_prefix(index)
    eps, dtype, dim = config.rms_norm_eps, reader.dtype, config.head_dim
    attention = f"{prefix}.self_attn"
    qk_norm = None
    if config.qk_norm:
        q, k = (interleave_rows(reader.norm(f"{attention}.{name}"), dim) for name in ("q_norm", "k_norm"))
        weight = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
        qk_norm = RMSNorm(weight, eps, dtype)
    return DecoderLayer(
        input_norm=RMSNorm(reader.norm(f"{prefix}.input_layernorm"), eps, dtype),
        qkv=_pack(config, reader, tuple(f"{attention}.{name}_proj" for name in "qkv"), scratch, interleave=True),
        qk_norm=qk_norm,
        o=_pack(config, reader, (f"{attention}.o_proj",), scratch),
        mlp_norm=RMSNorm(reader.norm(f"{prefix}.post_attention_layernorm"), eps, dtype),
        gate_up=_pack(config, reader, (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"), scratch),
        down=_pack(config, reader, (f"{prefix}.mlp.down_proj",), scratch),
        window=config.layer_windows[index],
    )


def _pack(
    config: DecoderConfig, reader: WeightReader, modules: tuple[str, ...], scratch: Scratch, *, interleave: bool = False
) -> Linear:
    """One product of the modules' rows, one below the other; `interleave` reorders all but the last's."""
    parts = [reader.linear(module) for module in modules]

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        if interleave:
            tensors = [*(interleave_rows(each, config.head_dim) for each in tensors[:-1]), tensors[-1]]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    biases = [part.bias for part in parts if part.bias is not None]
    bias = joined(biases) if biases else None
    quantized = [part.weight for part in parts if isinstance(part.weight, QuantizedWeight)]
    if quantized:
        codes, scale = joined([each.codes for each in quantized]), joined([each.scale for each in quantized])
        return quantized_linear(codes, scale, quantized[0].bits, bias, scratch)
    return dense_linear(joined([_dense(part) for part in parts]), bias)


def _dense(part: LinearWeight) -> torch.Tensor:
    assert isinstance(part.weight, torch.Tensor)
    return part.weight
