"""Makes a Hugging Face language model's inference faster, proves it, and serves it.

The public names below are loaded when they are first used: `import hasten` imports neither
torch nor any runtime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.artifact import ModelRef, inspect
    from hasten.bench.result import BenchResult
    from hasten.errors import HastenError
    from hasten.pipeline.bench import bench_offline
    from hasten.pipeline.config import EvalConfig, GenerateConfig, OfflineConfig, OptimizeConfig, ReportConfig
    from hasten.pipeline.doctor_model import diagnose
    from hasten.pipeline.evaluate import evaluate_model
    from hasten.pipeline.generate import generate
    from hasten.pipeline.optimize import optimize
    from hasten.pipeline.reporting import compare, report
    from hasten.request import Completion, Request, SamplingParams, TokenEvent

__all__ = [
    "BenchResult",
    "Completion",
    "EvalConfig",
    "GenerateConfig",
    "HastenError",
    "ModelRef",
    "OfflineConfig",
    "OptimizeConfig",
    "ReportConfig",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "__version__",
    "bench_offline",
    "compare",
    "diagnose",
    "evaluate_model",
    "generate",
    "inspect",
    "optimize",
    "report",
]

_MODULES = {
    "BenchResult": "hasten.bench.result",
    "Completion": "hasten.request",
    "EvalConfig": "hasten.pipeline.config",
    "GenerateConfig": "hasten.pipeline.config",
    "HastenError": "hasten.errors",
    "ModelRef": "hasten.artifact",
    "OfflineConfig": "hasten.pipeline.config",
    "OptimizeConfig": "hasten.pipeline.config",
    "ReportConfig": "hasten.pipeline.config",
    "Request": "hasten.request",
    "SamplingParams": "hasten.request",
    "TokenEvent": "hasten.request",
    "bench_offline": "hasten.pipeline.bench",
    "compare": "hasten.pipeline.reporting",
    "diagnose": "hasten.pipeline.doctor_model",
    "evaluate_model": "hasten.pipeline.evaluate",
    "generate": "hasten.pipeline.generate",
    "inspect": "hasten.artifact",
    "optimize": "hasten.pipeline.optimize",
    "report": "hasten.pipeline.reporting",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("hasten")
    if name not in _MODULES:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
