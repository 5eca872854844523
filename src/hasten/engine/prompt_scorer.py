"""Log-probabilities of a prompt's own tokens, computed a chunk at a time between the steps of other requests."""

from collections.abc import Iterator

import torch

from hasten.engine.sampler import possible
from hasten.request import Request, TokenLogprobs

CHUNK_TOKENS = 128
"""Of a prompt whose logits are in memory at a time; others wait for their computation."""


class PromptScorer:
    """One request's prompt.

    Args:
        chunks: logits after each token, [at most CHUNK_TOKENS, vocab_size] float32 each.

    Attributes:
        logprobs: of the tokens behind the first, as far as they are computed.
    """

    def __init__(self, request: Request, chunks: Iterator[torch.Tensor]) -> None:
        self.request = request
        self.logprobs: list[TokenLogprobs] = []
        self._chunks = chunks

    def advance(self) -> bool:
        """Computes the next chunk; whether it was the last."""
        prompt, num_top = self.request.prompt_token_ids, self.request.sampling.prompt_logprobs
        assert num_top is not None, "it was asked for"
        logits = next(self._chunks)
        start = len(self.logprobs) + 1
        targets = torch.tensor(prompt[start : start + len(logits)], device=logits.device)
        logits = logits[: len(targets)]  # what follows the last token is drawn, not scored
        total = logits.logsumexp(dim=-1, keepdim=True)
        chosen = (logits.gather(1, targets.unsqueeze(1)) - total).squeeze(1).tolist()
        top = logits.topk(min(num_top, logits.shape[1]))
        rows = zip(chosen, top.indices.tolist(), (top.values - total).tolist(), strict=True)
        self.logprobs += [(one, possible(zip(ids, values, strict=True))) for one, ids, values in rows]
        is_last = start + len(targets) >= len(prompt)
        if is_last:
            self.close()
        return is_last

    def close(self) -> None:
        """Gives up what is not computed yet, and the blocks that it holds."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()
