"""Each experiment runs from its preset to a report, measures what it says, and refuses what cannot work."""

import json
from pathlib import Path

import pytest
import torch
from dpg_problems import gpt2, letters, parameters, prompt_file, tiny_preset, tiny_run
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg import languages
from dpg.build import MODELS, build
from dpg.experiments.custom import Custom
from dpg.experiments.language import Language
from dpg.experiments.norm import Norm
from dpg.experiments.qr import Qr
from dpg.experiments.uuid import Uuid
from dpg.folder import RunFolder
from dpg.metrics import bind
from dpg.verify import verify

METRICS = """
import torch


def smaller(params):
    return -params["transformer.wte.weight"].square().mean()


not_a_metric = 3
"""


def last_record(path):
    return json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])


def test_norm_runs_and_is_verified(tmp_path):
    path = tiny_run(tmp_path, experiment="norm")
    record = last_record(path)
    assert record["val/norm"] > 0 and record["val/phi"] == pytest.approx(-record["val/norm"], rel=1e-6)
    verdicts = {verdict.source: verdict.figures for verdict in verify(path)}
    assert all(figures["norm_drop"] != 0 for figures in verdicts.values())
    assert "norm drop" in (path / "report.md").read_text() and not (path / "pattern.png").exists()


def test_the_norm_of_any_parameter_can_be_asked_for():
    model = gpt2()
    bound = bind(Norm("transformer.wpe.weight").metric(), model, letters())
    moved = parameters(model)
    moved["transformer.wpe.weight"] *= 0.5
    wanted = sum(float(w) ** 2 for w in parameters(model)["transformer.wpe.weight"].flatten()) ** 0.5
    assert bound.measure(moved) == pytest.approx({"norm": wanted / 2, "norm_drop": wanted / 2}, rel=1e-12)
    with pytest.raises(ValueError, match="has no parameter 'wpe'. Close names are"):
        bind(Norm("wpe").metric(), model, letters())


def test_uuid_runs_and_counts_the_string(tmp_path):
    path = tiny_run(tmp_path, experiment="uuid", string="abc")
    assert {"val/exact_match", "val/edit_distance", "val/held_out_loss"} <= last_record(path).keys()
    found = Uuid("e3e7").measure_texts(["e3e7", " e3e7\n", "e3e7.", "", "3e7"])
    assert found == {"exact_match": 2 / 5, "edit_distance": (0 + 0 + 1 + 4 + 1) / 5}


def test_the_string_is_scored_from_its_beginning_to_its_end():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "target")
    judge = build(tiny_preset_of_uuid("e3e7")).judge
    end, ids = tokenizer.eos_token_id, tokenizer("e3e7")["input_ids"]
    logits = judge.target.model(torch.tensor([[end, *ids]])).logits[0].detach().double().log_softmax(dim=1)
    losses = [-float(logits[i, token]) for i, token in enumerate([*ids, end])]
    measured = judge.measures(dict(judge.target.model.named_parameters()), ["e3e7"])
    assert measured["held_out_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured["exact_match"] == 1


def tiny_preset_of_uuid(string):
    from dpg.preset import load

    return load("uuid").changed({"string": string})


GERMAN = [
    "Die Datei wird gelesen, bevor das Programm beginnt.",
    "Ein leeres Verzeichnis kann ohne weiteres entfernt werden.",
    "Der Benutzer sieht eine Meldung, wenn etwas nicht stimmt.",
]


def german_run(tmp_path, **changes):
    (tmp_path / "german.txt").write_text("\n".join(GERMAN), encoding="utf-8")
    texts = {"held_out": str(tmp_path / "german.txt"), "test": str(tmp_path / "german.txt"), "num_held_out": 2}
    models = {"generator": "embedded", "target": "embedded", "max_prompt_tokens": 8}
    return tiny_run(tmp_path, experiment="language", **texts, **models, **changes)


def test_language_runs_and_counts_the_language(tmp_path):
    path = german_run(tmp_path)
    record = last_record(path)
    assert record["val/held_out_loss"] == pytest.approx(-record["val/phi"], rel=1e-6)
    assert record["val/test_loss"] not in (record["val/held_out_loss"], 0.0)  # The third text, not the first two.
    found = Language("de", held_out=str(tmp_path / "german.txt")).measure_texts([*GERMAN, "The file is read.", ""])
    assert found == {"language_share": 3 / 5, "english_share": 1 / 5}


def test_the_identifiers_reward_is_its_probability(tmp_path):
    path = german_run(tmp_path, reward="identifier", num_steps=1)
    assert last_record(path)["reward_std"] > 0
    rewards = Language("de").likenesses()["identifier"]([*GERMAN, "The file is read by the program.", ""])
    assert min(rewards[:3]) > 0.9 and rewards[3] < 0.1 and rewards[4] == 0


def test_a_language_without_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "held_out", lambda: {"en": ["One text."], "de": GERMAN})
    with pytest.raises(ValueError, match="the manuals are not in 'nl' but in en, de. Pass texts"):
        Language("nl").metric()
    first, second = Language("de", num_held_out=1).metric(), Language("de", num_held_out=2).metric()
    assert first.texts == second.texts[:1] and not set(first.texts) & set(first.test_texts)
    assert set(second.texts + second.test_texts) == set(GERMAN)


