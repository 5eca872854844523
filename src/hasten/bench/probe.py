"""What a server is asked before it is measured: which model it has, and which optional fields it takes.

One short request is made in the way of those that will be measured. Over HTTP a server that refuses an
optional field is asked again without it; over gRPC it lists the fields. Nothing here is timed.
"""

import http.client
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from hasten.bench.endpoints import (
    IGNORE_EOS,
    OPENAI_OPTIONAL,
    TOKEN_IDS,
    USAGE,
    Answer,
    Endpoint,
    KServeEndpoint,
    NotAnAnswerError,
    OnlineRequest,
    OpenAIEndpoint,
    error_text,
)
from hasten.bench.grpc_stream import ask
from hasten.bench.http_stream import Address, status_text
from hasten.bench.kserve_messages import PROMPT, KServeGrpcEndpoint, metadata_request
from hasten.config import nearest
from hasten.errors import EndpointError, UsageError

Api = Literal["completions", "chat", "kserve"]

PROBE_TOKENS = 8
REFUSED = frozenset({400, 422})


@dataclass(frozen=True)
class Probe:
    """What a server said.

    Args:
        endpoint: how to ask it for tokens.
        max_context_tokens: None where it does not say.
        num_prompt_tokens: of the prompt that it was given, by its own count; None likewise.
        missing: what is not known of each request, with the reason.
    """

    endpoint: Endpoint
    model: str
    max_context_tokens: int | None
    num_prompt_tokens: int | None
    missing: dict[str, str]


def probe(address: Address, api: Api, model: str | None, prompt: str, timeout_s: float) -> Probe:
    """Finds the model and makes one request.

    Raises:
        UsageError: the model, the key or the API is not the server's. EndpointError: it cannot be reached
        or does not answer as its API says.
    """
    request = OnlineRequest("probe", prompt, len(prompt.split()), PROBE_TOKENS)
    context = None
    if address.is_grpc and api != "kserve":
        raise UsageError(f"{address.url} is gRPC, which only KServe has: add --api kserve --model NAME")
    if api == "kserve" and model is None:
        raise UsageError("a KServe server does not list its models: name one with --model")
    if model is not None and address.is_grpc:
        endpoint, parts = _kserve_grpc(address, model, request, timeout_s)
    elif model is not None and api == "kserve":
        _get(address, f"/v2/models/{model}", timeout_s)
        variants: list[Endpoint] = [
            KServeEndpoint(model, is_nested=is_nested, is_counted=is_counted)
            for is_counted in (True, False)
            for is_nested in (False, True)
        ]
        endpoint, parts = _first_taken(address, variants, request, timeout_s)
    else:
        model, context = _openai_model(address, model, timeout_s)
        fields = (OPENAI_OPTIONAL, (IGNORE_EOS, USAGE), (USAGE,), ())
        variants = [OpenAIEndpoint(model, api == "chat", optional) for optional in fields]
        endpoint, parts = _first_taken(address, variants, request, timeout_s)
    answer = endpoint.read([time.perf_counter()] * len(parts), parts)
    if answer.error is not None or not answer.chunks:
        reason = answer.error or "the answer has no text"
        raise EndpointError(f"{address.url}{endpoint.path} does not stream as its API says: {reason}")
    endpoint, missing = _described(endpoint, answer)
    return Probe(endpoint, model, context, answer.num_prompt_tokens, missing)


def _first_taken(
    address: Address, endpoints: Sequence[Endpoint], request: OnlineRequest, timeout_s: float
) -> tuple[Endpoint, list[bytes]]:
    """The first that the server does not refuse, with what it answered."""
    for endpoint in endpoints:
        status, body = _ask(address, "POST", endpoint.path, endpoint.body(request), timeout_s)
        if status == 200:
            return endpoint, [body]
        if status not in REFUSED:
            break
    raise _refusal(address, endpoint.path, status, body)


def _kserve_grpc(
    address: Address, model: str, request: OnlineRequest, timeout_s: float
) -> tuple[Endpoint, list[bytes]]:
    """The model's endpoint, with the messages that it answered."""
    path, question = metadata_request(model)
    described = _ask_grpc(address, path, question, timeout_s)
    try:
        endpoint = KServeGrpcEndpoint.from_metadata(model, described)
    except NotAnAnswerError as error:
        raise EndpointError(f"{address.url}{path} does not answer as its API says: {error}") from error
    if PROMPT not in endpoint.inputs:
        raise UsageError(f"the model {model!r} has no input {PROMPT}: only models that take text are measured")
    return endpoint, _ask_grpc(address, endpoint.path, endpoint.body(request), timeout_s)


