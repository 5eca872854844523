"""`serve`: one model behind the OpenAI API and KServe v2; the engine in a process of its own."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass

import uvloop

from hasten.models.encoder_pooling import SentenceConfig
from hasten.pipeline.config import ServeConfig
from hasten.pipeline.progress import OnProgress, Schedule, silent
from hasten.pipeline.served_model import ENCODER_RUNTIME, model_name, runtime_config_of, served_target
from hasten.runtimes.base import EngineFacts
from hasten.runtimes.text import load_tokenizer
from hasten.serve.access import ApiKeys
from hasten.serve.app import HttpLimits, make_app, make_embedding_app
from hasten.serve.engine_client import EngineClient
from hasten.serve.kserve_embeddings import embedding_models
from hasten.serve.kserve_generation import generating_models
from hasten.serve.kserve_grpc import grpc_serving
from hasten.serve.logs import configure_logs
from hasten.serve.server import Listen, address_of, bound
from hasten.serve.server import serve as run_server
from hasten.serve.service import Service, ServiceLimits
from hasten.serve.tokenizer import ServeTokenizer


@dataclass(frozen=True)
class ServerReady:
    """A server that takes requests: where, under which name, and what is behind it.

    Args:
        note: why that is not what a run recommends, in a sentence; "" where it is.
    """

    address: str
    grpc_address: str | None
    model_name: str
    has_chat_template: bool
    facts: EngineFacts
    note: str


OnReady = Callable[[ServerReady], object]


def serve(config: ServeConfig, on_ready: OnReady, on_progress: OnProgress = silent) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        UsageError: the address, the keys, the certificate or another option cannot be used.
        ModelError, ResourceError: the model cannot be loaded.
    """
    keys = ApiKeys.read(config.api_key_file) if config.api_key_file is not None else None
    target, device = served_target(config)
    sentence = SentenceConfig.read(target.source) if target.candidate.runtime == ENCODER_RUNTIME else None
    listen = Listen(config.host, config.port, config.tls_cert, config.tls_key, config.drain_timeout_s, config.grpc_port)
    http = HttpLimits(keys, config.cors_origin, config.max_body_bytes, config.log_prompts)
    configure_logs(config.log_format)

    async def run() -> None:
        on_loading = until_ready.enter_context(Schedule(on_progress).loading(target.candidate.name))
        client = EngineClient(target.candidate.runtime, runtime_config, on_progress=on_loading)
        loading = asyncio.create_task(client.start())
        name = config.served_model_name or model_name(target)
        async with AsyncExitStack() as servers:
            try:
                lowercases = sentence is not None and sentence.lowercases
                tokenizer = ServeTokenizer(
                    await asyncio.to_thread(load_tokenizer, target.source), lowercases=lowercases
                )
                service = Service(client, tokenizer, name, ServiceLimits(config.max_queue, config.request_timeout_s))
                models = generating_models(service) if sentence is None else embedding_models(service)
                grpc_address = await servers.enter_async_context(grpc_serving(models, listen, http))
            except BaseException:
                loading.cancel()
                await asyncio.wait((loading,))
                raise

            def ready() -> None:
                until_ready.close()
                address = address_of(listener, listen)
                has_chat_template = tokenizer.has_chat_template
                on_ready(ServerReady(address, grpc_address, name, has_chat_template, client.facts, target.note))

            app = make_app(service, http) if sentence is None else make_embedding_app(service, http)
            await run_server(service, app, listener, listen, loading, ready)

    with bound(listen) as listener, ExitStack() as until_ready:
        runtime_config = runtime_config_of(config, target, device)
        uvloop.run(run())
