"""`dpg plan`: what a run will take, and what to change if it is too much."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:  # The command line's help must not wait for torch.
    from dpg.plan.speed import Speed

Count: TypeAlias = int | None
Name: TypeAlias = str | None
Rate: TypeAlias = float | None


def plan(
    experiment: Annotated[Name, typer.Argument(help="Of `dpg run`; or leave it out and pass --model.")] = None,
    preset: Annotated[str, typer.Option(help="laptop, paper, or a YAML file.")] = "laptop",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    model: Annotated[
        Name, typer.Option(help="Target: gpt2-124m, smollm2-135m, llama-1b, llama-8b, a folder or a hub name.")
    ] = None,
    generator: Annotated[Name, typer.Option(help="Likewise, or none. (default: as --model)")] = None,
    batch: Annotated[Count, typer.Option(help="Texts in an inner step, on all GPUs together. (256)")] = None,
    sequence_length: Annotated[Count, typer.Option(help="Tokens of a text. (128)")] = None,
    steps: Annotated[Count, typer.Option(help="T: inner steps. (1)")] = None,
    metrics: Annotated[Count, typer.Option(help="K: metrics that share the run. (1)")] = None,
    held_out: Annotated[Count, typer.Option(help="Texts of each metric. (0: it reads weights alone)")] = None,
    optimizer: Annotated[Name, typer.Option(help="Of the target: adamw or sgd. (adamw)")] = None,
    microbatch: Annotated[Count, typer.Option(help="Texts differentiated at a time on one GPU. (all)")] = None,
    slots: Annotated[Count, typer.Option(help="States kept at a time. (8)")] = None,
    states: Annotated[Name, typer.Option(help="Where: device, pinned or disk. (device)")] = None,
    prompt_tokens: Annotated[Count, typer.Option(help="Tokens of a prompt. (64)")] = None,
    group_size: Annotated[Count, typer.Option(help="Texts of a prompt. (4)")] = None,
    updates: Annotated[Count, typer.Option(help="Of the generator in a GRPO step. (1)")] = None,
    generation_batch: Annotated[Count, typer.Option(help="Texts sampled at a time on one GPU. (all)")] = None,
    policy_microbatch: Annotated[Count, typer.Option(help="Texts learned from at a time on one GPU. (all)")] = None,
    lora_rank: Annotated[Count, typer.Option(help="Train adapters of the generator. (none)")] = None,
    no_reference: Annotated[bool, typer.Option("--no-reference", help="There is no KL penalty.")] = False,
    gpus: Annotated[int, typer.Option(help="Devices that share the work.")] = 1,
    gpu_memory: Annotated[Name, typer.Option(help="Of each: 80GB, 24GiB, ...")] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help="Divide parameters and states between them.")] = False,
    flops: Annotated[Rate, typer.Option(help="Float32 operations a second of one device.")] = None,
    share: Annotated[Rate, typer.Option(help="Of these, what is reached. (0.4, an assumption)")] = None,
    bandwidth: Annotated[Rate, typer.Option(help="Bytes a second of one device's memory.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the three on --device.")] = False,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
    save: Annotated[Path | None, typer.Option(help="Write what was measured to this file.")] = None,
    constants: Annotated[Path | None, typer.Option(help="Read it from there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")] = False,
) -> None:
    """Say what a run will take before it starts: bytes in each phase, operations, seconds, and what to change."""
    options = {
        "generator": generator,
        "batch": batch,
        "sequence_length": sequence_length,
        "steps": steps,
        "metrics": metrics,
        "held_out": held_out,
        "optimizer": optimizer,
        "microbatch": microbatch,
        "slots": slots,
        "states": states,
        "prompt_tokens": prompt_tokens,
        "group_size": group_size,
        "updates": updates,
        "generation_batch": generation_batch,
        "policy_microbatch": policy_microbatch,
        "lora_rank": lora_rank,
    }
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"reference": False} if no_reference else {}
    if (experiment is None) == (model is None):
        raise ValueError("name an experiment (`dpg plan sixseven --preset paper`) or pass --model: one of the two.")
    from dpg.plan.options import Options, of_run, parsed_bytes
    from dpg.plan.page import as_dict, page
    from dpg.plan.workload import Devices

    capacity = None if gpu_memory is None else parsed_bytes(gpu_memory)
    devices = Devices(gpus, sharded, capacity)
    if experiment is not None:
        workload = of_run(experiment, preset, set_ or [], given, devices)
    elif set_:
        raise ValueError("--set goes with an experiment. With --model, pass the options of `dpg plan --help`.")
    else:
        workload = Options(model or "", **given).workload(devices)
    speed = _speed((flops, share, bandwidth), device if calibrate else None, save, constants)
    print(json.dumps(as_dict(workload, speed), indent=2) if as_json else page(workload, speed))


def _speed(given: tuple[Rate, Rate, Rate], device: Name, save: Path | None, constants: Path | None) -> "Speed | None":
    """What was given, measured on `device`, or read from `constants`; None if none of them."""
    from dpg.plan.speed import ASSUMED_SHARE, Speed, read_speed

    flops, share, bandwidth = given
    if sum((flops is not None, device is not None, constants is not None)) > 1:
        raise ValueError("--flops, --calibrate and --constants each say how fast a device is. Pass one of them.")
    if flops is None and (share is not None or bandwidth is not None):
        raise ValueError("--share and --bandwidth go with --flops.")
    if save is not None and device is None:
        raise ValueError("--save writes what --calibrate measured. Pass both.")
    if constants is not None:
        return read_speed(constants)
    if device is not None:
        import torch

        from dpg.plan.calibrate import calibrate

        measured = calibrate(torch.device(device))
        if save is not None:
            measured.save(save)
        return measured
    return None if flops is None else Speed(flops, ASSUMED_SHARE if share is None else share, bandwidth)
