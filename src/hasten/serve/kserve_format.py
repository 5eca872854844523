"""KServe v2's HTTP bodies: infer requests and answers, with Triton's binary tensors, and its generate extension.

Whatever bytes come are a request or a RequestError.

Not here: routes (`kserve_http`), tensors' elements (`kserve_tensors`).
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response

from hasten.errors import RequestError
from hasten.serve.kserve_fields import Inference
from hasten.serve.kserve_models import VERSION, KServeModel, Outputs
from hasten.serve.kserve_tensors import Tensor, bytes_of

HEADER_LENGTH = "inference-header-content-length"
JSON_SLICE = 4096  # numbers, under a millisecond

INFER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"type": "string"},
                    "parameters": {"type": "object"},
                    "data": {"description": "elements, flat or nested"},
                },
                "required": ["name", "shape", "datatype"],
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                "required": ["name"],
            },
        },
    },
    "required": ["inputs"],
}


class InputMessage(msgspec.Struct):
    """One input tensor of an infer request: its data, or how many bytes after the JSON are its own."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = msgspec.UNSET


class OutputMessage(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class InferMessage(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON of an infer request."""

    inputs: list[InputMessage]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputMessage] = []


_infer_decoder = msgspec.json.Decoder(InferMessage)
_generate_decoder = msgspec.json.Decoder(dict[str, Any])


def read_infer(body: bytes, header_length: str | None) -> tuple[InferMessage, list[Tensor]]:
    """An infer request and its input tensors.

    Args:
        header_length: the value of Inference-Header-Content-Length, how many bytes of the body are JSON;
            None if all are.

    Raises:
        RequestError: the body is not what the protocol describes.
    """
    num_json_bytes = len(body)
    if header_length is not None:
        num_json_bytes = int(header_length) if header_length.isdecimal() and len(header_length) < 12 else -1
        if not 0 <= num_json_bytes <= len(body):
            raise RequestError(f"Inference-Header-Content-Length must be at most {len(body)}, the body's length")
    message: InferMessage = _decoded(_infer_decoder, body[:num_json_bytes])
    tensors = []
    position = num_json_bytes
    for each in message.inputs:
        if "binary_data_size" not in each.parameters:
            _refuse_unknown(each.name, each.parameters)
            if each.data is msgspec.UNSET:
                raise RequestError(f"{each.name} has neither data nor binary_data_size")
            tensors.append(Tensor.from_json(each.name, each.datatype, each.shape, each.data))
            continue
        _refuse_unknown(each.name, each.parameters, "binary_data_size")
        size = each.parameters["binary_data_size"]
        if type(size) is not int or not 0 <= size <= len(body) - position or each.data is not msgspec.UNSET:
            raise RequestError(f"{each.name}: binary_data_size is not what is left of the body, or there is data too")
        raw = body[position : position + size]
        tensors.append(Tensor.from_bytes(each.name, each.datatype, each.shape, raw))
        position += size
    if position != len(body):
        raise RequestError(f"the body has {len(body) - position} bytes that are no input's")
    return message, tensors


def read_generate(model: KServeModel[Any], body: bytes) -> tuple[str, Inference]:
    """The id and the request of the generate extension. Raises RequestError."""
    values: dict[str, Any] = _decoded(_generate_decoder, body)
    request_id = values.pop("id", "")
    parameters = values.pop("parameters", {})
    if not isinstance(request_id, str) or not isinstance(parameters, dict):
        raise RequestError("id must be a string and parameters a JSON object")
    return request_id, model.read_values(values, parameters)


class AnswerForm:
    """Answers of the generate extension; what all of one request have in common is encoded once."""

    def __init__(self, model: KServeModel[Any], request_id: str) -> None:
        common = {"id": request_id} if request_id else {}
        common |= {"model_name": model.name, "model_version": VERSION}
        self._start = msgspec.json.encode(common)[:-1] + b","
        self._event_start = b"data: " + self._start
        self._specs = model.outputs

    def answer(self, outputs: Outputs) -> bytes:
        return self._start + self._end(outputs)

    def event(self, outputs: Outputs) -> bytes:
        return self._event_start + self._end(outputs) + b"\n\n"

    def _end(self, outputs: Outputs) -> bytes:
        """The outputs and the end of the JSON object."""
        fields = {name: each[0] if self._specs[name].is_scalar else each for name, each in outputs.items()}
        return msgspec.json.encode(fields)[1:]


def binary_outputs(model: KServeModel[Any], message: InferMessage) -> dict[str, bool]:
    """The outputs that are asked for, and whether in binary. Raises RequestError for one that the model has not."""
    default = message.parameters.get("binary_data_output", False)
    asked = {each.name: each.parameters.get("binary_data", default) for each in message.outputs}
    for each in message.outputs:
        model.check_output(each.name)
        _refuse_unknown(each.name, each.parameters, "binary_data")
    if not all(isinstance(is_binary, bool) for is_binary in (default, *asked.values())):
        raise RequestError("binary_data and binary_data_output are true or false")
    return asked or dict.fromkeys(model.outputs, default)


async def infer_response(
    model: KServeModel[Any], request_id: str, response: Outputs, asked: Mapping[str, bool]
) -> Response:
    """The answer to an infer request.

    Args:
        asked: of `binary_outputs`.
    """
    outputs: list[dict[str, Any]] = []
    raws: list[bytes] = []
    for name, values in response.items():
        if name not in asked:
            continue
        spec = model.outputs[name]
        output: dict[str, Any] = {"name": name, "datatype": spec.datatype, "shape": spec.shape_of(len(values))}
        if asked[name]:
            raws.append(bytes_of(spec.datatype, values))
            output["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            output["data"] = await json_numbers(values) if isinstance(values, np.ndarray) else values
        outputs.append(output)
    answer: dict[str, Any] = {"id": request_id} if request_id else {}
    header = msgspec.json.encode(answer | {"model_name": model.name, "model_version": VERSION, "outputs": outputs})
    if not raws:
        return Response(header, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(header))}
    return Response(b"".join((header, *raws)), headers=headers, media_type="application/octet-stream")


async def json_numbers(values: np.ndarray) -> msgspec.Raw:
    """A JSON array of numbers [n]; other requests are answered meanwhile, as millions take a second."""
    slices = []
    for start in range(0, len(values), JSON_SLICE):
        slices.append(msgspec.json.encode(values[start : start + JSON_SLICE].tolist())[1:-1])
        await asyncio.sleep(0)
    return msgspec.Raw(b"[%s]" % b",".join(slices))


def _refuse_unknown(name: str, parameters: Mapping[str, Any], *known: str) -> None:
    for parameter in parameters.keys() - known:
        raise RequestError(f"{name[:100]}: the parameter {parameter[:100]!r} is not supported")


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what the protocol describes: {error}") from error
