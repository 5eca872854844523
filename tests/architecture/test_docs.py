"""Every `hasten` command in the documentation has a verb and options that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from hasten.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_in(page: Path) -> Iterator[list[str]]:
    """Words of each `hasten ...` and `make ...` line in the page's shell blocks."""
    for block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.split(r"\s[|>&]|;", line.removeprefix("$ "))[0]
            words = shlex.split(command, comments=True)
            if words:
                words[0] = words[0].removeprefix(".venv/bin/")
                if words[0] in ("hasten", "make"):
                    yield words


def check_hasten(words: list[str]) -> None:
    command = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no verb {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    known = {"--help", *(flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts))}
    for word in rest:
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            assert word.partition("=")[0] in known, f"{command.name} has no option {word}"


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words[1:]:
        assert word in targets or "=" in word, f"there is no make target {word!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for words in commands_in(page):
        (check_hasten if words[0] == "hasten" else check_make)(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
