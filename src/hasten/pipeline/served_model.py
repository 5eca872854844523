"""What is settled about a model before it is served, by `serve` and by `export triton`."""

from pathlib import Path

from hasten.artifact import inspect
from hasten.engine.folder import is_engine_folder, read_engine_manifest
from hasten.hardware import count_cpus
from hasten.pipeline.config import ServeConfig, TritonConfig
from hasten.pipeline.target import Target, prepared
from hasten.runtimes.base import RuntimeConfig

# sequences at the same time, and tokens of each, where neither the options nor an engine folder say
MAX_NUM_SEQS = {"cpu": 32, "cuda": 256}
MAX_MODEL_TOKENS = 8192


def runtime_config_of(config: ServeConfig | TritonConfig, target: Target, device: str, out: Path) -> RuntimeConfig:
    """How the engine is loaded: by the options, else by an engine folder's profile, else by what the device holds.

    Args:
        out: where a model is converted to, if its runtime does not read it as it is.
    """
    max_num_seqs = MAX_NUM_SEQS[device]
    max_model_tokens = min(inspect(target.source).max_context_tokens, MAX_MODEL_TOKENS)
    if is_engine_folder(target.path):
        profile = read_engine_manifest(target.path).profile
        max_num_seqs, max_model_tokens = profile.max_num_seqs, profile.max_model_tokens
    return RuntimeConfig(
        model=prepared(target, out),
        scheme=target.candidate.scheme,
        max_num_seqs=config.max_num_seqs or max_num_seqs,
        max_model_tokens=config.max_model_tokens or max_model_tokens,
        num_threads=config.threads or count_cpus(),
        device=device,
    )


def model_name(target: Target) -> str:
    """The model's own name, also where it is in an engine folder."""
    if is_engine_folder(target.path):
        return read_engine_manifest(target.path).source_name
    return inspect(target.source).name
