"""Who may import whom, and what importing hasten may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "hasten"

# a module may import from its own layer and from those above it in this list
LAYERS = (
    {"errors", "extras", "request", "artifact", "safetensors_header", "hub", "config", "hardware"},
    {"kernels"},
    {"quantization"},
    {"models"},
    {"engine"},
    {"runtimes"},
    {"evaluate", "bench", "profiling"},
    {"report", "export", "serve"},
    {"pipeline"},
    {"cli", "__main__"},
)
MAY_IMPORT_LATE = {"cli", "registry", "extras", "__init__"}
LAYER_OF = {package: index for index, layer in enumerate(LAYERS) for package in layer}
FILES = sorted(SOURCE.rglob("*.py"))


def package_of(name: str) -> str | None:
    """The package or top-level module of "hasten.X.Y", None for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "hasten" and len(parts) > 1 else None


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "hasten":
                yield from ((node.lineno, f"hasten.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).with_suffix("").parts[0]
    if own == "__init__":
        return  # the public names, loaded lazily
    assert own in LAYER_OF, f"{relative(path)}: add {own} to LAYERS"
    wrong = [
        f"line {line}: {name}"
        for line, name in imported_names(ast.parse(path.read_text()))
        if (package := package_of(name)) is not None and LAYER_OF.get(package, len(LAYERS)) > LAYER_OF[own]
    ]
    assert not wrong, f"{relative(path)} imports from a later layer: {wrong}"


def test_there_is_no_cycle_between_packages() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        own = path.relative_to(SOURCE).with_suffix("").parts[0]
        names = {package_of(name) for _, name in imported_names(ast.parse(path.read_text()))}
        edges.setdefault(own, set()).update(name for name in names if name is not None and name != own)
    edges.pop("__init__", None)
    done: set[str] = set()
    while ready := [name for name in edges if name not in done and edges[name] & edges.keys() <= done]:
        done.update(ready)
    assert done == edges.keys(), f"packages that import each other: {sorted(edges.keys() - done)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_stand_at_the_top(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if MAY_IMPORT_LATE & set(parts):
        return
    late = [
        node.lineno
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not late, f"{relative(path)} imports inside a function at lines {late}"


@pytest.mark.parametrize("path", sorted((SOURCE / "runtimes").glob("*.py")), ids=relative)
def test_no_runtime_imports_another(path: Path) -> None:
    registry = ast.parse((SOURCE / "runtimes" / "registry.py").read_text())
    adapters = {
        node.value.partition(":")[0]
        for node in ast.walk(registry)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("hasten.runtimes.")
    }
    assert adapters
    imported = {name for _, name in imported_names(ast.parse(path.read_text()))}
    assert not imported & adapters


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("statement", ["import hasten", "import hasten.cli.main"])
def test_importing_hasten_is_light(statement: str) -> None:
    heavy = {"torch", "transformers", "onnxruntime", "onnxruntime_genai", "llama_cpp", "matplotlib", "huggingface_hub"}
    assert not loaded_after(statement) & heavy


@pytest.mark.parametrize("module", ["artifact", "hardware", "hub", "report", "pipeline.doctor", "serve.engine_client"])
def test_modules_that_must_work_without_torch(module: str) -> None:
    assert "torch" not in loaded_after(f"import hasten.{module}")


def test_the_engine_starts_without_transformers() -> None:
    """Its import takes longer than loading a model of 8 billion weights."""
    assert "transformers" not in loaded_after("import hasten.runtimes.native")
