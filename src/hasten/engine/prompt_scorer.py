"""Log-probabilities of a prompt's own tokens, computed a chunk at a time between the steps of other requests."""

from collections.abc import Generator

import torch

from hasten.engine.sampler import possible
from hasten.request import Request, TokenLogprobs

CHUNK_TOKENS = 128
"""Of a prompt whose logits are in memory at a time; others wait for their computation."""


class PromptScorer:
    """One request's prompt.

    Args:
        chunks: logits after each token, [at most CHUNK_TOKENS, vocab_size] float32 each.
    """

    def __init__(self, request: Request, chunks: Generator[torch.Tensor, None, None]) -> None:
        self.request = request
        self._chunks = chunks
        self._num_scored = 1  # what the first token is, nothing says

    @property
    def is_complete(self) -> bool:
        return self._num_scored == len(self.request.prompt_token_ids)

    def advance(self) -> tuple[TokenLogprobs, ...]:
        """Computes the next chunk: log-probabilities of the prompt's next tokens, from the second on."""
        prompt, num_top = self.request.prompt_token_ids, self.request.sampling.prompt_logprobs
        assert num_top is not None, "it was asked for"
        logits = next(self._chunks)
        following = prompt[self._num_scored : self._num_scored + len(logits)]
        targets = torch.tensor(following, dtype=torch.int64, device=logits.device)
        logits = logits[: len(targets)]  # what follows the last token is drawn, not scored
        total = logits.logsumexp(dim=-1, keepdim=True)
        chosen = (logits.gather(1, targets.unsqueeze(1)) - total).squeeze(1).tolist()
        top = logits.topk(min(num_top, logits.shape[1]))
        rows = zip(chosen, top.indices.tolist(), (top.values - total).tolist(), strict=True)
        self._num_scored += len(targets)
        return tuple((one, possible(zip(ids, values, strict=True))) for one, ids, values in rows)

    def close(self) -> None:
        """Gives up what is not computed yet, and the blocks that it holds."""
        self._chunks.close()
