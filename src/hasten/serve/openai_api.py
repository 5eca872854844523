"""The OpenAI API's routes that generate: requests into Service.open, pieces into its answers and streams.

Status and headers are sent with the first piece, so whatever ends a request before that is answered
with a status of its own. A later error is an event of the stream, and the last one: a stream that was
cut never ends in [DONE].
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from hasten.errors import HastenError
from hasten.request import SamplingParams
from hasten.serve.access import HttpRequest, http_request
from hasten.serve.event_stream import DONE, EventStreamResponse
from hasten.serve.json_route import JsonRoute
from hasten.serve.models_api import ERRORS, blaming, chat_prompt, check_model
from hasten.serve.openai_chat_models import ChatCompletionRequest
from hasten.serve.openai_errors import describe
from hasten.serve.openai_format import AnswerFormat, ChatFormat, Choice, CompletionFormat, ToolChatFormat
from hasten.serve.openai_models import CompletionRequest, SamplingFields
from hasten.serve.pieces import Piece
from hasten.serve.service import Generation, Service

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

# of a completion that does not say, as OpenAI has it
DEFAULT_MAX_TOKENS = 16


def openai_router(service: Service) -> APIRouter:
    """Completions and chats of one service."""
    router = APIRouter(responses=ERRORS, route_class=JsonRoute)

    @router.post("/v1/completions", responses=STREAMS)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continues a prompt, or several."""
        record = http_request(request.scope)
        record.prompts = body.prompt
        check_model(service, body.model)
        service.check_ready()
        with blaming("prompt"):
            service.check_places(len(body.prompts) * body.n)
            prompts = [
                await service.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
                for prompt in body.prompts
            ]
            room = min(service.output_room(prompt) for prompt in prompts)
        max_tokens = body.max_tokens or min(max(DEFAULT_MAX_TOKENS, body.min_tokens), room)
        sampling = body.sampling(max_tokens, body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)
        form = CompletionFormat(record.request_id, service, body, prompts)
        decode = service.tokenizer.decode
        echoes = [each if isinstance(each, str) else decode(each) for each in body.prompts] if body.echo else None
        return await _answer(service, body, record, prompts, sampling, form, echoes)

    @router.post("/v1/chat/completions", responses=STREAMS)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation, put into the model's chat template."""
        record = http_request(request.scope)
        with blaming("messages"):
            record.prompts = messages = [message.for_template() for message in body.messages]
        check_model(service, body.model)
        service.check_ready()
        prompt = await chat_prompt(service.tokenizer, messages, body.offered_tools, body.chat_template_kwargs)
        with blaming("messages"):
            room = service.output_room(prompt)
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = body.sampling(max_tokens or room, (body.top_logprobs or 0) if body.logprobs else None)
        form_class = ToolChatFormat if body.offered_tools else ChatFormat
        form = form_class(record.request_id, service, body, [prompt])
        return await _answer(service, body, record, [prompt], sampling, form)

    return router


async def _answer(
    service: Service,
    body: SamplingFields,
    record: HttpRequest,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    form: AnswerFormat,
    echoes: Sequence[str] | None = None,
) -> Response:
    """Runs the prompts of one request; choice i * n + j is continuation j of prompt i.

    Args:
        echoes: the prompts' texts, where they go before the continuations.
    """
    for field, token_ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
    ):
        with blaming(field):
            service.check_vocabulary(token_ids, field)
    async with AsyncExitStack() as stack:
        generations: list[Generation] = []
        for index, prompt in enumerate(prompts):
            echo = None if echoes is None else echoes[index]
            with blaming("max_tokens"):
                generation = await service.open(prompt, sampling, priority=body.priority, echo=echo)
            generations.append(await stack.enter_async_context(aclosing(generation)))
        record.generations = generations
        pieces = aiter(generations[0]) if len(generations) == 1 else _merged(generations, sampling.n, stack)
        if body.stream:
            events = _events(await anext(pieces), pieces, form, generations, record)
            return EventStreamResponse(events, stack.pop_all())
        choices = [Choice() for _ in range(len(prompts) * sampling.n)]
        async for some in pieces:
            for piece in some:
                choices[piece.index].add(piece)
        return Response(form.answer(choices, generations), media_type="application/json")


async def _events(
    first: Sequence[Piece],
    rest: AsyncIterator[Sequence[Piece]],
    form: AnswerFormat,
    generations: Sequence[Generation],
    record: HttpRequest,
) -> AsyncIterator[bytes]:
    """The events of a stream; those of pieces that came together are one chunk."""
    yield form.events(first, generations)
    try:
        async for some in rest:
            yield form.events(some, generations)
    except HastenError as error:
        described = describe(error)
        record.error = described.code
        yield b"data: " + described.body() + b"\n\n"
        return
    yield form.usage_event(generations) + DONE


def _merged(generations: Sequence[Generation], n: int, stack: AsyncExitStack) -> AsyncIterator[Sequence[Piece]]:
    """The pieces of several generations as they come, numbered as choices; `stack` ends who reads them."""
    queue: asyncio.Queue[Sequence[Piece] | Exception | None] = asyncio.Queue(maxsize=1)

    async def read(position: int, generation: Generation) -> None:
        try:
            async for pieces in generation:
                await queue.put([msgspec.structs.replace(each, index=position * n + each.index) for each in pieces])
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    async def take() -> AsyncIterator[Sequence[Piece]]:
        num_running = len(readers)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item

    async def end() -> None:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    readers = [asyncio.create_task(read(position, each)) for position, each in enumerate(generations)]
    stack.push_async_callback(end)
    return take()
