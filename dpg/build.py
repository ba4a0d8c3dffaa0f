"""From settings to the models, the reward and the prompts of a run, checked to fit together."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

import metagrad as mg
from dpg import baselines, corpus, languages
from dpg.experiments.experiment import Experiment
from dpg.generator import Generator
from dpg.grpo import GrpoConfig
from dpg.judge import Judge
from dpg.loop import Validation
from dpg.preset import Preset
from dpg.pretrain import multilingual_models
from dpg.prompts import read_prompts
from dpg.reward import MetagradReward, Reward
from dpg.settings import Settings
from dpg.target import Target, load_model
from dpg.text import encode

MODELS = Path(__file__).parent / "models"
NUM_VALIDATION_PROMPTS = 256


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `prose` are all prompts without the instruction, those of the validation first."""

    generator: Generator
    judge: Judge
    reward: Reward
    prompts: list[str]
    prose: list[str]
    validation: Validation
    config: GrpoConfig


def build(preset: Preset) -> Parts:
    """Load models and prompts.

    Raises:
        ValueError: if something is not there, or does not fit.
    """
    experiment, settings = preset.experiment, preset.settings
    _refuse_missing_device(settings.device)
    prompts = _prompts(settings.prompts)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    prose = [prompts[i] for i in order]
    shuffled = [settings.instruction + prompt for prompt in prose]
    num_validation = min(NUM_VALIDATION_PROMPTS, max(len(prompts) // 5, 1))
    config = _grpo(settings)
    config.check(shuffled[num_validation:])
    generator = _generator(settings)
    generator.encode(shuffled)
    judge, reward = build_reward(preset)
    for text in experiment.whole_texts():
        _refuse_too_long(text, generator, judge.target)
    return Parts(
        generator,
        judge,
        reward,
        shuffled[num_validation:],
        prose,
        Validation(shuffled[:num_validation], settings.validation_texts, settings.validate_every),
        config,
    )


def build_reward(preset: Preset) -> tuple[Judge, Reward]:
    """Load the target and what scores texts by it, without a generator.

    Raises:
        ValueError: if something is not there, or does not fit.
    """
    experiment, settings = preset.experiment, preset.settings
    _refuse_missing_device(settings.device)
    judge = Judge(load_target(settings), experiment.metric(), experiment.measure_texts)
    return judge, _reward(settings, experiment, judge)


def _refuse_missing_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch was built without it; there is none; no such name.
        raise ValueError(
            f"device={name} cannot be used here: {str(error).splitlines()[0]} "
            "Pass cpu, or cuda where there is a GPU and a torch built for it."
        ) from error


def _refuse_too_long(text: str, generator: Generator, target: Target) -> None:
    """Raise a ValueError if the generator cannot write all of `text`, or the target not train on all of it."""
    written = len(generator.tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = encode([text], target.tokenizer, sys.maxsize, train_eos=False, train_bos=target.train_bos)
    trained = whole["input_ids"].shape[1]
    if written > generator.max_new_tokens or trained > target.sequence_length:
        raise ValueError(
            f"{text!r} has {written} tokens to write and {trained} to train on, but `max_new_tokens` is "
            f"{generator.max_new_tokens} and `sequence_length` {target.sequence_length}. Raise them to these at least."
        )


def _generator(settings: Settings) -> Generator:
    same = settings.generator == "target"
    source = source_of(settings.target, "target") if same else source_of(settings.generator, "generator")
    model, tokenizer = load_model(source)
    return Generator(
        _adapted(model, settings).to(settings.device),
        tokenizer,
        settings.max_prompt_tokens,
        settings.max_new_tokens,
        settings.temperature,
        settings.chat,
        settings.generation_batch_size,
        None if settings.sampling_dtype is None else getattr(torch, settings.sampling_dtype),
    )


def _adapted(model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    """The generator with low-rank adapters, where the settings ask for them."""
    if settings.lora_rank is None:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return adapted(model, settings.lora_rank, settings.lora_alpha)


def adapted(model: PreTrainedModel, rank: int, alpha: float) -> PreTrainedModel:
    """A model that trains low-rank adapters of all its linear layers.

    Raises:
        ValueError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora_rank needs the package peft: pip install 'metagrad[scale]'.") from error
    shape = {"r": rank, "lora_alpha": alpha, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))


def load_target(settings: Settings) -> Target:
    """The model that trains on texts, and how.

    Raises:
        ValueError: if it is not there, or does not fit the settings.
    """
    model, tokenizer = load_model(source_of(settings.target, "target"), untie=settings.untie_head)
    return Target(
        model.to(settings.device),
        tokenizer,
        inner_optimizer(settings),
        inner_batch_size=settings.inner_batch_size,
        sequence_length=settings.sequence_length,
        train_eos=settings.train_eos,
        train_bos=settings.train_bos,
        loss_denominator=settings.loss_denominator,
        microbatch_size=settings.inner_microbatch_size,
        clip_norm=settings.inner_clip_norm,
    )


def inner_optimizer(settings: Settings) -> mg.optim.GradientTransformation:
    """The optimizer of the target's training."""
    if settings.inner_optimizer == "sgd":
        return mg.optim.sgd(lr=settings.inner_lr, weight_decay=settings.inner_weight_decay)
    return mg.optim.adamw(
        lr=settings.inner_lr,
        betas=(settings.inner_beta1, settings.inner_beta2),
        eps=settings.inner_eps,
        eps_root=settings.inner_eps_root,
        weight_decay=settings.inner_weight_decay,
    )


def _reward(settings: Settings, experiment: Experiment, judge: Judge) -> Reward:
    """The reward that the settings name; what goes with it, as the naive reward's comparison, goes with its class."""
    target, metric = judge.target, judge.metric
    match settings.reward:
        case "naive":
            return baselines.NaiveReward(target, metric)
        case "random":
            return baselines.RandomReward()
        case "edit-distance" | "embedding" | "identifier":
            return baselines.LikenessReward(_likeness(settings.reward, experiment, target))
        case "shuffled":
            return baselines.ShuffledReward(MetagradReward(target, metric, settings.cross_group))
        case _:
            return MetagradReward(target, metric, settings.cross_group)


def _likeness(name: str, experiment: Experiment, target: Target) -> baselines.Likeness:
    likenesses, wanted = dict(experiment.likenesses()), experiment.wanted()
    if wanted:
        likenesses["edit-distance"] = baselines.edit_likeness(wanted, target.tokenizer)
        likenesses["embedding"] = baselines.embedding_likeness(
            wanted, target.model, target.tokenizer, target.sequence_length
        )
    if name not in likenesses:
        possible = ", ".join(["metagradient", "naive", "shuffled", "random", *likenesses])
        raise ValueError(f"{experiment.name} knows no text to be like, so reward={name} means nothing: {possible} do.")
    return likenesses[name]


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
        entropy_coefficient=settings.entropy_coefficient,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        normalize_groups=settings.normalize_groups,
        microbatch_size=settings.policy_microbatch_size,
    )


def source_of(setting: str, name: str) -> str:
    """Where the model of a setting is: a folder, a .gguf file or a hub name."""
    match setting:
        case "embedded":
            return str(MODELS / name)
        case "multilingual":
            return str(multilingual_models() / name)
        case _:
            return setting


def _prompts(setting: str) -> list[str]:
    match setting:
        case "embedded":
            return corpus.held_out()
        case "multilingual":
            return languages.prompts(languages.held_out()["en"])
        case _:
            return read_prompts(setting)
