"""KServe v2 over gRPC on a made-up engine: statuses, streams, cancellation; tests/serving has a real one."""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from fake_engine import TEXT, TEXT_IDS, FakeEngineClient, make_service
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from hasten.errors import RequestError, UsageError
from hasten.serve import kserve_grpc
from hasten.serve.access import ApiKeys
from hasten.serve.app import HttpLimits
from hasten.serve.kserve_generation import generating_models
from hasten.serve.kserve_grpc import grpc_serving
from hasten.serve.kserve_protobuf import read_infer
from hasten.serve.server import Listen
from hasten.serve.service import Service

SERVICE = "/inference.GRPCInferenceService/"


def served(service: Service, ask: Callable[[grpc.aio.Channel], Awaitable[Any]], **limits: Any) -> Any:
    """What `ask` returns of a channel to this service."""

    async def run() -> Any:
        async with grpc_serving(generating_models(service), Listen(grpc_port=0), HttpLimits(**limits)) as address:
            assert address is not None
            # windows that do not grow: a reader that stops is noticed after 64 KiB
            async with grpc.aio.insecure_channel(address, (("grpc.http2.bdp_probe", 0),)) as channel:
                return await asyncio.wait_for(ask(channel), 30)

    return asyncio.run(run())


def infer_request(request_id: str = "", max_tokens: int = len(TEXT_IDS), **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny", id=request_id)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    request.raw_input_contents.extend([struct.pack("<I", 2) + b"Hi", struct.pack("<i", max_tokens)])
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


def text_of(response: pb.ModelInferResponse) -> str:
    return response.raw_output_contents[0][4:].decode()


def failure(
    message: Any,
    client: FakeEngineClient | None = None,
    method: str = "ModelInfer",
    service: Service | None = None,
    **limits: Any,
) -> grpc.aio.AioRpcError:
    """The error that a message, or bytes instead of one, is answered with."""
    raw = message if isinstance(message, bytes) else message.SerializeToString()

    async def ask(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(SERVICE + method)(raw)
        return caught.value

    return served(service or make_service(client or FakeEngineClient()), ask, **limits)


def streamed(service: Service, requests: Sequence[pb.ModelInferRequest]) -> list[pb.ModelStreamInferResponse]:
    async def ask(channel: grpc.aio.Channel) -> list[pb.ModelStreamInferResponse]:
        return [each async for each in GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests))]

    return served(service, ask)


def test_an_answer_has_the_outputs_that_were_asked_for() -> None:
    async def ask(channel: grpc.aio.Channel) -> tuple[pb.ModelInferResponse, pb.ModelInferResponse]:
        stub = GRPCInferenceServiceStub(channel)
        asked = infer_request("b")
        asked.outputs.add(name="finish_reason")
        return await stub.ModelInfer(infer_request("a")), await stub.ModelInfer(asked)

    both, one = served(make_service(FakeEngineClient()), ask)
    assert (both.id, both.model_name, both.model_version) == ("a", "tiny", "1")
    assert [output.name for output in both.outputs] == ["text_output", "finish_reason"]
    assert text_of(both) == TEXT
    assert [output.name for output in one.outputs] == ["finish_reason"]
    assert text_of(one) == "length"


def test_contents_are_the_same_as_raw_contents() -> None:
    request = pb.ModelInferRequest(model_name="tiny_tokens")
    request.inputs.add(name="input_ids", datatype="INT64", shape=[1, 2]).contents.int64_contents.extend([5, 6])
    request.parameters["max_tokens"].string_param = "3"

    async def ask(channel: grpc.aio.Channel) -> pb.ModelInferResponse:
        return await GRPCInferenceServiceStub(channel).ModelInfer(request)

    response = served(make_service(FakeEngineClient()), ask)
    assert response.raw_output_contents[0] == struct.pack("<3i", *TEXT_IDS[:3])
    assert response.outputs[0].shape == [3]


