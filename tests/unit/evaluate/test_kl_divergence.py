import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hasten.errors import RuntimeFailedError
from hasten.evaluate.kl_divergence import kl_divergence, num_top1_equal

LOGITS = arrays(np.float32, (3, 7), elements=st.floats(-8, 8, width=32))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).float().numpy()


@given(LOGITS, LOGITS)
def test_it_is_torchs_kl_div_and_not_negative(first: np.ndarray, second: np.ndarray) -> None:
    p, q = log_softmax(first), log_softmax(second)
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(q).double(), torch.from_numpy(p).double(), log_target=True, reduction="sum"
    )
    value = kl_divergence(p, q)
    assert value >= 0
    assert value == pytest.approx(float(expected), abs=1e-5)
    assert kl_divergence(p, p) == 0


def test_known_value_and_direction() -> None:
    baseline = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    candidate = np.log(np.array([[0.25, 0.75]], dtype=np.float32))
    assert kl_divergence(baseline, candidate) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)


def test_what_the_baseline_rules_out_does_not_count() -> None:
    baseline = np.array([[0.0, -math.inf]], dtype=np.float32)
    assert kl_divergence(baseline, baseline) == 0
    assert kl_divergence(baseline, np.log(np.array([[0.5, 0.5]], dtype=np.float32))) == pytest.approx(math.log(2))


def test_ruling_out_what_is_possible_is_an_error() -> None:
    possible = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    with pytest.raises(RuntimeFailedError, match="no chance"):
        kl_divergence(possible, np.array([[0.0, -math.inf]], dtype=np.float32))


def test_agreement_counts_positions() -> None:
    first = np.array([[0.0, -1.0], [-1.0, 0.0]])
    assert num_top1_equal(first, first) == 2
    assert num_top1_equal(first, first[:, ::-1]) == 0
