"""What `dpg plan` says of memory beside what a process takes.

    OMP_NUM_THREADS=1 python benchmarks/plan.py

Each case runs in processes of its own. `resident` is the peak of resident memory (VmHWM of /proc/self/status, set back
after imports and a metagradient of a tiny model) above what was resident then; glibc is asked to give freed memory back
(MALLOC_MMAP_THRESHOLD_). `allocated` is the peak of torch's CPU allocator by torch.profiler, in another process:
tensors, and what kernels take for themselves. Seconds are of the first process, beside the plan's by what
`dpg plan --calibrate` measures just before.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.profiler import profile
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PretrainedConfig

import dpg
import metagrad as mg
from dpg.build import MODELS
from dpg.plan.calibrate import calibrate
from dpg.plan.lines import Memory
from dpg.plan.memory import memory
from dpg.plan.shape import shape_of
from dpg.plan.speed import Speed, work_of
from dpg.plan.workload import Devices, Inner, Workload, Writer
from dpg.target import fuse_gelu

ENDS = {"bos_token_id": 0, "eos_token_id": 0}
CPU = Devices(cpu=True)


class Case(NamedTuple):
    """A target's training as `Inner` describes it."""

    config: Callable[[], PretrainedConfig]
    inner: dict[str, Any]


def _gpt2(width: int, layers: int, vocabulary: int) -> PretrainedConfig:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=vocabulary, n_positions=256, **ENDS)


def _llama(width: int, layers: int, vocabulary: int) -> PretrainedConfig:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
    return LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, vocab_size=vocabulary, **heads, **ENDS
    )


CASES = {
    "GPT-2, Adam, T=1, whole batch": Case(lambda: _gpt2(512, 6, 16384), {"num_steps": 1, "batch": 8, "length": 128}),
    "GPT-2, Adam, T=1, micro-batches of 4": Case(
        lambda: _gpt2(512, 6, 16384), {"num_steps": 1, "batch": 16, "length": 128, "microbatch": 4}
    ),
    "Llama, Adam, T=4, 2 slots, micro-batches of 2": Case(
        lambda: _llama(512, 6, 16384), {"num_steps": 4, "batch": 8, "length": 128, "microbatch": 2, "slots": 2}
    ),
    "Llama, vocabulary of 65,536, SGD, T=3, 8 slots": Case(
        lambda: _llama(256, 4, 65536), {"num_steps": 3, "batch": 4, "length": 128, "num_moments": 0}
    ),
    "GPT-2, Adam, T=2, 4 metrics": Case(
        lambda: _gpt2(256, 6, 8192), {"num_steps": 2, "batch": 8, "length": 128, "num_metrics": 4}
    ),
}
GRPO = "GRPO: Llama writes, GPT-2 is trained"
STEPS = 2
"""Of GRPO: Adam's state of the generator is there from the end of the first on."""


