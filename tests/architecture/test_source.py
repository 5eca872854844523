"""House rules that a machine can check."""

import ast
import re
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "src" / "hasten").rglob("*.py"))
MAX_LINES = 500
MANY_LINES = 400
VAGUE_NAMES = {"utils", "helpers", "common", "types", "misc", "profile", "triton"}
MACHINE_PATH = re.compile(r"(?<![\w.])(/home/\w+|/Users/\w+|/root/|[A-Z]:\\\\Users)")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked_text_files() -> list[Path]:
    """What git tracks or would; every file below the root where there is no git."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(git, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_is_short(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines: split it"
    if num_lines > MANY_LINES:
        warnings.warn(f"{relative(path)} has {num_lines} lines: look twice", stacklevel=1)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_says_what_it_is(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no module docstring"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_names_are_sorted_and_exist(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            names = ast.literal_eval(node.value)
            assert names == sorted(names)
            assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            does_nothing = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (catches_all and does_nothing), f"line {node.lineno} swallows every error"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = [
        f"{relative(path)}:{number}: {match.group()}"
        for path in tracked_text_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := MACHINE_PATH.search(line))
    ]
    assert not found, found


def test_makefile_describes_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    described = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    assert described == set(phony.group(1).split())


def test_constraints_pin_every_dependency() -> None:
    def names(text: str) -> set[str]:
        return {
            re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'^\W*"?([A-Za-z][\w.-]*)', text, re.MULTILINE)
        }

    pinned = names(re.sub(r"^#.*$", "", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["onnxruntime"], *extras["cuda"], *extras["dev"]]
    requirements = names("\n".join(wanted)) - {"hasten"}
    assert requirements <= pinned, f"not in constraints.txt: {sorted(requirements - pinned)}"
