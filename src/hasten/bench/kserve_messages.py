"""KServe v2's gRPC messages for measuring: a request into bytes, the responses of its stream into an answer.

Whatever bytes come are an answer or an error in one sentence. Not here: the connection (`grpc_stream`), and what
is the same over HTTP (`endpoints`).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hasten.bench.endpoints import (
    COUNTS,
    Answer,
    KServeChunk,
    NotAnAnswerError,
    OnlineRequest,
    kserve_answer,
    kserve_fields,
)
from hasten.extras import require

SERVICE = "/inference.GRPCInferenceService"
PROMPT = "text_input"
FINAL = "triton_final_response"
# without it Triton does not say that a stream has ended of a model that says so in a response of its own
ASK_FINAL = "triton_enable_empty_final_response"
BYTES = "BYTES"
CODES = {"BOOL": "?", "INT32": "i", "UINT32": "I", "INT64": "q", "UINT64": "Q", "FP32": "f", "FP64": "d"}


@dataclass(frozen=True)
class KServeGrpcEndpoint:
    """Triton's ModelStreamInfer for a model with text_input, text_output, max_tokens and stream.

    Args:
        inputs: datatype and number of dimensions of the model's inputs by name. What is no input is sent as a
            parameter, as Triton's vLLM backend takes it, and counts are not asked for.
    """

    model: str
    inputs: Mapping[str, tuple[str, int]]

    @classmethod
    def from_metadata(cls, model: str, parts: Sequence[bytes]) -> "KServeGrpcEndpoint":
        """Of what ModelMetadata answered. Raises NotAnAnswerError if it is no such message."""
        metadata = _parsed("ModelMetadataResponse", b"".join(parts))
        return cls(
            model,
            {
                each.name: (each.datatype, len(each.shape))
                for each in metadata.inputs
                if each.datatype in CODES or each.datatype == BYTES
            },
        )

    @property
    def path(self) -> str:
        return f"{SERVICE}/ModelStreamInfer"

    def body(self, request: OnlineRequest) -> bytes:
        message = _messages().ModelInferRequest(model_name=self.model)
        message.parameters[ASK_FINAL].bool_param = True
        counts = {name: True for name in COUNTS if name in self.inputs}
        for name, value in ({PROMPT: request.prompt} | kserve_fields(request) | counts).items():
            if name in self.inputs:
                datatype, num_dimensions = self.inputs[name]
                message.inputs.add(name=name, datatype=datatype, shape=(1,) * num_dimensions)
                message.raw_input_contents.append(_raw(datatype, value))
            else:
                kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
                setattr(message.parameters[name], kind, value)
        return bytes(message.SerializeToString())

    def read(self, times_s: Sequence[float], parts: Sequence[bytes]) -> Answer:
        return kserve_answer(_events(times_s, parts))


def metadata_request(model: str) -> tuple[str, bytes]:
    """The method that says which inputs a model has, and its request."""
    return f"{SERVICE}/ModelMetadata", _messages().ModelMetadataRequest(name=model).SerializeToString()


def _messages() -> Any:
    return require("tritonclient.grpc").service_pb2


def _parsed(kind: str, raw: bytes) -> Any:
    messages = _messages()
    try:
        return getattr(messages, kind).FromString(raw)
    except import_module("google.protobuf.message").DecodeError as error:
        raise NotAnAnswerError(f"the server sent a message that is no {kind}") from error


def _events(times_s: Sequence[float], parts: Sequence[bytes]) -> Iterator[tuple[float, KServeChunk]]:
    """Each response with its time, up to the last or one that is an error."""
    for time_s, part in zip(times_s, parts, strict=True):
        message = _parsed("ModelStreamInferResponse", part)
        if message.error_message:
            yield time_s, KServeChunk(error=message.error_message)
            return
        response = message.infer_response
        outputs, raws = response.outputs, response.raw_output_contents
        if len(outputs) != len(raws):
            raise NotAnAnswerError(f"the server sent {len(outputs)} outputs and {len(raws)} raw_output_contents")
        tensors = {output.name: (output.datatype, raw) for output, raw in zip(outputs, raws, strict=True)}
        yield (
            time_s,
            KServeChunk(
                text_output=_texts(tensors.get("text_output")),
                num_input_tokens=_number(tensors.get("num_input_tokens")),
                num_output_tokens=_number(tensors.get("num_output_tokens")),
            ),
        )
        if FINAL in response.parameters and response.parameters[FINAL].bool_param:
            return
    raise NotAnAnswerError(f"the stream ended without {FINAL}")


def _raw(datatype: str, value: Any) -> bytes:
    """A tensor of one element. In BYTES each element has its length before it."""
    if datatype != BYTES:
        return struct.pack(f"<{CODES[datatype]}", value)
    encoded = str(value).encode()
    return struct.pack("<I", len(encoded)) + encoded


def _texts(tensor: tuple[str, bytes] | None) -> list[str]:
    if tensor is None:
        return []
    datatype, raw = tensor
    texts, position = [], 0
    while position < len(raw):
        start = position + 4
        position = start + int.from_bytes(raw[position:start], "little")
        if datatype != BYTES or start > len(raw) or position > len(raw):
            raise NotAnAnswerError("the server sent a text_output that is no tensor of BYTES")
        texts.append(raw[start:position].decode(errors="replace"))  # a piece may end within a character
    return texts


def _number(tensor: tuple[str, bytes] | None) -> int | None:
    if tensor is None:
        return None
    datatype, raw = tensor
    code = CODES.get(datatype, "")
    if code not in tuple("iIqQ") or len(raw) != struct.calcsize(f"<{code}"):
        raise NotAnAnswerError("the server sent a number of tokens that is no integer")
    return int(struct.unpack(f"<{code}", raw)[0])
