"""Requests and replies as JSON."""

import json
from typing import Any

from dpg.serve.barrier import Order
from dpg.serve.batch import Batch, Done, Failure, Refused, Rewards, Sample, Shape
from dpg.serve.limits import Limits

FIELDS = {"batch", "stream", "size", "group_size", "samples"}


def read_order(body: bytes, limits: Limits) -> Order:
    """The order that a request's body holds.

    Raises:
        Refused: if it is none, or goes beyond a limit, saying where.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:  # Of damaged UTF-8 too; of brackets a thousand deep.
        raise Refused("malformed", f"the body is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise Refused("malformed", f"the body must be a JSON object, not {_kind(content)}.")
    if unknown := sorted(content.keys() - FIELDS):
        raise Refused("malformed", f"the body has a field {unknown[0]!r}; known are {', '.join(sorted(FIELDS))}.")
    stream = "stream" in content
    if stream == ("batch" in content):
        raise Refused("malformed", "the body must name either a `batch` or a `stream`.")
    name = _name(content, "stream" if stream else "batch", limits)
    shape = _shape(content, limits)
    rows = content.get("samples")
    if not isinstance(rows, list) or not rows:
        raise Refused("malformed", f"`samples` must be a list of at least one sample, not {_kind(rows)}.")
    samples = [_sample(row, limits) for row in rows]
    if stream and len(samples) != 1:
        raise Refused("malformed", f"a stream takes one sample a request, not {len(samples)}. Name a `batch` instead.")
    by_id = {sample.id: sample for sample in samples}
    if len(by_id) != len(samples):
        raise Refused("malformed", f"{len(samples)} samples have only {len(by_id)} different ids.")
    return Order(name, stream, shape, by_id)


def reply(order: Order, done: Done, rewards: Rewards) -> dict[str, Any]:
    """What the sender of an order is told: the rewards of its samples, in its order, and figures of the batch."""
    rescaled = rewards.rescaled
    return {
        "batch": str(done.key),
        "size": done.shape.size,
        "phi": rewards.phi,
        "reward_std": rewards.reward_std,
        "seconds": rewards.seconds,
        "rewards": [
            {"id": id, "raw": rewards.raw[id], "rescaled": None if rescaled is None else rescaled[id]}
            for id in order.samples
        ],
    }


def record(done: Done) -> dict[str, Any]:
    """The line of a batch in `metrics.jsonl`."""
    line = {"batch": str(done.key), "size": done.shape.size, "waited": done.waited}
    if isinstance(done.outcome, Failure):
        return line | {"error": done.outcome.kind, "message": done.outcome.message}
    rewards = done.outcome
    own = {"phi": rewards.phi, "reward_std": rewards.reward_std, "seconds": rewards.seconds}
    return line | own | dict(rewards.measures)


def described(batch: Batch, now: float) -> dict[str, Any]:
    """An open batch in the service's status."""
    arrived = len(batch.samples)
    return {"batch": str(batch.key), "arrived": arrived, "size": batch.shape.size, "age": now - batch.opened}


def _shape(content: dict[str, Any], limits: Limits) -> Shape:
    size, group_size = content.get("size"), content.get("group_size")
    # One reward alone has no spread, and teaches nothing.
    if not _is_count(size) or size < 2 or (group_size is not None and not _is_count(group_size)):
        raise Refused(
            "malformed",
            f"`size` must be a whole number of at least 2, and `group_size` one of at least 1 or null, not "
            f"{str(size)[:40]} and {str(group_size)[:40]}.",
        )
    if size > limits.batch_size:
        raise Refused("too-large", f"a batch of {size} samples is above the limit batch_size={limits.batch_size}.")
    if group_size is not None and size % group_size:
        raise Refused("malformed", f"a batch of {size} samples is not made of groups of {group_size}.")
    return Shape(size, group_size)


def _sample(row: Any, limits: Limits) -> Sample:
    if not isinstance(row, dict) or row.keys() != {"id", "group", "text"}:
        raise Refused("malformed", f"a sample must be an object of `id`, `group` and `text`, not {_kind(row)}.")
    if not isinstance(row["text"], str):
        raise Refused("malformed", f"the `text` of a sample must be a string, not {_kind(row['text'])}.")
    if len(row["text"]) > limits.text_length:
        raise Refused(
            "too-large",
            f"the text of sample {row['id']!r} has {len(row['text'])} characters, above the limit "
            f"text_length={limits.text_length}.",
        )
    return Sample(_name(row, "id", limits), _name(row, "group", limits), _unicode("text", row["text"]))


def _name(content: dict[str, Any], key: str, limits: Limits) -> str:
    value = content[key]
    if not isinstance(value, str) or not 0 < len(value) <= limits.name_length:
        shown = f"{len(value)} characters" if isinstance(value, str) else _kind(value)
        raise Refused("malformed", f"`{key}` must be a string of 1 to {limits.name_length} characters, not {shown}.")
    return _unicode(key, value)


def _unicode(key: str, value: str) -> str:
    # JSON may hold half a surrogate pair, on which a tokenizer would fail for the whole batch.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused("malformed", f"`{key}` is not Unicode: {error}.") from error
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1  # JSON's true is an int to Python.


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number or a truth value")
