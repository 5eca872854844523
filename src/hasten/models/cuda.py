"""A decoder's operators on a GPU: weights as the file has them, row by row, in one matrix a product.

One copy of the weights serves the streaming kernel and the libraries. The embedding table lies
on the GPU.
"""

from collections.abc import Mapping

import torch

from hasten.errors import UnsupportedModelError, UsageError
from hasten.kernels.cuda.attention import CudaAttention
from hasten.kernels.cuda.product import CudaProduct
from hasten.kernels.cuda.product_tuning import stream_configs
from hasten.kernels.product import Product
from hasten.models.config import DecoderConfig
from hasten.models.decoder import Embed
from hasten.models.rotary import rotation
from hasten.models.weights import HEAD, WeightReader, copy_bytes, layer_prefix
from hasten.quantization.rtn import QuantizedWeight

SCHEMES = ("fp32", "bf16", "fp16", "w8a16", "fp8")

MIN_HEAD_DIM = 10
MAX_HEAD_BYTES = 512
"""A head's size, and its bytes once that is rounded up to a power of two: what attention kernels take."""


class Operators:
    """See `models.load.Operators`."""

    def __init__(self, config: DecoderConfig, reader: WeightReader, tuning: Mapping[str, str]) -> None:
        if reader.scheme.name not in SCHEMES:
            raise UsageError(
                f"the native engine has no scheme {reader.scheme.name} on a GPU; allowed: {', '.join(SCHEMES)}"
            )
        head_bytes = (1 << (config.head_dim - 1).bit_length()) * reader.dtype.itemsize
        if config.head_dim < MIN_HEAD_DIM or head_bytes > MAX_HEAD_BYTES:
            most = MAX_HEAD_BYTES // reader.dtype.itemsize
            raise UnsupportedModelError(
                f"the native engine has no GPU kernels for heads of {config.head_dim} in {reader.scheme.name}, "
                f"only for {MIN_HEAD_DIM} to {most}: use --device cpu or another runtime"
            )
        self._config, self._reader, self._tuning = config, reader, tuning
        free_bytes, _ = torch.cuda.mem_get_info()
        self._has_copies = copy_bytes(config, reader.scheme, free_bytes) > 0

    def product(
        self, modules: tuple[str, ...], *, norm: str | None = None, is_gated: bool = False, num_rotary: int = 0
    ) -> CudaProduct:
        linear = self._reader.joined(modules)
        if isinstance(linear.weight, QuantizedWeight):
            weight, scale = linear.weight.codes, linear.weight.scale.flatten().float()
        else:
            weight, scale = linear.weight, None
        return CudaProduct(
            weight,
            scale=scale,
            bias=linear.bias,
            norm_weight=None if norm is None else self._reader.norm(norm).to(self._reader.dtype),
            eps=self._config.rms_norm_eps,
            is_gated=is_gated,
            out_dtype=torch.float32 if modules == (HEAD,) else None,
            has_copy=self._has_copies,
            configs=stream_configs(self._tuning, weight, is_gated),
        )

    def embedding(self, head: Product) -> Embed:
        dtype = self._reader.dtype
        if self._reader.shares_embedding:
            assert isinstance(head, CudaProduct) and head.scale is not None, "a quantized head has a scale a row"
            codes, scale = head.weight, head.scale
            return lambda token_ids: (codes[token_ids].float() * scale[token_ids].unsqueeze(1)).to(dtype)
        if isinstance(head, CudaProduct) and self._config.tied_head:
            table = head.weight
        else:
            table = self._reader.embedding().to(dtype)
        return lambda token_ids: table.index_select(0, token_ids)

    def attention(self) -> CudaAttention:
        config = self._config
        names = [f"{layer_prefix(index)}.self_attn" for index in range(config.num_layers if config.qk_norm else 0)]
        norms = [
            tuple(self._reader.norm(f"{name}.{which}_norm").to(self._reader.dtype) for which in "qk") for name in names
        ]
        return CudaAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            windows=config.layer_windows,
            qk_norms=tuple(norms),
            eps=config.rms_norm_eps,
            rotation=rotation(config.rotary, "cuda"),
            dtype=self._reader.dtype,
        )