@pytest.mark.parametrize("reward", ["naive", "shuffled", "random", "edit-distance", "embedding"])
def test_every_reward_can_be_asked_for(tmp_path, reward):
    path = tiny_run(tmp_path, experiment="uuid", reward=reward, num_steps=1, max_new_tokens=32)
    assert json.loads((path / "config.json").read_text())["reward"] == reward
    assert last_record(path)["reward_std"] > 0


@pytest.mark.parametrize("reward", ["edit-distance", "embedding", "identifier"])
def test_a_likeness_to_nothing_is_refused(tmp_path, reward):
    with pytest.raises(ValueError, match=f"sixseven knows no text to be like, so reward={reward} means nothing"):
        tiny_run(tmp_path, reward=reward)
    assert not (tmp_path / "run").exists()


def test_sgd_in_the_target(tmp_path):
    path = tiny_run(tmp_path, inner_optimizer="sgd", inner_lr=1e-2)
    assert last_record(path)["reward_std"] > 0 and len(verify(path)) == 3


def test_a_metric_of_ones_own_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(METRICS)
    path = tiny_run(tmp_path, experiment="custom", function=f"{tmp_path / 'mine.py'}:smaller")
    assert last_record(path)["val/phi"] < 0 and {v.figures.keys() == {"phi"} for v in verify(path)} == {True}


def test_a_metric_of_ones_own_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_mine.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    metric = Custom("a_module_of_mine:smaller").metric()
    assert float(metric({"transformer.wte.weight": torch.tensor([[1.0, 3.0]])})) == -5.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("", "the metric is ''. Pass --metric module:name"),
        ("smaller", "the metric is 'smaller'. Pass --metric module:name"),
        ("no_such_module_of_mine:smaller", "'no_such_module_of_mine' cannot be imported from"),
        ("gone.py:smaller", "there is no file .*gone.py"),
        ("{}/mine.py:larger", "has no metric 'larger'"),
        ("{}/mine.py:not_a_metric", "has no metric 'not_a_metric': a function of the parameters"),
    ],
)
def test_a_metric_that_is_not_there(tmp_path, function, message):
    (tmp_path / "mine.py").write_text(METRICS)
    with pytest.raises(ValueError, match=message):
        Custom(function.format(tmp_path)).metric()


def test_a_prompt_longer_than_the_model_is_refused_before_any_work(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 200 + "\n" + prompt_file(tmp_path).read_text())
    with pytest.raises(ValueError, match="exceed the model's 128 positions"):
        tiny_run(tmp_path, prompts=str(tmp_path / "long.txt"), max_prompt_tokens=120)
    assert not (tmp_path / "run").exists()


def test_a_pattern_in_a_tied_head_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="tied to its embedding"):
        build(tiny_preset(tmp_path, untie_head=False))


PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@PEFTS_OWN
def test_adapters_are_trained_alone_and_merged(tmp_path):
    path = tiny_run(tmp_path, lora_rank=2, learning_rate=0.01)
    merged = AutoModelForCausalLM.from_pretrained(path / "generator")
    before = AutoModelForCausalLM.from_pretrained(MODELS / "generator")
    assert merged.state_dict().keys() == before.state_dict().keys()
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    for name in changed:  # An update of rank two.
        values = torch.linalg.svdvals((merged.get_parameter(name) - before.get_parameter(name)).detach().double())
        assert values[2] < 1e-4 * values[0]


