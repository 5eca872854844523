"""Measures a candidate's quality against the baseline's, through nothing but its process.

The baseline is evaluated first; its log-probabilities stay on disk for the others to be compared
with. One window is held at a time, so that memory stays small with a large vocabulary. Judges
nothing: that is `bench.pick`.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.bench.metrics import median
from hasten.bench.result import Quality
from hasten.evaluate.greedy_match import TokenIds, generate_greedily, num_leading_equal
from hasten.evaluate.held_out import MIN_TOKENS, EvaluationSet
from hasten.evaluate.kl_divergence import kl_divergence, num_top1_equal
from hasten.evaluate.perplexity import bits_per_byte, check_logprobs, negative_log_likelihood, perplexity
from hasten.runtimes.process import RuntimeProcess


@dataclass(frozen=True)
class Reference:
    """What the baseline answered.

    Args:
        score_paths: its log-probabilities, one file for each window that was scored; the
            others are compared on these windows only.
        greedy: its continuations of the prompts.
    """

    score_paths: tuple[Path, ...]
    vocab_size: int
    greedy: tuple[TokenIds, ...]


Progress = Callable[[int, int], object]


def evaluate_baseline(
    process: RuntimeProcess,
    material: EvaluationSet,
    out: Path,
    *,
    time_budget_s: float = 60.0,
    num_tokens: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> tuple[Quality, Reference]:
    """Scores the baseline, which fixes how much text all candidates are scored on.

    Args:
        out: an empty or absent folder; the reference's files stay there.
        time_budget_s: no more windows than fit; at least MIN_TOKENS tokens where the text has them.
        num_tokens: scored tokens of an earlier, interrupted evaluation, to repeat it as it was.
        on_progress: gets the number of windows done and of all.

    Raises:
        RuntimeFailedError: the process failed or answered nonsense.
    """
    out.mkdir(parents=True, exist_ok=True)
    num_windows = len(material.windows)
    if num_tokens is not None:
        num_windows = min(num_windows, max(1, num_tokens // material.tokens_per_window))
    sums, paths, vocab_size, index = _Sums(), [], None, 0
    while index < num_windows:
        start_s = time.perf_counter()
        with _scored(process, material.windows[index], out, vocab_size) as (path, logprobs):
            vocab_size = logprobs.shape[1]
            sums.add(material, index, logprobs, logprobs)
            paths.append(path.replace(out / f"window-{index:04}.npy"))
        index += 1
        if num_tokens is None and index == min(2, num_windows):  # the first is slower: caches, lazy loading
            fitting = int(time_budget_s / (time.perf_counter() - start_s))
            least = -(-MIN_TOKENS // material.tokens_per_window)
            num_windows = min(num_windows, max(fitting, least))
        on_progress(index, num_windows)
    greedy = generate_greedily(process, material.prompts, material.greedy_tokens)
    assert vocab_size is not None, "there is at least one window"
    reference = Reference(tuple(paths), vocab_size, greedy)
    return sums.quality(material, greedy, reference), reference


def evaluate(
    process: RuntimeProcess,
    material: EvaluationSet,
    reference: Reference,
    *,
    on_progress: Progress = lambda done, total: None,
) -> Quality:
    """Scores a candidate on what the baseline was scored on.

    Raises:
        RuntimeFailedError: the process failed or answered nonsense.
    """
    sums = _Sums()
    num_windows = len(reference.score_paths)
    with tempfile.TemporaryDirectory(prefix="hasten-scores-") as folder:
        for index, path in enumerate(reference.score_paths):
            with _scored(process, material.windows[index], Path(folder), reference.vocab_size) as (_, logprobs):
                sums.add(material, index, np.load(path, mmap_mode="r"), logprobs)
            on_progress(index + 1, num_windows)
    return sums.quality(material, generate_greedily(process, material.prompts, material.greedy_tokens), reference)


@contextmanager
def _scored(
    process: RuntimeProcess, window: TokenIds, folder: Path, vocab_size: int | None
) -> Iterator[tuple[Path, np.ndarray]]:
    """The checked log-probabilities of one window, in a file that is gone afterwards unless it was moved."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        [path] = process.score([window], scratch)
        logprobs = np.load(path, mmap_mode="r")
        check_logprobs(logprobs, len(window), vocab_size)
        yield path, logprobs
    finally:
        shutil.rmtree(scratch)


class _Sums:
    """What adds up over windows."""

    def __init__(self) -> None:
        self._nll = self._kl = 0.0
        self._num_tokens = self._num_bytes = self._num_equal = 0

    def add(self, material: EvaluationSet, index: int, baseline: np.ndarray, candidate: np.ndarray) -> None:
        rows = slice(material.num_unscored - 1, -1)  # row i is the distribution of token i + 1
        targets = np.asarray(material.windows[index][material.num_unscored :])
        self._nll += negative_log_likelihood(candidate[rows], targets)
        self._num_tokens += len(targets)
        self._num_bytes += material.window_bytes[index]
        if candidate is baseline:
            self._num_equal += len(targets)
            return
        self._kl += kl_divergence(baseline[rows], candidate[rows])
        self._num_equal += num_top1_equal(baseline[rows], candidate[rows])

    def quality(self, material: EvaluationSet, greedy: tuple[TokenIds, ...], reference: Reference) -> Quality:
        equal = [num_leading_equal(mine, theirs) for mine, theirs in zip(greedy, reference.greedy, strict=True)]
        return Quality(
            perplexity=perplexity(self._nll, self._num_tokens),
            bits_per_byte=bits_per_byte(self._nll, self._num_bytes),
            mean_kl=self._kl / self._num_tokens,
            top1_agreement=self._num_equal / self._num_tokens,
            greedy_match_tokens=median(equal),
            greedy_tokens=material.greedy_tokens,
            num_tokens=self._num_tokens,
            text=material.origin,
        )
