"""Which Debian packages the text comes from, and how a file of each becomes plain text.

Every package is in Debian's main section, so its text may be read, changed and passed on. The order of the table is
the order of the corpus. Not here: the cleaning itself (clean.py) and the split (corpus.py).
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PSF = "PSF-2.0"
LIBRARY = r"/python3/dist-packages/.*\.py$"
DATA = r"/(tests?|testing|locale|_?vendor(ed)?|extern|externals)/|test_|_tests?\.py$"  # of libraries: not read


@dataclass(frozen=True)
class Source:
    """One package: files whose path in the package matches `pattern` are read as `kind`."""

    package: str
    kind: str  # a key of clean.CLEANERS
    pattern: str
    licence: str
    exclude: str = ""

    def paths(self, root: Path) -> Iterator[Path]:
        """Files of this source below `root`, where the package was unpacked, in sorted order."""
        wanted, unwanted = re.compile(self.pattern), re.compile(self.exclude) if self.exclude else None
        for path in sorted((root / self.package).rglob("*")):
            name = path.relative_to(root / self.package).as_posix()
            if wanted.search(name) and not (unwanted and unwanted.search(name)) and path.is_file():
                yield path


SOURCES = (
    Source("python3.11-doc", "rst", r"_sources/.*\.rst\.txt$", PSF, exclude=r"whatsnew/changelog"),
    Source("libpython3.11-minimal", "python", r"\.py$", PSF),
    Source("libpython3.11-stdlib", "python", r"\.py$", PSF, exclude=r"pydoc_data|/encodings/"),
    Source("libpython3.11-testsuite", "python", r"\.py$", PSF, exclude=r"/cjkencodings|bad_|badsyntax|/data/"),
    Source("idle-python3.11", "python", r"\.py$", PSF),
    Source("python3-distutils", "python", r"\.py$", PSF),
    Source("python3-lib2to3", "python", r"\.py$", PSF, exclude=r"tests/data"),
    Source("debian-reference-en", "html", r"\.en\.html$", "GPL-2.0-or-later"),
    Source("debian-policy", "rst", r"_sources/.*\.rst\.txt$", "GPL-2.0-or-later"),
    Source("developers-reference", "rst", r"_sources/.*\.rst\.txt$", "GPL-2.0-or-later"),
    Source("maint-guide", "html", r"\.en\.html$", "GPL-2.0-or-later"),
    Source("debian-handbook", "html", r"html/en-US/.*\.html$", "GPL-2.0-or-later OR CC-BY-SA-3.0"),
    Source("debian-faq", "html", r"\.html$", "GPL-2.0-or-later"),
    Source("apt-doc", "html", r"en\.?.*\.html$|guide\.html/.*\.html$", "GPL-2.0-or-later"),
    Source("aptitude-doc-en", "html", r"\.html$", "GPL-2.0-or-later"),
    Source("installation-guide-amd64", "html", r"/en/.*\.html$", "GPL-2.0-or-later"),
    Source("bash-doc", "html", r"\.html$", "GFDL-1.3-no-invariants"),
    Source("manpages", "man", r"man/man\d/", "Linux-man-pages-copyleft, GPL-2.0-or-later, BSD"),
    Source("manpages-dev", "man", r"man/man\d/", "Linux-man-pages-copyleft, GPL-2.0-or-later, BSD"),
    Source("perl-doc", "pod", r"\.pod$", "GPL-1.0-or-later OR Artistic", exclude=r"perl5\d+delta"),
    Source("git-doc", "html", r"\.html$", "GPL-2.0-only", exclude=r"RelNotes"),
    Source("postgresql-doc-15", "html", r"/html/.*\.html$", "PostgreSQL", exclude=r"bookindex|/release"),
    Source("linux-doc-6.1", "rst", r"_sources/.*\.rst\.txt$", "GPL-2.0-only", exclude=r"translations|devicetree"),
    Source("sqlite3-doc", "html", r"\.html$", "public domain", exclude=r"session/|c3ref/|releaselog|syntax/"),
    Source("python-django-doc", "html", r"\.html$", "BSD-3-Clause", exclude=r"genindex|modindex|releases/|_modules"),
    Source(
        "rust-doc",
        "html",
        r"/(book|reference|nomicon|rust-by-example|embedded-book|edition-guide|rustc|rustdoc)/.*\.html$",
        "MIT OR Apache-2.0",
        exclude=r"print\.html|2018-edition|first-edition|second-edition",
    ),
    Source("apache2-doc", "html", r"manual/en/.*\.html$", "Apache-2.0", exclude=r"quickreference|directives\.html"),
    Source("sphinx-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-2-Clause", exclude=r"changes"),
    Source("python-pandas-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-3-Clause", exclude=r"whatsnew|api/"),
    Source("python-scipy-doc", "html", r"\.html$", "BSD-3-Clause", exclude=r"genindex|release|_modules|search"),
    Source("python-sympy-doc", "rst", r"_sources/.*\.rst\.txt$|rst/.*\.rst(\.gz)?$", "BSD-3-Clause"),
    Source("python-sqlalchemy-doc", "rst", r"rst/.*\.rst$", "MIT", exclude=r"changelog"),
    Source("twisted-doc", "rst", r"_sources/.*\.rst\.txt$", "MIT"),
    Source("cmake-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-3-Clause", exclude=r"release/"),
    Source("nodejs-doc", "html", r"\.html$", "MIT", exclude=r"/all\.html|index"),
    Source("postfix-doc", "html", r"README\.html$", "IPL-1.0 OR EPL-2.0"),
    Source("python-flask-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-3-Clause", exclude=r"changes"),
    Source("python-click-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-3-Clause", exclude=r"changes"),
    Source("python-jinja2-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-3-Clause", exclude=r"changes"),
    Source("python-requests-doc", "rst", r"_sources/.*\.rst\.txt$", "Apache-2.0"),
    Source("python-werkzeug-doc", "rst", r"_sources/.*\.rst\.txt$", "BSD-3-Clause", exclude=r"changes"),
    Source("python-tornado-doc", "rst", r"_sources/.*\.rst\.txt$", "Apache-2.0"),
    Source("python-pytest-doc", "rst", r"_sources/.*\.rst\.txt$", "MIT", exclude=r"changelog|announce"),
    Source("python-setuptools-doc", "rst", r"_sources/.*\.rst\.txt$", "MIT", exclude=r"history"),
    Source("python-attr-doc", "rst", r"_sources/.*\.rst\.txt$", "MIT"),
    Source("python3-django", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-twisted", "python", LIBRARY, "MIT", exclude=DATA),
    Source("python3-sqlalchemy", "python", LIBRARY, "MIT", exclude=DATA),
    Source("python3-networkx", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-nltk", "python", LIBRARY, "Apache-2.0", exclude=DATA),
    Source("mercurial-common", "python", LIBRARY, "GPL-2.0-or-later", exclude=DATA),
    Source("python3-dask", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-distributed", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-sphinx", "python", LIBRARY, "BSD-2-Clause", exclude=DATA),
    Source("python3-setuptools", "python", LIBRARY, "MIT", exclude=DATA),
    Source("scons", "python", LIBRARY, "MIT", exclude=DATA),
    Source("python3-xarray", "python", LIBRARY, "Apache-2.0", exclude=DATA),
    Source("python3-reportlab", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-ipython", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-hypothesis", "python", LIBRARY, "MPL-2.0", exclude=DATA),
    Source("python3-scrapy", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-werkzeug", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-nbconvert", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-traitlets", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-mako", "python", LIBRARY, "MIT", exclude=DATA),
    Source("python3-babel", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("ansible-core", "python", LIBRARY, "GPL-3.0-or-later", exclude=DATA),
    Source("python3-aiohttp", "python", LIBRARY, "Apache-2.0", exclude=DATA),
    Source("python3-tornado", "python", LIBRARY, "Apache-2.0", exclude=DATA),
    Source("python3-dulwich", "python", LIBRARY, "Apache-2.0 OR GPL-2.0-or-later", exclude=DATA),
    Source("python3-sklearn", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-jinja2", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-click", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-flask", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
    Source("python3-requests", "python", LIBRARY, "Apache-2.0", exclude=DATA),
    Source("python3-sympy", "python", LIBRARY, "BSD-3-Clause", exclude=DATA),
)


def fetch(folder: Path) -> None:
    """Downloads the packages with apt and unpacks each into `folder`/<package>; nothing is installed."""
    debs = folder / "deb"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *(source.package for source in SOURCES)], cwd=debs, check=True)
    for deb in sorted(debs.glob("*.deb")):
        package, version, _ = deb.stem.split("_")
        target = folder / "unpacked" / package
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", deb, target], check=True)
        (folder / "unpacked" / f"{package}.version").write_text(version.replace("%3a", ":") + "\n")
