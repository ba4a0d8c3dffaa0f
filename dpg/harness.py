"""Texts of a task of the lm-evaluation-harness, from the harness's own YAML file."""

from pathlib import Path
from typing import Any

import yaml


def read_task(path: Path) -> list[str]:
    """The documents of a task, each its question and its right answer in one text.

    They are those of the task's training split, else of its validation split, else of its test split.

    Args:
        path: the task's YAML file.

    Raises:
        ValueError: if the harness is not installed, or the file is not a task with documents.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"{path} is a task of the lm-evaluation-harness: pip install 'metagrad[harness]'.") from error
    try:
        # Without the harness's own tasks, of which there are thousands.
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        (task,) = manager.load([_task_name(path)])["tasks"].values()
    except Exception as error:  # The harness and `datasets` raise many kinds.
        raise ValueError(f"{path} is not a task that can be loaded: {' '.join(str(error).split())}") from error
    splits = (
        (task.has_training_docs, task.training_docs),
        (task.has_validation_docs, task.validation_docs),
        (task.has_test_docs, task.test_docs),
    )
    documents = next((list(documents()) for there, documents in splits if there()), [])
    if not documents:
        raise ValueError(f"{path} is a task without documents.")
    return [_text(task, document) for document in documents]


def _task_name(path: Path) -> str:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise ValueError("it says no `task:`")
    return content["task"]


def _text(task: Any, document: Any) -> str:
    question, answer = task.doc_to_text(document), task.doc_to_target(document)
    if isinstance(answer, int):  # The place of the right choice.
        answer = task.doc_to_choice(document)[answer]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"the task asks {question!r} and answers {answer!r}, but only texts can be trained on.")
    # A task says what stands between the two, unless the answer brings its own blank.
    gap = "" if answer[:1].isspace() or question[-1:].isspace() else task.config.target_delimiter
    return question + gap + answer
