"""From a run's settings, or the parts that it has loaded, to what is to be planned."""

from dataclasses import replace
from math import ceil

from dpg import languages
from dpg.build import Parts, source_of
from dpg.experiments.language import Language
from dpg.experiments.uuid import Uuid
from dpg.loop import WRITTEN_AT_ONCE
from dpg.metrics import HeldOutLoss
from dpg.plan.shape import Shape, named_shape, shape_of
from dpg.plan.workload import Devices, HeldOut, Inner, Workload, Writer
from dpg.preset import Preset
from dpg.settings import Settings

TRAINED = ("metagradient", "shuffled", "naive")
"""Rewards that train a target."""


def of_preset(preset: Preset, devices: Devices) -> Workload:
    """The workload of a run that nothing has been loaded for: configurations are read, and no weights.

    Held-out texts are taken to be as long as those that the target trains on.

    Raises:
        ValueError: if a model's configuration is not to be had.
    """
    settings, experiment = preset.settings, preset.experiment
    target = named_shape(_source(settings.target, "target"), untie=settings.untie_head)
    same = settings.generator == "target"
    source = _source(settings.target, "target") if same else _source(settings.generator, "generator")
    generator = named_shape(source, lora_rank=settings.lora_rank)
    held_out = HeldOut()
    if isinstance(experiment, Language):
        held_out = HeldOut(experiment.num_held_out, HeldOutLoss.microbatch_size, settings.sequence_length)
    elif isinstance(experiment, Uuid):
        held_out = HeldOut(1, 1, settings.sequence_length)
    same_tokens = source == _source(settings.target, "target") or settings.generator == settings.target
    return of_settings(settings, generator, target, held_out, devices, experiment.name, same_tokens)


def of_parts(parts: Parts, settings: Settings, name: str = "") -> Workload:
    """The workload of a run whose models are there, on its one device."""
    metric, target = parts.judge.metric, parts.judge.target
    held_out = HeldOut()
    if isinstance(metric, HeldOutLoss):
        ids = target.tokenizer(metric.texts, verbose=False)["input_ids"]
        held_out = HeldOut(len(ids), metric.microbatch_size, max(map(len, ids)))
    shapes = shape_of(parts.generator.model, settings.generator), shape_of(target.model, settings.target)
    same_tokens = parts.generator.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    return of_settings(settings, *shapes, held_out, devices_of(settings), name, same_tokens)


def of_settings(
    settings: Settings,
    generator: Shape,
    target: Shape,
    held_out: HeldOut,
    devices: Devices,
    name: str,
    same_tokens: bool,
) -> Workload:
    """The workload of a run with these models; with `same_tokens` a text has no more than were written."""
    inner = _inner(settings, target, same_tokens)
    return Workload(replace(inner, held_out=held_out), _writer(settings, generator), devices, name)


def _writer(settings: Settings, shape: Shape) -> Writer:
    return Writer(
        shape,
        num_texts=settings.prompts_per_step * settings.group_size,
        num_prompts=settings.prompts_per_step,
        prompt=settings.max_prompt_tokens,
        written=settings.max_new_tokens,
        at_once=settings.generation_batch_size,
        validated=min(settings.validation_texts, WRITTEN_AT_ONCE),
        updates=settings.updates_per_step,
        microbatch=settings.policy_microbatch_size,
        has_reference=settings.kl_coefficient > 0,
        entropy=settings.entropy_coefficient > 0,
        own=settings.sampling_dtype is not None,
    )


def _inner(settings: Settings, shape: Shape, same_tokens: bool) -> Inner:
    longest = settings.max_new_tokens + settings.train_eos + settings.train_bos
    length = min(settings.sequence_length, longest) if same_tokens else settings.sequence_length
    # Rewards that train no target leave that to the validations.
    trained = settings.reward in TRAINED
    texts = num_texts_of_a_run(settings) if trained else settings.validation_texts
    return Inner(
        shape,
        num_steps=ceil(texts / settings.inner_batch_size),
        batch=min(texts, settings.inner_batch_size),
        length=max(length, 2),
        microbatch=settings.inner_microbatch_size,
        num_moments=0 if settings.inner_optimizer == "sgd" else 2,
        num_runs=num_runs(settings) if trained else 1,
        metagradient=settings.reward in ("metagradient", "shuffled"),
    )


def num_texts_of_a_run(settings: Settings) -> int:
    """Texts that one training of the target behind a reward sees."""
    return settings.prompts_per_step * settings.group_size // num_runs(settings)


def num_runs(settings: Settings) -> int:
    """Trainings of the target behind the rewards of a step: one, or one for each text of a prompt."""
    return settings.group_size if settings.reward == "naive" or not settings.cross_group else 1


def devices_of(settings: Settings, capacity: int | None = None) -> Devices:
    """The one device of a run."""
    return Devices(capacity=capacity, cpu=not settings.device.startswith("cuda"))


def _source(setting: str, name: str) -> str:
    if setting == "multilingual" and not (languages.cache() / "multilingual").exists():
        raise ValueError(
            f"the multilingual {name} is not made yet; `dpg run language` makes it, once and in minutes. Pass "
            f"--set {name}=... to plan with another."
        )
    return source_of(setting, name)
