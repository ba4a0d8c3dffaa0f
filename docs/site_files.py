"""For mkdocs: the examples that pages link to, outside docs/, are copied into the site, and the links follow."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDERS = ("examples", "benchmarks")


def on_files(files: Files, config: Any) -> Files:
    """Add the programs to the site's files."""
    root = Path(config.config_file_path).parent
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its links into the folders made links within the site."""
    for folder in FOLDERS:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
