"""A decoder's operators on a CPU.

The rows of q and k are reordered at load (see `kernels.rotary`). The embedding table of a
dense scheme stays in its file, memory-mapped, as a step reads a few of its rows.
"""

from collections.abc import Mapping

import torch

from hasten.kernels.attention import CpuAttention
from hasten.kernels.linear import Int8Linear, Linear, Scratch, dense_linear, quantized_linear
from hasten.kernels.product import CpuProduct, Product
from hasten.kernels.rms_norm import RMSNorm
from hasten.kernels.rotary import interleave_rows
from hasten.models.config import DecoderConfig
from hasten.models.decoder import Embed
from hasten.models.rotary import rotation
from hasten.models.weights import HEAD, LinearWeight, WeightReader, layer_prefix
from hasten.quantization.rtn import QuantizedWeight


class Operators:
    """See `models.load.Operators`."""

    def __init__(self, config: DecoderConfig, reader: WeightReader, tuning: Mapping[str, str]) -> None:
        self._config, self._reader = config, reader
        self._scratch = Scratch()
        self._head: Linear | None = None

    def product(
        self, modules: tuple[str, ...], *, norm: str | None = None, is_gated: bool = False, num_rotary: int = 0
    ) -> Product:
        linear = self._linear(modules, num_rotary)
        if modules == (HEAD,):
            self._head = linear
        return CpuProduct(linear, None if norm is None else self._norm(norm), is_gated=is_gated)

    def embedding(self, head: Product) -> Embed:
        if self._reader.shares_embedding:
            assert isinstance(self._head, Int8Linear), "the head has 8 bits in every quantized scheme"
            return self._head.rows
        table, dtype = self._reader.embedding(), self._reader.dtype
        return lambda token_ids: table.index_select(0, token_ids).to(dtype)

    def attention(self) -> CpuAttention:
        config = self._config
        return CpuAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            windows=config.layer_windows,
            qk_norms=tuple(self._qk_norm(layer_prefix(index)) for index in range(config.num_layers)),
            rotation=rotation(config.rotary, "cpu"),
            dtype=self._reader.dtype,
        )

    def _norm(self, module: str) -> RMSNorm:
        return RMSNorm(self._reader.norm(module), self._config.rms_norm_eps, self._reader.dtype)

    def _qk_norm(self, prefix: str) -> RMSNorm | None:
        """The norms of q and k over their heads together, with a weight row for each head."""
        config = self._config
        if not config.qk_norm:
            return None
        q, k = (interleave_rows(self._reader.norm(f"{prefix}.self_attn.{name}_norm"), config.head_dim) for name in "qk")
        weight = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
        return RMSNorm(weight, config.rms_norm_eps, self._reader.dtype)

    def _linear(self, modules: tuple[str, ...], num_rotary: int) -> Linear:
        parts = [self._reader.linear(module) for module in modules]

        def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
            rotary = [interleave_rows(each, self._config.head_dim) for each in tensors[:num_rotary]]
            tensors = rotary + tensors[num_rotary:]
            return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

        biases = [part.bias for part in parts if part.bias is not None]
        bias = joined(biases) if biases else None
        quantized = [part.weight for part in parts if isinstance(part.weight, QuantizedWeight)]
        if quantized:
            codes, scale = joined([each.codes for each in quantized]), joined([each.scale for each in quantized])
            return quantized_linear(codes, scale, quantized[0].bits, bias, self._scratch)
        return dense_linear(joined([_dense(part) for part in parts]), bias)


def _dense(part: LinearWeight) -> torch.Tensor:
    assert isinstance(part.weight, torch.Tensor)
    return part.weight
