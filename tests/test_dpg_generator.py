"""Sampling and log-probabilities are those of each continuation alone, whatever the batch and the model's defaults."""

import pytest
import torch
from dpg_problems import END, LETTERS, MODELS, generator, gpt2, ids_of, letters, written_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

import metagrad as mg
from dpg.build import MODELS as PUBLISHED
from dpg.generator import Generator
from dpg.target import load_model

PROMPTS = ["abcde", "k", "hg", "fff"]


def sampled(chosen, seed=0, prompts=PROMPTS, group_size=3):
    torch.manual_seed(seed)
    return chosen.sample(prompts, group_size)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", MODELS)
def test_log_probs_are_those_of_each_rollout_alone(family, temperature):
    chosen = Generator(MODELS[family](), letters(), max_prompt_tokens=4, max_new_tokens=6, temperature=temperature)
    rollouts = sampled(chosen)
    assert not rollouts.prompt_mask.all() and not rollouts.token_mask.all()  # There is padding on both sides.
    log_probs = chosen.log_probs(rollouts)
    assert log_probs.shape == rollouts.token_ids.shape
    for row in range(len(rollouts.texts)):
        alone = written_log_probs(chosen, rollouts, row)
        torch.testing.assert_close(log_probs[row][rollouts.token_mask[row]], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", MODELS)
def test_what_is_sampled_has_the_log_probs_that_it_was_drawn_with(family, temperature):
    chosen = Generator(MODELS[family](), letters(), max_prompt_tokens=4, max_new_tokens=6, temperature=temperature)
    rollouts = sampled(chosen)
    assert not rollouts.log_probs[~rollouts.token_mask].any()
    for row in range(len(rollouts.texts)):
        alone = written_log_probs(chosen, rollouts, row)
        torch.testing.assert_close(rollouts.log_probs[row][rollouts.token_mask[row]], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_a_cut_prompt_is_read_whole(length):
    chosen = Generator(*load_model(str(PUBLISHED / "generator")), max_prompt_tokens=length, max_new_tokens=8)
    for prompt in ["The file", "Internationalization of the configuration's parsers, as of version 3.11", "é—ü and ∞"]:
        text = chosen.cut(prompt)
        (ids,) = chosen.encode([text])
        assert ids == chosen.tokenizer(text)["input_ids"]  # Nothing is left to cut,
        assert prompt.startswith(text)  # and no character is cut.
    assert chosen.cut("a") == "a"


def test_a_prompt_of_which_nothing_is_left():
    chosen = Generator(*load_model(str(PUBLISHED / "generator")), max_prompt_tokens=1, max_new_tokens=8)
    with pytest.raises(ValueError, match="`max_prompt_tokens` 1 leaves nothing of the prompt '∞'"):
        chosen.cut("∞")  # A character of three tokens.


def test_in_float32_too():
    chosen = Generator(*load_model(str(PUBLISHED / "generator")), max_new_tokens=20)
    rollouts = sampled(chosen, prompts=["The file", "An object is", "If"], group_size=8)
    with torch.no_grad():
        again = chosen.log_probs(rollouts)
    assert rollouts.log_probs.dtype == torch.float32
    # Logits of about 10 from sums of 128 to 384 terms: a few units in the last place, 1e-6, each.
    torch.testing.assert_close(rollouts.log_probs, again * rollouts.token_mask, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", MODELS)
def test_each_token_is_that_of_its_uniform_number(family, temperature):
    """The inverse of the distribution function, written out for each row alone: no cache, no padding, no batch."""
    chosen = Generator(MODELS[family](2), letters(), max_prompt_tokens=4, max_new_tokens=9, temperature=temperature)
    rollouts = sampled(chosen, seed=3, group_size=6)
    torch.manual_seed(3)
    uniforms = 1 - torch.rand(24, 9, dtype=torch.float64)
    lengths = set()
    for row in range(24):
        ids = ids_of(PROMPTS[row // 6])[:4]
        start = len(ids)
        while len(ids) < start + 9 and END not in ids:
            p = (chosen.model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(dim=0).tolist()
            wanted, token, reached = float(uniforms[row, len(ids) - start]), 0, p[0]
            while reached < wanted * sum(p):
                token += 1
                reached += p[token]
            ids.append(token)
        assert rollouts.token_ids[row][rollouts.token_mask[row]].tolist() == ids[start:]
        lengths.add(len(ids) - start)
    assert len(lengths) > 3 and max(lengths) == 9  # Rows were dropped while others went on.


def test_a_recurrent_model_is_sampled_as_it_is_trained():
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=2, vocab_size=END + 1, initializer_range=0.3)
    chosen = Generator(MambaForCausalLM(config).float().eval(), letters(), max_prompt_tokens=4, max_new_tokens=8)
    rollouts = sampled(chosen)
    assert not rollouts.prompt_mask.all() and not rollouts.token_mask.all()
    with torch.no_grad():
        again = chosen.log_probs(rollouts)
    torch.testing.assert_close(rollouts.log_probs, again * rollouts.token_mask, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_model_that_cannot_go_on_from_what_it_has_read_is_refused():
    config = RwkvConfig(vocab_size=END + 1, hidden_size=8, attention_hidden_size=8, num_hidden_layers=2)
    with pytest.raises(ValueError, match="RwkvForCausalLM keeps no transformers.Cache"):
        Generator(RwkvForCausalLM(config), letters()).sample(["abc"])


def test_a_broken_model_is_named():
    model = gpt2()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(mg.NonFiniteError, match="draws its next token from is not finite"):
        Generator(model, letters(), max_new_tokens=3).sample(["abc"])


@pytest.mark.parametrize("uniform, possible", [(2.0**-53, {3}), (0.5, {3, 7}), (1.0, {7})])
def test_a_token_of_probability_zero_is_never_drawn(uniform, possible, monkeypatch):
    model = gpt2()
    never = torch.ones(END + 1, dtype=torch.bool)
    never[[3, 7]] = False
    model.lm_head.register_forward_hook(lambda head, given, logits: logits.masked_fill(never, -torch.inf))
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 1 - uniform, dtype=torch.float64))
    written = Generator(model, letters(), max_new_tokens=6).sample(["abc"]).token_ids[0].tolist()
    assert set(written) <= possible


@pytest.mark.parametrize("family", MODELS)
def test_log_probs_have_the_gradient_of_each_rollout_alone(family):
    chosen = Generator(MODELS[family](), letters(), max_new_tokens=4)
    rollouts = sampled(chosen)
    total = (chosen.log_probs(rollouts) * rollouts.token_mask).sum()
    alone = sum(written_log_probs(chosen, rollouts, row).sum() for row in range(len(rollouts.texts)))
    weights = list(chosen.model.parameters())
    # A Llama's norms compute in float32, and their gradients with them.
    tolerance = {"gpt2": 1e-12, "llama": 1e-5}[family]
    for batched, single in zip(torch.autograd.grad(total, weights), torch.autograd.grad(alone, weights), strict=True):
        torch.testing.assert_close(batched, single, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", MODELS)
def test_a_cold_generator_writes_the_most_likely_token_of_each_prompt_alone(family):
    chosen = Generator(MODELS[family](3), letters(), max_prompt_tokens=4, max_new_tokens=5, temperature=1e-6)
    rollouts = sampled(chosen, group_size=1)
    for row, prompt in enumerate(PROMPTS):
        ids = ids_of(prompt)[:4]
        start = len(ids)
        while len(ids) < start + 5 and ids[-1] != END:
            ids.append(int(chosen.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert rollouts.token_ids[row][rollouts.token_mask[row]].tolist() == ids[start:]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_as_frequent_as_the_softmax_says(temperature):
    model = gpt2(spread=0.2)
    model.generation_config = GenerationConfig(top_k=2, top_p=0.3, temperature=7.0, repetition_penalty=3.0)
    chosen = Generator(model, letters(), max_new_tokens=1, temperature=temperature)
    num_samples = 6000
    written = sampled(chosen, prompts=["k", "abc"], group_size=num_samples).token_ids[num_samples:]
    counts = torch.bincount(written.flatten(), minlength=END + 1)
    expected = num_samples * (model(torch.tensor([[0, 1, 2]])).logits[0, -1] / temperature).softmax(dim=0).detach()
    assert expected.min() > 5 and counts.min() > 0
    # χ² with 11 degrees of freedom is above 51 once in two million times.
    assert float(((counts - expected) ** 2 / expected).sum()) < 51


def test_more_than_the_fifty_likeliest_tokens_can_be_written():
    # Fifty is the top_k of transformers where nobody sets one. At temperature 5 the softmax of 1024 tokens is wide.
    chosen = Generator(*load_model(str(PUBLISHED / "generator")), max_new_tokens=1, temperature=5.0)
    ids = sampled(chosen, prompts=["The file"], group_size=2000).token_ids.flatten()
    logits = chosen.model(torch.tensor([chosen.tokenizer("The file")["input_ids"]])).logits[0, -1]
    unlikely = logits.argsort(descending=True)[50:]
    share = (logits / 5).softmax(dim=0)[unlikely].sum().item()
    # A binomial share, six standard deviations.
    assert abs(float(torch.isin(ids, unlikely).double().mean()) - share) < 6 * (share * (1 - share) / 2000) ** 0.5
    assert share > 0.2


@pytest.mark.parametrize(
    "defaults",
    [
        {"top_k": 2},
        {"top_p": 0.2},
        {"temperature": 9.0},
        {"repetition_penalty": 5.0},
        {"do_sample": False},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"epsilon_cutoff": 0.2},
        {"eta_cutoff": 0.2},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [0, 1, 2, 3]},
        {"begin_suppress_tokens": [0, 1, 2, 3]},
        {"bad_words_ids": [[4], [5]]},
        {"sequence_bias": [[[6], -10.0]]},
        {"min_new_tokens": 5},
        {"exponential_decay_length_penalty": [0, 3.0]},
        {"forced_eos_token_id": END},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=str,
)
def test_no_default_of_the_model_reaches_the_distribution(defaults):
    wanted = sampled(generator(max_new_tokens=5))
    model = gpt2(1)
    model.generation_config.update(**defaults)
    rollouts = sampled(Generator(model, letters(), 4, 5))
    assert torch.equal(rollouts.token_ids, wanted.token_ids)


@settings(max_examples=25)
@given(prompts=st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=5), group_size=st.integers(1, 3))
def test_prompts_keep_their_order_and_their_texts_stand_together(prompts, group_size):
    rollouts = sampled(generator(), prompts=prompts, group_size=group_size)
    assert len(rollouts.texts) == len(prompts) * group_size
    for row in range(len(rollouts.texts)):
        ids, mask = rollouts.prompt_ids[row], rollouts.prompt_mask[row].tolist()
        assert ids[rollouts.prompt_mask[row]].tolist() == ids_of(prompts[row // group_size])[:4]
        assert mask == sorted(mask)  # Padding stands on the left.


def test_a_rollout_ends_with_its_first_end_token():
    rollouts = sampled(generator(max_new_tokens=12), group_size=20)
    lengths = set()
    for row, text in enumerate(rollouts.texts):
        written = rollouts.token_ids[row].tolist()
        length = written.index(END) + 1 if END in written else len(written)
        lengths.add(length)
        assert rollouts.token_mask[row].tolist() == [i < length for i in range(len(written))]
        assert text == "".join(LETTERS[token] for token in written[:length] if token != END)
    assert len(lengths) > 4 and rollouts.token_mask[:, -1].any()  # Some were cut, the others ended anywhere.


def test_rows_are_rollouts_without_the_padding_that_they_share():
    rollouts = sampled(generator(max_new_tokens=12), prompts=["abcd", "hg", "k"], group_size=8)
    lengths = rollouts.token_mask.sum(dim=1)
    long, short = [int(lengths[8:].argsort()[i]) + 8 for i in (6, 0)]
    some = rollouts.rows(torch.tensor([long, short]))
    assert some.texts == [rollouts.texts[long], rollouts.texts[short]]
    prompt, written = max(2 if i < 16 else 1 for i in (long, short)), int(lengths[long])
    assert written < rollouts.token_ids.shape[1]
    cuts = [slice(-prompt, None)] * 2 + [slice(written)] * 3
    for part, whole, cut in zip(some[:5], rollouts[:5], cuts, strict=True):
        assert torch.equal(part, torch.stack([whole[long, cut], whole[short, cut]]))


def test_equal_seeds_give_equal_bits():
    first, second, other = (sampled(generator(), seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first[:5], second[:5], strict=True)) and first.texts == second.texts
    assert first.texts != other.texts


def test_the_model_is_in_evaluation_mode():
    assert not Generator(gpt2().train(), letters()).model.training


@pytest.mark.parametrize("empty", ["", "xyz"])
def test_a_prompt_without_a_token_is_named(empty):
    with pytest.raises(ValueError, match=f"prompt {empty!r} holds no token"):
        generator().sample(["abc", empty])


def test_a_tokenizer_without_an_end_token():
    without = PreTrainedTokenizerFast(tokenizer_object=letters().backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Generator(gpt2(), without)
