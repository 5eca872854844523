"""`hasten serve`: a model behind the OpenAI API and KServe v2, until it is told to end."""

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from hasten.cli import terminal
from hasten.cli.options import verb
from hasten.pipeline.config import ServeConfig

if TYPE_CHECKING:
    from hasten.pipeline.serve import ServerReady
    from hasten.pipeline.serve_triton import TritonReady


def register(app: typer.Typer) -> None:
    @verb(app, "serve", arguments=["model"])
    def serve(config: ServeConfig) -> None:
        """Serve a model with the OpenAI API and KServe v2; SIGTERM or Ctrl-C lets running requests end."""
        if config.server == "triton":
            from hasten.pipeline.serve_triton import serve_triton

            serve_triton(config, _tell_triton)
            return
        from hasten.extras import check_extra

        check_extra("serve")
        from hasten.pipeline.serve import serve as run_serve

        with ExitStack() as until_ready:
            on_progress = until_ready.enter_context(terminal.progress_bar())

            def on_ready(ready: "ServerReady") -> None:
                until_ready.close()
                _tell(config, ready)

            run_serve(config, on_ready, on_progress)


def _tell(config: ServeConfig, ready: "ServerReady") -> None:
    facts = ready.facts
    if ready.note:
        terminal.note(ready.note)
    where = f"{ready.model_name} ({facts.runtime} {facts.scheme} on {facts.device}"
    if (embedding := facts.embedding) is not None:
        length = "of length 1" if embedding.is_normalized else "not normalized"
        terminal.note(
            f"serving embeddings of {where}, inputs of at most {facts.max_model_tokens} tokens)\n"
            f"vectors     {embedding.size} numbers, {length}, pooling {' and '.join(embedding.pooling)}"
        )
    else:
        terminal.note(
            f"serving {where}, {facts.max_num_seqs} sequences of at most {facts.max_model_tokens} tokens)\n"
            f"page        {ready.address}/"
        )
    grpc = f", gRPC {ready.grpc_address}" if ready.grpc_address else ""
    terminal.note(f"OpenAI API  {ready.address}/v1\nKServe v2   {ready.address}/v2{grpc}")
    terminal.note(f"metrics     {ready.address}/metrics\ntry it:\n  {_example(config, ready)}")


def _example(config: ServeConfig, ready: "ServerReady") -> str:
    """A curl command that asks the server something."""
    path, asked = "completions", {"prompt": "Once upon a time", "max_tokens": 64, "stream": True}
    if ready.facts.embedding is not None:
        path, asked = "embeddings", {"input": "Once upon a time"}
    elif ready.has_chat_template:
        messages = [{"role": "user", "content": "Hello"}]
        path, asked = "chat/completions", {"messages": messages, "max_tokens": 64, "stream": True}
    body = json.dumps({"model": ready.model_name, **asked})
    options = " -k" if config.tls_cert else ""
    key = " -H 'Authorization: Bearer KEY'" if config.api_key_file else ""
    return f"curl -N{options} {ready.address}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'"


def _tell_triton(ready: "TritonReady") -> None:
    ports = ready.ports
    body = json.dumps({"text_input": "Once upon a time", "max_tokens": 64, "stream": True})
    url = f"http://{ports.host}:{ports.http}"
    terminal.note(
        f"tritonserver has {', '.join(ready.models)}\n"
        f"HTTP        {url}/v2\n"
        f"gRPC        {ports.host}:{ports.grpc}\n"
        f"metrics     http://{ports.host}:{ports.metrics}/metrics\n"
        f"try it:\n  curl -N {url}/v2/models/{ready.models[0]}/generate_stream -d '{body}'"
    )
