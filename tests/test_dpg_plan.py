"""A plan is what a run takes: its bytes are those of real tensors, its lines are products, and its sums are sums."""

import json
import math
import re

import pytest
import torch
from dpg_problems import tiny_preset
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import metagrad as mg
from dpg.build import build
from dpg.estimate import estimate
from dpg.plan import calibrate as calibration
from dpg.plan import graphs
from dpg.plan.advice import changes, verdict
from dpg.plan.command import _speed
from dpg.plan.inputs import of_parts
from dpg.plan.ledger import Ledger
from dpg.plan.lines import product, readable
from dpg.plan.memory import Alive, alive_at_reversal, elsewhere, memory
from dpg.plan.options import Options, of_run, parsed_bytes
from dpg.plan.page import as_dict, page
from dpg.plan.shape import named_shape, shape_of
from dpg.plan.speed import Speed, Work, forward_passes, read_speed, work_of
from dpg.plan.workload import Devices, HeldOut, Inner, Workload, Writer
from dpg.target import Target

ENDS = {"bos_token_id": 0, "eos_token_id": 0}
WIDTH, LAYERS, VOCABULARY, LENGTH = 128, 2, 4000, 32
GPT2 = GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH, **ENDS)
LLAMA = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=160,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=LENGTH,
    **ENDS,
)


