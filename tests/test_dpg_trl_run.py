"""`dpg run --engine trl` leaves the same folder, goes on where it stopped with the same bits, and refuses by name."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpg_problems import (
    TINY_RUN,
    assert_same_run,
    parameters,
    prompt_file,
    same_bits,
    tiny_preset,
    without_seconds,
)
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, get_scheduler
from trl import GRPOTrainer

from dpg.build import MODELS, build
from dpg.cli import main
from dpg.engine import BuiltinEngine, Interrupted, engine
from dpg.folder import RunFolder, RunFolderError
from dpg.run import run
from dpg.settings import Settings
from dpg.target import load_model
from dpg.trl import TrlEngine
from dpg.trl.config import grpo_config
from dpg.trl.engine import prompt_rows
from dpg.trl.steps import Steps
from dpg.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own.


def tiny(folder, name="run", *, resume=False, options=None, **changes):
    """A tiny run by TRL in `folder / name`, as a user's: in float32."""
    torch.set_default_dtype(torch.float32)
    try:
        run(tiny_preset(folder, **changes), folder / name, resume=resume, command="x", engine=TrlEngine(options or {}))
    finally:
        torch.set_default_dtype(torch.float64)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
    return tiny(folder)


def test_the_folder_is_that_of_the_built_in_loop(finished, folder):
    run(tiny_preset(folder), folder / "builtin", engine=BuiltinEngine())
    builtin, present = ({path.name for path in (folder / name).iterdir()} for name in ("builtin", "run"))
    assert present - builtin == {"trl", "checkpoint.json"} and builtin - present == {"checkpoint.pt"}
    found, wanted = without_seconds(finished), without_seconds(folder / "builtin")
    assert [record.keys() for record in found] == [record.keys() for record in wanted]
    assert found[0] == wanted[0]  # The untrained generator, on the same fresh texts.
    for record in found[1:]:
        assert all(math.isfinite(value) for key, value in record.items() if key != "seconds")
        assert record["reward_std"] > 0 and record["num_tokens"] > 8 and record["kl"] > 0
    config = json.loads((finished / "config.json").read_text())
    assert config["engine"] == "trl" and config["num_processes"] == 1
    untrained = AutoModelForCausalLM.from_pretrained(folder / "builtin" / "target")
    assert same_bits(parameters(untrained), parameters(AutoModelForCausalLM.from_pretrained(finished / "target")))


def test_a_run_is_verified(finished):
    assert [verdict.source for verdict in verify(finished)][0] == "the run's data"


