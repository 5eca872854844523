"""Chooses each sequence's next token from its logits.

The order is: grammar, biases (`logit_bias`), penalties, temperature, top-k, top-p, min-p, draw.
- grammar: the logits of tokens that it does not allow become -inf, which none of the later steps
  changes, so such a token is never drawn; log-probabilities are those of the tokens allowed;
- biases: what a request adds to the logits of single tokens, and -inf for what would end its output too early;
- repetition penalty r: a token of prompt or output has its logit divided by r if positive,
  multiplied by r if negative (CTRL, arXiv 1909.05858, section 4.1, as in transformers);
- frequency penalty f and presence penalty p: a token that was generated c > 0 times loses
  c * f + p from its logit (as the OpenAI API defines them: the prompt does not count);
- top-k: the k largest logits stay; top-p: the fewest tokens whose probability reaches p
  (arXiv 1904.09751, section 3.1); of equal logits at either border all stay;
- min-p: tokens stay whose probability is at least min_p times the largest (arXiv 2407.01082,
  section 3).

The invariant: a row's token depends on that row's logits, parameters and random number alone,
and that number on the sequence's seed and its number of generated tokens alone. So a seed gives
the same tokens however requests are batched, chunked or preempted.

This is the sampler in torch, of any device; `kernels.cuda.sample` is the same one as kernels.
Scores and probabilities are float32; random numbers and cumulative probabilities are float64.
"""

import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from hasten.engine.grammar import write_masks
from hasten.engine.logit_bias import add_biases, biases
from hasten.engine.sequence import Sequence, uniform
from hasten.request import SamplingParams

# Top-p first looks at this many of the most probable tokens, and sorts the whole vocabulary
# only if their probability does not reach p: sorting is slower than all the rest together.
_TOP_P_CANDIDATES = 1024

# Lower ones are taken for this, which is greedy already: divided by less, a logit may become infinite.
MIN_TEMPERATURE = 1e-20

# [256, 8] float32: the most that the logits of a mask's byte may be; a table is faster than to fill where a bit is 0.
_MOST_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), math.inf, -math.inf
).astype(np.float32)

NOT_FINITE = "the model's largest logit is not a finite number: its weights or precision are unfit"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; the log-probabilities only if they were asked for, as in TokenEvent.

    Args:
        error: why the token means nothing.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


def sample(logits: torch.Tensor, sequences: Items[Sequence]) -> list[SampledToken]:
    """Chooses one token for each sequence.

    Args:
        logits: [num_seqs, vocab_size] float32; changed in place.
    """
    _mask(logits, sequences)
    if added := biases((sequence, sequence.num_output_tokens) for sequence in sequences):
        add_biases(logits, added)
    if all(is_plain(sequence.sampling) for sequence in sequences):
        best = logits.max(dim=-1)
        return [_chosen(token_id, value) for token_id, value in _rows(best.indices, best.values)]
    for row, sequence in zip(logits, sequences, strict=True):
        penalize(row, sequence.sampling, sequence.token_ids, sequence.num_prompt_tokens)
    best = logits.max(dim=-1)
    tokens = [_chosen(token_id, value) for token_id, value in _rows(best.indices, best.values)]
    uniforms = {
        row: uniform(sequence.random_seed, sequence.num_output_tokens)
        for row, sequence in enumerate(sequences)
        if sequence.random_seed is not None and tokens[row].error is None
    }
    if uniforms:
        drawn = list(uniforms)
        scores = logits[drawn]  # a copy: log-probabilities are those before filtering
        filter_scores(scores, [sequences[row].sampling for row in drawn])
        for row, token_id in zip(drawn, draw(scores, list(uniforms.values())), strict=True):
            tokens[row] = SampledToken(token_id)
    for row, sequence in enumerate(sequences):
        if sequence.sampling.logprobs is not None and tokens[row].error is None:
            tokens[row] = _with_logprobs(tokens[row].token_id, logits[row], sequence.sampling.logprobs)
    return tokens


