"""Prompts from a file or a data set of the user's."""

import json
from pathlib import Path

from dpg.harness import read_task


def read_prompts(source: str) -> list[str]:
    """The prompts of a text file (one a line), a JSON-lines file, a `datasets` folder or a hub data set.

    A YAML file is a task of the lm-evaluation-harness, and gives its documents. A data set may be given with its
    configuration and split, as `wikimedia/wikipedia:20231101.en:train[:1000]`.

    Raises:
        ValueError: if there is nothing of that name, no `prompt` or `text` column, or no prompt in it.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        prompts = read_task(path)
    elif path.is_file():
        try:
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            prompts = [_column(json.loads(line), source) for line in lines] if path.suffix == ".jsonl" else lines
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not a UTF-8 text file ({error}). Save it as UTF-8.") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} has a line that is not JSON ({error}): {error.doc[:60]!r}.") from error
    else:
        prompts = _from_datasets(source)
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{source} holds no prompts.")
    return prompts


def _column(row: object, source: str) -> str:
    for name in ("prompt", "text"):
        if isinstance(row, dict) and isinstance(row.get(name), str):
            return row[name]
    raise ValueError(f"{source} has the row {row!r}, but prompts are strings in a column `prompt` or `text`.")


def _from_datasets(source: str) -> list[str]:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ValueError(
            f"{source} is not a file, and reading it as a data set needs the package `datasets`: "
            "pip install 'metagrad[data]'."
        ) from error
    try:
        if Path(source).is_dir():
            data = load_from_disk(source)
        else:
            name, _, rest = source.partition(":")
            configuration, _, split = rest.partition(":")
            data = load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # `datasets` raises a different class for every way of not finding something.
        raise ValueError(
            f"{source!r} is neither a file, nor a folder written by `datasets`, nor a data set that can be downloaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if isinstance(data, dict):  # Of a folder with several splits.
        if "train" not in data:
            raise ValueError(f"{source} has the splits {', '.join(data)} and no `train`. Save the one you want alone.")
        data = data["train"]
    return [_column(row, source) for row in data]
