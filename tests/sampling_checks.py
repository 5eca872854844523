"""A sampled token against the engine's sampler in float64."""

import math

import torch

from hasten.engine.sampler import filter_scores
from hasten.request import SamplingParams


def near(value: torch.Tensor, number: float) -> bool:
    """Whether a float32 sum may be on the other side of the number."""
    return bool(((value - number).abs() < 1e-5).any())


def check_drawn_token(logits: torch.Tensor, sampling: SamplingParams, number: float, token: int, border: float) -> None:
    """A drawn token and the border of what may be drawn.

    Args:
        logits: of one row, after penalties.
        number: the random one that was drawn with.
    """
    scores = logits.double().unsqueeze(0)
    filter_scores(scores, [sampling])
    kept = scores[0] > -math.inf
    scores = logits.double() / sampling.temperature
    before_top_p = scores.clone().unsqueeze(0)
    filter_scores(before_top_p, [SamplingParams(temperature=1.0, top_k=sampling.top_k)])
    reached = before_top_p[0].sort(descending=True).values.softmax(-1).cumsum(-1)
    ratios = (scores - scores.max()).exp()
    if not (sampling.top_p < 1.0 and near(reached, sampling.top_p)) and not near(ratios, sampling.min_p or -1.0):
        heavy = scores > scores.max() - 27  # lighter tokens are never drawn
        assert torch.equal((logits >= border) & heavy, kept & heavy)
    cumulative = torch.where(logits >= border, scores, -math.inf).softmax(-1).cumsum(-1)
    target = torch.tensor(number, dtype=torch.float64, device=logits.device)
    expected = int(torch.searchsorted(cumulative, target, right=True))
    if token != expected:  # the reference's exponentials differ in their last bits
        low, high = sorted((token, expected))
        assert near(cumulative[low : high + 1], number)
        assert cumulative[high - 1] - cumulative[low] < 1e-5
