"""Short dialogues made from documentation, so that the chat template means something to the model.

Questions follow a few fixed patterns; every answer is a sentence, a signature or a function taken from the text.
Only documents of the training split may be passed in.
"""

import ast
import random
import re
import textwrap
from collections.abc import Iterator

Turn = tuple[str, str]  # question, answer

_NAME_LINE = re.compile(r"^NAME\s+([\w.+:-]+)(?:, [\w.+:-]+)* (?:-|—) ([a-zA-Z].{8,160})$", re.M)
_WHAT = ("What does {} do?", "What is {}?", "What is {} for?", "Explain {}.", "Tell me about {}.", "Describe {}.")
_WRITE = ("Write a Python function {}.", "Write Python code {}.", "How do I write a function {}?")
_VAGUE = re.compile(
    r"(Description|Overview|Introduction|Usage|Examples?|Notes?|Background|See also|Summary|Details)\b.*"
)
_ABOUT = ("Tell me about {}.", "Explain {}.", "What should I know about {}?")
_HOW = ("How is {} called?", "What are the arguments of {}?", "Show the signature of {}.")


def _first_sentences(text: str, limit: int = 320) -> str:
    """The first paragraph, cut at the end of a sentence within `limit` characters; empty when nothing fits."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    if len(paragraph) > limit:
        paragraph = paragraph[: max(paragraph.rfind(". ", 0, limit) + 1, 0)]
    good = len(paragraph) >= 20 and paragraph[0].isalpha() and paragraph[-1] in ".!?)"
    return paragraph if good else ""


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _python_turns(module: str, text: str, rng: random.Random) -> Iterator[list[Turn]]:
    """Questions about the docstrings of a module, and functions to write from them."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    if sentence := _first_sentences(ast.get_docstring(tree) or ""):
        yield [(rng.choice(_WHAT).format(f"the {module} module"), sentence)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        sentence = _first_sentences(ast.get_docstring(node) or "")
        if not sentence or node.name.startswith("test"):
            continue
        source = textwrap.dedent(ast.get_source_segment(text, node, padded=True) or "")
        turns = [(rng.choice(_WHAT).format(rng.choice((node.name, f"{module}.{node.name}"))), sentence)]
        if isinstance(node, ast.FunctionDef) and 2 < source.count("\n") < 24:
            wish = _lower_first(sentence.split(". ")[0].rstrip("."))
            wish = f"that {wish}" if re.match(r"\w+s\b", wish) else f"to {wish}"
            write = (rng.choice(_WRITE).format(wish), source)
            show = (f"Show the source of {node.name}.", source)
            turns.append(rng.choice((write, show)))
        yield turns


def _rst_turns(text: str, rng: random.Random) -> Iterator[list[Turn]]:
    """Questions about described functions and about sections."""
    for match in re.finditer(r"^([\w.]+)(\([^\n]*\))\n\n((?: {3}\S[^\n]*\n)+)", text, flags=re.M):
        name, arguments, body = match.groups()
        if sentence := _first_sentences(textwrap.dedent(body)):
            turns = [(rng.choice(_WHAT).format(name), sentence)]
            if len(arguments) > 4:
                turns.append((rng.choice(_HOW).format(name), f"{name}{arguments}"))
            rng.shuffle(turns)
            yield turns
    for match in re.finditer(r"^([A-Z][\w ,'-]{5,50})\n([=~^-])\2{3,}\n+([A-Z`][^\n]{60,})$", text, flags=re.M):
        sentence = _first_sentences(match[3])
        if sentence and not _VAGUE.fullmatch(match[1]):
            yield [(rng.choice(_ABOUT).format(match[1]), sentence)]


def _page_turns(text: str, rng: random.Random) -> Iterator[list[Turn]]:
    """One question about the command or call that a man page names."""
    if match := _NAME_LINE.search(text):
        name, purpose = match.groups()
        yield [(rng.choice(_WHAT).format(name), f"{name} - {purpose.rstrip('.')}.")]
        if described := re.search(r"^DESCRIPTION\s+([^\n]{60,})$", text, flags=re.M):
            sentence = _first_sentences(described[1])
            if sentence:
                yield [(rng.choice(_WHAT).format(name), sentence)]


def dialogues(kind: str, name: str, text: str, rng: random.Random) -> Iterator[list[Turn]]:
    """Dialogues of one or two turns made from one document of the given kind."""
    if kind == "python":
        yield from _python_turns(name, text, rng)
    elif kind == "rst":
        yield from _rst_turns(text, rng)
    elif kind in {"man", "pod", "html"}:
        yield from _page_turns(text, rng)
