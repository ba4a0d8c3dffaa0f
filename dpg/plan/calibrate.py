"""What this device does in a second, measured: a product of matrices, a copy, and a metagradient of a small model."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import metagrad as mg
from dpg.plan.shape import shape_of
from dpg.plan.speed import Speed, work_of
from dpg.plan.workload import Devices, Inner, Workload
from dpg.target import Target, fuse_gelu

REPEATS = 5


def calibrate(device: torch.device) -> Speed:
    """The constants of a device.

    Cost: seconds on a GPU, about ten on two cores.
    """
    large = device.type == "cuda"
    side, size = (8192, 2**28) if large else (1024, 2**26)
    left, right = (torch.randn(side, side, dtype=torch.float32, device=device) for _ in range(2))
    flops = 2 * side**3 / _seconds(lambda: left @ right, device)
    source = torch.ones(size, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _seconds(lambda: copy.copy_(source), device)
    where = torch.cuda.get_device_name(device) if large else f"{torch.get_num_threads()} CPU threads"
    speed = Speed(flops, 1.0, bandwidth, f"measured on {where}")
    return replace(speed, share=min(_share(device, speed, large), 1.0))


def _share(device: torch.device, speed: Speed, large: bool) -> float:
    """The seconds that a metagradient would take at full speed, of those that it takes."""
    width, layers, texts, length = (768, 12, 32, 128) if large else (256, 4, 8, 64)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=8192, n_positions=length, **ends)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fuse_gelu(model)
    optimizer = mg.optim.adamw(lr=1e-4, eps_root=1e-4)
    # No text is encoded: the tokens are drawn.
    target = Target(model.to(device), None, optimizer, inner_batch_size=texts, sequence_length=length)
    batches = []
    for step in range(2):
        ids = torch.randint(config.vocab_size, (texts, length), device=device)
        index = torch.arange(step * texts, (step + 1) * texts, device=device)
        batches.append({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "index": index})
    meta = {"weights": torch.ones(2 * texts, dtype=torch.float32, device=device)}
    name, _ = next(model.named_parameters())

    def run() -> None:
        mg.metagradient(lambda state: state.params[name].sum(), target.step, model, batches, meta)

    workload = Workload(Inner(shape_of(model, "small"), 2, texts, length), None, Devices())
    return sum(speed.seconds(work, 1) for work in work_of(workload)) / _seconds(run, device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The median time of an action after a first one."""
    found = []
    for _ in range(REPEATS + 1):
        start = perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(perf_counter() - start)
    return median(found[1:])