@pytest.mark.parametrize("step", [0, 1])
def test_ctrl_c_finishes_the_step_and_can_be_resumed(finished, folder, monkeypatch, step):
    original = RunFolder.record

    def record(self, entry):
        original(self, entry)
        if entry.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    name = f"interrupted-{step}"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", record)
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 2; nothing is lost"):
            tiny(folder, name, checkpoint_every=2)
    assert len(without_seconds(folder / name)) == step + 1
    assert_same_run(tiny(folder, name, resume=True, checkpoint_every=2), finished)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(finished, folder, monkeypatch):
    keep = Steps.keep

    def killed(self, update):
        if update == 8:
            raise KeyboardInterrupt
        keep(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(folder, "killed")
    assert json.loads((folder / "killed" / "checkpoint.json").read_text()) == {"update": 4}
    assert_same_run(tiny(folder, "killed", resume=True), finished)


def test_a_finished_run_can_be_resumed_in_vain(finished, folder):
    before = (finished / "dataset.jsonl").read_bytes(), without_seconds(finished)
    tiny(folder, resume=True)
    assert before == ((finished / "dataset.jsonl").read_bytes(), without_seconds(finished))


def test_adapters_are_trained_and_resumed(folder, monkeypatch):
    whole = tiny(folder, "adapters", lora_rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "_record", lambda self, step, logs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tiny(folder, "adapters-killed", lora_rank=2)
    assert_same_run(tiny(folder, "adapters-killed", lora_rank=2, resume=True), whole)


def test_the_naive_reward_has_no_groups(folder):
    path = tiny(folder, "naive", reward="naive", num_steps=1)
    assert [record["step"] for record in without_seconds(path)] == [0, 1]


def test_a_chat_is_continued(folder):
    model, tokenizer = load_model(str(MODELS / "generator"))
    tokenizer.chat_template = "{% for m in messages %}say {{ m['content'] }}\n{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(folder / "chatty")
    chat = {"generator": str(folder / "chatty"), "chat": True, "max_prompt_tokens": 6, "num_steps": 1}
    parts = build(tiny_preset(folder, **chat))
    rows = prompt_rows(parts, tiny_preset(folder, **chat).settings)
    assert len(rows) == 4  # As many as one step draws.
    for row in rows:
        ((role, said),) = [(message["role"], message["content"]) for message in row["prompt"]]
        assert role == "user" and any(prompt.startswith(said) for prompt in parts.prompts)
    path = tiny(folder, "chat", **chat)
    assert without_seconds(path)[1]["num_tokens"] > 8


def test_each_step_draws_prompts_of_its_own(folder):
    preset = tiny_preset(folder, num_steps=5)
    parts = build(preset)
    drawn = [row["prompt"] for row in prompt_rows(parts, preset.settings)]
    whole = [parts.generator.cut(prompt) for prompt in parts.prompts]
    steps = [drawn[i : i + 4] for i in range(0, 20, 4)]
    assert all(whole.count(text) >= step.count(text) for step in steps for text in step)
    assert len({tuple(step) for step in steps}) == 5


def test_a_tokenizer_that_ends_prompts_is_refused(folder):
    preset = tiny_preset(folder)
    parts = build(preset)
    tokenizer = parts.generator.tokenizer
    ending = TemplateProcessing(single="$A end", special_tokens=[("end", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ending
    with pytest.raises(ValueError, match="puts its end token behind every text"):
        prompt_rows(parts, preset.settings)


def test_entropy_bonus_micro_batches_and_options(folder):
    options = {"loss_type": "dr_grpo", "activation_checkpointing": True}
    path = tiny(folder, "other", num_steps=1, policy_microbatch_size=1, entropy_coefficient=0.01, options=options)
    assert json.loads((path / "config.json").read_text())["trl_config"] == options


def test_trackers_get_our_figures_with_trls(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tiny(folder, "tracked", track="tensorboard")
    (events,) = (path / "trl" / "runs").iterdir()
    found = EventAccumulator(str(events)).Reload()
    ours = {"phi", "raw_reward_std", "pixel_accuracy", "val/phi", "val/pixel_accuracy"}
    assert {f"train/{name}" for name in {*ours, "reward", "kl", "loss"}} <= set(found.Tags()["scalars"])
    logged = found.Scalars("train/phi")
    assert [(event.step, pytest.approx(event.value)) for event in logged] == [
        (4 * record["step"], record["phi"]) for record in without_seconds(path)[1:]
    ]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_generator_that_diverges_stops_the_run(folder, monkeypatch, loss):
    compute = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *arguments: compute(*arguments) * loss)
    with pytest.raises(Exception, match="GRPO step 1: the generator's loss is (nan|inf)"):
        tiny(folder, f"diverged-{loss}")


def test_another_engine_cannot_resume(finished, folder):
    with pytest.raises(RunFolderError, match="was started with engine = 'trl', not 'builtin'"):
        run(tiny_preset(folder), finished, resume=True)
    with pytest.raises(RunFolderError, match="was started with trl_config = {}, not {'top_k': 5}"):
        tiny(folder, resume=True, options={"top_k": 5})


@pytest.mark.parametrize("damage", ["{", "{}", '{"update": 400}'])
def test_a_damaged_folder_is_refused(folder, damage):
    path = tiny(folder, f"damaged-{len(damage)}", num_steps=1)
    (path / "checkpoint.json").write_text(damage)
    with pytest.raises(RunFolderError, match="checkpoint.json is damaged|checkpoint-400 is gone"):
        tiny(folder, path.name, num_steps=1, resume=True)


def test_learning_rates_fall_as_in_the_built_in_loop():
    config = grpo_config(Settings(), Path("run/trl"), 1, {})
    assert config.max_steps == 280 and config.lr_scheduler_type == "polynomial"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    schedule = get_scheduler("polynomial", optimizer, 0, 280, config.lr_scheduler_kwargs)
    rates = []
    for _ in range(280):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-3 + (1e-4 - 1e-3) * update / 280 for update in range(280)])


@pytest.mark.parametrize(("processes", "micro"), [(1, None), (2, None), (2, 8), (4, 16)])
def test_a_step_is_shared_out_evenly(processes, micro):
    config = grpo_config(Settings(policy_microbatch_size=micro), Path("run/trl"), processes, {})
    assert config.per_device_train_batch_size == (micro or 64 // processes)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == 64
    assert config.steps_per_generation == 4 * config.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"device": "cuda:1"}, {}, "accelerate places TRL's models"),
        ({"sampling_dtype": "bfloat16"}, {}, "sampling_dtype=bfloat16 is for the built-in sampler"),
        ({"generator": "model.gguf"}, {}, "the generator is a .gguf file"),
        ({"updates_per_step": 3}, {}, "cannot share 256 texts a step evenly among 1 processes, 3 updates"),
        ({"policy_microbatch_size": 7}, {}, "micro-batches of 7 texts"),
        ({"final_learning_rate": 0.1}, {}, "TRL's schedules fall"),
        ({}, {"use_vlm": True}, "has no field 'use_vlm'"),
        ({}, {"beta": 0.1}, "beta is decided by the settings of the run"),
        ({}, {"save_steps": 1}, "save_steps cannot be changed in a run of dpg"),
    ],
)
def test_what_cannot_be_mapped_is_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        grpo_config(Settings(**changes), Path("run/trl"), 1, options)


