"""KServe v2's gRPC messages, from tritonclient's own definitions: requests into tensors, outputs into responses.

Whatever bytes come are a request or a RequestError. Responses carry their output in raw_output_contents, as
Triton's do.

Not here: methods and streams (`kserve_grpc`), tensors' elements (`kserve_tensors`).
"""

from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2 as pb

from hasten.errors import RequestError
from hasten.serve.kserve_fields import Inference
from hasten.serve.kserve_generation import FINISH_REASON
from hasten.serve.kserve_models import VERSION, KServeModel, KServeModels, Outputs
from hasten.serve.kserve_tensors import Tensor, bytes_of, text_of

# of a stream's response: whether it is its request's last
FINAL = "triton_final_response"

CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

MessageT = TypeVar("MessageT", bound=Message)


def parsed(kind: type[MessageT], raw: bytes) -> MessageT:
    """Raises RequestError if the bytes are no such message."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise RequestError(f"this is no {kind.DESCRIPTOR.name}: {error}") from error


def serialized(message: Message) -> bytes:
    return message.SerializeToString()


def read_infer(models: KServeModels, request: pb.ModelInferRequest) -> tuple[KServeModel[Any], Inference]:
    """Which model is asked for what.

    Raises:
        ApiException: there is no such model.
        RequestError: the tensors or parameters are wrong.
    """
    model = models.find(request.model_name, request.model_version)
    for output in request.outputs:
        model.check_output(output.name)
        _refuse_parameters(output)
    return model, model.read(_tensors(request), {name: _value(name, each) for name, each in request.parameters.items()})


class ResponseForm:
    """Responses to one request.

    Args:
        request: of a kind that `read_infer` takes.
    """

    def __init__(self, model: KServeModel[Any], request: pb.ModelInferRequest) -> None:
        self._model = model
        self._request_id = request.id
        self._asked = {output.name for output in request.outputs} or set(model.outputs)

    def response(self, outputs: Outputs) -> pb.ModelInferResponse:
        """Of the outputs those that were asked for."""
        response = pb.ModelInferResponse()
        self._fill(response, outputs)
        return response

    def stream_response(self, outputs: Outputs) -> pb.ModelStreamInferResponse:
        """The same as one of a stream's responses."""
        message = pb.ModelStreamInferResponse()
        self._fill(message.infer_response, outputs)
        message.infer_response.parameters[FINAL].bool_param = FINISH_REASON in outputs
        return message

    def _fill(self, response: pb.ModelInferResponse, outputs: Outputs) -> None:
        response.model_name = self._model.name
        response.model_version = VERSION
        response.id = self._request_id
        for name, values in outputs.items():
            if name in self._asked:
                spec = self._model.outputs[name]
                response.outputs.add(name=name, datatype=spec.datatype, shape=spec.shape_of(len(values)))
                response.raw_output_contents.append(bytes_of(spec.datatype, values))


def _tensors(request: pb.ModelInferRequest) -> list[Tensor]:
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise RequestError(f"there are {len(request.inputs)} inputs and {len(raws)} raw_input_contents")
    tensors = []
    for position, each in enumerate(request.inputs):
        _refuse_parameters(each)
        if not raws:
            tensors.append(Tensor(each.name, each.datatype, tuple(each.shape), _contents(each)))
        elif each.HasField("contents"):
            raise RequestError(f"{each.name} has contents, and there are raw_input_contents too")
        else:
            tensors.append(Tensor.from_bytes(each.name, each.datatype, each.shape, raws[position]))
    return tensors


def _contents(tensor: pb.ModelInferRequest.InferInputTensor) -> list[Any]:
    field = CONTENTS.get(tensor.datatype)
    if field is None:
        raise RequestError(f"{tensor.name}: there is no datatype {tensor.datatype[:40]!r} here")
    values = list(getattr(tensor.contents, field))
    return [text_of(tensor.name, value) for value in values] if tensor.datatype == "BYTES" else values


def _refuse_parameters(tensor: Any) -> None:
    for name in tensor.parameters:
        raise RequestError(f"{tensor.name}: the parameter {name[:100]!r} is not supported")


def _value(name: str, parameter: pb.InferParameter) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        raise RequestError(f"the parameter {name[:100]!r} has no value")
    return getattr(parameter, choice)
