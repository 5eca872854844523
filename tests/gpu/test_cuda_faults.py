"""What goes wrong on a GPU ends in a sentence that says what to do, and other requests go on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_harness import greedy, load_engine, prompt, write_model
from safetensors.torch import load_file, save_file

from engines import check_all_free, make_engine, run, tokens_of
from hasten.cli.main import run as run_command
from hasten.engine.build import build
from hasten.engine.device import find_device
from hasten.engine.engine import OUT_OF_MEMORY
from hasten.engine.sampler import NOT_FINITE
from hasten.engine.tuning import TUNING_NAME
from hasten.errors import ResourceError, UnsupportedModelError, UsageError, WeightsError
from hasten.models.load import load_decoder
from hasten.request import Request, SamplingParams
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.native import NativeRuntime

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

SHIPPED = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
SCHEMES = ["bf16", "w8a16", "fp8"]
POISON = 77


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine folders of the model that ships, by scheme."""
    parent = tmp_path_factory.mktemp("engines")
    for scheme in SCHEMES:
        build(SHIPPED, scheme, parent / scheme, device=find_device("cuda"))
    return parent


@pytest.fixture
def limit_memory() -> Iterator[Callable[[int], None]]:
    """limit_memory(bytes): from now on torch may take so much more than it has."""

    def limit(more_bytes: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_bytes) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_running_out_of_memory_ends_the_steps_requests_alone(model: Path, limit_memory: Callable[[int], None]) -> None:
    decoder = load_decoder(model, "bf16", "cuda")
    engine = make_engine(
        decoder,
        num_blocks=1200,
        max_model_tokens=2048,
        max_num_batched_tokens=16384,
        max_num_seqs=9,
        enable_prefix_cache=False,
    )
    small = [greedy("a", 20), greedy("b", 40, temperature=1.0, seed=3)]
    expected = tokens_of(run(engine, small))
    limit_memory(4 << 20)
    for number in range(9):
        engine.add_request(greedy(f"long{number}", 2000 + number))
    for request in small:  # nine run at a time, so these wait
        engine.add_request(request)
    ends, tokens = {}, {}
    while engine.has_unfinished:
        for event in engine.step():
            tokens.setdefault((event.request_id, 0), []).append(event.token_id)
            if event.finish_reason is not None:
                assert event.request_id not in ends
                ends[event.request_id] = (event.finish_reason, event.error)
    check_all_free(engine)
    assert ends == {
        **{f"long{number}": ("error", OUT_OF_MEMORY) for number in range(9)},
        "a": ("length", None),
        "b": ("length", None),
    }
    assert {key: tokens[key] for key in expected} == expected
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(tokens_of(run(engine, [greedy("long0", 2000)]))["long0", 0]) == 32


def test_running_out_of_memory_while_a_graph_is_captured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(model, "bf16", "cuda")
    engine = make_engine(decoder)
    compute = decoder.compute
    requests = [greedy("a", 20), greedy("b", 40, temperature=1.0, seed=3)]
    expected = tokens_of(run(make_engine(decoder), requests))

    def exhausted(*args: object) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            compute(*args)
            raise torch.OutOfMemoryError("no memory")
        return compute(*args)

    monkeypatch.setattr(type(decoder), "compute", lambda self, *args: exhausted(*args))
    for events in run(engine, requests).values():
        assert [(event.finish_reason, event.error) for event in events] == [("error", OUT_OF_MEMORY)]
    monkeypatch.undo()
    assert tokens_of(run(engine, requests)) == expected


