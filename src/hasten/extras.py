"""The optional packages: which extra brings which module, and the error when it is absent.

What every command needs is an ordinary dependency; what only one runtime or verb needs is
an extra. Probing uses `find_spec`, so nothing heavy is imported by asking.
"""

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

from hasten.errors import MissingExtraError


@dataclass(frozen=True)
class Extra:
    """One optional package: the extra's name, the module it brings and who needs it."""

    name: str
    module: str
    distribution: str
    min_version: str
    needed_by: str


EXTRAS = {
    extra.module: extra
    for extra in (
        Extra("onnxruntime", "onnxruntime_genai", "onnxruntime-genai", "0.18", "the onnxruntime runtime"),
        Extra("onnxruntime", "onnx", "onnx", "1.19", "the onnxruntime runtime"),
        Extra("llama-cpp", "llama_cpp", "llama-cpp-python", "0.3.36", "the llama_cpp runtime"),
        Extra("llama-cpp", "gguf", "gguf", "0.19", "the llama_cpp runtime"),
        Extra("cuda", "triton", "triton", "3.6", "the native engine on a GPU"),
        Extra("cuda", "cuda.bindings", "cuda-bindings", "13.0", "the native engine on a GPU"),
        Extra("serve", "fastapi", "fastapi", "0.130", "hasten serve"),
        Extra("serve", "uvicorn", "uvicorn", "0.40", "hasten serve"),
        Extra("serve", "prometheus_client", "prometheus-client", "0.23", "hasten serve"),
        Extra("serve", "grpc", "grpcio", "1.78", "serving and measuring servers"),
        Extra("serve", "tritonclient.grpc", "tritonclient", "2.60", "serving and measuring servers"),
        Extra("serve", "httptools", "httptools", "0.7", "serving and measuring servers"),
        Extra("serve", "uvloop", "uvloop", "0.22", "serving and measuring servers"),
        Extra("cuda", "pynvml", "nvidia-ml-py", "12.560", "the power figure of hasten profile"),
    )
}


def is_installed(module: str) -> bool:
    """Whether the module of a row in EXTRAS can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that `module` is in
        return False


def installed_version(module: str) -> str | None:
    """The installed version of the distribution behind `module`, None if there is none."""
    try:
        return metadata.version(EXTRAS[module].distribution)
    except metadata.PackageNotFoundError:
        return None


def require(module: str) -> ModuleType:
    """Imports an optional module.

    Raises:
        MissingExtraError: it is not installed; the message has the command that installs it.
    """
    _check_installed(EXTRAS[module])
    return import_module(module)


def check_extra(name: str) -> None:
    """Raises MissingExtraError if a module of an extra is not installed; imports none."""
    for extra in EXTRAS.values():
        if extra.name == name:
            _check_installed(extra)


def _check_installed(extra: Extra) -> None:
    if not is_installed(extra.module):
        raise MissingExtraError(
            f"{extra.needed_by} needs {extra.distribution}>={extra.min_version}: pip install 'hasten[{extra.name}]'"
        )
