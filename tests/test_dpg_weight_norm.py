"""Minus the norm of a parameter: compared with sums written out, and with retraining at other weights."""

import math

import pytest
import torch
from dpg_problems import ADAMW, TEXTS, gpt2, letters, parameters, same_bits, target, text_loss

import metagrad as mg
from dpg.metrics import WeightNorm
from dpg.reward import MetagradReward

HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
HIDDEN = "transformer.h.0.mlp.c_fc.weight"
BIAS = "transformer.h.0.mlp.c_fc.bias"
SGD = {"lr": 0.5}
OPTIMIZERS = {"sgd": mg.optim.sgd(**SGD), "adamw": mg.optim.adamw(**ADAMW)}


def norm_by_hand(weight):
    """The root of the sum of squares, entry by entry."""
    return math.sqrt(math.fsum(entry**2 for entry in weight.detach().flatten().tolist()))


def scaled(model, name, factor):
    """The parameters of `model`, one of them multiplied."""
    params = parameters(model)
    return params | {name: params[name] * factor}


@pytest.mark.parametrize("name", [None, HEAD, EMBEDDING, HIDDEN, BIAS])
def test_phi_and_figures_are_the_sum_of_squares(name):
    model = gpt2()
    if name == BIAS:
        torch.nn.init.normal_(model.get_parameter(BIAS))  # Zero in a new model, where the norm has no derivative.
    bound = WeightNorm(name).bind(model, letters())
    params = scaled(model, name or HEAD, -1.5)
    initial = norm_by_hand(model.get_parameter(name or HEAD))
    assert float(bound.phi(params)) == pytest.approx(-1.5 * initial, rel=1e-13)
    wanted = {"norm": 1.5 * initial, "norm_drop": -0.5 * initial}
    assert bound.measure(params) == pytest.approx(wanted, rel=1e-12)


def test_other_parameters_do_not_count():
    model = gpt2()
    bound = WeightNorm(HIDDEN).bind(model, letters())
    params = {name: p if name == HIDDEN else p + 1 for name, p in parameters(model).items()}
    assert bound.measure(params)["norm_drop"] == 0.0


def test_the_head_of_a_tied_model_is_its_embedding():
    model = gpt2(tied=True)
    assert float(WeightNorm().bind(model, letters()).phi(parameters(model))) == pytest.approx(
        -norm_by_hand(model.get_parameter(EMBEDDING)), rel=1e-13
    )


def test_the_change_is_from_the_model_as_it_was_when_bound():
    model = gpt2()
    params = parameters(model)
    bound = WeightNorm().bind(model, letters())
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert bound.measure(params)["norm_drop"] == 0.0


def test_a_change_below_float32_is_seen():
    # One entry of 2,000 moves by its last float32 bit or so: the norm moves by about 1e-8 of itself.
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2000))
    bound = WeightNorm("weight").bind(model, letters())
    moved = torch.ones(2000)
    moved[0] += 2.0**-20
    squares = math.fsum([1999.0, (1 + 2.0**-20) ** 2])
    wanted = math.sqrt(squares) - math.sqrt(2000)
    assert 0 < wanted < 1e-8 * math.sqrt(2000)
    # Two square roots of 45 in double precision differ by their last bits: 1e-14.
    assert bound.measure({"weight": moved})["norm_drop"] == pytest.approx(-wanted, abs=2e-14)


def test_figures_carry_no_graph():
    model = gpt2()
    bound = WeightNorm().bind(model, letters())
    figures = bound.measure({name: p.requires_grad_() for name, p in parameters(model).items()})
    assert all(type(value) is float for value in figures.values())


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("lm_head.weigth", HEAD),
        ("lm_head", HEAD),
        ("transformer.h.0.mlp.c_fc", HIDDEN),
        ("h.0.mlp.c_fc.weight", HIDDEN),
        ("?", "named_parameters"),
        ("", "named_parameters"),
    ],
)
def test_an_unknown_parameter_is_refused_with_close_names(asked, named):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no parameter") as caught:
        WeightNorm(asked).bind(gpt2(), letters())
    assert repr(asked) in str(caught.value) and named in str(caught.value)


def updated(kind, params, gradients, memory, step):
    """The parameters after one update, written out."""
    new = {}
    for key, p in params.items():
        g = gradients[key]
        if kind == "sgd":
            new[key] = p - SGD["lr"] * g
            continue
        beta1, beta2 = ADAMW["betas"]
        mean, square = memory.get(key, (torch.zeros_like(p), torch.zeros_like(p)))
        mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g**2
        memory[key] = (mean, square)
        root = (square / (1 - beta2**step) + ADAMW["eps_root"]).sqrt() + ADAMW["eps"]
        new[key] = p - ADAMW["lr"] * (mean / (1 - beta1**step) / root + ADAMW["weight_decay"] * p)
    return new


def phi_after_retraining(kind, chosen, name, weights):
    """Minus the norm of a parameter of a model trained by hand with a weight on every text."""
    start, memory = parameters(chosen.model), {}
    params = start
    for step, batch in enumerate(chosen.batches(TEXTS), start=1):
        leaves = {key: p.detach().clone().requires_grad_() for key, p in params.items()}
        indices = batch["index"].tolist()
        loss = sum(weights[i] * text_loss(chosen.model, TEXTS[i], 6, 6, leaves) for i in indices) / len(indices)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        params = {key: p.detach() for key, p in updated(kind, params, gradients, memory, step).items()}
    return -norm_by_hand(params[name])


@pytest.mark.parametrize("name", [HEAD, HIDDEN])
@pytest.mark.parametrize("inner_batch_size", [7, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rewards_are_finite_differences_of_retraining(kind, inner_batch_size, name):
    chosen = target(OPTIMIZERS[kind], inner_batch_size=inner_batch_size)
    bound = WeightNorm(None if name == HEAD else name).bind(chosen.model, letters())
    scores = MetagradReward(chosen, bound.phi).score(TEXTS)
    assert scores.phi == pytest.approx(phi_after_retraining(kind, chosen, name, [1.0] * 7), rel=1e-12)
    # Central differences of fourth order: Φ⁽⁵⁾h⁴/30 and 1e-15/h are 1e-12, and rewards are 1e-3.
    h, differences = 1e-3, []
    for i in range(len(TEXTS)):
        moves = {k: [1.0 + k * h * (j == i) for j in range(7)] for k in (-2, -1, 1, 2)}
        phi = {k: phi_after_retraining(kind, chosen, name, weights) for k, weights in moves.items()}
        differences.append((phi[-2] - 8 * phi[-1] + 8 * phi[1] - phi[2]) / (12 * h))
    wanted = torch.tensor(differences)
    assert float((scores.rewards - wanted).norm() / wanted.norm()) <= 1e-8


def test_the_model_itself_is_left_alone():
    chosen = target(OPTIMIZERS["adamw"])
    before = parameters(chosen.model)
    MetagradReward(chosen, WeightNorm().bind(chosen.model, letters()).phi)(TEXTS)
    assert same_bits(before, parameters(chosen.model))
