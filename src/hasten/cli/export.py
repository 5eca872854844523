"""`hasten export triton`: a model as a Triton model repository."""

import typer

from hasten.cli import terminal
from hasten.cli.options import Json, verb
from hasten.pipeline.config import TritonConfig


def register(app: typer.Typer) -> None:
    export = typer.Typer(help="Write a model for other programs.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(export, name="export")

    @export.callback()
    def group() -> None:
        """Write a model for other programs."""

    @verb(export, "triton", arguments=["model"])
    def triton(config: TritonConfig, *, json: Json = False) -> None:
        """Write a model repository for NVIDIA's Triton Inference Server; hasten serve --with triton runs it."""
        from dataclasses import asdict

        from hasten.pipeline.export import export_triton

        exported = export_triton(config)
        if json:
            import json as json_format

            terminal.result(json_format.dumps(asdict(exported), indent=1, default=str))
        else:
            terminal.result(f"repository: {exported.repository}")
            models = f"{exported.text_model} takes text, {exported.tokens_model} tokens"
            terminal.note(f"{models}; the weights stay in {exported.model}")
