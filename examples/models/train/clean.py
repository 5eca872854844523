"""Turns documentation files (reStructuredText, HTML, man pages, pod, Python) into plain text.

Each cleaner takes a path and returns text with paragraphs on one line and code as it was written. They are
approximate by design: good enough to learn from, no substitute for a renderer.
"""

import gzip
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

_ROLE = re.compile(r":(?:[\w+-]+:)+`([^`]*)`")
_ROLE_TARGET = re.compile(r"`([^`<]*?)\s*<[^`>]*>`_*")
_DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:.+-]+)::\s*(.*)$")
_OPTION = re.compile(r"^\s*:[\w\s-]+:(\s|$)")
_LABEL = re.compile(r"^\s*\.\. (_.*:|\|.*|\[.*)|^\s*\.\.(\s|$)|^__ ")
_LIST_ITEM = re.compile(r"^([*+#-]|\d+[.)]|\(\w\)|>>>|\.\.\.|\||\+[-=])(\s|$)|^#\.")
_RULER = re.compile(r"([^\w\s])\1+")
_DESCRIBED = re.compile(r"(function|class|method|attribute|data|exception|option|module|envvar|macro|type|var|member)$")
_QUIET = {"index", "highlight", "toctree", "image", "figure", "contents", "only", "include", "module", "currentmodule"}
_QUIET |= {"sectionauthor", "moduleauthor", "meta", "role", "literalinclude", "kernel-doc", "autoclass", "automodule"}


