"""The reward service over real sockets: nothing is lost, nothing is counted twice, and no reward is ever made up."""

import asyncio
import http.client
import json
import math
import random
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dpg_problems import target
from serving import PATTERN, Served, directly, letters_of, samples_of, served, small_reward

import metagrad as mg
from dpg.reward import MetagradReward
from dpg.serve.ask import RewardError, Rollout, reward_of, rewards_of
from dpg.serve.scoring import scorer

SECRET = "correct-horse-battery"


def order(name: str, size: int, samples: list[dict[str, str]], group_size: int | None = 4) -> dict:
    return {"batch": name, "size": size, "group_size": group_size, "samples": samples}


def send_all(service: Served, orders: list[dict]) -> list[tuple[int, dict]]:
    """The answers to requests that are all under way at once."""
    with ThreadPoolExecutor(len(orders)) as threads:
        return list(threads.map(service.post, orders))


@pytest.fixture(scope="module")
def running():
    """One service for the tests that leave it as they found it."""
    with served(small_reward()) as service:
        yield service


def send_and_leave(service: Served, body: dict) -> None:
    """Send a request whole, and die before the answer."""
    content = json.dumps(body).encode()
    head = f"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    with service.connect() as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        service.until(
            lambda status: body["batch"] in [*(b["batch"] for b in status["open"]), *(str(d.key) for d in service.done)]
        )


