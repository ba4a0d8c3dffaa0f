"""The paper's presets start and take one real step, on small models of the same architectures as the authors'."""

import json
import math

import pytest
from dpg_problems import prompt_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpg.estimate
from dpg.build import MODELS, build
from dpg.estimate import available_memory, estimate
from dpg.preset import FOLDER, load
from dpg.run import run

PAPER = sorted(file.stem.removesuffix("-paper") for file in FOLDER.glob("*-paper.yaml"))
CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SMALL = {
    "device": "cpu",
    "num_steps": 1,
    "prompts_per_step": 8,
    "updates_per_step": 2,
    "inner_batch_size": 16,
    "inner_microbatch_size": 8,
    "policy_microbatch_size": 4,
    "generation_batch_size": 12,
    "max_prompt_tokens": 64,
    "max_new_tokens": 16,
    "sequence_length": 32,
    "validation_texts": 16,
    "dataset_texts": 16,
    "checkpoint_every": 1,
}
"""What makes a run of seconds: sizes. Every learning rate, epsilon, coefficient and length of groups stays."""


@pytest.fixture(scope="module")
def llama_instruct(tmp_path_factory):
    """A small Llama whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("llama-instruct")
    AutoModelForCausalLM.from_pretrained(MODELS / "generator").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "generator")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def stand_in(experiment, llama_instruct, folder):
    preset = load(experiment, "paper")
    small_gpt2 = str(MODELS / "target")
    target = small_gpt2 if "gpt2" in preset.settings.target else str(llama_instruct)
    models = {"generator": str(llama_instruct), "target": target, "prompts": str(prompt_file(folder))}
    if experiment == "language":
        models |= {"held_out": models["prompts"], "test": models["prompts"], "num_held_out": 8}
    if experiment == "uuid":
        models |= {"max_new_tokens": 36, "sequence_length": 36}
    return preset.changed({**SMALL, **models})


@pytest.mark.parametrize("experiment", PAPER)
def test_a_paper_preset_takes_one_real_step(experiment, llama_instruct, tmp_path, capsys):
    preset = stand_in(experiment, llama_instruct, tmp_path)
    run(preset, tmp_path / "run")
    assert capsys.readouterr().out.startswith(f"{experiment}: about ")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert records[1]["reward_std"] > 0 and all(map(math.isfinite, records[1].values()))
    assert f"val/{preset.experiment.figure}" in records[1]


@pytest.mark.parametrize("experiment", PAPER)
def test_inner_hyperparameters_are_the_authors_in_units_of_a_mean_gradient(experiment):
    """Adam sees the authors' gradient g·K as we see g: lr·m/(sqrt(v + eps_root) + eps) with all of it over K."""
    settings = load(experiment, "paper").settings
    num_summed = 1024 // settings.inner_microbatch_size
    assert (settings.inner_eps, settings.inner_eps_root) == (1e-8 / num_summed, 1e-9 / num_summed**2)
    gradient = 3e-6
    authors = gradient * num_summed / (math.sqrt((gradient * num_summed) ** 2 + 1e-9) + 1e-8)
    ours = gradient / (math.sqrt(gradient**2 + settings.inner_eps_root) + settings.inner_eps)
    assert ours == pytest.approx(authors, rel=1e-12)


def test_a_chat_prompt_keeps_its_template_when_it_is_cut(llama_instruct, tmp_path):
    preset = stand_in("sixseven", llama_instruct, tmp_path).changed({"max_prompt_tokens": 30})
    generator = build(preset).generator
    tokenizer = generator.tokenizer
    (short,) = generator.encode(["Hi."])
    assert tokenizer.decode(short) == "user: Hi.\nassistant:"
    (long,) = generator.encode(["The file is returned. " * 40])
    text = tokenizer.decode(long)
    assert len(long) <= 31 and text.startswith("user: The file is returned.") and text.endswith("\nassistant:")


def test_the_estimate_counts_what_a_run_does(llama_instruct, tmp_path):
    preset = stand_in("sixseven", llama_instruct, tmp_path)
    expected = estimate(build(preset), preset.settings)
    assert expected.num_texts == 32 + 2 * 16 + 2 * 16 and expected.num_inner_steps == 2
    split = preset.changed({"cross_group": False})
    assert estimate(build(split), split.settings).num_inner_steps == 1  # Four data sets of eight texts.
    untrained = preset.changed({"reward": "random"})
    assert estimate(build(untrained), untrained.settings).num_inner_steps == 0
    run(preset, tmp_path / "run")
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert written <= expected.disk <= 4 * written + 10_000_000
    weights = (MODELS / "generator" / "model.safetensors").stat().st_size
    assert expected.memory > 4 * weights  # with its gradient and Adam's two moments


def test_models_that_cannot_fit_are_refused_before_any_work(llama_instruct, tmp_path, monkeypatch):
    monkeypatch.setattr(dpg.estimate, "available_memory", lambda device: 5_000_000)
    with pytest.raises(ValueError, match="the models and their optimizers take .* and cpu has 5 MB"):
        run(stand_in("norm", llama_instruct, tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_memory_is_that_of_the_machine():
    import torch

    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert available_memory(torch.device("cpu")) == pytest.approx(total, rel=0.01)
