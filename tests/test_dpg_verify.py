"""`dpg verify` repeats the fine-tune with nothing of metagrad, and its figure can be computed by hand."""

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dpg_problems import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpg
import metagrad
from dpg.preset import restore
from dpg.verify import SOURCES, fine_tuned, verify

ROOT = Path(dpg.__file__).parent
IMAGE = ["###.###", "#...#.#", "###...#", "#.#..#.", "#.#..#.", "###..#."]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("verified"), seed=1)


def change_by_hand(path, texts, config):
    """What one epoch of AdamW does to the head, text by text without padding."""
    tokenizer = AutoTokenizer.from_pretrained(path / "target")
    model = AutoModelForCausalLM.from_pretrained(path / "target", dtype=torch.float32).eval()
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["inner_lr"], weight_decay=0.0)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(config["seed"])).tolist()
    size = config["inner_batch_size"]
    for start in range(0, len(texts), size):
        total, count = 0.0, 0
        for i in order[start : start + size]:
            ids = [*tokenizer(texts[i])["input_ids"], tokenizer.eos_token_id][: config["sequence_length"]]
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=1)
            for t in range(len(ids) - 1):
                total, count = total - log_probs[t, ids[t + 1]], count + 1
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model.lm_head.weight.detach() - before


def accuracy_by_hand(change):
    """Pixels drawn right, one by one."""
    pixels = [(r, c) for r in range(6) for c in range(7)]
    return sum(float(change[c, r]) * (1 if IMAGE[r][c] == "#" else -1) > 0 for r, c in pixels) / 42


def phi_by_hand(change, strength):
    """Φ, pixel by pixel."""
    pixels = [(r, c) for r in range(6) for c in range(7)]
    margins = [strength * float(change[c, r]) * (1 if IMAGE[r][c] == "#" else -1) for r, c in pixels]
    return -sum(math.log1p(math.exp(-margin)) if margin > -30 else -margin for margin in margins) / 42


def test_the_accuracy_is_that_of_a_hand_written_fine_tune(finished):
    config = json.loads((finished / "config.json").read_text())
    verdicts = verify(finished)
    assert [verdict.source for verdict in verdicts] == list(SOURCES) and len(verdicts) == 3
    for verdict in verdicts:
        texts = [json.loads(line)["text"] for line in (finished / SOURCES[verdict.source]).read_text().splitlines()]
        change = change_by_hand(finished, texts, config)
        assert verdict.figures["pixel_accuracy"] == pytest.approx(accuracy_by_hand(change), abs=1e-12)
        assert verdict.figures["phi"] == pytest.approx(phi_by_hand(change, config["strength"]), rel=1e-3)
    written = json.loads((finished / "verify.json").read_text())
    assert written == [{"source": verdict.source, **verdict.figures} for verdict in verdicts]


def test_the_fine_tune_is_the_hand_written_one_in_size_too(finished):
    config = json.loads((finished / "config.json").read_text())
    texts = [json.loads(line)["text"] for line in (finished / "dataset.jsonl").read_text().splitlines()]
    untrained = AutoModelForCausalLM.from_pretrained(finished / "target", dtype=torch.float32)
    trained = fine_tuned(finished, texts, restore(config).settings)
    change, wanted = (
        (trained.lm_head.weight - untrained.lm_head.weight).detach(),
        change_by_hand(finished, texts, config),
    )
    # float32: Adam turns rounding into whole steps where a gradient is no more than rounding.
    assert float((change - wanted).norm() / wanted.norm()) < 1e-3


def test_micro_batches_change_memory_alone(finished):
    settings = restore(json.loads((finished / "config.json").read_text())).settings
    texts = [json.loads(line)["text"] for line in (finished / "dataset.jsonl").read_text().splitlines()]
    whole, parts = (fine_tuned(finished, texts, replace(settings, inner_microbatch_size=n)) for n in (None, 3))
    start = AutoModelForCausalLM.from_pretrained(finished / "target", dtype=torch.float32).lm_head.weight.detach()
    moved, also = (model.lm_head.weight.detach() - start for model in (whole, parts))
    assert float((moved - also).norm() / moved.norm()) < 1e-3  # As above: Adam and rounding.


def test_verify_runs_without_metagrad(finished):
    verify(finished)
    expected = (finished / "verify.json").read_bytes()
    (finished / "verify.json").unlink()
    code = "import sys; sys.modules['metagrad'] = None; from dpg.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", finished],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (finished / "verify.json").read_bytes() == expected


def imports_of(path):
    """Every module that a file imports, anywhere in it; of `from dpg import x` both dpg and dpg.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            if node.module.split(".")[0] == "dpg":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(module):
    """The file of a module of dpg, or None."""
    path = ROOT.parent.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def reached_from(module, seen):
    """All modules of dpg that a module imports, directly or not."""
    for name in {module, *imports_of(file_of(module))}:
        if name.split(".")[0] == "dpg" and name not in seen and file_of(name):
            seen.add(name)
            reached_from(name, seen)
    return seen


def test_verify_reaches_no_metagrad():
    reached = reached_from("dpg.verify", set())
    assert {"dpg.verify", "dpg.folder", "dpg.metrics", "dpg.text", "dpg.experiments.sixseven"} <= reached
    guilty = {name for name in reached if any(i.split(".")[0] == "metagrad" for i in imports_of(file_of(name)))}
    assert not guilty


def test_metagrad_never_imports_dpg():
    for path in Path(metagrad.__file__).parent.rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] == "dpg"], path


def test_dpg_uses_public_names_of_metagrad():
    public = set(metagrad.__all__)
    optimizers = set(metagrad.optim.__all__)
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [name for name in imports_of(path) if name.startswith("metagrad.")], path
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "metagrad":
                assert {alias.name for alias in node.names} <= public, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mg":
                assert node.attr in public, f"{path}: mg.{node.attr}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mg.optim":
                assert node.attr in optimizers, f"{path}: mg.optim.{node.attr}"


def test_every_public_name_exists():
    assert all(getattr(dpg, name) for name in dpg.__all__)
    with pytest.raises(AttributeError, match="'dpg' has no attribute 'nothing'"):
        dpg.nothing  # noqa: B018  # the look-up is the test
