"""KServe v2 over gRPC: the Open Inference Protocol with Triton's ModelStreamInfer, on the messages of tritonclient.

ModelInfer gives one response. On ModelStreamInfer, for models that generate, each request gets a response for each
read of the engine's tokens, told apart from others on the stream by its id; the last one, which is never an empty
one added for it, has the parameter triton_final_response. Whatever bytes a client sends end in a status that says
what is wrong, never in INTERNAL. A client that cancels or goes away ends its requests.

Not here: what the models take (`kserve_models`). Methods that are not in the table below are UNIMPLEMENTED.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as pb

from hasten.errors import UsageError
from hasten.serve.access import generation_fields
from hasten.serve.app import HttpLimits
from hasten.serve.kserve_models import Answer, KServeModels, only_response
from hasten.serve.kserve_protobuf import FINAL, ResponseForm, parsed, read_infer, serialized
from hasten.serve.openai_errors import ApiError, ApiException, describe, printable
from hasten.serve.server import FLUSH_TIMEOUT_S, WRITE_TIMEOUT_S, Listen

SERVICE_NAME = "inference.GRPCInferenceService"

STATUS_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

# a status travels in HTTP/2 headers, of which clients take 8 KiB; a character there may have 12 bytes
MAX_DETAIL_CHARS = 500

logger = logging.getLogger(__name__)


@asynccontextmanager
async def grpc_serving(models: KServeModels, listen: Listen, limits: HttpLimits) -> AsyncIterator[str | None]:
    """Listens for as long as the context lasts, and gives the address; without a port it does nothing.

    Raises:
        UsageError: the address is taken or not this machine's, or the TLS files are none.
    """
    if listen.grpc_port is None:
        yield None
        return
    size = limits.max_body_bytes
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken is an error
        )
    )
    server.add_generic_rpc_handlers((KServeGrpc(models, limits).handlers(),))
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    try:
        if listen.tls_cert is None or listen.tls_key is None:
            port = server.add_insecure_port(f"{host}:{listen.grpc_port}")
        else:
            pair = (listen.tls_key.read_bytes(), listen.tls_cert.read_bytes())
            port = server.add_secure_port(f"{host}:{listen.grpc_port}", grpc.ssl_server_credentials((pair,)))
    except (RuntimeError, OSError) as error:
        raise UsageError(f"cannot listen for gRPC on {host}:{listen.grpc_port}: {error}") from error
    await server.start()
    try:
        yield f"{host}:{port}"
    finally:
        await server.stop(FLUSH_TIMEOUT_S)


class Call:
    """One request while it is answered, and what its line in the log will say.

    Attributes:
        status: CANCELLED until there is an answer.
    """

    def __init__(self, method: str, context: grpc.aio.ServicerContext) -> None:
        self.status = grpc.StatusCode.CANCELLED
        self.error: str | None = None
        self.answer: Answer | None = None
        self.prompt: Any = None
        self._method = method
        self._client = context.peer()
        self._start_s = time.perf_counter()

    def fail(self, error: Exception) -> ApiError:
        """What to tell the client."""
        described = describe(error)
        self.status = STATUS_CODES.get(described.status, grpc.StatusCode.INTERNAL)
        self.error = described.code
        if described.code == "internal_error":
            logger.error("%s failed", self._method, exc_info=error)
        return described

    def fields(self, *, log_prompts: bool) -> dict[str, Any]:
        """What the log's line has."""
        fields = {
            "client": self._client,
            "method": "gRPC",
            "path": f"/{SERVICE_NAME}/{self._method}",
            "status": self.status.name,
            "duration_s": round(time.perf_counter() - self._start_s, 6),
        }
        if self.error is not None:
            fields["error"] = self.error
        if self.answer is not None:
            fields |= {"stream": self._method == "ModelStreamInfer", **generation_fields((self.answer.work,))}
        if log_prompts and self.prompt is not None:
            fields["prompts"] = self.prompt
        return fields


