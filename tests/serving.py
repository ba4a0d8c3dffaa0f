"""A reward service on a free loopback port, in a thread of the test's process, and plain requests to it."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from dpg_problems import ADAMW, LETTERS, target

import metagrad as mg
from dpg.metrics import WeightPattern
from dpg.reward import MetagradReward
from dpg.serve.batch import Batch, Done, Rewards
from dpg.serve.config import Config
from dpg.serve.limits import Limits
from dpg.serve.scoring import scorer
from dpg.serve.server import listen, serve, url_of
from dpg.serve.service import Service

PATTERN = WeightPattern(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]), offset=(1, 2), strength=5.0)


def small_reward(**settings: object) -> MetagradReward:
    """A real metagradient of a model of one layer in float64: several inner steps, so that the order matters."""
    return MetagradReward(target(mg.optim.adamw(**ADAMW), **{"inner_batch_size": 16, **settings}), PATTERN)


@dataclass(frozen=True)
class Served:
    """A running service."""

    url: str
    service: Service
    done: list[Done]
    stop: Callable[[], None]

    def config(self, batch: str = "4x4", **changes: object) -> Config:
        """Of a client that does not wait long."""
        prompts, texts = map(int, batch.split("x"))
        return Config(
            **{"url": self.url, "run": "run", "batches": {"train": (prompts, texts)}, "pause": 0.01, **changes}
        )

    def post(self, body: object, token: str | None = None, **headers: str) -> tuple[int, dict]:
        """The status and content of one POST; a body that is no bytes is sent as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {token}"} if token else {}),
            **headers,
        }
        return self._request("POST", "/v1/rewards", raw, sent)

    def get(self, path: str, token: str | None = None) -> tuple[int, dict]:
        """The status and content of one GET."""
        return self._request("GET", path, b"", _authorized(token))

    def connect(self) -> socket.socket:
        """A socket to the service."""
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=30)

    def until(self, true: Callable[[dict], bool]) -> dict:
        """The service's status once it is as wanted."""
        deadline = time.monotonic() + 20
        while not true(status := self.service.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.01)
        return status

    def _request(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict]:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@contextmanager
def served(
    reward: MetagradReward | Callable[[Batch], Rewards], token: str | None = None, port: int = 0, **limits: float
) -> Iterator[Served]:
    """A service of a reward, or of a function of a whole batch, until the block ends."""
    score = scorer(reward) if isinstance(reward, MetagradReward) else reward
    done: list[Done] = []
    service, listening, servers = Service(score, Limits(**limits), done.append), listen("127.0.0.1", port), []
    thread = threading.Thread(target=lambda: asyncio.run(serve(service, listening, token, servers.append)))
    thread.start()

    def stop() -> None:
        servers[0].should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()

    try:
        running = Served(url_of(listening), service, done, stop)
        while running.get("/health") != (200, {"status": "ok"}):
            time.sleep(0.01)
        yield running
    finally:
        stop()


def _authorized(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def letters_of(seed: int, number: int) -> list[str]:
    """So many short texts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (number,), generator=generator).tolist()
    return ["".join(LETTERS[i] for i in torch.randint(len(LETTERS), (n,), generator=generator)) for n in lengths]


def samples_of(seed: int, groups: int, size: int) -> list[dict[str, str]]:
    """Samples of a batch, in no particular order of ids."""
    texts = letters_of(seed, groups * size)
    return [{"id": f"s{i * 7919 % 1009}", "group": f"g{i // size}", "text": text} for i, text in enumerate(texts)]


def directly(reward: MetagradReward, samples: list[dict[str, str]], size: int) -> dict[str, float]:
    """What the reward itself gives for a batch, by id: the samples by group, then id, as the page says."""
    ordered = sorted(samples, key=lambda sample: (sample["group"], sample["id"]))
    rewards = reward.score([sample["text"] for sample in ordered], size).rewards
    return {sample["id"]: float(value) for sample, value in zip(ordered, rewards, strict=True)}
