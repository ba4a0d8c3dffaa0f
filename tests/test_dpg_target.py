"""Fine-tuning a target is ordinary training, and leaves the target's model as it was."""

import pytest
import torch
from dpg_problems import (
    ADAMW,
    TEXTS,
    copy_of,
    gpt2,
    largest_difference,
    letters,
    parameters,
    same_bits,
    target,
    text_loss,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import metagrad as mg
from dpg.build import MODELS
from dpg.metrics import WeightPattern
from dpg.reward import MetagradReward
from dpg.target import Target, load_model, untie_head

IMAGE = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])


def trained_by_torch(chosen, make_optimizer, denominator=6):
    """The parameters after an ordinary loop of torch.optim, each text's loss computed alone."""
    model = copy_of(chosen.model)
    optimizer = make_optimizer(model.parameters())
    for batch in chosen.batches(TEXTS):
        losses = [text_loss(model, TEXTS[i], chosen.sequence_length, denominator) for i in batch["index"].tolist()]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        if chosen.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.clip_norm)
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"microbatch_size": 2}, {"clip_norm": 0.05}, {"inner_batch_size": 100}, {"loss_denominator": 1.5}],
    ids=str,
)
def test_sgd_is_that_of_torch(settings):
    chosen = target(mg.optim.sgd(lr=0.2), **settings)
    wanted = trained_by_torch(chosen, lambda p: torch.optim.SGD(p, lr=0.2), settings.get("loss_denominator", 6))
    trained = chosen.fine_tune(TEXTS)
    assert largest_difference(trained, parameters(chosen.model)) > 1e-4
    assert largest_difference(trained, wanted) <= 1e-12


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(weight_decay):
    # √(v + eps_root) differs from √v by at most eps_root / 2√v where that matters, v > eps²: by 5e-19 at most. The
    # gradients that are zero but for rounding (a key's bias) are magnified by lr / eps = 1e4, from 1e-17 to 1e-13.
    ours = mg.optim.adamw(0.01, (0.8, 0.95), eps=1e-6, eps_root=1e-24, weight_decay=weight_decay)
    chosen = target(ours)
    wanted = trained_by_torch(
        chosen, lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    )
    assert largest_difference(chosen.fine_tune(TEXTS), wanted) <= 1e-11


def test_the_model_is_never_changed():
    chosen = target(mg.optim.adamw(**ADAMW))
    before = parameters(chosen.model)
    first = chosen.fine_tune(TEXTS)
    MetagradReward(chosen, WeightPattern(IMAGE))(TEXTS)
    assert same_bits(parameters(chosen.model), before)
    assert all(parameter.grad is None for parameter in chosen.model.parameters())
    assert same_bits(chosen.fine_tune(TEXTS), first)


def test_dropout_is_off():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12, resid_pdrop=0.5)).train()
    chosen = Target(model, letters(), mg.optim.sgd(0.1), sequence_length=6)
    assert same_bits(chosen.fine_tune(TEXTS), chosen.fine_tune(TEXTS))
    assert not model.training


def test_fine_tuning_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    target(mg.optim.sgd(0.1)).fine_tune(TEXTS)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    gpt2(0)  # Builds the same model, which draws.
    assert torch.equal(torch.get_rng_state(), after)


def test_untying_gives_the_head_a_copy_of_the_embedding():
    model = gpt2(tied=True)
    ids = torch.tensor([[0, 3, 5]])
    before, num_before = model(ids).logits, model.num_parameters()
    assert untie_head(model) is model
    head, embedding = model.lm_head.weight, model.transformer.wte.weight
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()
    assert torch.equal(model(ids).logits, before)
    assert model.config.tie_word_embeddings is False
    assert model.num_parameters() == num_before + head.numel()
    with torch.no_grad():
        head[0, 0] += 1
    assert not torch.equal(head, embedding)


def test_untying_twice_changes_nothing_more():
    model = untie_head(gpt2(tied=True))
    head = model.lm_head.weight
    assert untie_head(model).lm_head.weight is head


def test_an_untied_model_survives_a_folder(tmp_path):
    model = untie_head(gpt2(tied=True))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert same_bits(parameters(loaded), parameters(model))
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match=r"the LM head of GPT2LMHeadModel is tied to its embedding.*dpg\.untie_head"):
        MetagradReward(Target(gpt2(tied=True), letters(), mg.optim.sgd(0.1), sequence_length=8), WeightPattern(IMAGE))


def test_the_published_target_is_tied_until_asked_otherwise():
    assert "lm_head.weight" not in dict(load_model(str(MODELS / "target"))[0].named_parameters())
    model, tokenizer = load_model(str(MODELS / "target"), untie=True)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert model.dtype == torch.float32 and tokenizer.eos_token_id == model.config.eos_token_id


def test_a_loaded_model_computes_what_transformers_would(tmp_path):
    """Its activation is one operation of torch instead of eight."""
    gpt2(tied=True).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).double()
    loaded = load_model(str(tmp_path))[0].double()
    assert any(type(module).__name__ == "NewGELUActivation" for module in plain.modules())
    assert not any(type(module).__name__ == "NewGELUActivation" for module in loaded.modules())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is neither a folder with a causal language model .* nor a model name"):
        load_model(str(tmp_path / "nothing"))
