"""Reward functions have the signatures of their trainers, stand alone, and give exactly what the service computed."""

import asyncio
import importlib.util
import inspect
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trainers
import yaml
from dpg_problems import END, ids_of, letters
from serving import letters_of, served, small_reward

from dpg.serve import ask, clients
from dpg.serve.ask import RewardError, Rollout, reward_of
from dpg.serve.config import Config, _batches

ROOT = Path(ask.__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def running():
    with served(small_reward()) as service:
        yield service


@pytest.fixture
def environment(running, monkeypatch):
    """Sets DPG_REWARD_... for a run of its own."""

    def set_(**values: str) -> None:
        usual = {"URL": running.url, "RUN": f"run-{len(running.done)}", "BATCH": "2x2", "ATTEMPTS": "2"}
        for name, value in {**usual, **values}.items():
            monkeypatch.setenv(f"DPG_REWARD_{name}", value)

    set_()
    return set_


# Signatures.


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", [clients.compute_score, clients.compute_score_sync])
def test_verl_calls_with_these_keywords(function):
    path = trainers.source("verl", "experimental/reward_loop/reward_manager/naive.py")
    calls = [] if path is None else trainers.calls_of(path, "compute_score")
    assert path is None or len(calls) == 2
    for asked in [{key.arg for key in call.keywords} - {None} for call in calls] or [trainers.VERL_SAMPLE]:
        assert asked == trainers.VERL_SAMPLE == set(parameters(function))
    assert inspect.iscoroutinefunction(function) == (function is clients.compute_score)  # How verl tells them apart.


def test_verl_before_calls_with_these_keywords():
    path = trainers.source("verl", "workers/reward_manager/batch.py")
    if path is not None:
        (call,) = trainers.calls_of(path, "compute_score")
        assert {key.arg for key in call.keywords} - {None} == trainers.VERL_BATCH
    assert set(parameters(clients.compute_scores)) == trainers.VERL_BATCH


def test_openrlhf_calls_with_these_positions():
    path = trainers.source("openrlhf", "utils/agent.py")
    if path is not None:
        (call,) = trainers.calls_of(path, "reward_func")
        names = [re.match(r"\w+?(?=_list)", name)[0] for name in (trainers.ast.unparse(a) for a in call.args[1:])]
        assert names == trainers.OPENRLHF_REWARD
        read = set(re.findall(r"rewards_info\.get\(\"(\w+)\"\)", path.read_text(encoding="utf-8")))
        assert read == trainers.OPENRLHF_READ
    assert parameters(clients.reward_func) == trainers.OPENRLHF_REWARD


def test_verifiers_calls_with_these_names():
    path = trainers.source("verifiers", "v1/task.py")
    if path is not None:
        text = path.read_text(encoding="utf-8")
        given = set(re.search(r"available = \{(.*)\}", text)[1].replace('"', " ").split()) & {"task", "trace"}
        assert given | set(re.findall(r"available\[\"(\w+)\"\]", text)) == trainers.VERIFIERS_ARGUMENTS
        trace = (path.parent / "trace.py").read_text(encoding="utf-8")
        assert all(re.search(rf"^    (def )?{name}[:(]", trace, re.MULTILINE) for name in trainers.VERIFIERS_TRACE)
    assert set(parameters(clients.metagradient)) <= trainers.VERIFIERS_ARGUMENTS
    assert inspect.iscoroutinefunction(clients.metagradient)


# What they return.


def infos(split: str = "train") -> list[dict]:
    return [{"index": i // 2, "split": split} for i in range(4)]


def wanted(running) -> dict[str, float]:
    """By the checksum of the text, of the service's last batch."""
    outcome = running.done[-1].outcome
    return {id.split("-")[0]: (outcome.raw[id], outcome.rescaled[id]) for id in outcome.raw}


def test_verl_one_sample_at_a_time(running, environment):
    texts = letters_of(1, 4)

    async def all_of():
        calls = [
            clients.compute_score(data_source="d", solution_str=text, ground_truth="", extra_info=info)
            for text, info in zip(texts, infos(), strict=True)
        ]
        return await asyncio.gather(*calls)

    scores = asyncio.run(all_of())
    for text, score in zip(texts, scores, strict=True):
        raw, rescaled = wanted(running)[ask._checksum(text)]
        assert score["score"] == rescaled and score["dpg_raw_reward"] == raw
        assert score.keys() == {"score", "dpg_raw_reward", "dpg_reward_std", "dpg_phi"}
    environment(SCALE="raw", RUN="raw")
    assert [s["score"] for s in asyncio.run(all_of())] == [s["dpg_raw_reward"] for s in scores]


def test_verl_in_threads(running, environment):
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(clients.compute_score_sync, "d", t, "", i) for t, i in zip("abcd", infos(), strict=True)]
        scores = [job.result()["dpg_raw_reward"] for job in jobs]
    assert scores == [wanted(running)[ask._checksum(text)][0] for text in "abcd"]


def test_verl_validates_batches_of_another_size(running, environment):
    environment(BATCH="train=2x2,test=3x1")

    async def all_of():
        return await asyncio.gather(
            *(clients.compute_score("d", text, "", {"index": i, "split": "test"}) for i, text in enumerate("abc"))
        )

    assert len(asyncio.run(all_of())) == 3
    assert running.done[-1].shape == (3, 1) and running.done[-1].key.name.endswith("/test")
    with pytest.raises(ValueError, match="DPG_REWARD_BATCH gives no size for 'dev', only for"):
        asyncio.run(clients.compute_score("d", "a", "", {"index": 0, "split": "dev"}))


@pytest.mark.parametrize("info", [None, {}, {"split": "train"}])
def test_verl_without_an_index(environment, info):
    with pytest.raises(ValueError, match="`extra_info` has no `index`"):
        asyncio.run(clients.compute_score("d", "a", "", info))


def test_verl_a_whole_batch(running, environment):
    texts = letters_of(2, 4)
    scores = clients.compute_scores(["d"] * 4, texts, [""] * 4, infos())
    outcome = running.done[-1].outcome
    assert [score["score"] for score in scores] == [outcome.rescaled[f"{i:06d}"] for i in range(4)]


def test_openrlhf_one_sample_at_a_time(running, environment):
    environment(STOP="</s>,<end>")
    prompts = ["p" * 300, "q"]
    texts = ["abc", "cab", "k", "jj"]
    with ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(
                clients.reward_func, [prompts[i // 2] + text + ["", "<end>"][i % 2]], [prompts[i // 2]], [""]
            )
            for i, text in enumerate(texts)
        ]
        answers = [job.result() for job in jobs]
    for text, answer in zip(texts, answers, strict=True):
        raw, rescaled = wanted(running)[ask._checksum(text)]
        assert answer["rewards"] == answer["scores"] == rescaled and answer["extra_logs"]["dpg_raw_reward"] == raw
    assert answers[0].keys() == trainers.OPENRLHF_READ


@pytest.mark.parametrize(
    ("queries", "prompts", "message"),
    [(["ab", "ac"], ["a", "a"], "expected one query"), (["ba"], ["a"], "does not begin with its prompt 'a'")],
)
def test_openrlhf_that_asks_otherwise(environment, queries, prompts, message):
    with pytest.raises(ValueError, match=message):
        clients.reward_func(queries, prompts, [""] * len(queries))


def trace_of(id: str, key: str, *written: str | None) -> SimpleNamespace:
    messages = [SimpleNamespace(content=text) for text in written]
    return SimpleNamespace(id=id, task=SimpleNamespace(key=key), assistant_messages=messages)


def test_verifiers_one_rollout_at_a_time(running, environment):
    traces = [trace_of(f"t{i}", f"task{i // 2}", "first", text) for i, text in enumerate("abcd")]

    async def all_of():
        return await asyncio.gather(*(clients.metagradient(trace=trace) for trace in traces))

    assert asyncio.run(all_of()) == [wanted(running)[ask._checksum(text)][1] for text in "abcd"]
    with pytest.raises(RewardError, match="the rollout t9 holds nothing that the model wrote"):
        asyncio.run(clients.metagradient(trace_of("t9", "task")))


# Standing alone.


def test_the_clients_need_the_standard_library_alone(tmp_path, running):
    (tmp_path / "dpg" / "serve").mkdir(parents=True)
    for name in ("ask", "clients", "config"):
        shutil.copy(ROOT / "dpg" / "serve" / f"{name}.py", tmp_path / "dpg" / "serve")
    program = "print(clients.compute_scores('dddd', list('abcd'), 'gggg', INFOS)[0]['score'])"
    program = f"import sys; sys.path.append('.'); INFOS = {infos()}; from dpg.serve import clients; {program}"
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=tmp_path,
        env={"DPG_REWARD_URL": running.url, "DPG_REWARD_RUN": "alone", "DPG_REWARD_BATCH": "2x2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stderr == ""
    assert float(finished.stdout) == running.done[-1].outcome.rescaled["000000"]


@pytest.mark.parametrize("name", ["ask", "clients", "config"])
def test_the_clients_load_by_path_as_trainers_load_them(name):
    spec = importlib.util.spec_from_file_location("reward_func", ROOT / "dpg" / "serve" / f"{name}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # Into no `sys.modules`.


# Trouble.


def test_a_service_that_starts_late_is_found():
    ready = threading.Event()

    async def ask_early(config):
        rollouts = [Rollout(text, str(i // 2), batch="7", id=str(i)) for i, text in enumerate("abcd")]
        jobs = [asyncio.create_task(reward_of(rollout, config)) for rollout in rollouts]
        await asyncio.sleep(0.3)
        ready.set()
        return await asyncio.gather(*jobs)

    with socket_that_refuses() as port, ThreadPoolExecutor(1) as threads:
        config = Config(f"http://127.0.0.1:{port}", "run", {"train": (2, 2)}, pause=0.05, attempts=12)
        answers = threads.submit(asyncio.run, ask_early(config))
        assert ready.wait(10)
        with served(small_reward(), port=port) as service:
            assert len(answers.result(timeout=30)) == 4
            assert [str(done.key) for done in service.done] == ["run/train/7"]


def test_a_service_that_is_started_again_loses_nothing():
    """Half a batch waits at a service that stops; all of it is sent to the next one, and computed once."""
    rollouts = [Rollout(text, str(i // 2), batch="7", id=str(i)) for i, text in enumerate("abcd")]
    config = None
    with ThreadPoolExecutor(4) as threads:
        with served(small_reward()) as first:
            config = first.config("2x2", attempts=12, pause=0.05)
            jobs = [threads.submit(asyncio.run, reward_of(rollout, config)) for rollout in rollouts[:3]]
            first.until(lambda status: status["open"] and status["open"][0]["arrived"] == 3)
        with served(small_reward(), port=int(first.url.rsplit(":")[-1])) as second:
            jobs.append(threads.submit(asyncio.run, reward_of(rollouts[3], config)))
            raw = [job.result(timeout=30).raw for job in jobs]
            (done,) = second.done
            assert raw == [done.outcome.raw[rollout.id] for rollout in rollouts]


@contextmanager
def socket_that_refuses():
    """A port that is ours, on which nobody listens."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_what_is_refused_is_not_asked_again(running):
    config = running.config("2x2", pause=1000.0)
    rollouts = [Rollout(text, "0", batch="again", id="1") for text in ("a", "b")]

    async def both():
        first = asyncio.create_task(reward_of(rollouts[0], config))
        while not running.service.status()["open"]:
            await asyncio.sleep(0.01)
        with pytest.raises(RewardError, match="answered 409: .* sample '1' already, with another text"):
            await reward_of(rollouts[1], config)
        first.cancel()

    asyncio.run(both())
    rest = [Rollout(text, str(i // 2), batch="again", id=str(i)) for i, text in enumerate("xayz") if i != 1]
    with ThreadPoolExecutor(3) as threads:  # The service is left with no open batch.
        assert len(list(threads.map(lambda rollout: asyncio.run(reward_of(rollout, config)), rest))) == 3


def test_nobody_there():
    with socket_that_refuses() as port:
        config = Config(f"http://127.0.0.1:{port}", "run", {"train": (2, 2)}, pause=0.01, attempts=3)
        with pytest.raises(RewardError, match=f"127.0.0.1:{port}: ConnectionRefusedError"):
            asyncio.run(reward_of(Rollout("a", "0"), config))


def test_waiting_has_an_end(running):
    with served(small_reward()) as service:
        with pytest.raises(RewardError, match="no reward within 0.2 s"):
            asyncio.run(reward_of(Rollout("a", "0"), service.config(seconds=0.2)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("URL", "", "DPG_REWARD_URL is not set"),
        ("RUN", "", "DPG_REWARD_RUN is not set"),
        ("BATCH", "", "DPG_REWARD_BATCH is not set"),
        ("URL", "127.0.0.1:8067", "Give it as http://127.0.0.1:8067"),
        ("BATCH", "64", "Give prompts x texts of each"),
        ("BATCH", "train=0x4", "Give prompts x texts of each"),
        ("SCALE", "rescale", "Choose rescaled or raw"),
        ("ATTEMPTS", "0", "DPG_REWARD_ATTEMPTS=0 must be above 0"),
        ("ATTEMPTS", "2.5", "DPG_REWARD_ATTEMPTS is no number"),
        ("SECONDS", "nan", "DPG_REWARD_SECONDS=nan and"),
        ("SECONDS", "soon", "DPG_REWARD_SECONDS is no number"),
    ],
)
def test_an_environment_that_says_too_little(environment, name, value, message):
    environment(**{name: value})
    with pytest.raises(ValueError, match=message):
        clients.compute_scores(["d"], ["a"], [""], [{"index": 0}])


def test_a_rollout_of_a_named_batch_needs_an_id(environment):
    with pytest.raises(ValueError, match="a rollout of batch '3' needs an id"):
        asyncio.run(reward_of(Rollout("a", "0", batch="3")))


def test_the_token_is_not_shown():
    assert "secret" not in repr(Config("http://x", "run", {}, token="secret"))


# Examples.


def test_the_example_of_openrlhf_scores_what_was_written(running, environment, monkeypatch):
    for name in ("openrlhf", "openrlhf.utils", "openrlhf.utils.agent"):
        monkeypatch.setitem(sys.modules, name, None)  # Put back after the test.
        monkeypatch.delitem(sys.modules, name)
    trainers.openrlhf_agent()
    spec = importlib.util.spec_from_file_location("agent_module", EXAMPLES / "openrlhf" / "agent.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    executor = module.AgentExecutor()
    assert parameters(executor.execute) == trainers.OPENRLHF_EXECUTE
    texts = iter(["abc", "cab", "k", "jj"])

    async def generate(prompt_token_ids, sampling_params, multi_modal_data=None):
        tokens = [*ids_of(next(texts)), END]
        output = SimpleNamespace(token_ids=tokens, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])

    sampling = SimpleNamespace(max_tokens=8, logprobs=None)
    engine = SimpleNamespace(generate=generate)

    async def all_of():
        return await asyncio.gather(
            *(executor.execute(p, "", sampling, 40, letters(), engine) for p in ("ab", "ab", "cd", "cd"))
        )

    outputs = asyncio.run(all_of())
    for text, output in zip(["abc", "cab", "k", "jj"], outputs, strict=True):
        raw, rescaled = wanted(running)[ask._checksum(text)]
        assert output["reward"] == output["scores"] == rescaled and output["extra_logs"]["dpg_raw_reward"] == raw


def options(tree: dict, path: str = "") -> dict[str, object]:
    found = {}
    for key, value in tree.items():
        found |= options(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def test_the_example_of_verl_uses_options_that_there_are():
    content = yaml.safe_load((EXAMPLES / "verl" / "dpg.yaml").read_text(encoding="utf-8"))
    assert content.pop("defaults") == ["ppo_trainer", "_self_"]
    assert content.pop("hydra") == {"searchpath": ["pkg://verl.trainer.config"]}
    known = trainers.VERL_OPTIONS
    if (path := trainers.source("verl", "trainer/config/_generated_ppo_trainer.yaml")) is not None:
        there = options(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert {name: type(there[name]).__name__ for name in known} == known
    assert set(options(content)) == set(known)
    assert content["reward"]["custom_reward_function"] == {"path": "pkg://dpg.serve.clients", "name": "compute_score"}
    script = (EXAMPLES / "verl" / "run.sh").read_text(encoding="utf-8")
    sizes = _batches(re.search(r"DPG_REWARD_BATCH=(\S+)", script)[1])
    rollout = content["actor_rollout_ref"]["rollout"]
    assert sizes["train"] == (content["data"]["train_batch_size"], rollout["n"])
    assert sizes["test"][1] == rollout["val_kwargs"]["n"]


def test_the_example_of_openrlhf_uses_options_that_there_are():
    script = (EXAMPLES / "openrlhf" / "run.sh").read_text(encoding="utf-8")
    used = dict(re.findall(r"--([\w.]+)(?: (\S+))?", script.split("train_ppo_ray", 1)[1]))
    assert set(used) <= trainers.OPENRLHF_OPTIONS
    if (path := trainers.source("openrlhf", "cli/train_ppo_ray.py")) is not None:
        assert trainers.OPENRLHF_OPTIONS <= trainers.options_of(path)
    prompts, texts = _batches(re.search(r"DPG_REWARD_BATCH=(\S+)", script)[1])["train"]
    assert (used["rollout.batch_size"], used["rollout.n_samples_per_prompt"]) == (str(prompts), str(texts))
    assert (EXAMPLES / "openrlhf" / "agent.py").exists() and "$PWD/agent.py" in script


@pytest.mark.parametrize("folder", ["verl", "openrlhf"])
def test_the_scripts_are_shell(folder):
    subprocess.run(["bash", "-n", EXAMPLES / folder / "run.sh"], check=True)


def test_prompts_for_verl(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "prompts.txt").write_text("One\nTwo\n\nThree\n")
    command = [sys.executable, EXAMPLES / "verl" / "prompts.py", tmp_path / "prompts.txt", tmp_path / "data"]
    subprocess.run([*command, "1"], check=True, cwd=tmp_path, timeout=100)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "data" / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [row["prompt"][0]["content"] for row in rows] == ["One", "Two"]
    assert [row["extra_info"] for row in rows] == [{"index": 0, "split": "train"}, {"index": 1, "split": "train"}]
    refused = subprocess.run([*command, "3"], capture_output=True, text=True, timeout=100)
    assert refused.returncode == 1 and "has 3 prompts; 3 of them cannot be for testing" in refused.stderr