@pytest.mark.parametrize("tokens_at_once", [1, 5])
def test_a_stream_has_a_response_a_read_for_each_of_its_requests(tokens_at_once: int) -> None:
    client = FakeEngineClient(max_num_seqs=20, tokens_at_once=tokens_at_once)
    got = streamed(make_service(client), [infer_request(str(number)) for number in range(20)])
    for number in range(20):
        mine = [each.infer_response for each in got if each.infer_response.id == str(number)]
        assert "".join(map(text_of, mine)) == TEXT
        finals = [each.parameters["triton_final_response"].bool_param for each in mine]
        assert finals == [False] * (len(mine) - 1) + [True]
        assert len(mine) == -(-len(TEXT_IDS) // tokens_at_once)


def test_a_stream_survives_requests_that_are_refused() -> None:
    other = infer_request("other")
    other.model_name = "other"
    got = streamed(
        make_service(FakeEngineClient()), [infer_request("bad", max_tokens=0), other, infer_request("good", 1)]
    )
    refused = {each.infer_response.id: each.error_message for each in got if each.error_message}
    assert refused.keys() == {"bad", "other"}
    assert refused["bad"].startswith("max_tokens: ")
    assert [each.infer_response.id for each in got if not each.error_message] == ["good"]


def test_an_error_in_a_stream_ends_its_request_only() -> None:
    got = streamed(make_service(FakeEngineClient(fails_after=2)), [infer_request("a"), infer_request("b", 1)])
    last = [each for each in got if each.infer_response.id == "a"][-1]
    assert last.error_message == "the step failed"
    assert last.infer_response.parameters["triton_final_response"].bool_param
    assert not any(each.error_message for each in got if each.infer_response.id == "b")


def test_who_cancels_ends_their_requests() -> None:
    client = FakeEngineClient(step_s=0.01, max_model_tokens=4096)
    service = make_service(client)

    async def ask(channel: grpc.aio.Channel) -> None:
        stub = GRPCInferenceServiceStub(channel)
        stream = stub.ModelStreamInfer(iter([infer_request(str(number), 4000) for number in range(3)]))
        unary = stub.ModelInfer(infer_request("unary", 4000))
        while len(client.running) < 4:
            await asyncio.sleep(0.01)
        assert (await anext(aiter(stream))).infer_response.id
        stream.cancel()
        unary.cancel()
        await asyncio.wait_for(service.idle.wait(), 5)

    served(service, ask)
    assert not client.running
    assert len(client.aborted) == 4
    assert service.metrics.finished["abort"] == 4
    assert not service.metrics.errors


def test_a_client_that_goes_away_ends_its_requests() -> None:
    client = FakeEngineClient(step_s=0.01, max_model_tokens=4096)
    service = make_service(client)

    async def ask(channel: grpc.aio.Channel) -> None:
        stream = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([infer_request("", 4000)]))
        await anext(aiter(stream))
        await channel.close()
        await asyncio.wait_for(service.idle.wait(), 5)

    served(service, ask)
    assert len(client.aborted) == 1
    assert not service.metrics.errors


def test_a_reader_that_takes_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kserve_grpc, "WRITE_TIMEOUT_S", 0.5)
    client = FakeEngineClient(max_model_tokens=1 << 20)
    service = make_service(client)

    async def ask(channel: grpc.aio.Channel) -> grpc.StatusCode:
        stream = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([infer_request("", 1 << 19)]))
        await anext(aiter(stream))
        await asyncio.wait_for(service.idle.wait(), 20)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in stream:
                pass
        return ended.value.code()

    assert served(service, ask) == grpc.StatusCode.ABORTED
    assert len(client.aborted) == 1