def test_three_batches_of_sixty_four_clients_interleave(running):
    reward = small_reward()
    batches = {name: samples_of(seed, 16, 4) for seed, name in enumerate(["one", "two", "three"])}
    requests = [order(name, 64, [sample]) for name, samples in batches.items() for sample in samples]
    random.Random(0).shuffle(requests)
    answers = send_all(running, requests)
    assert [status for status, _ in answers] == [200] * 192
    given = {name: {} for name in batches}
    for request, (_, content) in zip(requests, answers, strict=True):
        assert content["batch"] == request["batch"] and content["size"] == 64
        (row,) = content["rewards"]
        assert row["id"] == request["samples"][0]["id"]
        given[request["batch"]][row["id"]] = row
        assert row["rescaled"] == row["raw"] / content["reward_std"]
    for name, samples in batches.items():
        wanted = directly(reward, samples, 4)
        assert {id: row["raw"] for id, row in given[name].items()} == wanted  # to the bit
        spread = float(torch.tensor(list(wanted.values())).std())
        assert next(c for _, c in answers if c["batch"] == name)["reward_std"] == pytest.approx(spread, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_streams_of_many_clients_are_cut_into_batches(seed):
    reward, texts = small_reward(), letters_of(seed, 48)
    with served(reward) as service:
        config = service.config("4x4")
        for step in range(3):
            part = list(enumerate(texts[16 * step : 16 * step + 16]))
            random.Random(seed).shuffle(part)

            async def ask(part=part):
                return await asyncio.gather(*(reward_of(Rollout(text, str(i // 4)), config) for i, text in part))

            answers = asyncio.run(ask())
            # The page says: by group, then by the checksum of the text.
            done = service.done[-1]
            assert str(done.key) == f"run/train#{step}"
            assert {answer.phi for answer in answers} == {done.outcome.phi}
            ordered = sorted(part, key=lambda row: (str(row[0] // 4), next(i for i in _ids(done) if _is(i, row[1]))))
            wanted = dict(zip(ordered, reward.score([text for _, text in ordered], 4).rewards.tolist(), strict=True))
            assert [answer.raw for answer in answers] == [wanted[row] for row in part]


def _ids(done) -> list[str]:
    return sorted(done.digests)


def _is(id: str, text: str) -> bool:
    from hashlib import sha256

    return id.startswith(sha256(text.encode()).hexdigest()[:16])


def test_a_whole_batch_of_one_process_in_several_requests(running, monkeypatch):
    monkeypatch.setattr("dpg.serve.ask.REQUEST_BYTES", 300)
    texts = letters_of(5, 32)
    answers = asyncio.run(rewards_of(texts, [str(i // 4) for i in range(32)], running.config()))
    ordered = sorted(range(32), key=lambda i: (str(i // 4), i))
    wanted = dict(zip(ordered, small_reward().score([texts[i] for i in ordered], 4).rewards.tolist(), strict=True))
    assert [answer.raw for answer in answers] == [wanted[i] for i in range(32)]


def test_clients_that_die_while_waiting_lose_nothing_for_the_others(running):
    samples = samples_of(7, 4, 4)
    for sample in samples[:5]:
        send_and_leave(running, order("deaths", 16, [sample]))
    answers = send_all(running, [order("deaths", 16, [sample]) for sample in samples[5:]])
    wanted = directly(small_reward(), samples, 4)
    for sample, (status, content) in zip(samples[5:], answers, strict=True):
        assert status == 200 and content["rewards"][0]["raw"] == wanted[sample["id"]]
    # And who comes back has its answer.
    for sample in samples[:5]:
        status, content = running.post(order("deaths", 16, [sample]))
        assert status == 200 and content["rewards"][0]["raw"] == wanted[sample["id"]]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_clients_do_every_reward_is_right(running, seed):
    """Sixty-four clients of each of three batches die and come back, send twice, or send nonsense between."""
    batches = {f"chaos{seed}{name}": samples_of(100 * seed + place, 16, 4) for place, name in enumerate("xyz")}
    chance, score = random.Random(seed), small_reward()

    def client(name: str, sample: dict[str, str], mood: str) -> tuple[int, dict]:
        request = order(name, 64, [sample])
        if mood == "dies":
            send_and_leave(running, request)
        if mood == "mumbles":
            assert running.post(b'{"batch": ')[0] == 400
        if mood == "stutters":
            with ThreadPoolExecutor(1) as thread:
                first = thread.submit(running.post, request)
                answer = running.post(request)
                assert answer == first.result()
                return answer
        answer = running.post(request)
        if mood == "forgets":
            assert running.post(order(name, 64, [{**sample, "text": sample["text"] + "a"}]))[0] == 409
            assert running.post(request) == answer
        return answer

    moods = ["dies", "mumbles", "stutters", "forgets", "waits"]
    jobs = [(name, sample, chance.choice(moods)) for name, samples in batches.items() for sample in samples]
    chance.shuffle(jobs)
    with ThreadPoolExecutor(len(jobs)) as threads:
        answers = list(threads.map(lambda job: client(*job), jobs))
    wanted = {name: directly(score, samples, 4) for name, samples in batches.items()}
    for (name, sample, _), (status, content) in zip(jobs, answers, strict=True):
        assert status == 200 and content["rewards"][0]["raw"] == wanted[name][sample["id"]]
    ended = [str(done.key) for done in running.done if str(done.key) in batches]
    assert sorted(ended) == sorted(batches)  # Each was computed once.


def test_a_sample_sent_twice_is_counted_once(running):
    samples = samples_of(8, 2, 2)
    with ThreadPoolExecutor(8) as threads:
        early = [threads.submit(running.post, order("twice", 4, [samples[0]], 2)) for _ in range(4)]
        running.until(lambda status: any(b["batch"] == "twice" and b["arrived"] == 1 for b in status["open"]))
        rest = [threads.submit(running.post, order("twice", 4, [sample], 2)) for sample in samples[1:]]
        answers = [future.result() for future in [*early, *rest]]
    wanted = directly(small_reward(), samples, 2)
    assert [status for status, _ in answers] == [200] * 7
    assert [c["rewards"][0]["raw"] for _, c in answers[:4]] == [wanted[samples[0]["id"]]] * 4
    assert len([done for done in running.done if str(done.key) == "twice"]) == 1


def test_an_id_with_another_text_is_a_conflict(running):
    samples = samples_of(9, 2, 2)
    changed = {**samples[0], "text": "kkkk"}
    send_and_leave(running, order("conflict", 4, [samples[0]], 2))
    status, content = running.post(order("conflict", 4, [changed], 2))
    assert status == 409 and content["error"] == "conflict" and "already, with another text" in content["message"]
    assert [s for s, _ in send_all(running, [order("conflict", 4, [s], 2) for s in samples[1:]])] == [200] * 3
    assert running.post(order("conflict", 4, [changed], 2))[0] == 409  # When the batch is over too.


def test_late_samples(running):
    samples = samples_of(10, 2, 2)
    assert running.post(order("late", 4, samples, 2))[0] == 200
    status, content = running.post(order("late", 4, [samples[2]], 2))
    assert status == 200 and content["rewards"][0]["raw"] == directly(small_reward(), samples, 2)[samples[2]["id"]]
    status, content = running.post(order("late", 4, [{**samples[0], "id": "stranger"}], 2))
    assert status == 410 and content["error"] == "over" and "these were not in it: 'stranger'" in content["message"]


def test_a_batch_of_another_shape_is_a_conflict(running):
    samples = samples_of(11, 2, 2)
    send_and_leave(running, order("shape", 4, samples[:1], 2))
    status, content = running.post(order("shape", 8, samples[1:2], 2))
    assert status == 409 and "Shape(size=4, group_size=2), but this request says Shape(size=8" in content["message"]
    assert running.post(order("shape", 4, samples[1:], 2))[0] == 200


def test_more_samples_than_the_batch_holds(running):
    samples = samples_of(12, 3, 2)
    send_and_leave(running, order("full", 4, samples[:3], 2))
    status, content = running.post(order("full", 4, samples[3:], 2))
    assert status == 409 and "has 3 of its 4 samples, and 3 more came" in content["message"]
    assert running.post(order("full", 4, samples[3:4], 2))[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{garbage", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"[1]", 400, "the body must be a JSON object, not a list"),
        ({}, 400, "either a `batch` or a `stream`"),
        ({"batch": "a", "stream": "b", "size": 2, "samples": []}, 400, "either a `batch` or a `stream`"),
        ({"batch": "a", "size": 2, "samples": [], "extra": 1}, 400, "has a field 'extra'; known are batch"),
        (order("", 2, []), 400, "`batch` must be a string of 1 to 256 characters, not 0 characters"),
        (order("x" * 257, 2, []), 400, "not 257 characters"),
        (order(3, 2, []), 400, "not a number"),
        (order("a", 1, []), 400, "`size` must be a whole number of at least 2"),
        (order("a", True, []), 400, "`size` must be a whole number"),
        (order("a", 2.5, []), 400, "`size` must be a whole number"),
        (order("a", 6, [], 4), 400, "a batch of 6 samples is not made of groups of 4"),
        (order("a", 10**6, []), 413, "above the limit batch_size=2048"),
        (order("a", 2, [], 2), 400, "`samples` must be a list of at least one sample"),
        (order("a", 2, [{"id": "1", "text": "a"}], 2), 400, "an object of `id`, `group` and `text`, not an object of"),
        (order("a", 2, [{"id": "1", "group": "g", "text": None}], 2), 400, "must be a string, not null"),
        (order("a", 2, [{"id": "1", "group": "g", "text": "\ud800"}], 2), 400, "`text` is not Unicode"),
        (order("a", 2, [{"id": "1", "group": "g", "text": "a" * 65537}], 2), 413, "65537 characters, above the limit"),
        (order("a", 2, [{"id": "1", "group": "g", "text": "a"}] * 2, 2), 400, "2 samples have only 1 different ids"),
        (
            {"stream": "s", "size": 2, "samples": [{"id": i, "group": "g", "text": "a"} for i in "12"]},
            400,
            "a stream takes one sample a request, not 2",
        ),
    ],
)
def test_garbage_is_refused_and_opens_no_batch(running, body, status, message):
    given, content = running.post(body)
    assert given == status and message in content["message"]
    assert running.service.status()["open"] == []


def test_other_content_types_are_refused(running):
    status, content = running.post(b"{}", **{"Content-Type": "text/plain"})  # What a web page may send unasked.
    assert status == 415 and "application/json" in content["message"]


def test_a_body_of_a_hundred_megabytes_is_never_held(running):
    before, chunk = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, b" " * 65536

    def refused(head: bytes, piece: bytes, number: int) -> None:
        with running.connect() as connection:
            connection.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + head)
            for _ in range(number):
                connection.sendall(piece)
            with http.client.HTTPResponse(connection) as answer:
                answer.begin()
                assert answer.status == 413 and b"above the limit body_bytes=1048576" in answer.read()

    # With its first bytes only, and whole; announced, and not.
    for number in (1, 1600):
        refused(b"Content-Length: 104857600\r\n\r\n", chunk, number)
    for number in (20, 1600):
        refused(b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + chunk + b"\r\n", number)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert running.get("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("given", [None, "wrong-wrong-wrong-wrong", SECRET + "x", SECRET[:-1], "é"])
def test_a_wrong_token_or_none(given):
    with served(small_reward(), SECRET) as service:
        sent = {"Authorization": f"Bearer {given}".encode().decode("latin-1")} if given else {}
        for status, content in (service.post(order("a", 2, samples_of(0, 1, 2), 2), **sent), service.get("/v1/status")):
            assert status == 401 and content["error"] == "unauthorized" and "Bearer" in content["message"]
        assert service.get("/health") == (200, {"status": "ok"})
        assert service.service.status()["open"] == []


def test_the_right_token():
    with served(small_reward(), SECRET) as service:
        answer = asyncio.run(rewards_of(letters_of(0, 4), ["a", "a", "b", "b"], service.config(token=SECRET)))
        assert len(answer) == 4
        assert service.get("/v1/status", SECRET)[1]["done"] == {"rewarded": 1}
        with pytest.raises(RewardError, match="answered 401: send the service's token"):
            asyncio.run(rewards_of(letters_of(0, 4), ["a", "a", "b", "b"], service.config()))


def test_a_batch_that_is_never_whole_is_reported_to_every_waiter():
    samples = samples_of(13, 4, 4)
    with served(small_reward(), fill_seconds=3) as service:
        answers = send_all(service, [order("never", 16, [sample]) for sample in samples[:13]])
        for status, content in answers:
            assert status == 504 and content["error"] == "incomplete" and "rewards" not in content
            assert "'never' " not in content["message"]
            assert (
                "batch never was given up after 3 s: 13 of 16 samples; of groups of 4, 'g3' has 1" in content["message"]
            )
        # One that comes back hears the same, one that comes too late that it is over.
        assert service.post(order("never", 16, samples[:1]))[0] == 504
        status, content = service.post(order("never", 16, samples[13:14]))
        assert status == 410 and "13 of 16 samples" in content["message"]
        # The service is none the worse.
        assert service.post(order("next", 16, samples))[0] == 200


def test_a_computation_that_fails_is_reported_to_every_waiter():
    diverges = MetagradReward(target(mg.optim.sgd(lr=1e300), inner_batch_size=2), PATTERN)
    with served(diverges) as service:
        answers = send_all(service, [order("bad", 8, [sample]) for sample in samples_of(14, 2, 4)])
        for status, content in answers:
            assert status == 500 and content["error"] == "failed" and "rewards" not in content
            assert "batch bad has no rewards: NonFiniteError" in content["message"]
        with pytest.raises(RewardError, match="answered 500: batch .* has no rewards: NonFiniteError"):
            asyncio.run(rewards_of(letters_of(0, 4), ["a", "a", "b", "b"], service.config()))


def test_rewards_that_are_all_zero_are_an_error():
    nothing = MetagradReward(target(mg.optim.sgd(lr=0.5)), lambda params: params["lm_head.weight"][0, 0] * 0)
    with served(nothing) as service:
        status, content = service.post(order("zero", 4, samples_of(15, 2, 2), 2))
        assert status == 500 and "all 4 rewards are 0: what was written has nothing to do" in content["message"]


def test_rewards_too_large_for_a_spread_are_an_error():
    huge = MetagradReward(target(mg.optim.sgd(lr=0.5)), lambda params: params["lm_head.weight"][0, 0] * 1e200)
    with served(huge) as service:
        status, content = service.post(order("huge", 4, samples_of(15, 2, 2), 2))
        assert status == 500 and "the rewards are too large for a standard deviation" in content["message"]


def test_equal_rewards_are_no_division_by_zero():
    samples = [{"id": str(i), "group": str(i // 2), "text": "cafe"} for i in range(4)]
    with served(small_reward(inner_batch_size=4)) as service:
        status, content = service.post(order("equal", 4, samples, 2))
        raw = {row["raw"] for row in content["rewards"]}
        if len(raw) > 1:  # Rounding in a batched product may differ by row.
            pytest.skip("equal texts were rounded differently here")
        assert (
            status == 200 and content["reward_std"] == 0 and {row["rescaled"] for row in content["rewards"]} == {None}
        )
        (answer, *_) = asyncio.run(rewards_of(["cafe"] * 4, ["a", "a", "b", "b"], service.config()))
        assert answer.score("raw") in raw
        with pytest.raises(RewardError, match="no spread to divide them by"):
            answer.score("rescaled")


def test_uneven_groups_are_an_error(running):
    samples = [{**sample, "group": "ab"[i > 0]} for i, sample in enumerate(samples_of(16, 2, 2))]
    for group_size in (2, None):
        status, content = running.post(order(f"uneven{group_size}", 4, samples, group_size))
        assert status == 422 and "'a' has 1" in content["message"] or "'b' has 3" in content["message"]


def test_a_prompt_drawn_twice_has_two_groups(running):
    samples = [{**sample, "group": "same"} for sample in samples_of(17, 2, 4)]
    status, content = running.post(order("drawn-twice", 8, samples))
    assert status == 200
    wanted = directly(small_reward(), samples, 4)
    assert {row["id"]: row["raw"] for row in content["rewards"]} == wanted


def gated(reward: MetagradReward) -> tuple[threading.Event, object]:
    """An event, and the real score of `reward`, which waits for it."""
    gate, score = threading.Event(), scorer(reward)

    def wait(batch):
        assert gate.wait(30)
        return score(batch)

    return gate, wait


def test_the_service_answers_while_it_computes():
    gate, score = gated(small_reward())
    with served(score) as service, ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(service.post, order(name, 4, samples_of(18, 2, 2), 2)) for name in ("a", "b", "c")]
        status = service.until(lambda status: len(status["open"]) == 3 and status["computing"])
        assert len(status["line"]) == 2 and all(batch["arrived"] == 4 for batch in status["open"])
        start = time.perf_counter()
        assert service.get("/health") == (200, {"status": "ok"})
        assert time.perf_counter() - start < 2
        send_and_leave(service, order("d", 4, samples_of(18, 2, 2)[:1], 2))  # Others go on filling.
        again = threads.submit(service.post, order("a", 4, samples_of(18, 2, 2)[:1], 2))  # Sent again meanwhile.
        gate.set()
        answers = [future.result() for future in asked]
        assert [status for status, _ in answers] == [200] * 3
        assert again.result()[1]["rewards"] == answers[0][1]["rewards"][:1]
        assert len({json.dumps(content["rewards"]) for _, content in answers}) == 1


def test_a_computation_that_takes_too_long_is_reported_and_its_result_dropped():
    gate, score = gated(small_reward())
    with served(score, compute_seconds=1.5) as service:
        samples = samples_of(19, 2, 2)
        status, content = service.post(order("slow", 4, samples, 2))
        assert status == 504 and content["error"] == "overdue" and "whole for 1.5 s without" in content["message"]
        status, content = service.post(order("behind", 4, samples, 2))
        assert status == 504 and "in line behind others" in content["message"]
        gate.set()
        service.until(lambda status: status["computing"] is None)
        assert service.post(order("slow", 4, samples, 2))[0] == 504  # As it was told.
        assert service.post(order("after", 4, samples, 2))[0] == 200


def test_too_many_open_batches():
    with served(small_reward(), open_batches=2) as service:
        samples = samples_of(20, 2, 2)
        for name in ("a", "b"):
            send_and_leave(service, order(name, 4, samples[:1], 2))
        status, content = service.post(order("c", 4, samples[:1], 2))
        assert status == 503 and content["error"] == "busy" and "2 batches are open" in content["message"]
        assert service.post(order("a", 4, samples[1:], 2))[0] == 200
        assert service.post(order("c", 4, samples, 2))[0] == 200


def test_connections_have_a_limit():
    with served(small_reward(), connections=6) as service:
        idle = [service.connect() for _ in range(6)]
        address = service.connect()
        address.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert address.recv(100).startswith(b"HTTP/1.1 503")
        for connection in [*idle, address]:
            connection.close()


def test_whoever_waits_when_the_service_stops_is_told():
    with served(small_reward()) as service, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(service.post, order("cut", 4, [s], 2)) for s in samples_of(21, 2, 2)[:3]]
        service.until(lambda status: status["open"] and status["open"][0]["arrived"] == 3)
        service.stop()
        for future in asked:
            status, content = future.result()
            assert status == 503 and content["error"] == "stopping"


def test_rewards_are_finite_numbers(running):
    status, content = running.post(order("finite", 16, samples_of(22, 4, 4)))
    assert status == 200 and all(math.isfinite(row["raw"] + row["rescaled"]) for row in content["rewards"])


def test_a_request_that_stalls_holds_nobody_up(running):
    with running.connect() as stalled:
        stalled.sendall(
            b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        assert running.post(order("others", 4, samples_of(23, 2, 2), 2))[0] == 200
        stalled.shutdown(socket.SHUT_RDWR)
