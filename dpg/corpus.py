"""English prose that every Python installation carries: its documentation.

The demonstrations need real sentences without a download. The standard library has about ten thousand of them, in the
language reference that ``help()`` prints (``pydoc_data.topics``) and in docstrings. Files are parsed, never imported.
"""

import ast
import importlib.util
import inspect
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from dpg.upkeep import collector_paused

MIN_WORDS = 5
MAX_CHARACTERS = 240
MAX_SENTENCES = 3

# Code, tables and most identifiers contain some other character; prose rarely does.
_SENTENCE = re.compile(r"""[A-Z][A-Za-z0-9 ,;:'"()-]*[a-z][A-Za-z0-9 ,;:'"()-]*[.!?]\)?""")
_BOUNDARY = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`]*>`_*")
_QUOTES = re.compile(r"``?|\*\*?(?=\w)|(?<=\w)\*\*?")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def passages(packages: Iterable[str] = ()) -> list[str]:
    """Passages of one to three sentences from the standard library, then from `packages`.

    Args:
        packages: Names of installed packages to read too, such as ``"torch"``.

    Returns:
        Distinct passages of at most `MAX_CHARACTERS` characters, in the order of the files' paths. The same Python
        version gives the same list; another version has somewhat different documentation.

    Raises:
        ValueError: A package is not installed.
    """
    folders = [Path(sysconfig.get_path("stdlib")), *map(_package_folder, packages)]
    found = (passage for folder in folders for text in _documentation(folder) for passage in _split(text))
    with collector_paused():
        return list(dict.fromkeys(found))


def is_held_out(passage: str, one_in: int = 8) -> bool:
    """Whether `passage` belongs to the part that no model is pretrained on.

    The choice depends on the passage's characters alone, so it is the same on every machine and does not change when
    other passages come or go.
    """
    return zlib.crc32(passage.encode()) % one_in == 0


def held_out() -> list[str]:
    """Passages of the standard library that the pretrained models never saw, in the order of `passages`."""
    return [passage for passage in passages() if is_held_out(passage)]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # Looks the package up without importing it.
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"Package {name!r} is not installed here. Install it or leave it out of `packages`.")
    return Path(next(iter(spec.submodule_search_locations)))


def _documentation(folder: Path) -> Iterator[str]:
    """Every docstring under `folder`, and the topics of ``help()`` where `folder` has them."""
    for path in sorted(_sources(folder)):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # Templates, and files written for another version of Python.
        yield from _docstrings(tree)
        if path.parts[-2:] == ("pydoc_data", "topics.py"):
            yield from map(inspect.cleandoc, _strings(tree))


def _sources(folder: Path) -> Iterator[Path]:
    """The Python files under `folder`; skipped folders, of which one holds all installed packages, are not entered."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if each not in _SKIPPED_FOLDERS]
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def _docstrings(node: ast.Module | ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    if isinstance(node, ast.Module | ast.ClassDef):  # Not into functions: few nested ones have a docstring.
        for child in node.body:
            yield from _docstrings(child)


def _strings(tree: ast.Module) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def _split(text: str) -> Iterator[str]:
    """The passages of one docstring: neighbouring sentences of one paragraph, as many as fit."""
    for paragraph in re.split(r"\n\s*\n", text):
        passage: list[str] = []
        for sentence in _sentences(paragraph):
            full = len(passage) == MAX_SENTENCES or len(" ".join([*passage, sentence])) > MAX_CHARACTERS
            if passage and (full or not sentence):
                yield " ".join(passage)
                passage = []
            if sentence:
                passage.append(sentence)
        if passage:
            yield " ".join(passage)


def _sentences(paragraph: str) -> Iterator[str]:
    """The sentences of `paragraph` without markup; an empty string stands for one that is not prose."""
    lines = paragraph.expandtabs().splitlines()
    if any(re.match(r"\s*(>>>|\.\. |@|[-=~^+]{3,})", line) for line in lines):
        return  # A doctest, a directive, a heading or a table.
    if len({len(line) - len(line.lstrip()) for line in lines[1:]}) > 1:
        return  # Ragged indentation: a list of arguments, or code.
    flat = " ".join(" ".join(lines).split())
    for pattern, kept in ((_ROLE, r"\1"), (_LINK, r"\1"), (_QUOTES, "")):
        flat = pattern.sub(kept, flat)
    for sentence in _BOUNDARY.split(flat):
        prose = _SENTENCE.fullmatch(sentence) and len(sentence) <= MAX_CHARACTERS
        yield sentence if prose and len(sentence.split()) >= MIN_WORDS else ""
