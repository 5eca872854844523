"""`hasten generate`: text from a prompt or a file of prompts, streamed as it is generated."""

from contextlib import ExitStack

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, verb
from hasten.errors import RequestError
from hasten.pipeline.config import GenerateConfig


def register(app: typer.Typer) -> None:
    @verb(app, "generate", arguments=["model", "prompt"])
    def generate(config: GenerateConfig, *, json: Json = False) -> None:
        """Continue a prompt, or every line of a file, in any runtime and precision."""
        from hasten.pipeline.generate import generate as run_generate
        from hasten.pipeline.generate import read_prompts

        num_prompts = len(read_prompts(config)) if str(config.file) != "-" else None
        is_streamed = num_prompts == 1 and config.n == 1 and not json
        terminal.note(f"loading {config.model}")
        with ExitStack() as bar:

            def on_text(index: int, piece: str) -> None:
                bar.close()  # before the text comes
                if is_streamed:
                    print(piece, end="", flush=True)  # noqa: T201

            completions = run_generate(config, on_text, bar.enter_context(terminal.progress_bar()))
        if json:
            import msgspec

            terminal.result(msgspec.json.format(msgspec.json.encode(completions), indent=1).decode())
        elif is_streamed:
            terminal.result("")
        else:
            for completion in completions:
                which = completion.request_id + (f".{completion.index}" if config.n > 1 else "")
                terminal.result(f"[{which}] {completion.text}")
        failed = [completion for completion in completions if completion.finish_reason == "error"]
        if failed:
            raise RequestError(f"{len(failed)} of {len(completions)} failed: {failed[0].error}")
