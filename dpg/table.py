"""Markdown tables, and the names of figures in them."""

from typing import Any


def words(name: str) -> str:
    """The name of a figure, for a person."""
    return name.replace("_", " ").replace("phi", "Φ")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
