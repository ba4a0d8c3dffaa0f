"""One experiment from settings to a finished run folder."""

import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metagrad as mg
from dpg import corpus, report
from dpg.display import Display
from dpg.experiments.experiment import Experiment
from dpg.folder import RunFolder
from dpg.generator import Generator
from dpg.grpo import GrpoConfig
from dpg.loop import Validation, train, write
from dpg.prompts import read_prompts
from dpg.records import Checkpoint, Record
from dpg.reward import MetagradReward
from dpg.settings import Settings
from dpg.target import Target, load_model

MODELS = Path(__file__).parent / "models"
NUM_VALIDATION_PROMPTS = 256


class Interrupted(Exception):
    """The run was asked to stop and has saved all it did; the message says how to continue."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    generator: Generator
    reward: MetagradReward
    prompts: list[str]
    validation: Validation
    config: GrpoConfig


def run(experiment: Experiment, settings: Settings, path: Path, *, resume: bool = False, command: str = "") -> None:
    """Carry out `experiment` in the folder `path`; `command` is what the report says made it.

    Raises:
        ValueError, RunFolderError: before anything is trained, for settings that cannot work.
        Interrupted: after Ctrl-C, once the step in progress is finished and saved.
    """
    parts = build(experiment, settings)
    folder = RunFolder(path)
    config = {"experiment": experiment.name, "command": command, **settings.as_dict(), **_environment(parts)}
    checkpoint = folder.reopen(config) if resume else None
    if not resume:
        folder.create(config, needed_bytes=_disk_bytes(parts))
        _prepare(folder, parts, settings)

    with _stop_requested() as stopping, Display(settings.num_steps) as display:

        def on_step(record: Record, take_checkpoint: Callable[[], Checkpoint]) -> None:
            folder.record(record)
            display.show(record)
            last = record.step == settings.num_steps
            if stopping() or last or record.step % settings.checkpoint_every == 0:
                folder.save(take_checkpoint())
            if stopping() and not last:
                raise Interrupted(
                    f"stopped after step {record.step} of {settings.num_steps}; nothing is lost. "
                    f"Continue with the same command and --resume --out {path}"
                )

        train(
            parts.generator,
            parts.prompts,
            parts.reward,
            parts.config,
            validation=parts.validation,
            seed=settings.seed,
            resume=checkpoint,
            on_step=on_step,
        )
    _finish(folder, parts, settings)


def build(experiment: Experiment, settings: Settings) -> Parts:
    """Load models and prompts and check that they fit together."""
    generator_model, generator_tokenizer = load_model(_source(settings.generator, "generator"))
    target_model, target_tokenizer = load_model(_source(settings.target, "target"), untie=True)
    prompts = corpus.held_out() if settings.prompts == "embedded" else read_prompts(settings.prompts)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    shuffled = [prompts[i] for i in order]
    num_validation = min(NUM_VALIDATION_PROMPTS, max(len(prompts) // 5, 1))
    config = _grpo(settings)
    config.check(shuffled[num_validation:])
    target = Target(
        target_model,
        target_tokenizer,
        mg.optim.adamw(
            lr=settings.inner_lr,
            betas=(settings.inner_beta1, settings.inner_beta2),
            eps=settings.inner_eps,
            eps_root=settings.inner_eps_root,
            weight_decay=settings.inner_weight_decay,
        ),
        inner_batch_size=settings.inner_batch_size,
        sequence_length=settings.sequence_length,
        train_eos=settings.train_eos,
    )
    return Parts(
        Generator(
            generator_model,
            generator_tokenizer,
            settings.max_prompt_tokens,
            settings.max_new_tokens,
            settings.temperature,
        ),
        MetagradReward(target, experiment.metric(settings), cross_group=settings.cross_group),
        shuffled[num_validation:],
        Validation(shuffled[:num_validation], settings.validation_texts, settings.validate_every),
        config,
    )


def _prepare(folder: RunFolder, parts: Parts, settings: Settings) -> None:
    """What later steps compare with: the untrained target, and texts that owe nothing to the training."""
    parts.reward.target.model.save_pretrained(folder.path / "target")
    parts.reward.target.tokenizer.save_pretrained(folder.path / "target")
    folder.write_texts("untrained.jsonl", _texts(parts, settings))
    prose = parts.validation.prompts + parts.prompts
    folder.write_texts("prose.jsonl", [prose[i % len(prose)] for i in range(settings.dataset_texts)])


def _finish(folder: RunFolder, parts: Parts, settings: Settings) -> None:
    folder.write_texts("dataset.jsonl", _texts(parts, settings))
    parts.generator.model.save_pretrained(folder.path / "generator")
    parts.generator.tokenizer.save_pretrained(folder.path / "generator")
    report.write(folder, parts.reward)


def _texts(parts: Parts, settings: Settings) -> list[str]:
    """`dataset_texts` fresh texts to validation prompts, from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return write(parts.generator, parts.validation.prompts, settings.dataset_texts)


def _grpo(settings: Settings) -> GrpoConfig:
    return GrpoConfig(
        num_steps=settings.num_steps,
        prompts_per_step=settings.prompts_per_step,
        group_size=settings.group_size,
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.final_learning_rate,
        updates_per_step=settings.updates_per_step,
        clip_range=settings.clip_range,
        kl_coefficient=settings.kl_coefficient,
        max_grad_norm=settings.max_grad_norm,
        normalize_groups=settings.normalize_groups,
    )


def _source(setting: str, name: str) -> str:
    return str(MODELS / name) if setting == "embedded" else setting


def _disk_bytes(parts: Parts) -> int:
    """The generator twice (result, and checkpoint beside its predecessor, each with Adam's two moments), the target."""
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (parts.generator.model, parts.reward.target.model)]
    return 7 * sizes[0] + sizes[1] + 10_000_000


def _environment(parts: Parts) -> dict[str, Any]:
    """What besides the settings decides the bits of a run."""
    prompts = "\n".join([*parts.validation.prompts, *parts.prompts])
    return {
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "prompts_checksum": zlib.crc32(prompts.encode()),
    }


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first lets the step finish, the second ends the program at once."""
    requested = False

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)
