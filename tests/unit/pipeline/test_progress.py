"""Time left of a step that tells how far it is."""

import pytest

from hasten.pipeline import progress
from hasten.pipeline.progress import LOAD_S, Progress, Schedule


def test_a_load_is_expected_to_go_on_as_fast_as_its_part_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now_s[0])
    shown: list[Progress] = []
    schedule = Schedule(shown.append)
    schedule.expect("speed", 60.0)
    with schedule.loading("native-bf16") as on_loading:
        for after_s, part, done, total in (
            (4.0, "read", 200_000_000, 1_000_000_000),  # the start of a process says nothing about reading
            (5.0, "read", 400_000_000, 1_000_000_000),
            (8.0, "read", 1_000_000_000, 1_000_000_000),
            (9.0, "capture", 1, 5),
            (9.5, "capture", 2, 5),
        ):
            now_s[0] = 100.0 + after_s
            on_loading(part, done, total)
    schedule.show("speed", "warming up")
    assert [(each.stage, each.left_s - 60.0, each.detail) for each in shown] == [
        ("load", LOAD_S, "native-bf16, starting"),
        ("load", LOAD_S, "native-bf16, 200 of 1,000 MB read"),
        ("load", 3.0, "native-bf16, 400 of 1,000 MB read"),
        ("load", 0.0, "native-bf16, 1,000 of 1,000 MB read"),
        ("load", 0.0, "native-bf16, 1 of 5 steps captured"),
        ("load", 1.5, "native-bf16, 2 of 5 steps captured"),
        ("speed", 0.0, "warming up"),
    ]
    assert shown[2].done_share == pytest.approx(5.0 / (5.0 + 63.0))
