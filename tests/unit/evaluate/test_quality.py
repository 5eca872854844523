import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.errors import RuntimeFailedError
from hasten.evaluate import quality
from hasten.evaluate.held_out import EvaluationSet
from hasten.evaluate.quality import evaluate, evaluate_baseline
from hasten.request import Request, TokenEvent
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import RuntimeProcess

VOCAB_SIZE = 16
WINDOWS = tuple(tuple((start + step) % VOCAB_SIZE for step in range(9)) for start in range(12))
MATERIAL = EvaluationSet(WINDOWS, 1, (16,) * 12, ((1, 2), (3, 4)), 8, "made up")


class Model:
    """The next token is the last plus one with this probability, any other one as likely as the rest."""

    config = SimpleNamespace(max_num_seqs=8)

    def __init__(self, certainty: float, step: int = 1) -> None:
        self.certainty, self.step = certainty, step
        self.scored: list[tuple[int, ...]] = []

    def score(self, token_ids: Iterable[Sequence[int]], out_dir: Path) -> list[Path]:
        paths = []
        for index, window in enumerate(token_ids):
            self.scored.append(tuple(window))
            probabilities = np.full((len(window), VOCAB_SIZE), (1 - self.certainty) / (VOCAB_SIZE - 1))
            probabilities[np.arange(len(window)), (np.asarray(window) + self.step) % VOCAB_SIZE] = self.certainty
            paths.append(out_dir / f"{index}.npy")
            np.save(paths[-1], np.log(probabilities).astype(np.float32))
        return paths

    def generate(self, requests: Iterable[Request]) -> list[TokenEvent]:
        return [
            TokenEvent(request.request_id, (request.prompt_token_ids[-1] + self.step * index) % VOCAB_SIZE, 0.0)
            for request in requests
            for index in range(1, request.sampling.max_tokens + 1)
        ]


def baseline(out: Path, model: Any = None, **options: Any) -> Any:
    return evaluate_baseline(model or Model(0.8), MATERIAL, out, **options)


def test_the_baseline_is_equal_to_itself(tmp_path: Path) -> None:
    measured, reference = baseline(tmp_path / "reference")
    assert measured.perplexity == pytest.approx(1 / 0.8, rel=1e-6)
    assert measured.bits_per_byte == pytest.approx(-math.log2(0.8) * 8 / 16, rel=1e-5)
    assert (measured.mean_kl, measured.top1_agreement) == (0, 1)
    assert (measured.greedy_match_tokens, measured.greedy_tokens) == (8, 8)
    assert (measured.num_tokens, measured.text) == (12 * 8, "made up")
    assert sorted((tmp_path / "reference").iterdir()) == list(reference.score_paths)


def test_a_candidate_is_compared_with_the_baseline(tmp_path: Path) -> None:
    _, reference = baseline(tmp_path)
    candidate: Any = Model(0.5)
    measured = evaluate(candidate, MATERIAL, reference)
    assert measured.perplexity == pytest.approx(2, rel=1e-6)
    assert measured.mean_kl == pytest.approx(0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5), rel=1e-4)
    assert (measured.top1_agreement, measured.greedy_match_tokens) == (1, 8)
    wrong: Any = Model(0.8, step=2)
    measured = evaluate(wrong, MATERIAL, reference)
    assert (measured.top1_agreement, measured.greedy_match_tokens) == (0, 0)


def test_a_slow_baseline_shortens_the_text_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MIN_TOKENS", 20)
    measured, reference = baseline(tmp_path, time_budget_s=0.0)
    assert measured.num_tokens == 24  # three windows of 8 are the least that has 20
    candidate: Any = Model(0.5)
    assert evaluate(candidate, MATERIAL, reference).num_tokens == 24
    assert candidate.scored == list(WINDOWS[:3])


def test_an_interrupted_evaluation_is_repeated_as_it_was(tmp_path: Path) -> None:
    measured, reference = baseline(tmp_path, num_tokens=40)
    assert (measured.num_tokens, len(reference.score_paths)) == (40, 5)


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _, reference = baseline(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]
    seen.clear()
    candidate: Any = Model(0.5)
    evaluate(candidate, MATERIAL, reference, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


def test_another_vocabulary_is_an_error(tmp_path: Path) -> None:
    _, reference = baseline(tmp_path)
    other = dataclasses.replace(reference, vocab_size=99)
    candidate: Any = Model(0.5)
    with pytest.raises(RuntimeFailedError, match=r"\[9, 99\] was expected"):
        evaluate(candidate, MATERIAL, other)


def test_a_runtime_in_its_own_process_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 16}')
    with RuntimeProcess("fake", RuntimeConfig(tmp_path, "fp32", max_num_seqs=1)) as process:
        measured, reference = evaluate_baseline(process, MATERIAL, tmp_path / "reference")
        assert evaluate(process, MATERIAL, reference) == measured
