"""Angles depend on the position alone, and stretch as each type says."""

import math
from typing import Any

import pytest
import torch

from hasten.models.rotary import read_rotary, rotation

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}


def rotations(rope_type: str, positions: torch.Tensor) -> torch.Tensor:
    rotary = read_rotary({"rope_parameters": {"rope_type": rope_type, **SETTINGS[rope_type]}}, 8, 64)
    return rotation(rotary, "cpu")(positions)


@pytest.mark.parametrize("rope_type", SETTINGS)
def test_an_angle_depends_on_its_position_alone(rope_type: str) -> None:
    positions = torch.arange(200)
    together = rotations(rope_type, positions)
    assert together.shape == (200, 1, 4)
    for chunk in positions.split(37):
        assert torch.equal(rotations(rope_type, chunk), together[chunk])
    assert torch.equal(rotations(rope_type, torch.tensor([150, 3])), together[[150, 3]])


def test_linear_divides_positions() -> None:
    torch.testing.assert_close(rotations("linear", torch.tensor([40])), rotations("default", torch.tensor([10])))


def test_length_dependent_types_are_unstretched_within_the_trained_context() -> None:
    default = rotations("default", torch.arange(64))
    torch.testing.assert_close(rotations("dynamic", torch.arange(64)), default)
    longrope = rotations("longrope", torch.arange(64))
    magnitude = math.sqrt(1 + math.log(2) / math.log(32))
    torch.testing.assert_close(longrope[:32], default[:32] * magnitude)
    torch.testing.assert_close(longrope[40], rotations("default", torch.tensor([5]))[0] * magnitude)
