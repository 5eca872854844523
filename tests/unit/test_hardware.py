import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hasten import hardware

GIB = 1 << 30
Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def siblings(*groups: str) -> dict[str, str]:
    """Topology files of CPUs 0, 1, ...: each entry is that CPU's list of siblings."""
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{group}\n"
        for cpu, group in enumerate(groups)
    }


@pytest.mark.usefixtures("four_cpus")
def test_hyperthreads_of_one_core_count_once(tree: Tree) -> None:
    assert hardware.count_cpus(tree(siblings("0,2", "1,3", "0,2", "1,3"))) == 2


@pytest.mark.usefixtures("four_cpus")
def test_without_topology_each_cpu_is_a_core(tree: Tree) -> None:
    assert hardware.count_cpus(tree({})) == 4


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/outer/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n2:memory:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        ({"proc/self/cgroup": "nonsense\n"}, 4),
    ],
)
def test_cpu_quota_of_control_groups(tree: Tree, files: dict[str, str], expected: int) -> None:
    assert hardware.count_cpus(tree(files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (16 * GIB, 10 * GIB)),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, (16 * GIB, 10 * GIB)),
        (
            {
                "proc/self/cgroup": "0::/box\n",
                "sys/fs/cgroup/box/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            (4 * GIB, 2 * GIB),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/box\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{8 * GIB}\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{GIB}\n",
            },
            (8 * GIB, 7 * GIB),
        ),
    ],
)
def test_memory_honours_control_groups(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: tuple[int, int]
) -> None:
    system = SimpleNamespace(total=16 * GIB, available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)
    assert hardware.memory(tree(files)) == expected


def test_bandwidth_is_that_of_a_memory() -> None:
    measured = hardware.measure_read_bandwidth(1, 32 << 20)
    assert 1e8 < measured < 1e13


def test_probe_without_bandwidth_is_plausible() -> None:
    found = hardware.probe(with_bandwidth=False)
    assert found.read_bandwidth_bytes_per_s is None
    assert 1 <= found.num_cpus <= (os.cpu_count() or 1)
    assert 0 < found.available_memory_bytes <= found.memory_bytes
    assert found.cpu
    assert set(found.cpu_flags) <= set(hardware.CPU_FLAGS)


def test_gpus_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NVIDIA H200, 143771, 9.0, 580.159.03\nbroken line\n[N/A], [N/A], 1, 2\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer))
    assert hardware.probe(with_bandwidth=False).gpus == (
        hardware.Gpu("NVIDIA H200", 143771 << 20, "9.0", "580.159.03"),
    )


@pytest.mark.parametrize(("visible", "asked"), [(None, None), ("", None), ("-1", None), ("1,0", "--id=1,0")])
def test_gpus_that_are_hidden_are_not_there(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str | None
) -> None:
    commands: list[tuple[str, ...]] = []

    def answer(command: tuple[str, ...], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="a GPU, 1024, 9.0, 580\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = hardware.probe(with_bandwidth=False).gpus
    assert len(found) == (0 if visible in ("", "-1") else 1)
    assert [command[-1] for command in commands if command[-1].startswith("--id")] == ([asked] if asked else [])


@pytest.mark.parametrize(
    "failure",
    [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 20)],
)
def test_no_gpu_where_the_tool_is_missing_or_fails(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    assert hardware.probe(with_bandwidth=False).gpus == ()


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert hardware.free_disk_bytes(tmp_path / "not" / "yet") > 0
