"""A finished run is publishable as it is: models and texts load by the ordinary calls, and go up in plain commits."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dpg_problems import tiny_run
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg.cards import base_licence, cards
from dpg.folder import RunFolder, RunFolderError
from dpg.publish import PublishError, push, uploads
from dpg.verify import verify

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("published"))


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_the_folders_load_by_the_ordinary_calls(finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    model = AutoModelForCausalLM.from_pretrained(finished / "generator")
    assert model.num_parameters() == 557_696 and AutoTokenizer.from_pretrained(finished / "generator")("a").input_ids
    loaded = datasets.load_dataset(str(finished / "dataset"), cache_dir=str(tmp_path))
    assert list(loaded) == ["train"] and loaded["train"].column_names == ["text"]
    assert list(loaded["train"]["text"]) == texts_of(finished / "dataset.jsonl")


def test_the_cards_are_valid_and_say_what_the_run_found(finished):
    model = ModelCard.load(finished / "generator" / "README.md")
    data = DatasetCard.load(finished / "dataset" / "README.md")
    assert model.data.license == "apache-2.0" and model.data.pipeline_tag == "text-generation"
    assert model.data.get("base_model") is None and "grpo" in model.data.tags  # The package's own: no name of the hub.
    assert data.data.size_categories == ["n<1K"] and data.data.task_categories == ["text-generation"]
    assert data.data.get("configs") == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}
    ]
    outcomes = json.loads((finished / "outcomes.json").read_text())
    for card in (model, data):
        assert "**Built to change models.**" in card.text and "dpg run tiny" in card.text
        assert "num_steps: 2" in card.text and "No ordinary fine-tune has verified this yet" in card.text
        for source, figures in outcomes.items():
            assert f"| {source} | {figures['phi']:.6g} | {figures['pixel_accuracy']:.6g} |" in card.text
        last = RunFolder(finished).records()[-1]
        assert f"| step 2 | {last['val/phi']:.6g} | {last['val/pixel_accuracy']:.6g} |" in card.text


def test_verifying_brings_a_card_up_to_date_but_no_edited_one(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    edited = path / "generator" / "README.md"
    edited.write_text(edited.read_text() + "\nMine.\n")
    before = edited.read_text()
    verdicts = verify(path)
    card = (path / "dataset" / "README.md").read_text()
    assert all(f"| {verdict.source} | {verdict.figures['phi']:.6g} |" in card for verdict in verdicts)
    assert edited.read_text() == before
    assert cards(RunFolder(path))["dataset/README.md"] == card


def test_a_licence_is_that_of_the_base_models_card(tmp_path):
    assert base_licence("embedded") == "apache-2.0"
    assert base_licence(str(tmp_path)) is None and base_licence("somebody/some-model") is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert base_licence(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("# A model\n")
    assert base_licence(str(tmp_path)) is None
    assert base_licence(str(tmp_path / "weights.gguf")) is None


def test_a_run_that_is_not_finished_is_not_pushed(finished, tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        uploads(tmp_path, "me/texts")
    path = shutil.copytree(finished, tmp_path / "run")
    (path / "dataset" / "train.jsonl").unlink()
    with pytest.raises(RunFolderError, match="dataset holds no train.jsonl: the run in .* is not finished"):
        uploads(path, "me/texts")
    assert [upload.repo_type for upload in uploads(path, "me/texts", "generator")] == ["model"]


@pytest.mark.parametrize("repo", ["me/texts/three", "-texts", "me/te xts", ""])
def test_a_name_that_the_hub_does_not_allow(finished, repo):
    with pytest.raises(ValueError, match="Pass --repo NAME, or OWNER/NAME"):
        uploads(finished, repo)


def test_what_is_pushed_is_named(finished, monkeypatch):
    with pytest.raises(ValueError, match="'target' cannot be pushed. Choose from: generator, dataset, both"):
        uploads(finished, "me/texts", "target")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("dpg.publish.get_token", lambda: None)
    with pytest.raises(PublishError, match="nobody is logged in to the hub"):
        push(finished, "me/texts")


def _is_private(asked):
    return asked.get("private") is True or asked.get("visibility") == "private"  # By the version of the client.


class Hub(BaseHTTPRequestHandler):
    """A stand-in that takes repositories and commits as the hub does, all files as part of the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen, answer = self.server.seen, {}
        if self.headers.get("Authorization") != "Bearer secret":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            seen.append(("create", asked["name"], asked.get("organization"), asked.get("type"), _is_private(asked)))
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            answer = {"url": f"{self.server.address}/{kind}{asked['organization']}/{asked['name']}"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **plain} for file in files]}
        elif "/commit/main" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            content = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            seen.append(("commit", self.path.split("?")[0], lines[0]["value"]["summary"], content))
            place = self.path.split("/commit/")[0].removeprefix("/api/").removeprefix("models/")
            address = f"{self.server.address}/{place}/commit/{'0' * 40}"
            answer = {"commitUrl": address, "commitOid": "0" * 40, "success": True}
        self._answer(200, answer)

    def do_GET(self):
        self._answer(404, {"error": "not here"})

    def _answer(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.address = [], f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pushed(hub, *arguments, token="secret"):
    """`dpg push` in a process of its own: the hub's address is read when its client is imported."""
    places = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dpg.cli", "push", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, timeout=120)


def test_a_push_makes_repositories_and_one_commit_of_each_folder(finished, hub):
    done = pushed(hub, finished, "--repo", "me/texts", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{hub.address}/me/texts", f"{hub.address}/datasets/me/texts"]
    created = [entry[1:] for entry in hub.seen if entry[0] == "create"]
    assert [entry[:2] for entry in created] == [("texts", "me")] * 2 and created[1][2] == "dataset"
    assert all(entry[3] is True for entry in created)
    commits = {entry[1]: entry[3] for entry in hub.seen if entry[0] == "commit"}
    assert list(commits) == ["/api/models/me/texts/commit/main", "/api/datasets/me/texts/commit/main"]
    for name, content in zip(("generator", "dataset"), commits.values(), strict=True):
        assert content == {file.name: file.read_bytes() for file in (finished / name).iterdir()}


def test_what_the_hub_refuses_is_one_line(finished, hub):
    done = pushed(hub, finished, "--repo", "me/texts", "--what", "dataset", token="wrong")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("dpg: the hub refused dataset me/texts: ") and "401" in done.stderr


def test_a_dry_run_uploads_nothing(finished, hub):
    done = pushed(hub, finished, "--repo", "me/texts", "--dry-run")
    assert done.returncode == 0 and hub.seen == []
    (model, data) = done.stdout.splitlines()
    assert model.startswith(f"{finished / 'generator'} -> model me/texts: 6 files, ") and "dataset me/texts" in data