class KServeGrpc:
    """The methods of one service."""

    def __init__(self, models: KServeModels, limits: HttpLimits) -> None:
        self._service = models.service
        self._limits = limits
        self._models = models

    def handlers(self) -> grpc.GenericRpcHandler:
        """All that is served, by name. Requests come as bytes, so that what is no message gets its own status."""
        unary: dict[str, tuple[type[Message], Callable[[Any, Call], Awaitable[Message]]]] = {
            "ServerLive": (pb.ServerLiveRequest, self._server_live),
            "ServerReady": (pb.ServerReadyRequest, self._server_ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, self._model_config),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._repository_index),
            "ModelInfer": (pb.ModelInferRequest, self._model_infer),
        }
        handlers = {name: self._unary(name, kind, answer) for name, (kind, answer) in unary.items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._model_stream_infer, response_serializer=serialized
        )
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def end(self, call: Call) -> None:
        """Counts and logs it."""
        if call.error is not None:
            self._service.metrics.errors.update((call.error,))
        logger.info("request", extra={"fields": call.fields(log_prompts=self._limits.log_prompts)})

    def check_key(self, context: grpc.aio.ServicerContext) -> None:
        """Raises ApiException unless the metadata has a key that lets in."""
        keys = self._limits.keys
        authorization = dict(context.invocation_metadata() or ()).get("authorization")
        if keys is not None and not keys.admits(authorization if isinstance(authorization, str) else None):
            message = "no valid API key: send one as metadata, authorization: Bearer KEY"
            raise ApiException(ApiError(401, "invalid_api_key", message))

    def _unary(
        self, name: str, kind: type[Message], answer: Callable[[Any, Call], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler:
        async def handle(raw: bytes, context: grpc.aio.ServicerContext) -> Message:
            call = Call(name, context)
            try:
                self.check_key(context)
                response = await answer(parsed(kind, raw), call)
                call.status = grpc.StatusCode.OK
                return response
            except Exception as error:
                await _abort(context, call, error)
                raise  # abort has raised
            finally:
                self.end(call)

        return grpc.unary_unary_rpc_method_handler(handle, response_serializer=serialized)

    async def _server_live(self, request: pb.ServerLiveRequest, call: Call) -> Message:
        return pb.ServerLiveResponse(live=self._service.client.failure is None)

    async def _server_ready(self, request: pb.ServerReadyRequest, call: Call) -> Message:
        return pb.ServerReadyResponse(ready=self._service.is_ready)

    async def _model_ready(self, request: pb.ModelReadyRequest, call: Call) -> Message:
        self._models.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._service.is_ready)

    async def _server_metadata(self, request: pb.ServerMetadataRequest, call: Call) -> Message:
        return pb.ServerMetadataResponse(name="hasten", version=version("hasten"), extensions=self._models.extensions)

    async def _model_metadata(self, request: pb.ModelMetadataRequest, call: Call) -> Message:
        model = self._models.find(request.name, request.version)
        return ParseDict(model.metadata(), pb.ModelMetadataResponse())

    async def _model_config(self, request: pb.ModelConfigRequest, call: Call) -> Message:
        model = self._models.find(request.name, request.version)
        return ParseDict({"config": model.config()}, pb.ModelConfigResponse())

    async def _repository_index(self, request: pb.RepositoryIndexRequest, call: Call) -> Message:
        return ParseDict({"models": self._models.index()}, pb.RepositoryIndexResponse())

    async def _model_infer(self, request: pb.ModelInferRequest, call: Call) -> Message:
        model, inference = read_infer(self._models, request)
        call.prompt = inference.prompt
        async with aclosing(await model.open(inference, is_stream=False)) as answer:
            call.answer = answer
            return ResponseForm(model, request).response(await only_response(answer))

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        try:
            self.check_key(context)
        except ApiException as error:
            call = Call("ModelStreamInfer", context)
            try:
                await _abort(context, call, error)
            finally:
                self.end(call)
        await InferStream(self, self._models, context).run(requests)


class InferStream:
    """One ModelStreamInfer: requests come in, and the responses of all of them go out as they are there.

    A reader that is slow stops the pieces of its own requests; how many of those there can be is what the
    queue takes. One that takes nothing for WRITE_TIMEOUT_S loses them.
    """

    def __init__(self, methods: KServeGrpc, models: KServeModels, context: grpc.aio.ServicerContext) -> None:
        self._methods = methods
        self._models = models
        self._context = context
        self._writing = asyncio.Lock()
        self._running: set[Call] = set()
        self._task = asyncio.current_task()
        self._is_stuck = False

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Until the client has sent its last request and has its last response, or is gone."""
        try:
            async with asyncio.TaskGroup() as tasks:
                async for raw in requests:
                    await self._begin(raw, tasks)
        except asyncio.CancelledError:
            if not self._is_stuck:
                raise
        finally:
            for call in self._running:  # those whose tasks were cancelled before they began
                assert call.answer is not None
                await call.answer.aclose()
                self._methods.end(call)
        if self._is_stuck:  # the client learns it when it reads again
            await self._context.abort(grpc.StatusCode.ABORTED, f"nothing was read for {WRITE_TIMEOUT_S} s")

    async def _begin(self, raw: bytes, tasks: asyncio.TaskGroup) -> None:
        call = Call("ModelStreamInfer", self._context)
        request_id = ""
        try:
            request = parsed(pb.ModelInferRequest, raw)
            request_id = request.id
            model, inference = read_infer(self._models, request)
            call.prompt = inference.prompt
            call.answer = await model.open(inference, is_stream=True)
        except Exception as error:
            await self._refuse(request_id, call, error)
            self._methods.end(call)
        else:
            self._running.add(call)
            tasks.create_task(self._respond(call, call.answer, ResponseForm(model, request), request_id))

    async def _respond(self, call: Call, answer: Answer, form: ResponseForm, request_id: str) -> None:
        self._running.remove(call)
        try:
            async with aclosing(answer):
                async for outputs in answer:
                    await self._write(form.stream_response(outputs))
            call.status = grpc.StatusCode.OK
        except Exception as error:
            await self._refuse(request_id, call, error)
        finally:
            self._methods.end(call)

    async def _refuse(self, request_id: str, call: Call, error: Exception) -> None:
        described = call.fail(error)
        response = pb.ModelInferResponse(id=request_id)
        response.parameters[FINAL].bool_param = True
        await self._write(
            pb.ModelStreamInferResponse(error_message=printable(described.message), infer_response=response)
        )

    async def _write(self, response: Message) -> None:
        async with self._writing:
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await self._context.write(response)
            except grpc.aio.BaseError as error:  # the client is gone, and the stream is about to be cancelled
                raise asyncio.CancelledError from error
            except TimeoutError as error:
                self._is_stuck = True
                if self._task is not None and self._task is not asyncio.current_task():
                    self._task.cancel()
                raise asyncio.CancelledError from error


async def _abort(context: grpc.aio.ServicerContext, call: Call, error: Exception) -> None:
    described = call.fail(error)
    details = printable(described.message[:MAX_DETAIL_CHARS])
    await context.abort(call.status, details, tuple(described.headers.items()))
