"""What a run will take, before it starts: memory, disk, texts and arithmetic, from the sizes of models and settings.

The estimates are of the leading terms, for float32 weights: good to a factor of about two, which tells a run for a
laptop from one for a cluster, and a batch that fits from one that does not.
"""

import math
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dpg.build import Parts
from dpg.loop import WRITTEN_AT_ONCE
from dpg.settings import Settings

FLOAT = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Estimate:
    """Of a whole run.

    Attributes:
        memory: bytes on the device at the peak: weights, optimizer and reference of the generator, and the largest of
            what sampling, the policy's update and the target's metagradient need besides.
        disk: bytes in the run folder.
        num_texts: written for training, validation and the final data set.
        num_inner_steps: of the target, for each reward.
        num_flops: of training; sampling counts as forward passes.
    """

    memory: int
    disk: int
    num_texts: int
    num_inner_steps: int
    num_flops: float

    def __str__(self) -> str:
        return (
            f"about {_bytes(self.memory)} of memory and {_bytes(self.disk)} of disk; {self.num_texts} texts, "
            f"{self.num_inner_steps} inner steps a reward, {self.num_flops:.1e} floating-point operations"
        )


def estimate(parts: Parts, settings: Settings) -> Estimate:
    """The estimate of a run of `parts`."""
    generator, target = parts.generator.model, parts.judge.target.model
    batch = settings.prompts_per_step * settings.group_size
    num_inner_steps = _num_inner_steps(settings)
    num_validations = len({*range(0, settings.num_steps, settings.validate_every), settings.num_steps})
    length = settings.max_prompt_tokens + settings.max_new_tokens
    own = settings.sampling_dtype is not None  # Then log-probabilities are computed again in the weights' own type.
    forwards = 1 + own + (settings.kl_coefficient > 0) + 3  # sampling, own and reference log-probabilities, update
    written = 2 * _num_parameters(generator) * length  # operations of one forward pass over one text
    trained = 2 * _num_parameters(target) * settings.sequence_length
    # With one inner step a gradient and the derivative by the weights; else the replay, a gradient and all of it too.
    metagradient_forwards = {0: 0, 1: 6}.get(num_inner_steps, 15)
    target_forwards = 3 if settings.reward == "naive" else metagradient_forwards
    num_validated = num_validations * settings.validation_texts
    flops = settings.num_steps * batch * (forwards * written + target_forwards * trained)
    flops += num_validated * (written + 3 * trained)
    peak = max(_sampling(generator, settings), _update(generator, settings), _metagradient(target, settings))
    return Estimate(
        memory=_kept(parts, settings) + peak,
        disk=FLOAT * (7 * _num_parameters(generator) + _num_parameters(target)) + 10_000_000,
        num_texts=settings.num_steps * batch + num_validated + 2 * settings.dataset_texts,
        num_inner_steps=num_inner_steps,
        num_flops=flops,
    )


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or all of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_too_large(parts: Parts, settings: Settings) -> None:
    """Raise a ValueError if what a run keeps all the time is more than the device has."""
    needed, there = _kept(parts, settings), available_memory(parts.generator.model.device)
    if needed > there:
        raise ValueError(
            f"the models, their optimizers and states take {_bytes(needed)}, and {settings.device} has "
            f"{_bytes(there)}. Choose smaller models, or train adapters: lora_rank=16."
        )


def _num_inner_steps(settings: Settings) -> int:
    """Of one training run behind a reward; 0 where no target is trained."""
    if settings.reward not in ("metagradient", "shuffled", "naive"):
        return 0
    return math.ceil(_num_texts_of_a_run(settings) / settings.inner_batch_size)


def _num_texts_of_a_run(settings: Settings) -> int:
    split = settings.reward == "naive" or not settings.cross_group  # A data set for each text of a prompt.
    return settings.prompts_per_step * (1 if split else settings.group_size)


def _kept(parts: Parts, settings: Settings) -> int:
    """Bytes that are there all the time: the generator with its optimizer and reference, and the target."""
    generator = parts.generator.model
    learned = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    copies = 1 + (settings.kl_coefficient > 0)
    return FLOAT * (copies * _num_parameters(generator) + 3 * learned + _num_parameters(parts.judge.target.model))


def _sampling(model: PreTrainedModel, settings: Settings) -> int:
    at_once = max(settings.prompts_per_step * settings.group_size, min(settings.validation_texts, WRITTEN_AT_ONCE))
    batch = settings.generation_batch_size or at_once
    config = model.config
    all_heads = getattr(config, "num_attention_heads", 1)  # Not every architecture has attention.
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = heads * (config.hidden_size // all_heads)
    length = settings.max_prompt_tokens + settings.max_new_tokens
    return FLOAT * batch * (2 * config.num_hidden_layers * width * length + 5 * config.vocab_size)


def _update(model: PreTrainedModel, settings: Settings) -> int:
    batch = settings.prompts_per_step * settings.group_size // settings.updates_per_step
    rows = min(settings.policy_microbatch_size or batch, batch)
    length = settings.max_prompt_tokens + settings.max_new_tokens
    return rows * (_activations(model, length) + 3 * FLOAT * settings.max_new_tokens * model.config.vocab_size)


def _metagradient(model: PreTrainedModel, settings: Settings) -> int:
    """States of eight slots at most, the cotangent, and the second-order graph of a micro-batch."""
    steps = _num_inner_steps(settings)
    if not steps:
        return 0
    rows = min(settings.inner_microbatch_size or settings.inner_batch_size, _num_texts_of_a_run(settings))
    logits = FLOAT * settings.sequence_length * model.config.vocab_size
    states = (min(steps, 8) + 2) * 3 * FLOAT * _num_parameters(model)
    return states + rows * 3 * (_activations(model, settings.sequence_length) + 2 * logits)


def _activations(model: PreTrainedModel, length: int) -> int:
    """Bytes kept for the gradient of one text: about 16 vectors and two attention maps a layer."""
    config = model.config
    vectors = 16 * config.hidden_size * length
    maps = 2 * getattr(config, "num_attention_heads", 0) * length**2
    return FLOAT * config.num_hidden_layers * (vectors + maps)


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError
