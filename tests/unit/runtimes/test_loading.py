"""How far loading is, from the runtime through its process to the caller."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.runtimes import protocol
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.process import RuntimeProcess
from hasten.runtimes.protocol import Loading, LoadingReporter, Reply, decoder, read_message, write_message


def test_bytes_beyond_32_bits_pass_through_the_pipe() -> None:
    pipe = io.BytesIO()
    message = Loading("read", 10**12, 2 * 10**12)
    write_message(pipe, message)
    pipe.seek(0)
    assert read_message(pipe, decoder(Reply)) == message


def test_the_first_step_and_the_end_of_each_part_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.time, "monotonic", lambda: 100.0)
    sent: list[Loading] = []
    report = LoadingReporter(sent.append)
    for done in range(1, 5001):
        report("read", done, 5000)
    for done in (1, 2):
        report("capture", done, 2)
    assert sent == [Loading("read", 1, 5000), Loading("read", 5000, 5000), Loading("capture", 2, 2)]


def test_ten_steps_a_second_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(protocol.time, "monotonic", lambda: now_s[0])
    sent: list[Loading] = []
    report = LoadingReporter(sent.append)
    for done in range(1, 1000):
        now_s[0] = done / 256
        report("read", done, 1000)
    assert [each.done for each in sent] == list(range(1, 1000, 26))


def test_a_process_tells_how_far_the_native_runtime_is(write_model: Callable[..., Path]) -> None:
    told: list[tuple[str, int, int]] = []
    config = RuntimeConfig(write_model(), "bf16", max_num_seqs=1, max_model_tokens=32)
    with RuntimeProcess("native", config, on_loading=lambda *step: told.append(step)):
        parts, done, totals = zip(*told, strict=True)
    assert set(parts) == {"read"} and len(set(totals)) == 1
    assert list(done) == sorted(set(done)) and done[-1] == totals[-1]
