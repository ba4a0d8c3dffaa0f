"""Asking the reward service for rewards, with the standard library alone."""

import asyncio
import hashlib
import json
import ssl
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dpg.serve.config import Config

LONGEST_PAUSE = 30.0
REQUEST_BYTES = 500_000  # Of texts in one request; the service's own limit is higher.


class RewardError(Exception):
    """There is no reward; the message says why. Never caught here: a trainer must not go on with a made-up one."""


class Answer(NamedTuple):
    """The reward of one sample, and figures of its batch."""

    raw: float
    rescaled: float | None
    phi: float | None
    reward_std: float

    def score(self, scale: str) -> float:
        """The reward that a trainer is given."""
        if scale == "raw":
            return self.raw
        if self.rescaled is None:
            raise RewardError(
                f"all rewards of the batch are {self.raw:g}, so there is no spread to divide them by. "
                "DPG_REWARD_SCALE=raw goes on; nothing is learned from such a batch."
            )
        return self.rescaled

    def figures(self) -> dict[str, float]:
        """What a trainer may log."""
        figures = {"dpg_raw_reward": self.raw, "dpg_reward_std": self.reward_std, "dpg_phi": self.phi}
        return {name: value for name, value in figures.items() if value is not None}

    def named(self, scale: str) -> dict[str, float]:
        """What verl wants of a function: the score, and figures to log."""
        return {"score": self.score(scale), **self.figures()}


class Rollout(NamedTuple):
    """A text to score.

    Attributes:
        text: what was written, without its prompt.
        group: the same for all texts of one prompt.
        split: which batches it belongs to, as train or test.
        batch: which one, where the trainer knows: its step. None for the next to be whole: then a batch is made of the
            samples that arrive first.
        id: the sample's own within the batch, needed where `batch` is given; else None for a random one.
    """

    text: str
    group: str
    split: str = "train"
    batch: str | None = None
    id: str | None = None


async def reward_of(rollout: Rollout, config: Config | None = None) -> Answer:
    """The reward of a text, once the service has its whole batch; `config` is the environment's unless given.

    Raises:
        RewardError: if there is none.
        ValueError: for a split or a batch that the configuration, or the rollout, says too little of.
    """
    config = config or Config.from_environment()
    if rollout.split not in config.batches:
        raise ValueError(f"DPG_REWARD_BATCH gives no size for {rollout.split!r}, only for {list(config.batches)}.")
    if rollout.batch is not None and rollout.id is None:
        raise ValueError(f"a rollout of batch {rollout.batch!r} needs an id, the same whenever it is sent.")
    prompts, texts = config.batches[rollout.split]
    order = {"size": prompts * texts, "group_size": texts}
    if rollout.batch is None:
        # Ids that begin with the text's checksum put a batch in one order at every run, though their rest is random.
        id = f"{_checksum(rollout.text)}-{rollout.id or uuid.uuid4().hex}"
        order["stream"] = f"{config.run}/{rollout.split}"
    else:
        id = rollout.id
        order["batch"] = f"{config.run}/{rollout.split}/{rollout.batch}"
    order["samples"] = [{"id": id, "group": _short(rollout.group), "text": rollout.text}]
    (answer,) = await _ask(order, config)
    return answer


async def rewards_of(texts: list[str], groups: list[str], config: Config | None = None) -> list[Answer]:
    """The rewards of a whole batch that one process holds; of a text each, in their order."""
    config = config or Config.from_environment()
    samples = [
        {"id": f"{place:06d}", "group": _short(group), "text": text}
        for place, (text, group) in enumerate(zip(texts, groups, strict=True))
    ]
    order = {"batch": f"{config.run}/{uuid.uuid4().hex}", "size": len(samples), "group_size": None}
    parts = await asyncio.gather(*(_ask({**order, "samples": part}, config) for part in _parts(samples)))
    return [answer for part in parts for answer in part]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _short(group: str) -> str:
    """A name of a group, which may be a whole prompt."""
    return group if len(group) <= 100 else f"{group[:80]}... {_checksum(group)}"


def _parts(samples: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The samples in as many lists as requests take."""
    parts, size = [[]], 0
    for sample in samples:
        length = len(json.dumps(sample))
        if parts[-1] and size + length > REQUEST_BYTES:
            parts, size = [*parts, []], 0
        parts[-1].append(sample)
        size += length
    return parts


async def _ask(order: dict[str, Any], config: Config) -> list[Answer]:
    """Send until there is an answer. A sample that is sent again has its id, and so is counted once."""
    try:
        async with asyncio.timeout(config.seconds):
            status, reply = await _persist(order, config)
    except TimeoutError as error:
        raise RewardError(f"no reward within {config.seconds:g} s (DPG_REWARD_SECONDS).") from error
    if status != 200:
        raise RewardError(f"the reward service answered {status}: {reply.get('message', reply)}")
    shared = (reply["phi"], reply["reward_std"])
    return [Answer(row["raw"], row["rescaled"], *shared) for row in reply["rewards"]]


async def _persist(order: dict[str, Any], config: Config) -> tuple[int, dict[str, Any]]:
    for attempt in range(config.attempts):
        if attempt:
            await asyncio.sleep(min(config.pause * 2 ** (attempt - 1), LONGEST_PAUSE))
        try:
            status, reply = await _post(order, config)
        except (OSError, ValueError) as error:  # No connection, or one that broke off.
            status, reply = 503, {"message": f"{config.url}: {type(error).__name__}: {error}"}
        if status != 503:
            break
    return status, reply


async def _post(order: dict[str, Any], config: Config) -> tuple[int, dict[str, Any]]:
    address, body = urlsplit(config.url), json.dumps(order).encode()
    secure = ssl.create_default_context() if address.scheme == "https" else None
    # HTTP/1.0: an answer ends where its connection does.
    lines = [f"POST {address.path.rstrip('/')}/v1/rewards HTTP/1.0", f"Host: {address.netloc}"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {config.token}"] if config.token else []
    reader, writer = await asyncio.open_connection(
        address.hostname, address.port or (443 if secure else 80), ssl=secure
    )
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        with suppress(ConnectionError):  # A refusal comes before the whole body was sent.
            await writer.drain()
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status = int(head.split()[1].decode()) if head.startswith(b"HTTP/1.") else 503
    try:
        return status, json.loads(content)
    except ValueError:
        if status == 200:
            raise
        return status, {"message": content.decode(errors="replace")[:500] or "the connection was closed"}


def wait(asking: Any) -> Any:
    """The result of a coroutine, wherever this is called: in a thread of its own, which has no event loop yet."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asking).result()