def _mask(logits: torch.Tensor, sequences: Items[Sequence]) -> None:
    """Takes from each sequence with a grammar the tokens that may not come next, in place."""
    rows = {row: sequence.matcher for row, sequence in enumerate(sequences) if sequence.matcher is not None}
    if not rows:
        return
    vocab_size = logits.shape[-1]
    masks = np.empty((len(rows), -(-vocab_size // 32)), dtype=np.int32)
    write_masks(list(rows.values()), masks)
    most = _MOST_OF_BYTE[masks.view(np.uint8)].reshape(len(rows), -1)[:, :vocab_size]  # [num_rows, vocab_size]
    for row, limits in zip(rows, torch.from_numpy(most), strict=True):
        torch.minimum(logits[row], limits.to(logits.device), out=logits[row])


def penalize(logits: torch.Tensor, sampling: SamplingParams, token_ids: Items[int], num_prompt_tokens: int) -> None:
    """Applies one sequence's penalties in place.

    Args:
        logits: [vocab_size] float32.
        token_ids: prompt and output.
    """
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(token_ids)), device=logits.device)
        scores = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        counts = Counter(token_ids[num_prompt_tokens:])
        generated = torch.tensor(list(counts), dtype=torch.int64, device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[generated] -= sampling.presence_penalty + sampling.frequency_penalty * times


def filter_scores(scores: torch.Tensor, samplings: Items[SamplingParams]) -> None:
    """Applies temperature, top-k, top-p and min-p in place; what is dropped becomes -inf.

    Args:
        scores: [num_rows, vocab_size] float32 logits of rows with a temperature above 0.
    """
    vocab_size = scores.shape[-1]
    scores /= _column(scores, [max(each.temperature, MIN_TEMPERATURE) for each in samplings])
    top_k = [min(each.top_k or vocab_size, vocab_size) for each in samplings]
    if min(top_k) < vocab_size:
        widest = max(k for k in top_k if k < vocab_size)
        largest = scores.topk(widest).values  # [num_rows, widest]
        border = [
            -math.inf if k == vocab_size else values[k - 1] for k, values in zip(top_k, largest.tolist(), strict=True)
        ]
        scores.masked_fill_(scores < _column(scores, border), -math.inf)
    if min(each.top_p for each in samplings) < 1.0:
        scores.masked_fill_(scores < _top_p_border(scores, [each.top_p for each in samplings]), -math.inf)
    if max(each.min_p for each in samplings) > 0.0:
        distance = [math.log(each.min_p) if each.min_p else -math.inf for each in samplings]
        scores.masked_fill_(scores < scores.amax(dim=-1, keepdim=True) + _column(scores, distance), -math.inf)


def draw(scores: torch.Tensor, uniforms: Items[float]) -> list[int]:
    """Draws one token a row from softmax(scores), by inverting the distribution function.

    Args:
        scores: [num_rows, vocab_size] float32.
        uniforms: one number in [0, 1) a row.
    """
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)  # [num_rows, vocab_size]
    targets = _column(cumulative, uniforms) * cumulative[:, -1:]  # [num_rows, 1]
    # The first token whose cumulative probability is above the target; its own is not 0.
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).tolist()


def is_plain(sampling: SamplingParams) -> bool:
    """Whether the most probable token is all that is asked for."""
    return (
        sampling.temperature == 0.0
        and sampling.logprobs is None
        and sampling.repetition_penalty == 1.0
        and sampling.presence_penalty == 0.0
        and sampling.frequency_penalty == 0.0
    )


def _column(like: torch.Tensor, values: Items[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)  # [num_rows, 1]


def _top_p_border(scores: torch.Tensor, top_p: Items[float]) -> torch.Tensor:
    """The lowest score that stays in each row, [num_rows, 1]."""
    vocab_size = scores.shape[-1]
    wanted = _column(scores, top_p)
    total = scores.logsumexp(dim=-1, keepdim=True)
    for width in (min(_TOP_P_CANDIDATES, vocab_size), vocab_size):
        largest = scores.topk(width).values  # [num_rows, width], descending
        before = (largest - total).exp().cumsum(dim=-1).roll(1, dims=-1)
        reached = before[:, :1].clone()  # all of them together, rolled to the front
        before[:, 0] = 0.0
        if width == vocab_size or bool(((reached >= wanted) | (wanted == 1.0)).all()):
            break
    num_kept = (before < wanted).sum(dim=-1, keepdim=True)
    return torch.where(wanted < 1.0, largest.gather(-1, num_kept - 1), -math.inf)


def _rows(token_ids: torch.Tensor, values: torch.Tensor) -> Iterable[tuple[int, float]]:
    return zip(token_ids.tolist(), values.tolist(), strict=True)


def _chosen(token_id: int, logit: float) -> SampledToken:
    if math.isfinite(logit):
        return SampledToken(token_id)
    return SampledToken(token_id, error=NOT_FINITE)


def _with_logprobs(token_id: int, logits: torch.Tensor, num_top: int) -> SampledToken:
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(num_top, logprobs.shape[-1]))
    return SampledToken(token_id, logprobs[token_id].item(), possible(_rows(top.indices, top.values)))


def possible(logprobs: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Token ids and log-probabilities, without those that a grammar does not allow."""
    return tuple((token_id, logprob) for token_id, logprob in logprobs if logprob > -math.inf)
