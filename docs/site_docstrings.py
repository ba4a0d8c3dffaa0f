"""For mkdocs: the house's docstrings as mkdocstrings reads them, which knows no section `Cost`."""

import re
from typing import Any

from griffe import Extension, Object

REST = r"(.*(?:\n[ ]+\S.*)*)"
PARAGRAPH = re.compile(rf"^(Cost|Args and errors|Args, errors and cost): {REST}", re.MULTILINE)
RETURNS = re.compile(rf"^Returns:\n{REST}", re.MULTILINE)
SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8,}\S.*)*)", re.MULTILINE)


def readable(docstring: str) -> str:
    """The docstring with these sections as paragraphs, and an entry for each of several arguments named together."""
    docstring = PARAGRAPH.sub(lambda found: f"**{found[1]}.** {_sentence(found[2])}", docstring)
    docstring = RETURNS.sub(lambda found: f"**Returns.** {_sentence(found[1])}", docstring)
    docstring = SEVERAL.sub(
        lambda found: "\n".join(f"    {name}: {_one_line(found[2])}" for name in found[1].split(", ")), docstring
    )
    return docstring.replace("](", "]\\(")  # `metrics[t](state)` is a call there, and no link.


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    line = _one_line(text)
    return line[0].upper() + line[1:]


class Readable(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
