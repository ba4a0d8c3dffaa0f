"""The prose of the demonstrations: held out by its characters alone, prose by its shape, and read without importing."""

import random
import re
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpg import corpus, pretrain
from dpg.build import MODELS
from dpg.target import load_model


@pytest.fixture(scope="module")
def read():
    """All passages, and the modules that reading them imported."""
    before = set(sys.modules)
    passages = corpus.passages()
    return passages, set(sys.modules) - before


def crc32(data):
    """CRC-32 bit by bit: the polynomial 0x04C11DB7 reflected."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_the_checksum_of_this_file_is_the_standard_one():
    assert crc32(b"123456789") == 0xCBF43926


@given(passage=st.text(), one_in=st.integers(1, 20))
def test_the_split_depends_on_characters_alone(passage, one_in):
    assert corpus.is_held_out(passage, one_in) == (crc32(passage.encode()) % one_in == 0)


def test_pretraining_never_sees_what_is_held_out(read, monkeypatch, tmp_path):
    passages, _ = read
    seen = []

    class Stop(Exception):
        pass

    def train_tokenizer(texts, vocabulary):
        seen.extend(texts)
        raise Stop

    monkeypatch.setattr(corpus, "passages", lambda packages=(): passages)
    monkeypatch.setattr(pretrain, "train_tokenizer", train_tokenizer)
    with pytest.raises(Stop):
        pretrain.pretrain(tmp_path, seed=0, vocabulary=300, epochs=1)
    held_out = corpus.held_out()
    assert not set(held_out) & set(seen)
    assert sorted(held_out + seen) == sorted(passages)
    # One in eight, give or take six standard deviations.
    assert abs(len(held_out) - len(passages) / 8) < 6 * (len(passages) * 7 / 64) ** 0.5


def test_there_is_enough_prose_and_none_of_it_twice(read):
    passages, _ = read
    assert len(passages) > 5000 and len(set(passages)) == len(passages)


def test_every_passage_is_one_to_three_sentences(read):
    words = r"""[A-Za-z0-9 ,;:'"()-]"""
    sentence = rf"[A-Z]{words}*[a-z]{words}*[.!?]\)?"
    passage_shape = re.compile(rf"{sentence}(?: {sentence}){{0,2}}")
    for passage in read[0]:
        assert passage_shape.fullmatch(passage), passage
        assert len(passage) <= 240 and len(passage.split()) >= 5, passage
        assert not re.search(r"\s\s|[`*_<>={}\[\]\\]", passage), passage


def test_reading_imports_nothing(read):
    # Besides the codecs of source files that name an encoding of their own.
    assert not [name for name in read[1] if not name.startswith("encodings.")]


def test_a_package_is_read_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "loud_package"
    package.mkdir()
    (package / "__init__.py").write_text('"""This package would rather not be imported."""\nraise SystemExit\n')
    (package / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    assert corpus.passages(["loud_package"]) == ["This package would rather not be imported."]
    assert "loud_package" not in sys.modules


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="Package 'no_such_package' is not installed"):
        corpus.passages(["no_such_package"])


def test_the_published_models_are_small():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"generator", "target"}
    assert sum(path.stat().st_size for path in files) <= 5_000_000


PROSE = "This method returns a new object if the given argument is a string, and raises an error otherwise."


@pytest.mark.parametrize("name", ["generator", "target"])
def test_a_published_model_knows_english_from_noise(name):
    model, tokenizer = load_model(str(MODELS / name))
    end = tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size and end == len(tokenizer) - 1

    def loss(words):
        row = torch.tensor([[end, *tokenizer(" ".join(words))["input_ids"]]])
        return model(row, labels=row).loss.item()

    # Below a uniform guess, ln 1024 = 6.9, and the order of the words matters to it.
    assert loss(PROSE.split()) < 4.5
    assert loss(PROSE.split()) + 0.5 < loss(random.Random(0).sample(PROSE.split(), len(PROSE.split())))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "generator")


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) - 1 for i in ids)


def test_a_trained_tokenizer_orders_its_ids_by_frequency():
    # The weight pictures are drawn on the first rows of the head, which only texts with those pieces can move.
    texts = ["the cat and the hat", "the rat", "a cat that sat", "ça va"] * 3
    trained = pretrain.train_tokenizer(texts, vocabulary=270)
    counts = Counter(i for text in texts for i in trained(text)["input_ids"])
    frequencies = [counts[i] for i in range(len(trained))]
    assert frequencies == sorted(frequencies, reverse=True) and frequencies[0] > frequencies[5] > 0
    assert len(trained) == 270 and trained.eos_token_id == trained.pad_token_id == 269
    assert trained.decode(trained("a ça\n")["input_ids"]) == "a ça\n"
