"""Cross-entropy in chunks is torch's cross-entropy, with its first and second derivatives, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import metagrad as mg


def derivatives(losses, hidden, weight, weights, u, v):
    """The losses, the gradient of their weighted sum, and what one more derivative along (u, v) gives to each input."""
    inputs = [x.detach().requires_grad_() for x in (hidden, weight, weights)]
    found = losses(*inputs[:2])
    gradient = torch.autograd.grad((inputs[2] * found).sum(), inputs[:2], create_graph=True)
    return [found, *gradient, *torch.autograd.grad(gradient, inputs, (u, v))]


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 4),
    classes=st.integers(1, 6),
    chunk_size=st.integers(1, 12),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_it_is_cross_entropy_twice_differentiated(rows, width, classes, chunk_size, seed):
    draw = torch.Generator().manual_seed(seed)
    hidden, u = torch.randn(2, rows, width, generator=draw)
    weight, v = torch.randn(2, classes, width, generator=draw)
    labels = torch.randint(-1, classes, (rows,), generator=draw)
    labels[labels < 0] = -100
    weights = torch.randn(rows, generator=draw)
    ours = derivatives(
        lambda h, w: mg.linear_cross_entropy(h, w, labels, chunk_size=chunk_size), hidden, weight, weights, u, v
    )
    torchs = derivatives(lambda h, w: cross_entropy(h @ w.T, labels, reduction="none"), hidden, weight, weights, u, v)
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_a_training_run_through_it_is_the_run_through_logits():
    draw = torch.Generator().manual_seed(3)
    params = {"embed": torch.randn(7, 4, generator=draw), "head": torch.randn(7, 4, generator=draw)}
    ids = torch.randint(7, (5, 6), generator=draw)
    batch = {"ids": ids, "index": torch.arange(5)}

    def chunked(params, batch):
        hidden = torch.tanh(params["embed"][batch["ids"][:, :-1]])
        return mg.linear_cross_entropy(hidden, params["head"], batch["ids"][:, 1:], chunk_size=7).mean(1)

    def plain(params, batch):
        logits = torch.tanh(params["embed"][batch["ids"][:, :-1]]) @ params["head"].T
        return cross_entropy(logits.mT, batch["ids"][:, 1:], reduction="none").mean(1)

    results = [
        mg.metagradient(
            lambda state: state.params["head"].square().sum(),
            mg.TrainStep(mg.weighted(loss), mg.optim.adam(0.05, eps_root=1e-3)),
            params,
            [batch] * 4,
            {"weights": torch.ones(5)},
            wrt_params=True,
        )
        for loss in (chunked, plain)
    ]
    torch.testing.assert_close(results[0].meta["weights"], results[1].meta["weights"], rtol=1e-11, atol=0)
    torch.testing.assert_close(results[0].params["embed"], results[1].params["embed"], rtol=1e-10, atol=1e-15)


def test_no_tensor_is_as_large_as_all_logits():
    """Seen by a mode that looks at every tensor torch makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for leaf in made if isinstance(made, tuple | list) else [made]:
                if isinstance(leaf, torch.Tensor):
                    self.numbers = max(self.numbers, leaf.numel())
            return made

    hidden, weight, labels = torch.randn(64, 3), torch.randn(50, 3), torch.randint(50, (64,))
    with Largest() as largest:
        derivatives(
            lambda h, w: mg.linear_cross_entropy(h, w, labels, chunk_size=4),
            hidden,
            weight,
            torch.ones(64),
            torch.ones(64, 3),
            torch.ones(50, 3),
        )
    assert largest.numbers <= 4 * 50


def test_a_third_derivative_is_refused():
    weight = torch.randn(5, 3, requires_grad=True)
    loss = mg.linear_cross_entropy(torch.randn(2, 3), weight, torch.tensor([1, 2])).sum()
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize(
    "hidden, weight, labels, size, message",
    [
        ((2, 3), (5, 4), (2,), 4, "do not fit"),
        ((2, 3), (5, 3), (3,), 4, "do not fit"),
        ((2, 3), (5, 3), (2,), 0, "chunk_size"),
    ],
)
def test_what_does_not_fit_is_refused(hidden, weight, labels, size, message):
    with pytest.raises(ValueError, match=message):
        mg.linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64), chunk_size=size
        )


def test_a_label_that_is_no_class_is_not_a_number():
    """In a training step an error that names it; to read labels would keep a step from being compiled."""
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    losses = mg.linear_cross_entropy(hidden, weight, torch.tensor([4, -1, -100, 5]))
    assert losses.isnan().tolist() == [False, True, False, True] and losses[2] == 0
    step = mg.TrainStep(lambda p, b, meta: mg.linear_cross_entropy(b, p["w"], torch.tensor([0, -1])), mg.optim.sgd(0.1))
    with pytest.raises(mg.NonFiniteError, match="step 0"):
        mg.train(step, {"w": weight}, [hidden[:2]], {})


def test_a_position_without_a_label_counts_for_nothing_whatever_stands_there():
    hidden = torch.tensor([[torch.inf, 1.0], [1.0, 2.0]])
    losses = mg.linear_cross_entropy(hidden, torch.randn(3, 2), torch.tensor([-100, 1]))
    assert losses[0] == 0 and losses[1] > 0


def test_autocast_does_not_round_it():
    hidden, weight, labels = torch.randn(4, 3).float(), torch.randn(5, 3).float().requires_grad_(), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = mg.linear_cross_entropy(hidden, weight, labels)
        mixed = mg.linear_cross_entropy(hidden @ torch.eye(3).float(), weight, labels)
        gradient = torch.autograd.grad(mixed.sum(), weight, create_graph=True)[0]
        second = torch.autograd.grad(gradient.sin().sum(), weight)[0]
    assert losses.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(losses, cross_entropy(hidden @ weight.T, labels, reduction="none"))
    assert gradient.dtype == second.dtype == torch.float32