def read(path: Path) -> str:
    """The file as text; a .gz is unpacked and bytes that are no UTF-8 are dropped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", errors="ignore").replace("\r\n", "\n")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _inline_rst(line: str) -> str:
    line = _ROLE.sub(lambda match: re.sub(r"\s*<.*>$|^[~!]", "", match[1]), line)
    line = _ROLE_TARGET.sub(r"\1", line)
    line = re.sub(r"`([^`]+)`__?", r"\1", line).replace("``", "`")
    line = re.sub(r"\|([\w-]+)\|", r"\1", re.sub(r" ?\[#?\w*\]_", "", line))
    return re.sub(r"\\([*_|`\\ ])", r"\1", line)


def _directive(match: re.Match[str], literal_at: int) -> tuple[str | None, int]:
    """What a directive leaves in the text, and the indentation below which the text that follows is verbatim."""
    space, name, argument = match.groups()
    short = name.split(":")[-1]
    if short in {"index", "toctree", "autoclass", "automodule", "audit-event"}:
        return None, len(space)
    if short in {"code-block", "code", "sourcecode", "parsed-literal", "ipython", "math", "productionlist", "testcode"}:
        return None, len(space)
    if short in _QUIET:
        return None, literal_at
    if _DESCRIBED.search(short):
        return f"{space}{argument}", literal_at
    if short in {"note", "warning", "tip", "important", "seealso", "caution"}:
        title = "See also" if short == "seealso" else short.capitalize()
        return f"{space}{title}: {argument}", literal_at
    if short in {"versionadded", "versionchanged", "deprecated"}:
        label = {"versionadded": "New in", "versionchanged": "Changed in", "deprecated": "Deprecated since"}[short]
        return f"{space}{label} version {argument}", literal_at
    return f"{space}{argument}" if argument else None, literal_at


def _joins(previous: str, line: str) -> bool:
    """Whether `line` continues the paragraph that `previous` ends."""
    stripped = line.lstrip()
    if not previous.strip() or _LIST_ITEM.match(stripped) or _RULER.fullmatch(stripped):
        return False
    if _RULER.fullmatch(previous.strip()):
        return False
    if re.search(r"={4}|-{4}|\s{3,}\S", previous.strip()) or re.search(r"={4}|-{4}|\s{3,}\S", stripped):
        return False
    same_indent = _indent(previous) == _indent(line)
    item = re.match(r"\s*([*+-]|\d+\.|#\.)\s+", previous)
    return same_indent or bool(item and _indent(line) == item.end())


def rst(path: Path) -> str:
    """reStructuredText without its markup."""
    out: list[str] = []
    verbatim: set[int] = set()  # indices in `out`
    literal_at = -1  # lines indented deeper than this are verbatim; -1: none are
    open_paragraph = False
    for line in (line.rstrip() for line in read(path).expandtabs(8).split("\n")):
        if not line:
            out.append("")
            open_paragraph = False
            continue
        if literal_at >= 0 and _indent(line) > literal_at:
            verbatim.add(len(out))
            out.append(line)
            continue
        literal_at = -1
        if match := _DIRECTIVE.match(line):
            text, literal_at = _directive(match, literal_at)
            out.extend([text] if text else [])
            open_paragraph = False
            continue
        if _LABEL.match(line) or (_OPTION.match(line) and not open_paragraph):
            continue
        joins = open_paragraph and bool(out) and _joins(out[-1], line)
        text = line
        if line.endswith("::"):
            literal_at = _indent(line)
            text = line[:-1]
        if joins:
            out[-1] += " " + text.lstrip()
        else:
            out.append(text)
        open_paragraph = not re.search(r"^\s*(>>>|\.\.\.)", line)
    return "\n".join(line if index in verbatim else _inline_rst(line) for index, line in enumerate(out))


class _HtmlText(HTMLParser):
    """Collects the text of a page, without navigation."""

    blocks = frozenset(
        ("p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "tr", "pre", "table", "ul", "ol", "dl", "br")
    ) | {"section", "article", "blockquote"}
    skipped = frozenset(
        ("script", "style", "nav", "header", "footer", "head", "svg", "button", "select", "form", "noscript")
    )
    noise = re.compile(
        r"sphinxsidebar|related|navheader|navfooter|footer|\btoc|menu|side-?bar|\bnav|breadcrumb|banner|lang\b|"
        r"search|quickview|page-header|\bpath\b|\bup\b|tagline|contents|headerlink|\bprevnext|\bhd\b|\bft\b|prev-next"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip_tag = ""
        self.skip_depth = 0
        self.pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skip_tag:
            self.skip_depth += tag == self.skip_tag
            return
        described = " ".join(value or "" for name, value in attrs if name in {"class", "id", "summary", "role"})
        noisy = tag in {"div", "table", "ul", "a", "p", "aside"} and self.noise.search(described.lower())
        if tag in self.skipped or noisy:
            self.skip_tag, self.skip_depth = tag, 1
            return
        if tag in self.blocks and not self.pre_depth:
            self.parts.append("\n- " if tag == "li" else "\n")
        self.pre_depth += tag == "pre"
        if tag == "pre":
            self.parts.append("\n\x00")

    def handle_endtag(self, tag: str) -> None:
        if self.skip_tag:
            self.skip_depth -= tag == self.skip_tag
            if self.skip_depth == 0:
                self.skip_tag = ""
            return
        if tag == "pre" and self.pre_depth:
            self.pre_depth -= 1
            self.parts.append("\x00\n\n")
        elif tag in self.blocks and not self.pre_depth:
            self.parts.append("\n" if tag in {"li", "tr", "dt"} else "\n\n")
        elif tag in {"td", "th"}:
            self.parts.append("  ")

    def handle_data(self, data: str) -> None:
        if not self.skip_tag:
            self.parts.append(data if self.pre_depth else re.sub(r"\s+", " ", data))


def html(path: Path) -> str:
    """The text of an HTML page; preformatted blocks keep their lines."""
    parser = _HtmlText()
    parser.feed(read(path))
    parser.close()
    out = []
    for index, part in enumerate("".join(parser.parts).split("\x00")):
        if index % 2:
            out.append("\n".join("    " + line if line.strip() else "" for line in part.strip("\n").split("\n")))
        else:
            out.append("\n".join(" ".join(line.split()) for line in part.split("\n")))
    text = "\n".join(out).replace("¶", "")
    text = re.sub(r"\n- *\n+(?=\S)", "\n- ", text)
    return re.sub(r"\n{2,}(?=- )", "\n", text)


def man(path: Path) -> str:
    """A man page as groff shows it, with paragraphs on one line."""
    source = read(path)
    if source.startswith(".so "):
        return ""
    command = ["groff", "-t", "-mandoc", "-Tutf8", "-P-cbou", "-rHY=0", "-rLL=78n", "-dAD=l"]
    shown = subprocess.run(command, input=source, capture_output=True, text=True, check=False).stdout
    lines = shown.strip().split("\n")[1:-1]  # the page's header and footer
    out: list[str] = []
    for line in (line[7:] if line.startswith("       ") else line for line in lines):
        prose = out and re.search(r"\w[,.;:]?$|[.,;)]$", out[-1]) and len(out[-1]) > 48
        if prose and line.strip() and _joins(out[-1], line):
            out[-1] += " " + " ".join(line.split())
        else:
            out.append(line.rstrip())
    out = [re.sub(r"(?<=\S) {2,3}(?=\S)", " ", line) if len(line) > 60 else line for line in out]
    return "\n".join(out)


def pod(path: Path) -> str:
    """Perl's plain old documentation without its markup."""
    text = re.sub(r"^=(begin|for)\b.*?^=end.*?$|^=(cut|over|back|encoding|pod)\b.*$", "", read(path), flags=re.M | re.S)
    if text.count("\n") < 5:  # the non-greedy block above ran to the end of an unusual file
        return ""
    text = re.sub(r"^=(?:head\d|item)\s*", "", text, flags=re.M)
    for _ in range(3):
        text = re.sub(r"\bL<+\s*(?:([^|<>]*)\|)?([^<>]*?)\s*>+", lambda match: match[1] or match[2], text)
        text = re.sub(r"\b[BCEFISXZ]<+\s*([^<>]*?)\s*>+", r"\1", text)
    paragraphs = re.split(r"\n{2,}", text)
    return "\n\n".join(block if block.startswith((" ", "\t")) else " ".join(block.split()) for block in paragraphs)


def python(path: Path) -> str:
    """Python source as it is."""
    return read(path).expandtabs(8)


CLEANERS: dict[str, Callable[[Path], str]] = {"rst": rst, "html": html, "man": man, "pod": pod, "python": python}


_NAVIGATION = re.compile(r"- *(- *)?((Prev|Next|Up|Home)\b.*)?")


def tidy(text: str) -> str:
    """Drops control characters, rulers, over-long lines and runs of blank lines."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd\u00ad]", "", text).replace("\xa0", " ").replace("\u200b", "")
    lines = (
        re.sub(r"([=~^*_#\-+.\"'`])\1{11,}", lambda match: match[1] * 8, line.rstrip()) for line in text.split("\n")
    )
    kept = [line for line in lines if len(line) <= 6000 and not _NAVIGATION.fullmatch(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"
