"""`export triton`: a model, found and with its limits settled, as a Triton model repository."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.artifact import inspect
from hasten.errors import TokenizerError, UsageError
from hasten.export.triton_repository import TritonExport, write_repository
from hasten.models.encoder_config import is_encoder
from hasten.pipeline.config import TritonConfig
from hasten.pipeline.device import resolve_device
from hasten.pipeline.served_model import model_name, runtime_config_of
from hasten.pipeline.target import resolve_target
from hasten.runtimes.text import load_tokenizer


@dataclass(frozen=True)
class ExportedModels:
    """What a repository got.

    Args:
        text_model, tokens_model: names of the models.
        model: the folder with the weights, which must stay where it is.
    """

    repository: Path
    text_model: str
    tokens_model: str
    model: Path


def export_triton(config: TritonConfig) -> ExportedModels:
    """Writes the repository; loads no weights.

    Raises:
        ModelError: the model cannot be used, or its tokenizer not without transformers.
        UsageError: an encoder, a runtime that cannot serve, a name that Triton does not take, or models that exist.
    """
    target = resolve_target(config.model, scheme=config.scheme, is_served=True)
    model = inspect(target.source)
    if is_encoder(model.config):
        raise UsageError(f"{model.name} is an encoder, which is not exported: hasten serve gives its embeddings")
    runtime = target.candidate.runtime
    device = "cuda" if config.gpus or config.mig else resolve_device(config.device, runtime)
    runtime_config = runtime_config_of(config, target, device)
    tokenizer = getattr(load_tokenizer(target.source), "backend_tokenizer", None)
    if tokenizer is None:
        raise TokenizerError(f"{target.source} has no fast tokenizer, which Triton needs: add its tokenizer.json")
    export = TritonExport(
        name=config.name or model_name(target).replace("/", "-"),
        runtime=runtime,
        config=replace(runtime_config, model=runtime_config.model.resolve(), num_threads=config.threads),
        tokenizer=tokenizer.to_str(),
        instances=config.instances,
        gpus=(config.gpus or (0,)) if device == "cuda" and not config.mig else (),
        mig=config.mig or (),
        python=config.python or sys.executable,
    )
    write_repository(export, config.output)
    return ExportedModels(config.output, export.name, export.tokens_model, export.config.model)
