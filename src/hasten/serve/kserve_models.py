"""The models of the Open Inference Protocol (KServe v2) as HTTP and gRPC see them: what goes in, what comes out.

A server has two. The one of the served model's own name takes text; NAME_tokens takes token ids, for clients that
tokenize themselves. What they take and give is `kserve_generation`'s or, for an encoder, `kserve_embeddings`'. A
name that does not exist is refused.

Not here: messages, and what an error is on the wire.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import ValidationError

from hasten.config import nearest
from hasten.errors import RequestError
from hasten.serve.kserve_fields import Inference, Spec
from hasten.serve.kserve_tensors import STRUCT_CODES, Elements, Tensor
from hasten.serve.openai_errors import ApiError, ApiException
from hasten.serve.service import Service, Work

VERSION = "1"
TOKENS_SUFFIX = "_tokens"

# what Triton's clients say to the protocol, not to the model
PROTOCOL_PARAMETERS = ("binary_data_output", "triton_enable_empty_final_response")

CONFIG_TYPES = {"BYTES": "TYPE_STRING", **{name: f"TYPE_{name}" for name in STRUCT_CODES}}

Outputs = Mapping[str, Elements]
"""What a response has, by the outputs' names."""

InferenceT = TypeVar("InferenceT", bound=Inference)


class Answer(Protocol):
    """One admitted request: iterate over its responses once, in one task, and close it however that ended.

    Attributes:
        work: what the log tells of it.
    """

    @property
    def work(self) -> Work: ...

    def __aiter__(self) -> AsyncIterator[Outputs]: ...

    async def aclose(self) -> None: ...


class KServeModel(ABC, Generic[InferenceT]):
    """One model as clients of the protocol see it.

    Attributes:
        is_decoupled: whether a request may have several responses, in Triton's word.
        other_names: names that Triton's models have for the same inputs.
    """

    is_decoupled: ClassVar[bool]
    other_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, service: Service, name: str, inference: type[InferenceT]) -> None:
        self.name = name
        self._service = service
        self._inference = inference

    @property
    @abstractmethod
    def outputs(self) -> Mapping[str, Spec]:
        """By name; a response may lack some of them."""

    @abstractmethod
    async def open(self, inference: InferenceT, *, is_stream: bool) -> Answer:
        """Admits a request.

        Args:
            is_stream: whether the answer may be several responses; else it is one.

        Raises:
            RequestError: it is beyond the model's limits, or may not be asked in this way.
            QueueFullError: as many sequences wait as may.
            DrainingError, EngineUnavailableError: no request is taken now.
        """

    @cached_property
    def inputs(self) -> dict[str, tuple[Spec, bool]]:
        """By name, the tensor and whether it may be left out; the required one first."""
        found = {}
        for name, field in self._inference.model_fields.items():
            spec = next((each for each in field.metadata if isinstance(each, Spec)), None)
            if spec is not None:
                found[name] = (spec, not field.is_required())
        return dict(sorted(found.items(), key=lambda item: item[1][1]))

    def metadata(self) -> dict[str, Any]:
        """The protocol's description."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "hasten",
            "inputs": [_described(name, spec) for name, (spec, _) in self.inputs.items()],
            "outputs": [_described(name, spec) for name, spec in self.outputs.items()],
        }

    def config(self) -> dict[str, Any]:
        """Triton's description, which says what is optional and whether there may be many responses."""
        return {
            "name": self.name,
            "backend": "hasten",
            "max_batch_size": 0,
            "input": [
                {**_configured(name, spec), "optional": is_optional}
                for name, (spec, is_optional) in self.inputs.items()
            ],
            "output": [_configured(name, spec) for name, spec in self.outputs.items()],
            "model_transaction_policy": {"decoupled": self.is_decoupled},
        }

    def read(self, tensors: Iterable[Tensor], parameters: Mapping[str, Any]) -> InferenceT:
        """A request's tensors and parameters, checked.

        Raises:
            RequestError: what is wrong with which of them.
        """
        known = self.inputs
        values: dict[str, Any] = {}
        for tensor in tensors:
            name = self.other_names.get(tensor.name, tensor.name)
            if name not in known:
                raise RequestError(
                    f"{self.name} has no input {tensor.name[:100]!r}: {nearest(tensor.name[:100], known)}"
                )
            spec, _ = known[name]
            spec.check(tensor)
            _put(values, name, tensor.values[0] if spec.is_scalar else tensor.values)
        return self.read_values(values, parameters)

    def read_values(self, *sources: Mapping[str, Any]) -> InferenceT:
        """The same of plain values by name, from several places. Raises RequestError."""
        values: dict[str, Any] = {}
        for source in sources:
            for name, value in source.items():
                if name not in PROTOCOL_PARAMETERS:
                    _put(values, self.other_names.get(name, name), value)
        try:
            return self._inference.model_validate(values)
        except ValidationError as error:
            raise RequestError(self._reason(error)) from error

    def check_output(self, name: str) -> None:
        """Raises RequestError for an output that the model has not."""
        if name not in self.outputs:
            raise RequestError(f"{self.name} has no output {name[:100]!r}, only {' and '.join(self.outputs)}")

    def _reason(self, error: ValidationError) -> str:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(first["loc"][0])[:100]
        if first["type"] == "extra_forbidden":
            return f"{self.name} has no input or parameter {name!r}: {nearest(name, self._inference.model_fields)}"
        return f"{name}: {first['msg']}"


class KServeModels:
    """The models of one service, by name."""

    def __init__(self, service: Service, *models: KServeModel[Any]) -> None:
        self.service = service
        self._models = {model.name: model for model in models}

    @property
    def are_decoupled(self) -> bool:
        """Whether their answers may be streams."""
        return any(model.is_decoupled for model in self._models.values())

    @property
    def extensions(self) -> Sequence[str]:
        """Of the protocol, by Triton's names."""
        generate = ("generate",) if self.are_decoupled else ()
        return ("binary_tensor_data", *generate, "model_configuration", "parameters")

    def find(self, name: str, version: str = "") -> KServeModel[Any]:
        """Raises ApiException for one that is not served; any version is "1"."""
        model = self._models.get(name)
        if model is None or version not in ("", VERSION):
            message = (
                f"there is no model {name[:100]!r} in version {version[:40] or VERSION}: {', '.join(self._models)}"
            )
            raise ApiException(ApiError(404, "model_not_found", message))
        return model

    def index(self) -> list[dict[str, str]]:
        """All models, as Triton's repository lists them."""
        state = "READY" if self.service.is_ready else "UNAVAILABLE"
        return [{"name": name, "version": VERSION, "state": state} for name in self._models]


async def only_response(answer: Answer) -> Outputs:
    """Of an answer that is no stream."""
    [outputs] = [outputs async for outputs in answer]
    return outputs


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    if name in values:
        raise RequestError(f"{name} is given twice")
    values[name] = value


def _described(name: str, spec: Spec) -> dict[str, Any]:
    return {"name": name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _configured(name: str, spec: Spec) -> dict[str, Any]:
    return {"name": name, "data_type": CONFIG_TYPES[spec.datatype], "dims": list(spec.shape)}