@pytest.mark.parametrize("scheme", ["fp32", *SCHEMES])
def test_logits_that_are_not_numbers_end_their_request_alone(scheme: str, model: Path, tmp_path: Path) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(model, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    weights["lm_head.weight"][POISON] = 0  # so that it is not generated: 0 is far below the largest logit
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    decoder = load_decoder(poisoned, scheme, "cuda")
    clean = [
        greedy(f"r{number}", 5 + 30 * number, 24, temperature=number % 2, seed=number, min_p=0.05)
        for number in range(6)
    ]
    clean = [each for each in clean if POISON not in each.prompt_token_ids]
    assert len(clean) >= 4
    bad = [
        Request(f"bad{length}", (*prompt(length, 9), POISON), SamplingParams(max_tokens=9, temperature=length % 2))
        for length in (1, 30, 401)
    ]
    expected = tokens_of(run(make_engine(decoder), clean)) if scheme == "fp32" else None
    engine = make_engine(decoder, num_blocks=90)
    for _ in range(2):  # a second time in blocks and slots that the first left
        events = run(engine, [clean[0], *bad, *clean[1:]])
        for request in bad:
            [event] = events.pop((request.request_id, 0))
            assert (event.token_id, event.finish_reason, event.error) == (None, "error", NOT_FINITE)
        tokens = tokens_of(events)
        assert len(tokens) == len(clean)
        if expected is not None:
            assert tokens == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_damaged_engine_folder_is_refused(
    scheme: str, folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def flip(path: Path, where: int) -> None:
        content = bytearray(path.read_bytes())
        content[where] ^= 0x10
        path.write_bytes(content)

    def truncate(path: Path) -> None:
        os.truncate(path, path.stat().st_size - 100)

    damages: list[Callable[[Path], None]] = [
        lambda folder: flip(folder / "config.json", 30),
        lambda folder: flip(folder / "weights-00001.safetensors", -5),
        lambda folder: truncate(folder / "weights-00001.safetensors"),
        lambda folder: (folder / "weights-00001.safetensors").unlink(),
        lambda folder: truncate(folder / "engine.json"),
    ]
    for number, damage in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(folders / scheme, folder)
        damage(folder)
        assert run_command(["generate", str(folder), "once", "--device", "cuda", "--max-tokens", "4"]) == 1
        assert "build the engine again" in capfd.readouterr().err


def test_truncated_weights_of_a_model_are_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(WeightsError, match="bytes"):
        load_engine(tmp_path / "model", "bf16")


def test_tuning_from_elsewhere_or_damaged_is_done_again(folders: Path, tmp_path: Path) -> None:
    request = Request("r", prompt(20), SamplingParams(max_tokens=8, ignore_eos=True))
    choices = json.loads((folders / "bf16" / TUNING_NAME).read_text())
    [mine] = choices.values()
    contents = (
        json.dumps({"NVIDIA H100, sm_90, CUDA 12.8, stream_linear 0": mine}),
        json.dumps({name: dict.fromkeys(known, "stages99-cluster7") for name, known in choices.items()}),
        json.dumps({name: dict.fromkeys(known, 5) for name, known in choices.items()}),
        json.dumps([1, 2]),
        "{",
    )
    tokens = []
    for number, content in enumerate((None, *contents)):
        folder = tmp_path / str(number)
        shutil.copytree(folders / "bf16", folder)
        if content is not None:
            (folder / TUNING_NAME).write_text(content)
        runtime = NativeRuntime(RuntimeConfig(folder, "bf16", device="cuda"))
        tokens.append([event.token_id for event in runtime.generate([request])])
    assert all(len(each) == 8 for each in tokens)


def test_a_folder_built_on_a_cpu_runs(tmp_path: Path) -> None:
    request = Request("r", prompt(20), SamplingParams(max_tokens=8, ignore_eos=True))
    folder = build(SHIPPED, "w8a16", tmp_path / "engine")
    runtime = NativeRuntime(RuntimeConfig(folder, "w8a16", device="cuda"))
    assert len(list(runtime.generate([request]))) == 8


def test_scores_are_those_of_the_cpu() -> None:
    rows = [list(prompt(200, number)) for number in range(2)]
    scores = {
        device: list(NativeRuntime(RuntimeConfig(SHIPPED, "fp32", device=device)).score(rows))
        for device in ("cpu", "cuda")
    }
    for ours, theirs in zip(scores["cuda"], scores["cpu"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("arguments", [["generate", str(SHIPPED), "x"], ["build", str(SHIPPED), "-o"]])
def test_a_scheme_without_gpu_kernels(arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*arguments, *([str(tmp_path / "out")] if arguments[-1] == "-o" else [])]
    assert run_command([*arguments, "--device", "cuda", "--scheme", "w4a16"]) == 2
    assert "w4a16" in (said := capfd.readouterr().err)
    assert "fp8" in said.split("allowed")[1]
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="w8a16, fp8"):
        load_decoder(SHIPPED, "w4a16", "cuda")


@pytest.mark.parametrize("arguments", [["generate", str(SHIPPED), "x"], ["build", str(SHIPPED), "-o"]])
def test_without_a_gpu(arguments: list[str], tmp_path: Path) -> None:
    arguments = [*arguments, *([str(tmp_path / "out")] if arguments[-1] == "-o" else [])]
    command = [sys.executable, "-m", "hasten", *arguments, "--device", "cuda"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=120, check=False
    )
    assert found.returncode == 1
    assert "hasten doctor" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head_dim", [8, 10, 24, 160, 256, 512])
@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
def test_a_head_size_runs_right_or_is_refused(head_dim: int, scheme: str, tmp_path: Path) -> None:
    changes = {"head_dim": head_dim, "num_attention_heads": 4, "num_hidden_layers": 2}
    path = write_model(tmp_path / "model", **changes)
    expected = tokens_of(run(load_engine(path, "fp32", "cpu"), [greedy("a", 40), greedy("b", 7)]))
    try:
        engine = load_engine(path, scheme)
    except UnsupportedModelError as error:
        assert "head" in str(error)
        assert head_dim in (8, 512) or (head_dim > 128 and scheme == "fp32")
        return
    tokens = tokens_of(run(engine, [greedy("a", 40), greedy("b", 7)]))
    if scheme == "fp32":
        assert tokens == expected
    logits = torch.cat(list(engine.prompt_logits(prompt(40), 33)))
    cpu = torch.cat(list(load_engine(path, "fp32", "cpu").prompt_logits(prompt(40), 40)))
    assert (logits.cpu() - cpu).square().mean().sqrt() < 0.05 * cpu.std()


@pytest.fixture
def fill() -> Iterator[Callable[[int], None]]:
    """fill(bytes): so much of the GPU's memory stays free."""
    held = []

    def take(free_bytes: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append(torch.empty(torch.cuda.mem_get_info()[0] - free_bytes, dtype=torch.uint8, device="cuda"))

    yield take
    held.clear()
    torch.cuda.empty_cache()


def test_limits_that_do_not_fit(tmp_path: Path, fill: Callable[[int], None], capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 65536}
    path = write_model(tmp_path / "model", **sizes)
    fill(3 << 30)
    with pytest.raises(ResourceError, match="lower max_model_tokens to"):
        NativeRuntime(RuntimeConfig(path, "bf16", max_num_seqs=1, max_model_tokens=65536, device="cuda"))
    out = tmp_path / "engine"
    arguments = ["build", str(path), "--device", "cuda", "-o", str(out), "--max-model-tokens"]
    assert run_command([*arguments, "65536"]) == 1
    said = capfd.readouterr().err
    assert "lower --max-model-tokens to" in said
    fitting = said.split("lower --max-model-tokens to ")[1].split()[0].strip(".,")
    assert not out.exists()
    assert run_command([*arguments, fitting, "--dry-run"]) == 0


@pytest.mark.parametrize("scheme", ["bf16", "w8a16"])
def test_weights_that_do_not_fit(scheme: str, tmp_path: Path, limit_memory: Callable[[int], None]) -> None:
    path = write_model(tmp_path / "model", intermediate_size=8192)
    limit_memory(20 << 20)
    with pytest.raises(ResourceError, match="memory"):
        NativeRuntime(RuntimeConfig(path, scheme, device="cuda"))