def main() -> None:
    """Print the table, or run one case as this program's own subprocess."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case")
    parser.add_argument("--profiled", action="store_true")
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(_run(given.case, given.profiled)))
        return
    speed = calibrate(torch.device("cpu"))
    print(f"{speed.flops:.3g} operations a second, of which {speed.share:.2f} are reached; {speed.source}\n")
    print("| case | planned MB | allocated MB | ratio | resident MB | ratio | planned s | measured s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (*CASES, GRPO):
        found, seconds = _planned(name, speed)
        resident, allocated = _in_process(name), _in_process(name, "--profiled")["bytes"]
        size, took = resident["bytes"], resident["seconds"] / (STEPS if name == GRPO else 1)
        print(
            f"| {name} | {found.peak / 1e6:.0f} | {allocated / 1e6:.0f} | {found.peak / allocated:.2f} "
            f"| {size / 1e6:.0f} | {found.peak / size:.2f} | {seconds:.1f} | {took:.1f} |",
            flush=True,
        )


def _planned(name: str, speed: Speed) -> tuple[Memory, float]:
    workload = _workload(name)
    return memory(workload), sum(speed.seconds(work, 1) for work in work_of(workload))


def _workload(name: str) -> Workload:
    if name == GRPO:
        generator, target, _ = _grpo()
        inner = Inner(shape_of(target.model, "target"), 1, 32, 64)
        writer = Writer(shape_of(generator.model, "generator"), 32, 8, 16, 64, updates=2)
        return Workload(inner, writer, CPU)
    case = CASES[name]
    return Workload(Inner(shape_of(_model(case.config()), name), **case.inner), None, CPU)


def _in_process(name: str, *options: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--case", name, *options]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(name: str, profiled: bool) -> dict[str, float]:
    """Bytes at the peak and seconds of a case, from the making of its models on."""
    tiny = _model(_gpt2(64, 1, 64))
    _metagradient(tiny, Inner(shape_of(tiny, "tiny"), 2, 2, 8))
    with _allocated() if profiled else _resident() as found:
        action = _grpo_step() if name == GRPO else _prepared(CASES[name])
        start = perf_counter()
        action()
        seconds = perf_counter() - start
    return {"bytes": found[0], "seconds": seconds}


def _prepared(case: Case) -> Callable[[], None]:
    model = _model(case.config())
    return lambda: _metagradient(model, Inner(shape_of(model, "target"), **case.inner))


def _model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    fuse_gelu(model)
    return model


def _metagradient(model: Any, inner: Inner) -> None:
    optimizer = mg.optim.adamw(lr=1e-4, eps_root=1e-4) if inner.num_moments else mg.optim.sgd(lr=1e-4)
    sizes = {"inner_batch_size": inner.batch, "sequence_length": inner.length, "microbatch_size": inner.microbatch}
    target = dpg.Target(model, None, optimizer, **sizes)
    batches = []
    for step in range(inner.num_steps):
        ids = torch.randint(model.config.vocab_size, (inner.batch, inner.length))
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # Texts differ in length.
        index = torch.arange(step * inner.batch, (step + 1) * inner.batch)
        batches.append({"input_ids": ids, "labels": ids, "attention_mask": mask, "index": index})
    meta = {"weights": torch.ones(inner.num_steps * inner.batch)}

    def norm(state: mg.State) -> torch.Tensor:
        return torch.stack([p.norm() for p in state.params.values()]).sum()

    metrics = norm if inner.num_metrics == 1 else [norm] * inner.num_metrics
    mg.metagradient(metrics, target.step, model, batches, meta, schedule=mg.Binomial(inner.slots))


def _grpo() -> tuple[dpg.Generator, dpg.Target, dpg.GrpoConfig]:
    tokenizers = [AutoTokenizer.from_pretrained(MODELS / name) for name in ("generator", "target")]
    sizes = [len(tokenizer) for tokenizer in tokenizers]
    generator = dpg.Generator(_model(_llama(256, 6, sizes[0])), tokenizers[0], 16, 64)
    optimizer = mg.optim.adamw(lr=1e-4, eps_root=1e-4)
    target = dpg.Target(_model(_gpt2(256, 6, sizes[1])), tokenizers[1], optimizer, 32, 64)
    config = dpg.GrpoConfig(num_steps=STEPS, prompts_per_step=8, group_size=4, updates_per_step=2, kl_coefficient=0.1)
    return generator, target, config


def _grpo_step() -> Callable[[], None]:
    generator, target, config = _grpo()
    # The norm of the head as Φ; prompts are long enough to be cut to 16 tokens.
    reward = dpg.MetagradReward(target, dpg.metrics.WeightNorm())
    prompts = [f"Text {i}: what is read here is cut to a few tokens, of which there are more." * 2 for i in range(8)]
    return lambda: dpg.train(generator, prompts, reward, replace(config, learning_rate=1e-4))


@contextmanager
def _resident() -> Iterator[list[int]]:
    found: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak back to what is resident now.
    before = _status("VmRSS")
    yield found
    found.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@contextmanager
def _allocated() -> Iterator[list[int]]:
    found: list[int] = []
    with profile(profile_memory=True, acc_events=True) as recorded:
        yield found
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    found.append(peak)


if __name__ == "__main__":
    main()
