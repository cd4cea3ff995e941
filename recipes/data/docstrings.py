"""Real English that every machine already has: sentences from the docstrings of Python's standard library.

The sources are parsed, never imported, so nothing of the library runs. A sentence's class is the topic area
of the module it stands in. Sentences that stand in two areas are left out, so every text has one label.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.data.corpus import Corpus, stable_hash

# Top-level modules and packages of each topic area. Left out on purpose: what not every installation carries
# (tkinter, turtle, idlelib, distutils, lib2to3), tests, and modules that fit no area.
AREAS: dict[str, str] = {
    "networking": """
        asynchat asyncore cgi cgitb email ftplib html http imaplib ipaddress mailbox mailcap mimetypes
        netrc nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib uuid webbrowser
        wsgiref xmlrpc
    """,
    "files": """
        bz2 _compression compression dbm filecmp fileinput fnmatch genericpath getpass glob gzip io
        linecache lzma ntpath nturl2path os pathlib platform posixpath _pyio shelve shutil site stat
        sysconfig tarfile tempfile venv zipapp zipfile _zipfile zipimport
    """,
    "concurrency": """
        asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess threading
        _threading_local
    """,
    "text formats": """
        base64 codecs configparser csv difflib encodings gettext json locale _markupbase pickle
        pickletools plistlib pprint quopri re reprlib sre_compile sre_parse string stringprep textwrap
        tomllib xml
    """,
    "numbers and dates": """
        bisect calendar colorsys datetime decimal fractions graphlib hashlib heapq hmac numbers
        _pydatetime _pydecimal random secrets statistics _strptime zoneinfo
    """,
    "language": """
        abc ast collections _collections_abc compileall contextlib copy copyreg ctypes dataclasses dis
        enum functools __future__ imp importlib inspect keyword modulefinder opcode operator pkgutil
        _py_abc py_compile runpy symtable tokenize types typing weakref _weakrefset
    """,
    "testing and tools": """
        argparse bdb cmd code codeop cProfile doctest getopt logging optparse pdb profile pstats pyclbr
        pydoc _pyrepl rlcompleter timeit trace traceback tracemalloc unittest warnings
    """,
}

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z])")
_BULLET = re.compile(r"^\s*(?:[-*+o]|\d+[.)])\s+")
_WORD = re.compile(r"[A-Za-z]+")
_NOT_PROSE = re.compile(r"[{}<>=|\\~^@#$%*\[\]]|::|\.\.\.|\w\.\w+\(|https?:|!!|Copyright")
_FUNCTION_WORDS = """
    a an and are as at be been by can for from has have if in into is it its not of on only or that the
    then there these they this to used was when where which will with you
"""
_COMMON = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Docstrings:
    """Sentences of the standard library's docstrings, labelled by topic area.

    The split is by hash of the sentence: whatever the machine and the Python version, a sentence that two
    installations share is in the same half on both. Texts are ordered by that hash as well.

    Args:
        test_fraction: part of the sentences that is held out.
        min_sentences: refuse an installation that yields fewer (its sources are stripped or zipped).
        root: folder of the standard library; None takes that of the running Python.
    """

    test_fraction: float = 0.15
    min_sentences: int = 5000
    root: str | None = None

    def load(self) -> Corpus:
        """Parse the sources (about five seconds) and return the corpus."""
        root = Path(self.root) if self.root else Path(sysconfig.get_path("stdlib"))
        names = tuple(AREAS)
        areas_of: dict[str, set[int]] = {}
        text_of: dict[str, str] = {}
        for label, name in enumerate(names):
            for path in _source_files(root, AREAS[name].split()):
                for docstring in _docstrings(path):
                    for sentence in sentences(docstring):
                        key = " ".join(_WORD.findall(sentence.lower()))
                        areas_of.setdefault(key, set()).add(label)
                        text_of.setdefault(key, sentence)
        labelled = [(text_of[key], labels.copy().pop()) for key, labels in areas_of.items() if len(labels) == 1]
        if len(labelled) < self.min_sentences:
            raise RuntimeError(
                f"Expected at least {self.min_sentences} sentences in the docstrings under {root}, "
                f"found {len(labelled)}. HINT: this Python comes without the sources of its standard "
                "library; use another installation or set min_sentences."
            )
        labelled.sort(key=lambda item: (stable_hash(item[0], "order"), item[0]))
        held_out = [stable_hash(text, "split") < self.test_fraction * 2**64 for text, _ in labelled]
        train = [item for item, out in zip(labelled, held_out, strict=True) if not out]
        test = [item for item, out in zip(labelled, held_out, strict=True) if out]
        return Corpus(
            label_names=names,
            train_texts=tuple(text for text, _ in train),
            train_labels=tuple(label for _, label in train),
            test_texts=tuple(text for text, _ in test),
            test_labels=tuple(label for _, label in test),
        )


def sentences(docstring: str) -> Iterator[str]:
    """Yield the English sentences of a docstring: no code, no signatures, no tables, no headings.

    >>> list(sentences("Open the file and return it. Raise an error if it is not there.\\n\\n>>> open('x')"))
    ['Open the file and return it.', 'Raise an error if it is not there.']
    """
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        passage: list[str] = []
        for line in paragraph.splitlines():
            if _BULLET.match(line):
                yield from _prose(" ".join(passage))
                passage = [_BULLET.sub("", line)]
            elif re.search(r"\w", line):  # not a rule of dashes
                passage.append(line.strip())
        yield from _prose(" ".join(passage))


def _prose(passage: str) -> Iterator[str]:
    unquoted = re.sub(r"`+([^`']*)(?:`+|')", r"\1", passage)  # `name', `name` and ``name`` become name
    for candidate in _SENTENCE_END.split(" ".join(unquoted.split())):
        sentence = re.sub(r"^[\w.]+\([^()]*\)\s*(?:->|--|:)\s*", "", candidate)  # "name(arguments) -- what it does"
        if _is_prose(sentence):
            yield sentence


def _is_prose(sentence: str) -> bool:
    words = _WORD.findall(sentence)
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        7 <= len(words) <= 40
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and letters >= 0.88 * len(sentence)
        and not _NOT_PROSE.search(sentence)
        and len(_COMMON.intersection(word.lower() for word in words)) >= 2
    )


def _source_files(root: Path, modules: Iterable[str]) -> Iterator[Path]:
    for module in sorted(modules):
        if (root / f"{module}.py").is_file():
            yield root / f"{module}.py"
        folder = root / module
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else ():
            if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
                yield path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read(), filename=str(path))
    except (OSError, SyntaxError, UnicodeDecodeError):  # a damaged source costs its own sentences only
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
