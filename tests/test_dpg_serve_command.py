"""`dpg serve` refuses what is unsafe or cannot work, serves what a run would compute, and ends by Ctrl-C."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from serving import letters_of
from transformers.utils import logging

from dpg import cli
from dpg.build import build_reward
from dpg.preset import load
from dpg.serve import config
from dpg.serve.app import STATUS
from dpg.serve.command import printable
from dpg.serve.limits import Limits
from dpg.serve.server import listen, read_token, refuse_strangers, url_of

ROOT = Path(cli.__file__).parents[1]
SECRET = "correct-horse-battery-staple"
METRIC = """
import time
from pathlib import Path


def phi(params):
    while Path({flag!r}).exists():
        time.sleep(0.1)
    return -params["transformer.wte.weight"].square().mean()
"""


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line that `dpg serve` leaves on standard error."""
    logging.disable_progress_bar()  # As `main` asks for, which comes too late in a process that has run others.
    monkeypatch.delenv("DPG_REWARD_TOKEN", raising=False)

    def line(*arguments):
        monkeypatch.setattr(sys, "argv", ["dpg", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        errors = capsys.readouterr().err.splitlines()
        assert left.value.code == 1 and len(errors) == 1 and errors[0].startswith("dpg: "), errors
        return errors[0]

    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "my-machine"])
