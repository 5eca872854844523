"""Which variant of a kernel is fastest for a shape on this machine: measured once, then remembered.

Choices are kept in a file for each user and in the engine folder, under the environment that they
were measured in: a folder from another GPU or version is measured again and never refused. A
choice changes speed only, so a file that is lost or damaged costs no more than a few seconds.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hasten.config import Scheme
from hasten.kernels.product_shape import ROW_BUCKETS, TUNED_BUCKETS, ProductShape
from hasten.models.config import DecoderConfig

logger = logging.getLogger(__name__)

TUNING_NAME = "tuning.json"
Candidates = Mapping[str, Callable[[], None]]
Measure = Callable[[Sequence[Callable[[], None]]], Sequence[float]]
"""Times all candidates, in turns, in any unit; inf for one that cannot run."""


def product_shapes(config: DecoderConfig, scheme: Scheme, max_num_seqs: int) -> tuple[ProductShape, ...]:
    """The products of decode steps of up to max_num_seqs sequences, as far as they are tuned."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    dtype = ("float8_e4m3fn" if scheme.is_fp8 else "int8") if scheme.is_quantized else scheme.activation
    last = next((bucket for bucket in ROW_BUCKETS if bucket >= max_num_seqs), ROW_BUCKETS[-1])
    matrices = (
        (q_size + 2 * kv_size, hidden, False),
        (hidden, q_size, False),
        (2 * inner, hidden, True),
        (hidden, inner, False),
        (config.vocab_size, hidden, False),
    )
    return tuple(
        dict.fromkeys(
            ProductShape(rows_out, rows_in, dtype, rows, is_gated)
            for rows_out, rows_in, is_gated in matrices
            for rows in TUNED_BUCKETS
            if rows <= last
        )
    )


class Tuner:
    """Finds the fastest of several candidates, unless it knows it already.

    Attributes:
        choices: by key, what was known and what was measured since.
        num_measured: keys that had to be measured.
    """

    def __init__(self, measure: Measure, known: Mapping[str, str] | None = None) -> None:
        self._measure = measure
        self.choices = dict(known or {})
        self.num_measured = 0

    def best(self, key: str, candidates: Candidates) -> str | None:
        """The name of the fastest candidate; None where none can run."""
        if self.choices.get(key) in candidates:
            return self.choices[key]
        times = self._measure(list(candidates.values()))
        self.num_measured += 1
        fastest_first = sorted(zip(times, candidates, strict=True))
        if not fastest_first or fastest_first[0][0] == math.inf:
            self.choices.pop(key, None)
            return None
        self.choices[key] = fastest_first[0][1]
        return self.choices[key]


def read_tuning(path: Path, environment: str) -> dict[str, str]:
    """The choices that a file has for an environment; {} where it has none or is damaged."""
    choices = _read(path).get(environment, {})
    return {key: name for key, name in choices.items() if isinstance(name, str)}


def write_tuning(path: Path, environment: str, choices: Mapping[str, str]) -> None:
    """Adds choices to a file, keeping those of other environments; readers see the old file or the new one."""
    everything = _read(path)
    everything[environment] = {**everything.get(environment, {}), **choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(everything, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)


def remember(environment: str, choices: Mapping[str, str]) -> None:
    """Writes choices to the user's own file; says so where that cannot be written."""
    path = user_tuning_path()
    try:
        write_tuning(path, environment, choices)
    except OSError as error:
        logger.warning("kernel tuning is not kept, so that it is done again next time: %s: %s", path, error.strerror)


def user_tuning_path() -> Path:
    """The user's own file, in XDG_CACHE_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache") / "hasten" / TUNING_NAME


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("kernels are tuned again: %s cannot be read: %s", path, error)
        return {}
    if not isinstance(values, dict):
        logger.warning("kernels are tuned again: %s holds no choices", path)
        return {}
    return {key: choices for key, choices in values.items() if isinstance(choices, dict)}
