"""Texts become examples: padding is never trained on, the end of a text is, and every example keeps its number."""

import copy

import pytest
import torch
from dpg_problems import END, LETTERS, TEXTS, gpt2, ids_of, letters, target, text_loss
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import metagrad as mg
from dpg.text import IGNORED, encode, example_losses, rows

NO = IGNORED


def test_ignored_is_the_label_that_cross_entropy_ignores():
    logits = torch.randn(1, 3)
    assert torch.nn.functional.cross_entropy(logits, torch.tensor([NO]), reduction="sum") == 0


def test_padding_is_never_a_label_and_the_end_is():
    data = encode(["abc", "a", "abcd", "abcdefg"], letters(), sequence_length=5)
    assert data["input_ids"].tolist() == [
        [0, 1, 2, END, END],
        [0, END, END, END, END],
        [0, 1, 2, 3, END],
        [0, 1, 2, 3, 4],
    ]
    assert data["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    # The fourth text was cut: its end is not where it was cut.
    assert data["labels"].tolist() == [[0, 1, 2, END, NO], [0, END, NO, NO, NO], [0, 1, 2, 3, END], [0, 1, 2, 3, 4]]
    assert data["index"].tolist() == [0, 1, 2, 3]


def test_the_end_can_be_left_out():
    data = encode(["abc", "a", "abcde"], letters(), sequence_length=5, train_eos=False)
    assert data["input_ids"].tolist() == [[0, 1, 2, END, END], [0, END, END, END, END], [0, 1, 2, 3, 4]]
    assert data["labels"].tolist() == [[0, 1, 2, NO, NO], [0, NO, NO, NO, NO], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("train_eos", [True, False])
def test_a_text_without_a_token_has_a_loss_of_zero(train_eos):
    data = encode(["", "xyz", "ab"], letters(), sequence_length=5, train_eos=train_eos)
    assert data["attention_mask"].sum(dim=1).tolist() == [1, 1, 3 if train_eos else 2]
    logits = gpt2()(data["input_ids"], attention_mask=data["attention_mask"]).logits
    losses = example_losses(logits, data["labels"], denominator=5)
    assert losses[:2].tolist() == [0.0, 0.0]
    assert losses[2] > 0


@given(
    texts=st.lists(st.text(LETTERS, max_size=9), min_size=1, max_size=12),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_text_is_in_one_batch_under_its_own_index(texts, size, seed):
    batches = target(mg.optim.sgd(0.1), inner_batch_size=size, data_seed=seed).batches(texts)
    assert [len(batch["index"]) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(len(texts)))
    for batch in batches:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert lengths == sorted(lengths) and lengths[-1] == batch["input_ids"].shape[1]
        for row, i in enumerate(batch["index"].tolist()):
            wanted = [*ids_of(texts[i]), END][:6]
            assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == wanted
            assert [label for label in batch["labels"][row].tolist() if label != NO] == wanted


@given(size=st.integers(1, 9), group=st.integers(1, 4), groups=st.integers(1, 6))
def test_groups_are_shuffled_and_their_texts_are_not(size, group, groups):
    chosen = target(mg.optim.sgd(0.1), inner_batch_size=size)
    batches = chosen.batches([LETTERS[i % 11] for i in range(group * groups)], group)
    order = [int(i) for batch in batches for i in batch["index"]]
    found = [order[i : i + group] for i in range(0, len(order), group)]
    assert sorted(found) == [list(range(i, i + group)) for i in range(0, group * groups, group)]
    assert all(len(batch["index"]) == size for batch in batches[:-1])


def test_the_data_seed_alone_decides_the_order():
    def order(seed):
        return [batch["index"].tolist() for batch in target(mg.optim.sgd(0.1), data_seed=seed).batches(TEXTS)]

    before = torch.get_rng_state()
    assert order(42) == order(42)
    assert order(42) != order(43)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_keeps_the_index_and_drops_shared_padding():
    chosen = rows(encode(["abcdef", "ab", "a"], letters(), sequence_length=8), torch.tensor([2, 1]))
    assert chosen["input_ids"].tolist() == [[0, END, END], [0, 1, END]]
    assert chosen["labels"].tolist() == [[0, END, NO], [0, 1, END]]
    assert chosen["index"].tolist() == [2, 1]


@pytest.mark.parametrize("denominator", [1.0, 6, 128])
def test_losses_are_those_of_each_text_alone(denominator):
    model = gpt2()
    data = encode([*TEXTS, ""], letters(), sequence_length=6)
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    losses = example_losses(logits, data["labels"], denominator)
    alone = torch.stack([text_loss(model, text, 6, denominator) for text in [*TEXTS, ""]])
    torch.testing.assert_close(losses, alone, rtol=1e-12, atol=1e-14)


def test_what_stands_in_the_padding_changes_nothing():
    model = gpt2()
    data = encode(TEXTS, letters(), sequence_length=6)
    other = torch.where(data["attention_mask"].bool(), data["input_ids"], torch.tensor(3))
    losses = [
        example_losses(model(ids, attention_mask=data["attention_mask"]).logits, data["labels"], 6)
        for ids in (data["input_ids"], other)
    ]
    assert torch.equal(*losses)


def test_no_texts():
    with pytest.raises(ValueError, match="at least one string"):
        encode([], letters(), sequence_length=5)


def test_a_tokenizer_without_an_end_token():
    without = PreTrainedTokenizerFast(tokenizer_object=letters().backend_tokenizer)
    with pytest.raises(ValueError, match="has no end-of-sequence token. Set `tokenizer.eos_token`"):
        encode(["ab"], without, sequence_length=5)


def test_an_end_that_the_tokenizer_adds_is_not_doubled():
    tokenizer = copy.deepcopy(letters())  # The one that all tests share stays as it is.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, END)]
    )
    assert encode(["ab"], tokenizer, sequence_length=5)["input_ids"].tolist() == [[0, 1, END]]


def test_one_string_is_not_a_list_of_texts():
    with pytest.raises(ValueError, match="list of at least one string, but got 'abc'"):
        encode("abc", letters(), sequence_length=5)


def test_a_text_begins_behind_the_begin_token_if_asked():
    data = encode(["abc", "", "abcdefg"], letters(), sequence_length=5, train_bos=True)  # No begin token: the end's.
    assert data["input_ids"].tolist() == [[END, 0, 1, 2, END], [END, END, END, END, END], [END, 0, 1, 2, 3]]
    # An empty text teaches to end at once.
    assert data["labels"].tolist() == [[END, 0, 1, 2, END], [END, END, NO, NO, NO], [END, 0, 1, 2, 3]]
    own = PreTrainedTokenizerFast(tokenizer_object=letters().backend_tokenizer, bos_token="k", eos_token="<end>")
    assert encode(["abc"], own, 9, train_bos=True)["input_ids"].tolist() == [[10, 0, 1, 2, END]]
    assert encode(["kabc"], own, 9, train_bos=True)["input_ids"].tolist() == [[10, 0, 1, 2, END]]  # Not doubled.