def _described(endpoint: Endpoint, answer: Answer) -> tuple[Endpoint, dict[str, str]]:
    """The endpoint without what has no effect, and what is not known therefore."""
    missing = {}
    has_token_ids = all(chunk.num_tokens is not None for chunk in answer.chunks)
    if answer.num_tokens is None and not has_token_ids:
        missing["token_count"] = "the server gives no token counts: a chunk counts as a token, merged ones too low"
    elif not has_token_ids:
        missing["token_ids"] = "the server gives no token ids: where it merges tokens, their times are spread"
    if isinstance(endpoint, OpenAIEndpoint):
        if not has_token_ids:
            endpoint = replace(endpoint, optional=tuple(each for each in endpoint.optional if each != TOKEN_IDS))
        ended_early = answer.num_tokens is not None and answer.num_tokens < PROBE_TOKENS
        if IGNORE_EOS not in endpoint.optional or ended_early:
            endpoint = replace(endpoint, optional=tuple(each for each in endpoint.optional if each != IGNORE_EOS))
            missing["ignore_eos"] = "the server does not take ignore_eos: answers may be shorter than was asked for"
    return endpoint, missing


def _openai_model(address: Address, wanted: str | None, timeout_s: float) -> tuple[str, int | None]:
    listed = _get(address, "/v1/models", timeout_s)
    try:
        models = {each["id"]: each.get("max_model_len") for each in listed["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise EndpointError(f"{address.url}/v1/models does not answer as OpenAI's API says") from error
    if wanted is None and len(models) != 1:
        raise UsageError(
            f"the server has {len(models)} models: name one with --model, of {', '.join(models) or 'none'}"
        )
    name = wanted or next(iter(models))
    if name not in models:
        raise UsageError(f"the server has no model {name!r}: {nearest(name, models)}")
    return name, models[name]


def _get(address: Address, path: str, timeout_s: float) -> Any:
    status, body = _ask(address, "GET", path, None, timeout_s)
    if status != 200:
        raise _refusal(address, path, status, body)
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise EndpointError(f"{address.url}{path} does not answer in JSON: is this the server's address?") from error


def _ask(address: Address, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
    if address.is_tls:
        context = ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address.host, address.port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    try:
        connection.request(method, address.prefix + path, body, address.headers)
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError as error:
        raise EndpointError(f"{address.url} did not answer within {timeout_s:g} s: is it still loading?") from error
    except ConnectionRefusedError as error:
        raise EndpointError(
            f"nothing listens at {address.netloc} (connection refused): start the server, or check host and port"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise EndpointError(f"{address.url} cannot be used: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _ask_grpc(address: Address, path: str, payload: bytes, timeout_s: float) -> list[bytes]:
    """The response messages of a call that ended with OK."""
    code, details, parts = ask(address, path, payload, timeout_s)
    if code == "OK":
        return parts
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        raise _locked(address, code)
    if code in ("NOT_FOUND", "UNIMPLEMENTED"):
        raise UsageError(f"{address.url} refused {path} ({details}): check the address and the model's name")
    if code == "DEADLINE_EXCEEDED":
        raise EndpointError(f"{address.url} did not answer within {timeout_s:g} s: is it still loading?")
    if code == "UNAVAILABLE":
        raise EndpointError(
            f"{address.url} cannot be used ({details}): start the server, or check host, port and that it is "
            "the one for gRPC"
        )
    raise EndpointError(f"{address.url}{path} ended with {code}: {details}")


def _refusal(address: Address, path: str, status: int, body: bytes) -> UsageError | EndpointError:
    """The error for an answer that is not 200."""
    try:
        reason = error_text(msgspec.json.decode(body))
    except msgspec.DecodeError:
        reason = ""
    if status in (401, 403):
        return _locked(address, status_text(status))
    if status == 404:
        which = "the right one, the model's name and --api (completions, chat or kserve)"
        return UsageError(
            f"{address.url} has no {path} ({reason or status_text(status)}): check that the address is {which}"
        )
    return EndpointError(f"{address.url}{path} answered {status_text(status)}{f': {reason}' if reason else ''}")


def _locked(address: Address, status: str) -> UsageError:
    cure = "check the key of --api-key-file" if address.key else "give the server's key with --api-key-file"
    return UsageError(f"{address.url} lets nobody in without its key ({status}): {cure}")
