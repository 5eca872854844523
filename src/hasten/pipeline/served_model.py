"""What is settled about a model before it is served, by `serve` and by `export triton`."""

from dataclasses import replace

from hasten.artifact import inspect
from hasten.bench.result import Candidate
from hasten.engine.folder import is_engine_folder, read_engine_manifest
from hasten.errors import UnsupportedModelError
from hasten.hardware import count_cpus
from hasten.models.encoder_config import ENCODERS, is_encoder
from hasten.pipeline.config import ServeConfig, TritonConfig
from hasten.pipeline.device import resolve_device
from hasten.pipeline.target import Target, resolve_target
from hasten.runtimes.base import RuntimeConfig
from hasten.runtimes.registry import serving_runtime

# sequences at the same time, and tokens of each, where neither the options nor an engine folder say
MAX_NUM_SEQS = {"cpu": 32, "cuda": 256}
MAX_MODEL_TOKENS = 8192

ENCODER_RUNTIME = "encoder"
ENCODER_SCHEMES = {"cpu": "fp32", "cuda": "bf16"}
MAX_STEP_INPUTS = 1024  # of an encoder, whose steps have a limit of tokens as well


def served_target(config: ServeConfig) -> tuple[Target, str]:
    """What is served, and on which device; an encoder in the runtime for encoders.

    Raises:
        ModelError: there is no such model, or it gives embeddings in a way that is not supported.
        UsageError: an option contradicts the model.
    """
    target = resolve_target(config.model, scheme=config.scheme, is_served=True)
    device = resolve_device(config.device, target.candidate.runtime)
    if target.is_converted:
        return target, device
    model = inspect(target.source)
    if not is_encoder(model.config):
        if (target.source / "modules.json").exists():
            raise UnsupportedModelError(
                f"{model.name} is for embeddings by {model.architecture}, which are not supported; supported: "
                f"{', '.join(ENCODERS)}"
            )
        return target, device
    return replace(target, candidate=Candidate(ENCODER_RUNTIME, config.scheme or ENCODER_SCHEMES[device])), device


def runtime_config_of(config: ServeConfig | TritonConfig, target: Target, device: str) -> RuntimeConfig:
    """How the engine is loaded: by the options, else by an engine folder's profile, else by what the device holds.

    Raises:
        UsageError: the target's runtime cannot serve, or does not run its scheme.
    """
    runtime, scheme = target.candidate.runtime, target.candidate.scheme
    serving_runtime(runtime, scheme)
    max_num_seqs = MAX_STEP_INPUTS if runtime == ENCODER_RUNTIME else MAX_NUM_SEQS[device]
    max_model_tokens = min(inspect(target.source).max_context_tokens, MAX_MODEL_TOKENS)
    if is_engine_folder(target.path):
        profile = read_engine_manifest(target.path).profile
        max_num_seqs, max_model_tokens = profile.max_num_seqs, profile.max_model_tokens
    return RuntimeConfig(
        model=target.path,
        scheme=scheme,
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