def test_other_machines_are_kept_out_without_a_token(refused, host):
    assert f"--host {host} can be reached from other machines, and the service has no token" in refused(
        "sixseven", "--host", host
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    refuse_strangers(host, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [("short", "has 5 characters. Give at least 16"), ("two words of a token", "without a space"), ("é" * 20, "ASCII")],
)
def test_a_token_that_is_none(tmp_path, refused, content, message):
    (tmp_path / "token").write_text(content)
    assert message in refused("sixseven", "--token-file", tmp_path / "token")


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{SECRET}\n")
    monkeypatch.setenv("DPG_REWARD_TOKEN", "x" * 16)
    assert read_token(tmp_path / "token") == SECRET and read_token(None) == "x" * 16
    monkeypatch.delenv("DPG_REWARD_TOKEN")
    assert read_token(None) is None


def test_names_of_clients_cannot_write_on_the_terminal():
    assert printable("λ \x1b[31mred\nserving") == "\\u03bb \\x1b[31mred\\nserving"


def test_a_port_that_is_taken(refused):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refused("sixseven", "--port", port)
    assert "cannot listen on 127.0.0.1, port 70000" in refused("sixseven", "--port", 70000)


def test_addresses_are_shown_as_urls():
    with listen("127.0.0.1", 0) as listening:
        assert url_of(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"
    with listen("::1", 0) as listening:
        assert url_of(listening) == f"http://[::1]:{listening.getsockname()[1]}"


def test_what_else_cannot_work(tmp_path, refused):
    assert "--limit batch_sizes=3: expected key=value with a key of body_bytes" in refused(
        "sixseven", "--limit", "batch_sizes=3"
    )
    assert "there is no experiment 'sevensix'" in refused("sevensix")
    assert "sixseven has no setting 'inner_rl'" in refused("sixseven", "--set", "inner_rl=1")
    assert "no-model' is neither a folder" in refused("sixseven", "--port", 0, "--target", tmp_path / "no-model")
    assert "reward=naive compares a text with the whole batch" in refused(
        "sixseven", "--port", 0, "--set", "reward=naive"
    )
    (tmp_path / "preset.yaml").write_text("experiment: norm\n")
    assert "holds a run, or what was served by another preset" in refused("sixseven", "--port", 0, "--out", tmp_path)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY:
        assert f"and the system allows {hard}" in refused("sixseven", "--limit", f"connections={hard}")


def test_without_its_packages(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("dpg.serve.command", "dpg.serve.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "dpg serve needs a package: " in (line := refused("sixseven")) and "pip install 'metagrad[serve]'" in line


def post(url: str, name: str, texts: list[str], token: str = SECRET) -> tuple[int, dict]:
    samples = [{"id": str(i), "group": str(i // 2), "text": text} for i, text in enumerate(texts)]
    body = json.dumps({"batch": name, "size": 4, "group_size": 2, "samples": samples})
    return ask_for(url, "POST", "/v1/rewards", body, token)


def ask_for(url: str, method: str, path: str, body: str = "", token: str = SECRET) -> tuple[int, dict]:
    host, port = re.match(r"http://(.*):(\d+)", url).groups()
    connection = HTTPConnection(host, int(port), timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def test_a_service_from_start_to_end(tmp_path):
    flag = tmp_path / "wait"
    (tmp_path / "mine.py").write_text(METRIC.format(flag=str(flag)))
    command = [sys.executable, "-m", "dpg.cli", "serve", "custom", "--metric", f"{tmp_path}/mine.py:phi", "--port", "0"]
    # Threads as here: a sum of floats depends on them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DPG_REWARD_TOKEN": SECRET}
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        [*command, "--out", tmp_path / "out"], env=environment, stdout=log, stderr=subprocess.STDOUT
    ) as process:

        def lines():
            return (tmp_path / "log").read_text().splitlines()

        deadline = time.monotonic() + 60
        while not any(line.startswith("serving ") for line in lines()):
            assert process.poll() is None and time.monotonic() < deadline, lines()
            time.sleep(0.05)
        url = re.search(r"serving (\S+), with a token; Ctrl-C stops", lines()[-1])[1]
        texts = letters_of(0, 4)
        status, content = post(url, "first", texts)
        assert status == 200
        assert post(url, "first", texts, "wrong")[0] == 401
        flag.touch()
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(post, url, "computing", texts), threads.submit(post, url, "filling", texts[:2])]
            while len((status := ask_for(url, "GET", "/v1/status")[1])["open"]) < 2 or not status["computing"]:
                assert time.monotonic() < deadline, status
            assert not any(job.done() for job in waiting)  # The computation would take for ever.
            process.send_signal(signal.SIGINT)
            for job in waiting:
                assert job.result() == (503, {"error": "stopping", "message": "the reward service is stopping."})
        assert process.wait(timeout=20) == 0
    log.close()

    assert lines()[0].startswith("custom: ") and "inner_lr=" in lines()[1] and "fill_seconds=600.0" in lines()[2]
    assert re.match(r"first: 4 texts, phi -\d\S+, reward std \d\S+, \S+ s after 0.00 s of waiting", lines()[4])
    assert lines()[-1] == "stopped; whoever waited was told"
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["batch"] for record in records] == ["first", "computing", "filling"]
    assert records[0].keys() >= {"size", "waited", "phi", "reward_std", "seconds"}
    assert [record.get("error") for record in records] == [None, "stopping", "stopping"]

    # What a run with the preset that it left would compute.
    flag.unlink()
    _, reward = build_reward(load("custom", str(tmp_path / "out" / "preset.yaml")))
    wanted = reward.score(texts, 2)
    assert content["phi"] == pytest.approx(wanted.phi, rel=1e-6)
    given = torch.tensor([row["raw"] for row in content["rewards"]])
    torch.testing.assert_close(given, wanted.rewards.double(), rtol=1e-4, atol=0)


def test_the_page_lists_every_outcome_limit_and_variable():
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    outcomes = re.findall(r"^\| (\d+) \| `([\w-]+)` \|", page, re.MULTILINE)
    assert {kind: int(status) for status, kind in outcomes} == STATUS
    limits = re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE)
    assert {name: int(value) for name, value in limits} == asdict(Limits())
    variables = set(re.findall(r"^    (DPG_REWARD_\w+):", config.__doc__, re.MULTILINE))
    assert variables == set(re.findall(r"^\| `(DPG_REWARD_\w+)` \|", page, re.MULTILINE))
