"""Collects the training text and splits it by file into training, validation and held-out documents.

Writes into a folder: train.jsonl.xz and validation.jsonl.xz (one document a line), heldout.txt, sources.json.
The split depends on the file's name alone, so it is the same on every run. Held-out documents are taken from Python's
own documentation and library (PSF licence) so that they may ship with the model; a validation document is of the same
files and is never trained on either. Dialogues are made of training documents only.
"""

import hashlib
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from chat import Turn, dialogues
from clean import CLEANERS, tidy
from sources import PSF, SOURCES, Source

HELDOUT_BYTES = 90_000
HELDOUT_SOURCES = {"python3.11-doc", "libpython3.11-minimal", "libpython3.11-stdlib"}
MAX_DOCUMENT_CHARS = 400_000
MIN_DOCUMENT_CHARS = 400


@dataclass(frozen=True)
class Document:
    """One file's text."""

    source: str
    name: str
    kind: str
    text: str

    @property
    def digest(self) -> int:
        """A number that depends on the document's name alone."""
        return int.from_bytes(hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()[:8], "big")

    @property
    def is_heldout(self) -> bool:
        """Whether this document is kept out of training."""
        return self.source in HELDOUT_SOURCES and self.digest % 25 == 0


def _is_readable(text: str) -> bool:
    letters = sum(character.isascii() and (character.isalpha() or character in " \n") for character in text[:20_000])
    foreign = sum(not character.isascii() for character in text[:20_000])
    size = min(len(text), 20_000)
    return len(text) >= MIN_DOCUMENT_CHARS and letters > 0.6 * size and foreign < 0.03 * size


def _documents(source: Source, root: Path, seen: set[int]) -> Iterable[Document]:
    """The source's documents, without paragraphs that an earlier document had."""
    for path in source.paths(root):
        text = tidy(CLEANERS[source.kind](path))[:MAX_DOCUMENT_CHARS]
        blocks = []
        for block in text.split("\n\n"):
            key = hash(block) if len(block) >= 120 else None
            if key not in seen:
                blocks.append(block)
            if key is not None:
                seen.add(key)
        text = "\n\n".join(blocks).strip() + "\n"
        if _is_readable(text):
            name = path.relative_to(root / source.package).as_posix()
            yield Document(source.package, name, source.kind, text)


def _heldout(documents: list[Document]) -> list[Document]:
    """Whole documents of moderate length, prose and Python in turn, about HELDOUT_BYTES in all."""
    fitting = (document for document in documents if 1500 <= len(document.text) <= 14_000)
    code = (document for document in fitting if document.kind == "rst" or "def " in document.text)  # no tables
    ordered = sorted(code, key=lambda document: document.digest)
    halves = {kind: [document for document in ordered if document.kind == kind] for kind in ("rst", "python")}
    chosen: list[Document] = []
    for half in halves.values():
        size = 0
        for document in half:
            if size + len(document.text.encode()) <= HELDOUT_BYTES // 2:
                chosen.append(document)
                size += len(document.text.encode())
    return sorted(chosen, key=lambda document: document.digest)


def _chat_documents(documents: Iterable[Document], seed: int) -> list[Document]:
    """Groups of dialogues; within a group each dialogue is a list of turns, as JSON in the document's text."""
    rng = random.Random(seed)
    unique: dict[tuple[str, str], list[Turn]] = {}
    for document in documents:
        module = re.sub(r".*(?:python3\.11|dist-packages)/|\.py$|/__init__", "", document.name).replace("/", ".")
        for turns in dialogues(document.kind, module, document.text, rng):
            unique.setdefault(turns[0], turns)
    groups = list(unique.values())
    rng.shuffle(groups)
    return [Document("chat", str(index), "chat", json.dumps(turns)) for index, turns in enumerate(groups)]


def _write(path: Path, documents: Iterable[Document]) -> None:
    with lzma.open(path, "wt", preset=4, encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


def load(path: Path) -> list[Document]:
    """Documents written by `build`."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def build(root: Path, out: Path, seed: int) -> None:
    """Cleans the packages unpacked below `root` and writes the corpus to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    documents = [document for source in SOURCES for document in _documents(source, root, seen)]
    outside = [document for document in documents if document.is_heldout]
    heldout = _heldout(outside)
    names = {(document.source, document.name) for document in heldout}
    validation = [document for document in outside if (document.source, document.name) not in names]
    train = [document for document in documents if not document.is_heldout]
    chat = _chat_documents(train, seed)
    random.Random(seed).shuffle(train)
    _write(out / "train.jsonl.xz", [*train, *chat])
    _write(out / "validation.jsonl.xz", validation)
    (out / "heldout.txt").write_text("\n".join(document.text for document in heldout), encoding="utf-8")

    sizes = Counter[str]()
    for document in [*train, *chat]:
        sizes[document.source] += len(document.text.encode())
    licences = {source.package: source.licence for source in SOURCES}
    rows = [
        {
            "package": package,
            "version": (root / f"{package}.version").read_text().strip(),
            "licence": licence,
            "training_bytes": sizes[package],
        }
        for package, licence in licences.items()
    ]
    facts = {
        "sources": rows,
        "chat_bytes": sizes["chat"],
        "num_dialogues": len(chat),
        "num_documents": len(train),
        "heldout_licence": PSF,
        "heldout": [f"{document.source}/{document.name}" for document in heldout],
    }
    (out / "sources.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(train)} documents, {sum(sizes.values()) / 1e6:.1f} MB, {len(chat)} dialogues; held out {len(outside)}")
