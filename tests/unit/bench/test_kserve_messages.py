"""KServe's gRPC messages: what is asked for, and what the responses of a stream come to, whatever bytes they are."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from hasten.bench.endpoints import COUNTS, Answer, NotAnAnswerError, OnlineRequest
from hasten.bench.kserve_messages import KServeGrpcEndpoint, metadata_request
from hasten.bench.token_times import Chunk

REQUEST = OnlineRequest("r", "ein Glück", 2, 3)
TEXT, FLAG = ("BYTES", 1), ("BOOL", 1)
HASTEN = {"text_input": TEXT, "stream": FLAG, "max_tokens": ("INT32", 1), "temperature": ("FP32", 1)} | dict.fromkeys(
    ("ignore_eos", *COUNTS), FLAG
)
ENDPOINT = KServeGrpcEndpoint("m", HASTEN)


def text_tensor(*texts: bytes) -> tuple[str, bytes]:
    return "BYTES", b"".join(struct.pack("<I", len(text)) + text for text in texts)


def response(*, is_last: bool = False, error: str = "", **outputs: tuple[str, bytes]) -> bytes:
    message = pb.ModelStreamInferResponse(error_message=error)
    message.infer_response.parameters["triton_final_response"].bool_param = is_last
    for name, (datatype, raw) in outputs.items():
        message.infer_response.outputs.add(name=name, datatype=datatype, shape=[1])
        message.infer_response.raw_output_contents.append(raw)
    return bytes(message.SerializeToString())


def read(*parts: bytes) -> Answer:
    return ENDPOINT.read([float(index) for index in range(len(parts))], parts)


def uint32(number: int) -> tuple[str, bytes]:
    return "UINT32", struct.pack("<I", number)


def test_all_that_the_model_takes_goes_as_tensors() -> None:
    message = pb.ModelInferRequest.FromString(ENDPOINT.body(REQUEST))
    sent = {each.name: raw for each, raw in zip(message.inputs, message.raw_input_contents, strict=True)}
    assert message.model_name == "m"
    assert sent == {
        "text_input": text_tensor("ein Glück".encode())[1],
        "max_tokens": struct.pack("<i", 3),
        "temperature": struct.pack("<f", 0.0),
        **dict.fromkeys(("stream", "ignore_eos", *COUNTS), b"\1"),
    }
    assert list(message.parameters) == ["triton_enable_empty_final_response"]
    assert {tuple(each.shape) for each in message.inputs} == {(1,)}


def test_what_is_no_input_goes_as_a_parameter_and_counts_are_left_out() -> None:
    """As Triton's vLLM backend has it; the other model is batched by Triton."""
    message = pb.ModelInferRequest.FromString(
        KServeGrpcEndpoint("m", {"text_input": ("BYTES", 2), "stream": FLAG}).body(REQUEST)
    )
    assert [(each.name, tuple(each.shape)) for each in message.inputs] == [("text_input", (1, 1)), ("stream", (1,))]
    assert message.parameters["max_tokens"].int64_param == 3
    assert message.parameters["ignore_eos"].bool_param
    assert not set(COUNTS) & set(message.parameters)


def test_inputs_are_those_of_the_models_metadata() -> None:
    path, question = metadata_request("m")
    assert path == "/inference.GRPCInferenceService/ModelMetadata"
    assert pb.ModelMetadataRequest.FromString(question).name == "m"
    metadata = pb.ModelMetadataResponse(name="m")
    metadata.inputs.add(name="text_input", datatype="BYTES", shape=[-1, 1])
    metadata.inputs.add(name="odd", datatype="FP16", shape=[1])
    endpoint = KServeGrpcEndpoint.from_metadata("m", [metadata.SerializeToString()])
    assert endpoint.inputs == {"text_input": ("BYTES", 2)}
    with pytest.raises(NotAnAnswerError, match="no ModelMetadataResponse"):
        KServeGrpcEndpoint.from_metadata("m", [b"\xff"])


def test_an_answer_has_its_texts_counts_and_times() -> None:
    counts = {"num_input_tokens": uint32(7)}
    answer = read(
        response(text_output=text_tensor("Glü".encode()[:3]), num_output_tokens=uint32(2), **counts),
        response(text_output=text_tensor(b""), num_output_tokens=uint32(0), **counts),
        response(text_output=text_tensor(b"ck", b"!"), num_output_tokens=uint32(1), **counts),
        response(is_last=True),
    )
    assert answer == Answer((Chunk(0.0, 3, 2), Chunk(2.0, 3, 1)), 3, 7, "length", None)


def test_an_answer_without_counts() -> None:
    answer = read(response(text_output=text_tensor(b"ab"), is_last=True), b"not looked at")
    assert answer == Answer((Chunk(0.0, 2, None),), None, None, "length", None)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (response(error="no\nblocks", is_last=True), "the server reported: no blocks"),
        (b"\xff\xff", "the server sent a message that is no ModelStreamInferResponse"),
        (response(), "the stream ended without triton_final_response"),
        (b"", "the stream ended without triton_final_response"),
        (response(text_output=("BYTES", b"\0\0\0")), "the server sent a text_output that is no tensor of BYTES"),
        (
            response(text_output=("BYTES", b"\xff\xff\xff\xffa")),
            "the server sent a text_output that is no tensor of BYTES",
        ),
        (response(text_output=("FP32", bytes(4))), "the server sent a text_output that is no tensor of BYTES"),
        (response(num_output_tokens=("FP32", bytes(4))), "the server sent a number of tokens that is no integer"),
        (response(num_output_tokens=("INT32", bytes(5))), "the server sent a number of tokens that is no integer"),
        (response(num_output_tokens=("", b"")), "the server sent a number of tokens that is no integer"),
        (
            response(num_output_tokens=("INT64", b"\xff" * 8)),
            "the server sent -1 as the number of tokens of one response",
        ),
        (
            pb.ModelStreamInferResponse(
                infer_response=pb.ModelInferResponse(raw_output_contents=[b""])
            ).SerializeToString(),
            "the server sent 0 outputs and 1 raw_output_contents",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_and_what_came_before_stays(part: bytes, error: str) -> None:
    answer = read(response(text_output=text_tensor(b"a")), part)
    assert answer.error == error
    assert answer.chunks == (Chunk(0.0, 1),)


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_whatever_bytes_come_are_an_answer_or_an_error(parts: list[bytes]) -> None:
    answer = read(*parts)
    assert answer.error or answer.finish_reason is not None or not answer.chunks


@given(st.sampled_from(["BYTES", "INT32", "INT64", "UINT64", "BOOL", "x"]), st.binary(max_size=20), st.booleans())
def test_whatever_tensors_come_are_an_answer_or_an_error(datatype: str, raw: bytes, is_last: bool) -> None:
    names = ("text_output", "num_input_tokens", "num_output_tokens")
    for name in names:
        assert isinstance(read(response(is_last=is_last, **{name: (datatype, raw)})), Answer)