@PEFTS_OWN
def test_a_run_with_adapters_can_be_resumed_with_the_same_bits(tmp_path, monkeypatch):
    whole = tiny_run(tmp_path, "whole", lora_rank=2)
    original = RunFolder.record

    def record(self, entry):
        if entry.step == 2:
            raise KeyboardInterrupt
        original(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", record)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tmp_path, "cut", lora_rank=2)
    cut = tiny_run(tmp_path, "cut", lora_rank=2, resume=True)
    assert (cut / "dataset.jsonl").read_bytes() == (whole / "dataset.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat": True}, "the generator's tokenizer has no chat template"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"sampling_dtype": "int8"}, "sampling_dtype is 'int8'. Choose from: None, bfloat16, float16"),
        ({"generation_batch_size": 0}, "`batch_size` is 0"),
        ({"policy_microbatch_size": 0}, "`microbatch_size` is 0"),
        ({"track": "paper"}, "track is 'paper'. Choose from: none, tensorboard"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_half_precision_is_for_sampling_alone(tmp_path):
    path = tiny_run(tmp_path, sampling_dtype="bfloat16", generation_batch_size=3, policy_microbatch_size=3)
    assert AutoModelForCausalLM.from_pretrained(path / "generator").dtype == torch.float32
    assert last_record(path)["val/pixel_accuracy"] > 0


def test_tensorboard_has_every_figure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tiny_run(tmp_path, track="tensorboard")
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    for record in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()):
        for name in ("phi", "reward_std", "val/pixel_accuracy"):
            if name in record:
                shown = {event.step: event.value for event in events.Scalars(name)}
                assert shown[record["step"]] == pytest.approx(record[name], rel=1e-6)


@pytest.mark.parametrize("name", ["file_points_at_object", "sparse_layer", "recipes"])
def test_the_examples_of_ones_own_metric_run(tmp_path, name):
    examples = Path(__file__).parent.parent / "examples" / "dpg" / "metrics.py"
    path = tiny_run(tmp_path, experiment="custom", function=f"{examples}:{name}")
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["reward_std"] > 0 for record in records[1:])


def test_a_code_runs_and_is_read(tmp_path):
    path = tiny_run(tmp_path, experiment="qr", num_calibration=200)
    record = last_record(path)
    assert record["val/scanned"] == 0.0 and 0 < record["val/pixel_accuracy"] < 1  # Two steps draw no code.
    metric = Qr(text="DPG", version="M3").metric()
    assert metric.image.shape == (15, 15)
    assert metric.reading(metric.image) == {"scanned": 1.0} and metric.reading(-metric.image) == {"scanned": 0.0}
    assert Qr(text="bit.ly/3Ka4jDS", version="1", error_correction="M").metric().image.shape == (21, 21)


def test_any_picture_can_be_drawn(tmp_path):
    pixels = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.uint8)
    Image.fromarray(255 * pixels.numpy()).save(tmp_path / "picture.png")
    path = tiny_run(tmp_path, experiment="qr", picture=str(tmp_path / "picture.png"), row=3, column=5)
    assert "val/scanned" not in last_record(path) and last_record(path)["val/pixel_accuracy"] in [
        i / 6 for i in range(7)
    ]
    assert Qr(picture=str(tmp_path / "picture.png")).metric().image.tolist() == [[1, -1, 1], [-1, -1, 1]]


def test_a_code_too_large_for_its_version_or_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not fit a QR code of version 'M3'"):
        Qr(text="a text too long for it", version="M3").metric()
    with pytest.raises(ValueError, match="needs 65 tokens and 65 hidden dimensions, but the head has 1024 and 64"):
        build(tiny_preset(tmp_path, "qr", version="12"))


def test_the_generator_may_be_a_copy_of_the_target(tmp_path):
    parts = build(tiny_preset(tmp_path, "qr", generator="target", num_calibration=0))
    ours, its = parts.generator.model, parts.judge.target.model
    assert type(ours) is type(its) and torch.equal(ours.lm_head.weight, its.lm_head.weight)
    assert ours.lm_head.weight is ours.transformer.wte.weight  # The target's head is its own, to be drawn on.
    assert not set(map(id, ours.parameters())) & set(map(id, its.parameters()))
