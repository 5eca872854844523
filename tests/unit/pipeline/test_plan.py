"""The plan: which candidates, in which groups, and what is refused before anything starts."""

import dataclasses
from pathlib import Path

import pytest

from hasten.artifact import ModelRef, TensorInfo
from hasten.errors import MissingExtraError, ResourceError, UsageError
from hasten.hardware import Gpu, Hardware
from hasten.pipeline import plan as planning
from hasten.pipeline.config import OptimizeConfig
from hasten.pipeline.plan import check_resources, default_output, make_plan

HARDWARE = Hardware("a CPU", 2, (), 16 << 30, 12 << 30, "Linux", (), 20e9)
GPU_MACHINE = dataclasses.replace(
    HARDWARE, gpus=(Gpu("a GPU", 8 << 30, "9.0", "580"),), read_bandwidth_bytes_per_s=1e12
)


def model_of(num_parameters: int) -> ModelRef:
    rows = num_parameters // 1000
    tensor = TensorInfo("lm_head.weight", "BF16", (rows, 1000), "model.safetensors", 0, rows * 2000)
    return ModelRef(Path("m"), "m", "r", "LlamaForCausalLM", {"vocab_size": 100}, {}, {tensor.name: tensor})


def test_the_baseline_comes_first_whatever_order_is_asked_for() -> None:
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native", "transformers")), model_of(10**7), HARDWARE)
    assert plan.baseline == "transformers-fp32" == plan.candidates[0].candidate.name
    assert {cost.candidate.runtime for cost in plan.candidates} == {"transformers", "native"}


def test_the_baseline_is_there_also_when_only_others_are_asked_for() -> None:
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",), schemes=("w8a16",)), model_of(10**7), HARDWARE)
    assert [cost.candidate.name for cost in plan.candidates] == ["transformers-fp32", "native-w8a16"]


def test_candidates_that_do_not_fit_together_are_grouped_each_with_the_baseline() -> None:
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",)), model_of(10**9), HARDWARE)
    assert len(plan.groups) > 1
    assert all(group[0] == plan.baseline and len(group) > 1 for group in plan.groups)
    grouped = [name for group in plan.groups for name in group[1:]]
    assert sorted(grouped) == sorted(cost.candidate.name for cost in plan.candidates[1:])


def test_a_short_time_budget_means_fewer_rounds_but_at_least_one() -> None:
    asked = OptimizeConfig(model="m", runtimes=("native",))
    budget = dataclasses.replace(asked, time_budget=1.0)
    assert make_plan(asked, model_of(10**8), HARDWARE).num_rounds == asked.runs
    assert make_plan(budget, model_of(10**8), HARDWARE).num_rounds == 1


def test_serving_the_best_native_candidate_is_part_of_the_cost() -> None:
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",)), model_of(10**8), HARDWARE)
    quickest = min(cost.round_s for cost in plan.candidates if cost.candidate.runtime == "native")
    assert plan.served_s > 2 * 12 * quickest
    without = make_plan(OptimizeConfig(model="m", runtimes=("transformers",)), model_of(10**8), HARDWARE)
    assert without.served_s == 0
    assert "the served engine" not in plan.left_out | without.left_out


def test_without_the_extra_nothing_is_served_and_one_sentence_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.extras.is_installed", lambda module: module != "uvloop")
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",)), model_of(10**8), HARDWARE)
    assert plan.served_s == 0
    assert plan.left_out["the served engine"].endswith("needs uvloop>=0.22: pip install 'hasten[serve]'")


def test_too_little_memory_is_refused_with_both_figures() -> None:
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",)), model_of(4 * 10**9), HARDWARE)
    with pytest.raises(ResourceError, match=r"transformers-fp32 needs about 15\.\d GiB of memory and 12\.0 GiB"):
        check_resources(plan, HARDWARE, 1 << 50)


def test_too_little_disk_is_refused_with_both_figures() -> None:
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",)), model_of(10**8), HARDWARE)
    with pytest.raises(ResourceError, match=r"need 0\.8 GiB of disk and 0\.1 GiB are free"):
        check_resources(plan, HARDWARE, 100 << 20)


def test_an_absent_runtime_is_left_out_by_default_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "is_installed", lambda module: False)
    plan = make_plan(OptimizeConfig(model="m"), model_of(10**7), HARDWARE)
    assert plan.left_out == {"onnxruntime": "not installed: pip install 'hasten[onnxruntime]'"}
    monkeypatch.setattr("hasten.extras.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'hasten\[onnxruntime\]'"):
        make_plan(OptimizeConfig(model="m", runtimes=("onnxruntime",)), model_of(10**7), HARDWARE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": ("natve",)}, r"unknown runtime 'natve': did you mean native\?"),
        ({"runtimes": ("transformers",), "schemes": ("fp32",)}, "nothing to compare"),
        ({"schemes": ("fp16",)}, "scheme 'fp16' is not for device cpu: did you mean"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(OptimizeConfig(model="m", **options), model_of(10**7), HARDWARE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ("w8a8",)}, r"unknown scheme 'w8a8': did you mean w8a16\?"),
        ({"concurrency": ()}, "--concurrency needs"),
        ({"concurrency": (0, 1)}, "--concurrency must be at least 1, got 0"),
        ({"new_tokens": 1}, "--new-tokens must be at least 2, got 1"),
        ({"max_kl": float("nan")}, "--max-kl must be at least 0, got nan"),
        ({"price_per_hour": 0.0}, "--price-per-hour must be above 0"),
        ({"time_budget": -1.0}, "--time-budget must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OptimizeConfig(model="m", **options)  # type: ignore[arg-type]


def test_a_gpu_has_schemes_of_its_own_and_leaves_out_what_needs_a_cpu() -> None:
    plan = make_plan(OptimizeConfig(model="m"), model_of(10**9), GPU_MACHINE, "cuda")
    names = [cost.candidate.name for cost in plan.candidates]
    assert names == ["transformers-fp16", "native-bf16", "native-w8a16", "native-fp8"]
    assert plan.left_out == {"onnxruntime": "runs on the CPU only: --device cpu has it"}
    with pytest.raises(UsageError, match="llama_cpp runtime runs on the CPU only"):
        make_plan(OptimizeConfig(model="m", runtimes=("llama_cpp",)), model_of(10**7), GPU_MACHINE, "cuda")
    with pytest.raises(UsageError, match="scheme 'w4a16' is not for device cuda"):
        make_plan(OptimizeConfig(model="m", schemes=("w4a16",)), model_of(10**7), GPU_MACHINE, "cuda")


def test_a_gpu_is_asked_whether_the_model_fits_its_memory() -> None:
    model = model_of(6 * 10**9)
    plan = make_plan(OptimizeConfig(model="m", runtimes=("native",)), model, GPU_MACHINE, "cuda")
    with pytest.raises(ResourceError, match=r"transformers-fp16 needs about 13\.2 GiB of GPU memory and 8\.0 GiB"):
        check_resources(plan, GPU_MACHINE, 1 << 50, "cuda")


def test_the_run_folder_is_named_after_the_model() -> None:
    assert default_output("some/where/tiny-llama/") == Path("runs/tiny-llama")
