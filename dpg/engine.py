"""What carries out the GRPO steps of a run: the loop of this package, or a trainer from elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from dpg.build import Parts
from dpg.folder import RunFolder
from dpg.loop import train
from dpg.records import Checkpoint, Record
from dpg.settings import Settings

OnStep: TypeAlias = Callable[[Record, Callable[[], None]], None]
"""Called after every step with its record and a function that keeps a checkpoint of it in the run folder."""


class Interrupted(Exception):
    """The run was asked to stop and has saved all it did; the message says how to continue."""


class Engine(ABC):
    """A way to train a generator, with everything that goes before and after left to `dpg.run`.

    Attributes:
        name: as given to `--engine`.
        num_processes: that train together.
        is_main: whether this process is the one that writes the run folder.
        tracks: whether it shows figures in the tracker of the settings itself.
    """

    name: ClassVar[str]
    num_processes: int = 1
    is_main: bool = True
    tracks: bool = False

    @abstractmethod
    def environment(self, settings: Settings, path: Path) -> dict[str, Any]:
        """What besides the settings decides the bits of a run; called first.

        Raises:
            ValueError: for settings that this engine cannot carry out.
        """

    @abstractmethod
    def reopen(self, folder: RunFolder, config: dict[str, Any]) -> Any:
        """The newest checkpoint of the run in `folder`, its records cut back to it.

        Raises:
            RunFolderError: if there is none, or the run was started with another configuration.
        """

    @abstractmethod
    def train(self, parts: Parts, settings: Settings, folder: RunFolder, checkpoint: Any, on_step: OnStep) -> None:
        """Train `parts.generator` in place, from `checkpoint` or from the beginning (None).

        Args:
            on_step: called in the main process; an `Interrupted` that it raises ends the run after its checkpoint.
        """


class BuiltinEngine(Engine):
    """`dpg.loop`."""

    name = "builtin"

    def environment(self, settings: Settings, path: Path) -> dict[str, Any]:
        return {"engine": self.name}

    def reopen(self, folder: RunFolder, config: dict[str, Any]) -> Checkpoint:
        return folder.reopen(config)

    def train(
        self, parts: Parts, settings: Settings, folder: RunFolder, checkpoint: Checkpoint | None, on_step: OnStep
    ) -> None:
        train(
            parts.generator,
            parts.prompts,
            parts.reward,
            parts.config,
            judge=parts.judge,
            validation=parts.validation,
            seed=settings.seed,
            resume=checkpoint,
            on_step=lambda record, taken: on_step(record, lambda: folder.save(taken())),
        )


def engine(name: str, trl_config: Path | None = None) -> Engine:
    """The engine of a name; `trl_config` is a YAML file of options for TRL.

    Raises:
        ValueError: for an unknown name, a package that is missing, or options that are not TRL's.
    """
    if name == "trl":
        try:
            from dpg.trl.engine import TrlEngine
        except ImportError as error:
            raise ValueError(f"--engine trl needs TRL: pip install 'metagrad[trl]' ({error}).") from error
        return TrlEngine.from_file(trl_config)
    if name != "builtin":
        raise ValueError(f"there is no engine {name!r}. Choose from: builtin, trl.")
    if trl_config is not None:
        raise ValueError("--trl-config is for --engine trl.")
    return BuiltinEngine()


def checkpoint_due(settings: Settings, step: int) -> bool:
    """Whether a checkpoint is kept after `step` in any case."""
    return step == settings.num_steps or step % settings.checkpoint_every == 0
