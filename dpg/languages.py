"""Short passages in English, German, Spanish, French and Italian, from manuals that Debian packages carry.

The Debian administrator's handbook and the Debian reference exist in all five languages. Their packages are fetched at
run time through ``apt-get``, which must be there; a folder of one's own texts does as well, and needs nothing.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import torch

from dpg.corpus import MAX_CHARACTERS, MAX_SENTENCES, MIN_WORDS, is_held_out

LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}
PACKAGES = ("debian-handbook", *(f"debian-reference-{code}" for code in LANGUAGES))

# The pages of a language within a package: html/de-DE/*.html of the handbook, *.de.html of the reference.
_PAGES = {code: (f"html/{code}-{code.upper()}/*.html", f"debian-reference/*.{code}.html") for code in LANGUAGES}
_PAGES["en"] = ("html/en-US/*.html", "debian-reference/*.en.html")
_BLOCKS = {"body", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ol", "p", "pre", "table", "td"}
_BLOCKS |= {"th", "title", "tr", "ul"}
# Letters of any alphabet and the marks of prose; code, tables and most identifiers contain some other character.
_SENTENCE = re.compile(r"""[«„“¿¡]?[^\W\d_a-zà-ÿ](?:[^\W_]|[ ,;:'"()«»„“”’¿¡-])*[.!?]\)?""")
_BOUNDARY = re.compile(r"(?<=[.!?])\s+(?=[«„“¿¡]?[^\W\d_a-zà-ÿ])")


def passages(folder: Path | None = None) -> dict[str, list[str]]:
    """Passages of one to three sentences by language code.

    Args:
        folder: holds ``en.txt``, ``de.txt``, ``es.txt``, ``fr.txt`` and ``it.txt``, a passage a line. None for the
            manuals, which are fetched once and kept in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``).

    Returns:
        Distinct passages, none in two languages: what a translation left in English counts as English. The manuals'
        passages have at most `MAX_CHARACTERS` characters.

    Raises:
        ValueError: for a missing or empty file, or if the manuals cannot be fetched.
    """
    if folder is None:
        folder = cache() / "languages"
        if not all((folder / f"{code}.txt").is_file() for code in LANGUAGES):
            fetch(folder)
    read = {code: _read(folder / f"{code}.txt") for code in LANGUAGES}
    owner: dict[str, str] = {}
    for code, found in read.items():
        for passage in found:
            owner.setdefault(passage, code)
    return {code: [passage for passage, its in owner.items() if its == code] for code in LANGUAGES}


def cache() -> Path:
    """The folder in the user's cache for what is made once."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "metagrad"


def training(folder: Path | None = None) -> dict[str, list[str]]:
    """The passages that models may be pretrained on, by language code."""
    return {code: [text for text in found if not is_held_out(text)] for code, found in passages(folder).items()}


def held_out(folder: Path | None = None) -> dict[str, list[str]]:
    """The passages that no pretrained model saw, by language code."""
    return {code: [text for text in found if is_held_out(text)] for code, found in passages(folder).items()}


def documents(texts: dict[str, list[str]], english_share: float) -> list[str]:
    """Two passages a document, on two lines, each in any language whatever the other's; in torch's random order.

    The English passages are repeated until they make `english_share` of all; the others occur once.
    """
    others = [text for code, found in texts.items() if code != "en" for text in found]
    num_english = round(len(others) * english_share / (1 - english_share))
    english = [texts["en"][i % len(texts["en"])] for i in range(num_english)]
    passages = [*english, *others]
    order = torch.randperm(len(passages)).tolist()
    return [f"{passages[i]}\n{passages[j]}" for i, j in zip(order[::2], order[1::2], strict=False)]


def prompts(texts: list[str], max_characters: int = 120) -> list[str]:
    """The shorter of `texts` as prompts: a first line, which asks for a second."""
    return [f"{text}\n" for text in texts if len(text) <= max_characters]


def fetch(folder: Path) -> None:
    """Write the manuals' passages into `folder`, in the form that `passages` reads.

    Raises:
        ValueError: if ``apt-get`` or ``dpkg-deb`` is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        unpacked = Path(name)
        for package in PACKAGES:
            _run("apt-get", "download", package, cwd=unpacked)
        for file in sorted(unpacked.glob("*.deb")):
            _run("dpkg-deb", "-x", file.name, ".", cwd=unpacked)
        for code in LANGUAGES:
            path = folder / f"{code}.txt"
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{text}\n" for text in unpacked_passages(unpacked, code)), encoding="utf-8")
            partial.replace(path)


def unpacked_passages(unpacked: Path, code: str) -> Iterator[str]:
    """The passages in one language of packages unpacked into one folder, in the order of the files' paths."""
    for pattern in _PAGES[code]:
        for path in sorted(unpacked.rglob(pattern)):
            for paragraph in paragraphs(path.read_text(encoding="utf-8")):
                yield from split(paragraph)


def paragraphs(html: str) -> list[str]:
    """The text of a page's paragraphs (``<p>`` and ``<div class="para">``), without markup."""
    reader = _Paragraphs()
    reader.feed(html)
    reader.close()
    return reader.found


def split(paragraph: str) -> Iterator[str]:
    """The passages of one paragraph: neighbouring sentences, as many as fit. What is not prose ends a passage."""
    passage: list[str] = []
    for sentence in [*_BOUNDARY.split(paragraph), ""]:
        prose = _SENTENCE.fullmatch(sentence) and len(sentence) <= MAX_CHARACTERS
        prose = prose and len(sentence.split()) >= MIN_WORDS
        full = len(passage) == MAX_SENTENCES or len(" ".join([*passage, sentence])) > MAX_CHARACTERS
        if passage and (full or not prose):
            yield " ".join(passage)
            passage = []
        if prose:
            passage.append(sentence)


class _Paragraphs(HTMLParser):
    """Collects the text that stands directly in a paragraph, not in a list or listing inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[tuple[str, bool]] = []  # Enclosing blocks: the tag, and whether it is a paragraph.
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self._end_paragraph()
            self._open.append((tag, tag == "p" or (tag == "div" and ("class", "para") in attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag in {block for block, _ in self._open}:
            self._end_paragraph()
            while self._open.pop()[0] != tag:  # Blocks that were never closed end with the one around them.
                pass

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def _end_paragraph(self) -> None:
        text = " ".join("".join(self._text).split())
        if text and self._open and self._open[-1][1]:
            self.found.append(text)
        self._text.clear()


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}). {_FOLDER}") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{path} holds no passage. {_FOLDER}")
    return found


_FOLDER = f"The folder of texts needs {', '.join(f'{code}.txt' for code in LANGUAGES)}, with a passage a line."


def _run(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else None
    except FileNotFoundError:
        problem = f"there is no {command[0]} on this machine"
    if problem:
        raise ValueError(
            f"the texts come from Debian packages, but `{' '.join(command)}` failed: {problem}. Run `apt-get update` "
            f"and try again, or bring texts of your own with `--texts FOLDER`. {_FOLDER}"
        )
