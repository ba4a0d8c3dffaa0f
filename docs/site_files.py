"""For mkdocs: the examples that pages link to, outside docs/, are copied into the site, and the links follow."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDERS = ("examples", "benchmarks")


def on_files(files: Files, config: Any) -> Files:
    """Add the programs to the site's files."""
    root = Path(config.config_file_path).parent
    for folder in FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            files.append(File.generated(config, f"{folder}/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its links into the folders made links within the site."""
    for folder in FOLDERS:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
