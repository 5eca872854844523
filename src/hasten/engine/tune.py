"""Tunes the kernels of a decoder for the GPU of this machine, as far as nobody has yet."""

import importlib
from collections.abc import Callable
from pathlib import Path

from hasten.config import Scheme
from hasten.engine.tuning import (
    TUNING_NAME,
    Tuner,
    product_shapes,
    read_tuning,
    remember,
    user_tuning_path,
    write_tuning,
)
from hasten.extras import require
from hasten.models.config import DecoderConfig

CUDA_TUNING = "hasten.kernels.cuda.product_tuning"

OnTune = Callable[[int, int], object]
"""Told how many shapes are done, of how many."""


def tune_on_gpu(
    config: DecoderConfig,
    scheme: Scheme,
    max_num_seqs: int,
    folder: Path | None = None,
    on_shape: OnTune | None = None,
) -> dict[str, str]:
    """The fastest variant of each kernel of a decode step, by tuning.ProductShape.key.

    What neither the engine folder nor the user's file knows is measured, and kept in the user's file.

    Raises:
        MissingExtraError: what the kernels are compiled with is not installed.
    """
    for module in ("triton", "cuda.bindings"):
        require(module)
    cuda = importlib.import_module(CUDA_TUNING)
    environment = cuda.environment()
    known = read_tuning(user_tuning_path(), environment)
    if folder is not None:
        known |= read_tuning(folder / TUNING_NAME, environment)
    tuner = Tuner(cuda.time_in_turns, known)
    shapes = product_shapes(config, scheme, max_num_seqs)
    choices: dict[str, str] = {}
    for number, shape in enumerate(shapes, 1):
        choice = known.get(shape.key)
        if choice is None:
            candidates = cuda.product_candidates(shape)
            choice = tuner.best(shape.key, candidates) if candidates else None
        if choice is not None:
            choices[shape.key] = choice
        if on_shape is not None:
            on_shape(number, len(shapes))
    if tuner.num_measured:
        remember(environment, choices)
    return choices


def write_folder_tuning(folder: Path, choices: dict[str, str]) -> None:
    """Keeps choices in an engine folder that is being written."""
    write_tuning(folder / TUNING_NAME, importlib.import_module(CUDA_TUNING).environment(), choices)
