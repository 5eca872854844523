"""The decoder of all supported families: one graph, driven by DecoderConfig's flags.

The projections q, k, v are one product with the norm before it inside, and so are gate and up
with the activation behind them: a layer is four products and an attention. How a device
computes them is `kernels`; which rows and columns they have is decided here.

A forward runs a whole step: prefill chunks and decode tokens together. It keeps no state; what
a sequence remembers is in the KV cache that the caller passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from hasten.kernels.attention import Attend
from hasten.kernels.kv_cache import KVCache
from hasten.kernels.product import Product
from hasten.models.batch import Batch
from hasten.models.config import DecoderConfig

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [num_tokens] int64 give their embeddings, [num_tokens, hidden_size]."""


class Attention(Protocol):
    """Attention of all layers on one device."""

    def begin(self, batch: Batch, kv_cache: KVCache) -> Attend:
        """Works out what a step needs that does not depend on the layer."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's products: qkv and gate_up have their norm inside, gate_up its activation too."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product


class Decoder:
    """A loaded model. `dtype` is that of the activations and of the KV cache.

    Args:
        device: where the weights are, as torch names it.
        head: has the final norm inside.
    """

    def __init__(
        self,
        *,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: str,
        embed: Embed,
        layers: tuple[DecoderLayer, ...],
        head: Product,
        attention: Attention,
    ) -> None:
        self.config, self.dtype, self.device, self.attention = config, dtype, device, attention
        self._embed, self._layers, self._head = embed, layers, head

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads."""
        products = [each for layer in self._layers for each in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(product.weight_bytes for product in (*products, self._head))

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Runs one step and writes its keys and values into the cache, in place.

        Returns:
            float32 [len(batch.logits_indices), vocab_size].
        """
        wanted = batch.logits_indices
        is_all = len(wanted) == len(batch.token_ids)
        return self.compute(batch.token_ids, self.attention.begin(batch, kv_cache), None if is_all else wanted)

    def compute(
        self, token_ids: torch.Tensor, attend: Attend, logits_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The graph itself, without a decision that depends on values.

        Args:
            logits_indices: tokens whose logits are wanted, in any order; None for all.

        Returns:
            float32 [len(logits_indices), vocab_size].
        """
        hidden = self._embed(token_ids)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended = attend(layer.qkv(hidden), index)
            if index == last and logits_indices is not None:
                attended, hidden = attended.index_select(0, logits_indices), hidden.index_select(0, logits_indices)
                if not hidden.shape[0]:  # only the cache was wanted
                    return torch.empty(0, self.config.vocab_size, device=hidden.device)
            hidden = layer.o(attended, hidden)
            hidden = layer.down(layer.gate_up(hidden), hidden)
        return self._head(hidden).float()