def test_engines_are_chosen_by_name(tmp_path):
    (tmp_path / "good.yaml").write_text("use_vllm: true\nvllm_mode: server\n")
    assert engine("trl", tmp_path / "good.yaml") == TrlEngine({"use_vllm": True, "vllm_mode": "server"})
    (tmp_path / "bad.yaml").write_text("- use_vllm\n")
    for name, path, message in [
        ("verl", None, "there is no engine 'verl'. Choose from: builtin, trl"),
        ("builtin", tmp_path / "good.yaml", "--trl-config is for --engine trl"),
        ("trl", tmp_path / "bad.yaml", "must hold fields of GRPOConfig"),
        ("trl", tmp_path / "none.yaml", "is no YAML file"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine(name, path)


def test_an_error_message_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpg", "run", "sixseven", "--engine", "trl", "--trl-config", "none.yaml"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("dpg: --trl-config none.yaml is no YAML file")


def launched(folder, name, *arguments):
    """A tiny run by two processes: its exit status and what it printed."""
    settings = [part for key, value in TINY_RUN.items() for part in ("--set", f"{key}={value}")]
    command = [
        "run",
        "sixseven",
        "--engine",
        "trl",
        "--prompts",
        prompt_file(folder),
        "--out",
        folder / name,
        *settings,
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpg.cli"]
    path = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*launch, *map(str, command), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout + done.stderr


def test_two_processes_write_one_folder(folder, finished):
    status, printed = launched(folder, "two")
    assert status == 0 and printed.count("finished in ") == 1, printed
    assert [record.keys() for record in without_seconds(folder / "two")] == [
        record.keys() for record in without_seconds(finished)
    ]
    assert without_seconds(folder / "two")[0] == without_seconds(finished)[0]
    assert len(verify(folder / "two")) == 3
