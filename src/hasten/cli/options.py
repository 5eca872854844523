"""Command-line options generated from the fields of a config dataclass.

A field's default and help text are written once, in the dataclass; `verb` turns a function
of a config into a command that typer can read.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.errors import UsageError


def verb(app: typer.Typer, name: str, arguments: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Registers `run(config, *, json)` as the command `name` of `app`.

    The config class is the annotation of run's first parameter. Its fields become options,
    those named in `arguments` positional arguments; run's keyword-only parameters are taken
    as typer would.
    """

    def register(run: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(run, eval_str=True).parameters.values())
        config_class = own[0].annotation
        hints = typing.get_type_hints(config_class)
        fields = {field.name: field for field in dataclasses.fields(config_class) if "help" in field.metadata}
        ordered = [*arguments, *(name for name in fields if name not in arguments)]

        def command(**values: Any) -> None:
            settings = {key: _from_text(hints[key], values.pop(key), key) for key in fields}
            run(config_class(**settings), **values)

        parameters = [_parameter(fields[key], hints[key], key in arguments) for key in ordered]
        signature = inspect.Signature([*parameters, *own[1:]])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        app.command(name, help=inspect.getdoc(run))(command)
        return run

    return register


def _item_of(hint: Any) -> Any:
    """The type of the items that a tuple has, or a tuple that may be absent; None for anything else."""
    for each in (hint, *typing.get_args(hint)):
        if typing.get_origin(each) is tuple:
            return typing.get_args(each)[0]
    return None


def _parameter(field: dataclasses.Field[Any], hint: Any, is_argument: bool) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    text = field.metadata["help"]
    default: Any = field.default
    annotation: Any = hint
    metavar = None
    item = _item_of(hint)
    if item is not None and is_argument:
        annotation = list[item]  # type: ignore[valid-type]
    elif item is not None and default is None:
        annotation, metavar = str | None, "A,B,..."
    elif item is not None:
        annotation, default = str, ",".join(str(each) for each in default)
        metavar = "A,B,..."
        if item is str and not default:
            annotation, default, metavar = list[str], [], "TEXT"  # free text may hold commas: repeat the option
    if is_argument:
        required = inspect.Parameter.empty if field.default in ("", ()) else default
        return inspect.Parameter(
            field.name, kind, default=required, annotation=Annotated[annotation, typer.Argument(help=text)]
        )
    flags = field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)
    info = typer.Option(*flags, help=text, metavar=metavar, show_default=default not in (None, "", []))
    return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[annotation, info])


def _from_text(hint: Any, value: Any, name: str) -> Any:
    item = _item_of(hint)
    if item is None or value is None:
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    try:
        return tuple(item(part) for part in parts)
    except ValueError as error:
        kind = "whole numbers" if item is int else "numbers"
        raise UsageError(f"--{name.replace('_', '-')} takes {kind} with commas between, got {value!r}") from error


Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
OutputFile = Annotated[Path | None, typer.Option("-o", "--output", help="write the result to this file")]
