"""The runner of each device; what a GPU's needs is imported only when one is asked for."""

import importlib

from hasten.engine.config import EngineConfig
from hasten.engine.model_runner import ModelRunner, Runner
from hasten.kernels.kv_cache import KVCache
from hasten.models.decoder import Decoder


def make_runner(decoder: Decoder, kv_cache: KVCache, config: EngineConfig) -> Runner:
    """The runner of the decoder's device.

    Args:
        config: resolved.
    """
    if decoder.device == "cpu":
        return ModelRunner(decoder, kv_cache)
    return importlib.import_module("hasten.engine.cuda_runner").CudaRunner(decoder, kv_cache, config)