@pytest.fixture(autouse=True)
def as_in_a_run():
    """Torch's own default type, in which models compute their constants."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(dtype)


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gpt2():
    return shape_of(model_of(GPT2), "small GPT-2")


@pytest.fixture(scope="module")
def llama():
    return shape_of(model_of(LLAMA), "small Llama")


def counted(config, inner, device="cpu"):
    """The most bytes of tensors that a real metagradient has at a time, besides the model."""
    model = model_of(config)
    optimizer = mg.optim.adamw(lr=1e-3, eps_root=1e-4) if inner.num_moments else mg.optim.sgd(lr=1e-3)
    target = Target(model, None, optimizer, inner.batch, LENGTH, microbatch_size=inner.microbatch)
    batches = []
    for step in range(inner.num_steps):
        ids = torch.randint(VOCABULARY, (inner.batch, LENGTH))
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # Texts differ in length, so that attention needs its mask.
        index = torch.arange(step * inner.batch, (step + 1) * inner.batch)
        batches.append({"input_ids": ids, "labels": ids, "attention_mask": mask, "index": index})
    meta = {"weights": torch.ones(inner.num_steps * inner.batch, dtype=torch.float32)}

    def phi(state):
        return torch.stack([parameter.square().sum() for parameter in state.params.values()]).sum()

    metrics = phi if inner.num_metrics == 1 else [phi] * inner.num_metrics
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        mg.metagradient(metrics, target.step, model, batches, meta, schedule=mg.Binomial(inner.slots))
    return ledger.peak


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 1},
        {"num_steps": 1, "microbatch": 2},
        {"num_steps": 1, "num_metrics": 3},
        {"num_steps": 2},
        {"num_steps": 3, "microbatch": 2},
        {"num_steps": 3, "slots": 2},
        {"num_steps": 3, "slots": 1, "microbatch": 4},
        {"num_steps": 3, "num_metrics": 3, "microbatch": 4},
        {"num_steps": 3, "num_moments": 0},
    ],
    ids=str,
)
def test_planned_bytes_are_those_of_the_tensors_of_a_real_run(config, settings):
    inner = Inner(shape_of(model_of(config), "small"), batch=8, length=LENGTH, **settings)
    (phase,) = memory(Workload(inner, None, Devices())).phases
    # What an update makes in passing, blocks of half a megabyte, is not in the plan.
    assert phase.bytes == pytest.approx(counted(config, inner), rel=0.02)


def test_the_ledger_counts_what_is_held():
    kept = torch.zeros(10, dtype=torch.float32)
    with Ledger([kept]) as ledger:
        first = torch.zeros(100, dtype=torch.float32)
        view, other = first[10:], kept[5:]
        assert ledger.alive == 400
        second = first + 1
        assert (ledger.alive, ledger.peak) == (800, 800)
        del first
        assert ledger.alive == 800  # The view still holds it.
        del view, other
        assert (ledger.alive, ledger.peak) == (400, 800)
        del second
        assert ledger.alive == 0


def test_parameters_and_lines_are_those_of_a_hand_calculation(gpt2):
    block = (
        4 * WIDTH + (WIDTH + 1) * 3 * WIDTH + (WIDTH + 1) * WIDTH + (WIDTH + 1) * 4 * WIDTH + (4 * WIDTH + 1) * WIDTH
    )
    p = VOCABULARY * WIDTH + LENGTH * WIDTH + LAYERS * block + 2 * WIDTH
    assert gpt2.num_params == gpt2.num_learned == p and gpt2.largest_block == VOCABULARY * WIDTH
    inner = Inner(gpt2, num_steps=4, batch=8, length=LENGTH, microbatch=2, num_metrics=3)
    writer = Writer(gpt2, num_texts=16, num_prompts=4, prompt=5, written=10)
    found = memory(Workload(inner, writer, Devices()))
    always = {line.what: line.bytes for line in found.always.lines}
    assert always == {
        "generator's weights": 4 * p,
        "generator's gradient": 4 * p,
        "generator's Adam state": 8 * p,
        "reference of the KL": 4 * p,
        "target's weights": 4 * p,
    }
    lines = {line.what: line.bytes for phase in found.phases for line in phase.lines}
    # States 0 to 3 are kept, 4 is the trained one; of the first the two moments are one tensor of zeros.
    assert lines["5 states"] == (5 * 3 - 1) * 4 * p
    assert lines["gradients kept with states"] == 3 * 4 * p  # The last step's comes with its state.
    assert lines["adjoint"] == 3 * 3 * 4 * p and lines["its cotangent"] == 3 * 4 * p
    assert lines["Hessian products"] == 2 * 3 * 4 * p  # Of this micro-batch, and the sum of those before.
    assert lines["keys and values"] == 16 * (5 + 10) * 2 * LAYERS * WIDTH * 4
    assert lines["logits, in 5 forms"] == 5 * 16 * VOCABULARY * 4
    assert lines["copy of weights and Adam state"] == 3 * 4 * p


def test_every_product_is_the_arithmetic_that_it_shows(gpt2, llama):
    writer = Writer(llama, 16, 4, 5, 10, has_reference=False)
    for devices in (Devices(), Devices(4), Devices(4, sharded=True), Devices(cpu=True)):
        inner = Inner(gpt2, num_steps=4, batch=8, length=LENGTH, microbatch=2, place="pinned")
        workload = Workload(inner, writer, devices)
        found = memory(workload)
        for line in [
            *found.always.lines,
            *(each for phase in found.phases for each in phase.lines),
            elsewhere(workload),
        ]:
            if not line.arithmetic.startswith("counted"):
                told = line.arithmetic.replace(",", "").replace(" B", "").replace(" x ", "*")
                assert line.bytes == math.ceil(eval(told) - 1e-6), line


def test_a_page_adds_up(gpt2):
    inner = Inner(gpt2, num_steps=2, batch=8, length=LENGTH, held_out=HeldOut(6, 4, 10))
    workload = Workload(inner, Writer(gpt2, 16, 4, 5, 10), Devices(capacity=2**40))
    found, told = memory(workload), as_dict(workload, None)
    assert [phase["bytes"] for phase in told["phases"]] == [sum(x["bytes"] for x in p["lines"]) for p in told["phases"]]
    assert told["peak_bytes"] == told["always"]["bytes"] + max(phase["bytes"] for phase in told["phases"])
    lines = page(workload, None).splitlines()
    assert f"peak, while {found.largest.name}" in next(line for line in lines if line.startswith("peak"))
    assert next(line for line in lines if line.startswith("peak")).endswith(readable(found.peak))
    assert sum(line.startswith("  in all") for line in lines) == len(found.phases) + 2  # and all the time, operations


def test_states_alive_when_a_step_is_reversed():
    assert alive_at_reversal(4, 8, 2, False) == Alive(5, 0)
    assert alive_at_reversal(4, 8, 2, True) == Alive(5, 3)
    assert alive_at_reversal(4, 1, 2, False) == Alive(3, 0)  # The first, the one in hand, the trained one.
    assert alive_at_reversal(100, 10, 2, False).states == 12  # Ten kept, one in hand, the trained one.


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2-124m", 124_439_808),
        ("smollm2-135m", 134_515_008),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, published):
    assert named_shape(name).num_params == published


def test_adapters_learn_alone(llama):
    pytest.importorskip("peft")
    adapted = llama.with_adapters(4)
    per_layer = 4 * (2 * WIDTH + 2 * (WIDTH + WIDTH // 2) + 2 * WIDTH + 3 * (WIDTH + 160))
    assert adapted.num_learned == LAYERS * per_layer
    assert adapted.num_params == llama.num_params + adapted.num_learned and llama.num_learned == llama.num_params


def test_forward_operations_are_those_of_the_products_of_matrices(gpt2):
    products = 2 * (LAYERS * 12 * WIDTH**2 + WIDTH * VOCABULARY) + 4 * LAYERS * WIDTH * LENGTH
    assert graphs.operations(gpt2, LENGTH) == pytest.approx(products, rel=1e-9)


def test_forward_passes_are_those_of_the_theory(gpt2):
    def passes(**settings):
        return sum(count for _, count in forward_passes(Inner(gpt2, batch=8, length=LENGTH, **settings)))

    assert passes(num_steps=1) == 5 and passes(num_steps=1, microbatch=2) == 6
    assert passes(num_steps=1, num_metrics=3) == 3 + 3 * 2
    # Two steps: 3 + 3 forward, 6 back through the graph of the last, then 3 + 2 for step 0.
    assert passes(num_steps=2) == 17
    # With micro-batches the last step's gradient and that of step 0 were kept: 3 + 3, 3 + 6, and 3 for step 0.
    assert passes(num_steps=2, microbatch=2) == 18
    # One slot: step 0 is run again; its gradient was found on the way to be kept with its state, and is there.
    assert passes(num_steps=3, slots=1) == 9 + 3 * 3 + 2 * 3 + 2 * 6 + 2
    assert passes(num_steps=4, metagradient=False) == 12


def test_devices_share_texts_and_if_sharded_states_too(gpt2):
    inner = Inner(gpt2, num_steps=3, batch=8, length=LENGTH)
    one, apart, sharded = (
        memory(Workload(inner, None, devices)) for devices in (Devices(), Devices(4), Devices(4, sharded=True))
    )
    bytes_of = [{line.what: line.bytes for line in found.largest.lines} for found in (one, apart, sharded)]
    assert bytes_of[0]["4 states"] == bytes_of[1]["4 states"] == 4 * bytes_of[2]["4 states"]
    graph = "activations of the gradient"
    assert bytes_of[0][graph] > 3 * bytes_of[1][graph] and bytes_of[1][graph] == bytes_of[2][graph]
    assert bytes_of[2]["largest block, gathered"] == 3 * 4 * gpt2.largest_block
    # With parameters that are many beside the texts, the graph is freed before all gradients are there; but where each
    # device keeps a small part of those, the graph is what counts.
    writer = Writer(gpt2, num_texts=4, num_prompts=2, prompt=2, written=4)
    graph = graphs.policy(gpt2, 1, 2, 4, False)
    learning = memory(Workload(None, writer, Devices(4, sharded=True))).phases[2]
    assert learning.lines[0].bytes >= graph.held
    assert sharded.always.bytes == gpt2.num_params and one.always.bytes == 4 * gpt2.num_params


def test_verdicts_and_what_to_change(gpt2):
    inner = Inner(gpt2, num_steps=4, batch=64, length=LENGTH)
    writer = Writer(gpt2, 64, 16, 5, 10)
    peak = memory(Workload(inner, writer, Devices())).peak

    def at(capacity):
        return Workload(inner, writer, Devices(capacity=capacity))

    assert verdict(Workload(inner, writer, Devices())) is None
    assert verdict(at(2 * peak)).startswith("fits: ") and changes(at(2 * peak)) == []
    assert verdict(at(peak + 1)).startswith("may fit: ")
    assert verdict(at(peak - 1)).startswith("does not fit: ")
    found = changes(at(peak // 4))
    peaks = [peak, *(change.peak for change in found)]
    assert all(after < before for before, after in zip(peaks, peaks[1:], strict=False))
    assert found[-1].peak <= 0.9 * (peak // 4)
    assert found[0].option.startswith("--microbatch ")
    told = page(at(peak // 4), None)
    assert "What to change, one after the other:" in told and found[-1].what in told
    assert "That is not enough" in page(at(10_000), None)


def test_seconds_are_operations_over_what_is_reached(gpt2, tmp_path):
    speed = Speed(1e9, 0.5, 1e6)
    assert speed.seconds(Work("", "", 2e9), 1) == 4.0 and speed.seconds(Work("", "", 2e9), 4) == 1.0
    assert speed.seconds(Work("", "", 2e9, bytes_read=5e6), 4) == 5.0
    speed.save(tmp_path / "constants.json")
    assert read_speed(tmp_path / "constants.json") == speed
    workload = Workload(Inner(gpt2, 2, 8, LENGTH), Writer(gpt2, 16, 4, 5, 10), Devices())
    told = as_dict(workload, speed)
    assert told["seconds"] == pytest.approx(sum(speed.seconds(work, 1) for work in work_of(workload)))
    assert "measured" not in page(workload, speed) and "0.5 are reached" in page(workload, speed)
    with pytest.raises(ValueError, match="share is 2"):
        Speed(1e9, 2.0)
    (tmp_path / "wrong.json").write_text('{"speed": 3}')
    with pytest.raises(ValueError, match="wrong.json holds no constants"):
        read_speed(tmp_path / "wrong.json")


def test_a_calibration_measures_this_device(monkeypatch):
    monkeypatch.setattr(calibration, "REPEATS", 1)
    found = calibration.calibrate(torch.device("cpu"))
    assert 1e8 < found.flops < 1e14 and 0 < found.share <= 1 and 1e7 < found.bandwidth < 1e13
    assert found.source == "measured on 1 CPU threads"


def test_a_run_prints_the_peak_of_its_plan(tmp_path):
    preset = tiny_preset(tmp_path)
    parts = build(preset)
    found = memory(of_parts(parts, preset.settings))
    expected = estimate(parts, preset.settings)
    assert (expected.memory, expected.always) == (found.peak, found.always.bytes)


def test_a_preset_is_planned_without_its_models(monkeypatch):
    paper = of_run("language", "paper", [], {"slots": 4}, Devices(capacity=80 * 10**9))
    assert paper.inner.shape.num_params == 1_235_814_400 and paper.inner.slots == 4
    assert paper.inner.held_out == HeldOut(1024, 256, 128) and not paper.devices.cpu
    naive = of_run("sixseven", "laptop", ["reward=naive"], {}, Devices())
    assert not naive.inner.metagradient and naive.inner.num_runs == 4 and naive.devices.cpu
    assert naive.devices.capacity is not None  # This machine's.
    assert naive.inner.length == 33  # Texts of 32 tokens and their end, though the target would read 48.
    assert paper.inner.length == 128
    with pytest.raises(ValueError, match="the multilingual target is not made yet"):
        monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
        of_run("language", "laptop", [], {}, Devices())


def test_amounts_of_memory():
    assert parsed_bytes("80GB") == 80 * 10**9 and parsed_bytes("24 GiB") == 24 * 2**30
    assert parsed_bytes("500m") == 500 * 10**6 and parsed_bytes("1.5GiB") == 3 * 2**29
    for text in ("plenty", "80"):  # Bytes, gigabytes?
        with pytest.raises(ValueError, match=f"'{text}' is no amount of memory"):
            parsed_bytes(text)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="share is 0.0"):
        _speed((1e12, 0.0, None), None, None, None)
    assert product("", 3, 1_000, over=7).bytes == math.ceil(12_000 / 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt5"}, "'gpt5' is no folder, and no name found"),
        ({"model": "weights.gguf"}, "is a packed model"),
        ({"batch": 0}, "batch is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"microbatch": 0}, "microbatch is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"lora_rank": 0}, "lora-rank is 0"),
        ({"sequence_length": 2000}, "the sequence length is 2000. Pass from 2 to the 1024 positions"),
        ({"prompt_tokens": 1000}, "exceed the 1024 positions"),
        ({"states": "cloud"}, "Choose from: device, pinned, disk"),
        ({"optimizer": "lion"}, "Choose from: adamw, sgd"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Options(**{"model": "gpt2-124m", **options}).workload(Devices())


def test_a_model_that_writes_nothing_is_no_target(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="is no causal language model"):
        named_shape(str(tmp_path))
