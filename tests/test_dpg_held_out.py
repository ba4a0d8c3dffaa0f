"""The held-out loss is a student's for-loop over single texts, however it is split up; so are its rewards."""

import pytest
import torch
from dpg_problems import MODELS, TEXTS, gpt2, ids_of, letters, next_token_log_probs, parameters, target, text_loss
from transformers import PreTrainedTokenizerFast

import metagrad as mg
from dpg.metrics import HeldOutLoss
from dpg.reward import MetagradReward

HELD_OUT = ["abcab", "hgfedcba", "jd", "eifj", "kkbkk"]
SENTENCES = ["ab cde", "hgf edc ba", "  j d ", "bab kk\tfe\n"]
"""The test tokenizer has no token for blanks, so that the last word's tokens are its letters."""


def moved(model):
    """Parameters that are not the model's own: a metric must look at these."""
    torch.manual_seed(3)
    return {name: p + 0.1 * torch.randn_like(p) for name, p in parameters(model).items()}


def by_hand(model, params, texts, last_word):
    """Φ, each text's log-probabilities from a forward pass of its own."""
    found = []
    for text in texts:
        each = next_token_log_probs(model, ids_of(text), params)
        found.append(each[-len(text.split()[-1]) :] if last_word else each)
    return torch.cat(found).mean()


@pytest.mark.parametrize("microbatch_size", [1, 2, 256])
@pytest.mark.parametrize("last_word", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_phi_is_the_mean_log_probability_of_the_scored_tokens(name, last_word, microbatch_size):
    model, texts = MODELS[name](), SENTENCES if last_word else HELD_OUT
    params = {key: p.requires_grad_() for key, p in moved(model).items()}
    bound = HeldOutLoss(texts, last_word=last_word, microbatch_size=microbatch_size).bind(model, letters())
    phi, wanted = bound.phi(params), by_hand(model, params, texts, last_word)
    assert float(phi.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert bound.measure(params)["held_out_loss"] == pytest.approx(-float(wanted.detach()), rel=1e-12)
    gradients = [torch.autograd.grad(value, list(params.values()), allow_unused=True) for value in (phi, wanted)]
    for key, got, right in zip(params, *gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-13, msg=key)


def test_the_accuracy_counts_words_that_are_likeliest_letter_by_letter():
    model = gpt2()
    params = moved(model)
    texts = [a + b + " " + c + d for a in "abc" for b in "dk" for c in "abcdefghijk" for d in "adg"]
    right = 0
    for text in texts:
        ids = ids_of(text)
        logits = torch.func.functional_call(model, params, (torch.tensor([ids]),), {"use_cache": False}).logits[0]
        right += all(int(logits[i - 1].argmax()) == ids[i] for i in (2, 3))
    assert 0 < right < len(texts)
    for microbatch_size in (7, 256):
        bound = HeldOutLoss(texts, last_word=True, microbatch_size=microbatch_size).bind(model, letters())
        assert bound.measure(params)["last_word_accuracy"] == right / len(texts)
    assert "last_word_accuracy" not in HeldOutLoss(texts).bind(model, letters()).measure(params)


def phi_after_retraining(chosen, weights, last_word):
    """Φ after SGD written out, with a weight on every text, each text's loss computed alone."""
    params = parameters(chosen.model)
    for batch in chosen.batches(TEXTS):
        leaves = {key: p.detach().requires_grad_() for key, p in params.items()}
        indices = batch["index"].tolist()
        loss = sum(weights[i] * text_loss(chosen.model, TEXTS[i], 6, 6, leaves) for i in indices) / len(indices)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        params = {key: p.detach() - 0.5 * g for (key, p), g in zip(leaves.items(), gradients, strict=True)}
    return float(by_hand(chosen.model, params, SENTENCES if last_word else HELD_OUT, last_word))


@pytest.mark.parametrize("last_word", [False, True])
def test_rewards_are_finite_differences_of_retraining(last_word):
    chosen = target(mg.optim.sgd(lr=0.5))  # Three inner steps.
    texts = SENTENCES if last_word else HELD_OUT
    metric = HeldOutLoss(texts, last_word=last_word, microbatch_size=2)
    scores = MetagradReward(chosen, metric.bind(chosen.model, chosen.tokenizer).phi).score(TEXTS)
    assert scores.phi == pytest.approx(phi_after_retraining(chosen, [1.0] * 7, last_word), rel=1e-12)
    # Central differences of fourth order, as in test_dpg_reward.py.
    h, differences = 1e-3, []
    for i in range(len(TEXTS)):
        moves = {k: [1.0 + k * h * (j == i) for j in range(7)] for k in (-2, -1, 1, 2)}
        phi = {k: phi_after_retraining(chosen, weights, last_word) for k, weights in moves.items()}
        differences.append((phi[-2] - 8 * phi[-1] + 8 * phi[1] - phi[2]) / (12 * h))
    wanted = torch.tensor(differences)
    assert float(wanted.norm()) > 1e-4
    assert float((scores.rewards - wanted).norm() / wanted.norm()) <= 1e-8


def test_a_tokenizer_that_frames_texts_is_scored_from_its_first_word_on():
    # As Llama's does at the front, and T5's at the back: the first letter has something before it, the end is no text.
    class Framed:
        eos_token_id, unk_token_id = letters().eos_token_id, None

        def __call__(self, text, verbose=True):
            return {"input_ids": [3, *ids_of(text), self.eos_token_id]}

    model = gpt2()
    wanted = torch.cat([next_token_log_probs(model, [3, *ids_of(text)]) for text in HELD_OUT]).mean()
    phi = HeldOutLoss(HELD_OUT).bind(model, Framed()).phi(parameters(model))
    assert float(phi) == pytest.approx(float(wanted.detach()), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, r"at least one string, but are \[\]"),
        ({"texts": "abc"}, "at least one string, but are 'abc'"),
        ({"texts": ["ab cd", " abc "], "last_word": True}, "text ' abc ' has no word before its last one"),
        ({"texts": ["abc"], "microbatch_size": 0}, "`microbatch_size` is 0. Pass at least 1"),
        ({"texts": ["abc"], "sequence_length": 1}, "`sequence_length` is 1. Pass at least 2"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeldOutLoss(**arguments)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (HeldOutLoss(["abc", "a"]), "text 'a' has 1 tokens, which leaves none to predict"),
        (HeldOutLoss(["abc", "XYZ"]), "text 'XYZ' has 0 tokens"),
        (HeldOutLoss(["abc XYZ"], last_word=True), "text 'abc XYZ' has 3 tokens, which leaves none"),
        (HeldOutLoss(["abc", "abcde" * 10]), "has 50 tokens, but .* allows 48"),
        (HeldOutLoss(["abc", "abcde"], sequence_length=4), "has 5 tokens, but .* allows 4"),
    ],
)
def test_texts_that_do_not_fit_the_model_are_refused_when_bound(metric, message):
    with pytest.raises(ValueError, match=message):
        metric.bind(gpt2(), letters())


def test_a_text_with_an_unknown_token_is_refused():
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", eos_token="a")
    with pytest.raises(ValueError, match="'b' holds something that the tokenizer does not know"):
        HeldOutLoss(["b"]).bind(gpt2(), tokenizer)
