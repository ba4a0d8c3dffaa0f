"""What a trainer's process is told of the reward service.

Environment:
    DPG_REWARD_URL: the service, as http://127.0.0.1:8067.
    DPG_REWARD_TOKEN: its token, where it wants one.
    DPG_REWARD_RUN: any name that no other run has had, not even this one before it was started again.
    DPG_REWARD_BATCH: prompts x texts of each in one batch: 64x4, or by split, train=64x4,test=100x1.
    DPG_REWARD_SCALE: rescaled (the default; divided by the batch's standard deviation) or raw.
    DPG_REWARD_STOP: strings, with commas, of which `reward_func` takes one off the end of a text.
    DPG_REWARD_SECONDS: how long to wait for a reward at most (3600).
    DPG_REWARD_ATTEMPTS: how often to ask when the service cannot be reached (8; waits 1, 2, 4, ... 30 s in between).
"""

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Config:
    """Where the service is and what a batch is. `from_environment` reads the variables above."""

    url: str
    run: str
    batches: dict[str, tuple[int, int]]
    token: str | None = field(default=None, repr=False)
    scale: str = "rescaled"
    stop: tuple[str, ...] = ()
    seconds: float = 3600.0
    attempts: int = 8
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.scale not in ("rescaled", "raw"):
            raise ValueError(f"DPG_REWARD_SCALE is {self.scale!r}. Choose rescaled or raw.")
        if not (self.seconds > 0 and self.attempts >= 1):
            raise ValueError(
                f"DPG_REWARD_SECONDS={self.seconds} and DPG_REWARD_ATTEMPTS={self.attempts} must be above 0."
            )
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"DPG_REWARD_URL is {self.url!r}. Give it as http://127.0.0.1:8067.")

    @classmethod
    def from_environment(cls) -> "Config":
        """The configuration that the environment holds.

        Raises:
            ValueError: for a variable that is missing or means nothing.
        """
        for name in ("DPG_REWARD_URL", "DPG_REWARD_RUN", "DPG_REWARD_BATCH"):
            if not os.environ.get(name):
                raise ValueError(f"{name} is not set, and the reward service needs it: see docs/serve.md.")
        return cls(
            os.environ["DPG_REWARD_URL"],
            os.environ["DPG_REWARD_RUN"],
            _batches(os.environ["DPG_REWARD_BATCH"]),
            os.environ.get("DPG_REWARD_TOKEN"),
            os.environ.get("DPG_REWARD_SCALE", "rescaled"),
            tuple(filter(None, os.environ.get("DPG_REWARD_STOP", "").split(","))),
            _number("DPG_REWARD_SECONDS", 3600.0),
            _number("DPG_REWARD_ATTEMPTS", 8),
        )


def _number(name: str, default: float) -> Any:
    try:
        return type(default)(os.environ.get(name, default))
    except ValueError as error:
        raise ValueError(f"{name} is no number: {error}.") from error


def _batches(text: str) -> dict[str, tuple[int, int]]:
    batches = {}
    for part in text.split(","):
        split, equals, size = part.rpartition("=")
        prompts, cross, texts = size.partition("x")
        if not (prompts.isdecimal() and cross and texts.isdecimal()) or min(int(prompts), int(texts)) < 1:
            raise ValueError(f"DPG_REWARD_BATCH is {text!r}. Give prompts x texts of each, as 64x4 or train=64x4.")
        batches[split.strip() if equals else "train"] = (int(prompts), int(texts))
    return batches
