"""Ranges that a profiler sees, put on a torch module from outside: phases of generation, names of modules.

The module itself stays as its library made it; all hooks are gone when the `with` block ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import record_function

from hasten.kernels.phase import Phase, phase
from hasten.runtimes.base import MODULE_PREFIX


class GenerationPhases:
    """The phase that generation is in; one is left when the next is entered."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._entered: phase | None = None

    def enter(self, name: Phase) -> None:
        self.leave()
        self._entered = phase(name, on_gpu=self._on_gpu).__enter__()

    def leave(self) -> None:
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
            self._entered = None

    @contextmanager
    def follow(self, model: torch.nn.Module) -> Iterator[None]:
        """Calls of the model are prefill or decode, what comes after one is sampling until `leave` is called."""

        def before(module: torch.nn.Module, arguments: Any, values: dict[str, Any]) -> None:
            self.enter("prefill" if values["input_ids"].shape[1] > 1 else "decode")

        def after(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            self.enter("sampling")

        handles = (model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after))
        try:
            yield
        finally:
            self.leave()
            for handle in handles:
                handle.remove()


@contextmanager
def modules_named(model: torch.nn.Module) -> Iterator[None]:
    """Each call of a module below `model` is a range "module NAME", NAME being the last part of its path."""
    entered: list[record_function] = []

    def before(name: str) -> Any:
        def enter(module: torch.nn.Module, arguments: Any) -> None:
            entered.append(record_function(f"{MODULE_PREFIX}{name}"))
            entered[-1].__enter__()

        return enter

    def after(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    handles = []
    for path, module in model.named_modules():
        if path:
            handles += [module.register_forward_pre_hook(before(path.rpartition(".")[2]))]
            handles += [module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