def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    assert failure(b"\xff\xff").code() == grpc.StatusCode.INVALID_ARGUMENT
    not_utf8 = infer_request("id-here").SerializeToString().replace(b"id-here", b"id-\xff\xfere")
    assert failure(not_utf8).code() == grpc.StatusCode.INVALID_ARGUMENT
    got = served(
        make_service(FakeEngineClient()),
        lambda channel: _first(channel.stream_stream(SERVICE + "ModelStreamInfer")(iter([b"\xff\xff"]))),
    )
    assert "this is no ModelInferRequest" in pb.ModelStreamInferResponse.FromString(got).error_message


async def _first(stream: Any) -> Any:
    return await anext(aiter(stream))


def _raw(text: bytes) -> pb.ModelInferRequest:
    request = infer_request()
    request.raw_input_contents[0] = text
    return request


def _with(change: Callable[[pb.ModelInferRequest], Any]) -> pb.ModelInferRequest:
    request = infer_request()
    change(request)
    return request


@pytest.mark.parametrize(
    ("request_", "details"),
    [
        (_raw(b"\x01"), "ends within the length"),
        (_raw(struct.pack("<i", -1)), "longer than what was sent"),
        (_raw(struct.pack("<I", 2) + b"\xc3\x28"), "is not UTF-8"),
        (_raw(struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b"), "2 elements, which is not its shape"),
        (infer_request(max_tokens=-1), "max_tokens: "),
        (_with(lambda request: request.raw_input_contents.pop()), "2 inputs and 1 raw_input_contents"),
        (_with(lambda request: request.inputs[0].shape.append(-1)), "not its shape"),
        (
            _with(lambda request: setattr(request.inputs[1], "datatype", "INT64")),
            "4 bytes, and an element of INT64 has 8",
        ),
        (
            _with(lambda request: request.inputs[0].contents.bytes_contents.append(b"x")),
            "there are raw_input_contents too",
        ),
        (_with(lambda request: request.outputs.add(name="logits")), "has no output 'logits'"),
        (_with(lambda request: request.parameters["seed"]), "the parameter 'seed' has no value"),
        (infer_request(sequence_id=3), "no input or parameter 'sequence_id'"),
        (infer_request(stream=1), "use generate_stream or ModelStreamInfer"),
        (pb.ModelInferRequest(model_name="tiny"), "text_input: Field required"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(request_: pb.ModelInferRequest, details: str) -> None:
    error = failure(request_)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details in error.details()


def test_details_fit_into_a_header() -> None:
    request = infer_request()
    request.parameters["\N{CJK UNIFIED IDEOGRAPH-4E00}" * 5000].bool_param = True
    assert failure(request).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_models_are_not_found_and_other_methods_unimplemented() -> None:
    other = pb.ModelInferRequest(model_name="other")
    assert failure(other).code() == grpc.StatusCode.NOT_FOUND
    asked = pb.ModelMetadataRequest(name="tiny", version="7")
    assert failure(asked, method="ModelMetadata").code() == grpc.StatusCode.NOT_FOUND
    for method in ("ModelStatistics", "RepositoryModelLoad", "SystemSharedMemoryRegister"):
        assert failure(b"", method=method).code() == grpc.StatusCode.UNIMPLEMENTED


def test_without_a_key_nobody_is_let_in() -> None:
    service = make_service(FakeEngineClient())
    methods = [
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelConfig",
        "ModelInfer",
    ]

    async def ask(channel: grpc.aio.Channel) -> list[grpc.StatusCode]:
        codes = []
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "right"),)):
            calls = [channel.unary_unary(SERVICE + name)(b"", metadata=metadata) for name in methods]
            calls.append(channel.stream_stream(SERVICE + "ModelStreamInfer")(metadata=metadata))
            codes += [await call.code() for call in calls]
        stub = GRPCInferenceServiceStub(channel)
        right = (("authorization", "Bearer right"),)
        assert (await stub.ServerReady(pb.ServerReadyRequest(), metadata=right)).ready
        stream = stub.ModelStreamInfer(iter([infer_request()]), metadata=right)
        assert not (await anext(aiter(stream))).error_message
        return codes

    codes = served(service, ask, keys=ApiKeys(["right"]))
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 24, codes


def test_a_full_queue_is_resource_exhausted_with_retry_after() -> None:
    service = make_service(FakeEngineClient(max_num_seqs=1, step_s=0.05), max_queue=0)

    async def ask(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
        stub = GRPCInferenceServiceStub(channel)
        results = await asyncio.gather(
            *(stub.ModelInfer(infer_request(max_tokens=5)) for _ in range(2)), return_exceptions=True
        )
        [refused] = [each for each in results if isinstance(each, grpc.aio.AioRpcError)]
        return refused

    refused = served(service, ask)
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(refused.trailing_metadata())["retry-after"]) >= 1


def test_other_limits_have_their_statuses() -> None:
    slow = FakeEngineClient(step_s=0.02)
    assert failure(infer_request(timeout=30_000), slow).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert failure(infer_request(), FakeEngineClient(fails_after=2)).code() == grpc.StatusCode.INTERNAL
    assert failure(infer_request(), FakeEngineClient(fails_after=2, dies=True)).code() == grpc.StatusCode.UNAVAILABLE
    draining = make_service(FakeEngineClient())
    draining.drain()
    assert failure(infer_request(), service=draining).code() == grpc.StatusCode.UNAVAILABLE
    assert failure(b"x" * 2000, max_body_bytes=1000).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_request_is_a_line_in_the_log_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    service = make_service(FakeEngineClient())
    with caplog.at_level("INFO", "hasten"):
        streamed(service, [infer_request("a", 3), infer_request("b", 0)])
    good, bad = sorted((record.fields for record in caplog.records), key=lambda fields: fields["status"], reverse=True)  # type: ignore[attr-defined]
    assert (good["status"], good["completion_tokens"], good["stream"]) == ("OK", 3, True)
    assert (bad["status"], bad["error"]) == ("INVALID_ARGUMENT", "invalid_value")
    assert "prompts" not in good
    assert service.metrics.errors == {"invalid_value": 1}


def test_an_address_that_cannot_be_listened_on_is_the_users_mistake(tmp_path: Any) -> None:
    async def run(listen: Listen) -> None:
        models = generating_models(make_service(FakeEngineClient()))
        async with grpc_serving(models, listen, HttpLimits()) as address:
            assert address is not None
            port = int(address.rpartition(":")[2])
            async with grpc_serving(models, Listen(grpc_port=port), HttpLimits()):
                pass

    with pytest.raises(UsageError, match="cannot listen for gRPC"):
        asyncio.run(run(Listen(grpc_port=0)))
    (tmp_path / "no.pem").write_text("none")
    with pytest.raises(UsageError, match="cannot listen for gRPC"):
        asyncio.run(run(Listen(tls_cert=tmp_path / "no.pem", tls_key=tmp_path / "no.pem", grpc_port=0)))


@given(
    st.sampled_from(["text_input", "max_tokens", "stop", "x"]),
    st.sampled_from(["BYTES", "INT32", "FP32", "BOOL", "", "FP16"]),
    st.lists(st.integers(-(2**63), 3), max_size=3),
    st.lists(st.binary(max_size=12), max_size=3),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
)
def test_any_tensors_are_a_request_or_refused(
    name: str, datatype: str, shape: list[int], raws: list[bytes], values: list[int]
) -> None:
    request = pb.ModelInferRequest(model_name="tiny", raw_input_contents=raws)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"Hi")
    request.inputs.add(name=name, datatype=datatype, shape=shape).contents.int_contents.extend(values)
    if raws:
        for tensor in request.inputs:
            tensor.ClearField("contents")
    with contextlib.suppress(RequestError):
        model, inference = read_infer(generating_models(make_service(FakeEngineClient())), request)
        assert inference.sampling(inference.max_tokens or 1).max_tokens >= 1
        assert model.name == "tiny"
