"""One training step, θ ↦ U(θ, ∇L(θ)), and its pullback. Everything that defines the step is in the step."""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torchopt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchopt.base import GradientTransformation

from metagrad._curvature import Contribution, pull_forward, pull_gradient
from metagrad._loss import WeightedLoss, cut, loss_gradient, mean_share
from metagrad._random import cuda_devices, read_rng, write_rng
from metagrad._refusals import (
    constant_buffer,
    refuse_changed_shapes,
    refuse_non_finite_gradient,
    refuse_shared_modules,
)
from metagrad._tree import describe, detached, floating_leaves, fresh, grouped, independent, tensor_leaves
from metagrad._types import Batches, Loss, Params, Pull, Pullback, State, Tree
from metagrad.optim import clip

Optimizer: TypeAlias = GradientTransformation | Callable[[Tree], GradientTransformation]


@dataclass(frozen=True)
class TrainStep:
    """Mean loss of a batch, its gradient, clipping, the optimizer's update: one pure step.

    Args:
        loss: `loss(params, batch, meta)` → one loss per example, of which the step takes the mean over the whole
            batch, or one scalar.
        optimizer: a TorchOpt gradient transformation, or a function of `meta` that returns one.
        microbatch_size: examples differentiated at a time. Same gradient up to rounding, less memory; every tensor
            of a batch is then cut along its first axis. None: the whole batch at once.
        clip_norm: upper bound of the gradient's global L2 norm, differentiated; the formula is that of
            `torch.nn.utils.clip_grad_norm_`.
        seed: start of the random numbers that the loss may draw (dropout). They are part of the state, so a replay
            draws the same; the generator of the caller is left as it was.

    Raises:
        ValueError: for a `microbatch_size` or a `clip_norm` that is not positive.

    Note:
        Attention runs on torch's math kernel: the fused ones have no second derivative.
    """

    loss: Loss
    optimizer: Optimizer
    microbatch_size: int | None = None
    clip_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(
                f"`microbatch_size` is {self.microbatch_size}. Pass at least 1, or None for the whole batch."
            )
        if not isinstance(self.optimizer, GradientTransformation) and (
            not callable(self.optimizer) or isinstance(self.optimizer, type)
        ):
            raise ValueError(
                f"`optimizer` is {self.optimizer!r}. Pass a TorchOpt transformation such as mg.optim.adamw(lr=1e-3), "
                "or a function of `meta` that returns one; torch.optim cannot be differentiated."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"`clip_norm` is {self.clip_norm}. Pass a norm above 0, or None not to clip.")

    def init(self, params: Mapping[str, Tensor] | torch.nn.Module, meta: Tree) -> State:
        """The state before step 0: copies of the parameters and buffers, a fresh optimizer, seeded randomness.

        A module gives its trainable parameters and all buffers, tied ones once; its frozen parameters stay inside it.

        Raises:
            ValueError: if there is nothing to train, an entry is not a floating-point tensor, or a module with
                parameters or buffers stands in two places.
        """
        if isinstance(params, torch.nn.Module):
            refuse_shared_modules(params)
            buffers = dict(params.named_buffers())
            params = {name: p for name, p in params.named_parameters() if p.requires_grad}
        else:
            buffers = {}
        if not params:
            raise ValueError("there are no parameters to train: pass a non-empty dict, or a module that is not frozen.")
        for name, value in params.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} is {describe(value)}, but only floating-point tensors can be trained. "
                    "Leave it out of `params`."
                )
        # Copies: what the caller does to the model between the run and its replay must not reach the replay.
        own: Params = independent({name: params[name] for name in sorted(params)})
        devices = cuda_devices(own)
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            rng = read_rng(devices)
        return State(own, independent(buffers), self._transformation(meta).init(own), rng, step=0)

    def validate(self, batches: Batches, meta: Tree) -> None:
        """Check all batches before any training.

        Raises:
            ValueError: for no batches, an empty batch, or weights that do not fit the batches.
        """
        if not isinstance(batches, Sized):
            raise ValueError(
                f"`batches` is a {type(batches).__name__}, which can be read once. Pass a list, or anything with len() "
                "and [t] that gives the same batch at every reading."
            )
        if len(batches) == 0:
            raise ValueError("`batches` is empty: there is no step to train. Pass at least one batch.")
        ranges = []
        for step in range(len(batches)):
            batch = batches[step]
            if any(leaf.numel() == 0 for leaf in tensor_leaves(batch)):
                raise ValueError(f"batch {step} holds no examples ({describe(batch)}). Leave empty batches out.")
            if isinstance(self.loss, WeightedLoss):
                ranges.append(self.loss.index_range(batch, step))
        if isinstance(self.loss, WeightedLoss):
            lowest, highest = zip(*ranges, strict=True)
            self.loss.validate(meta, min(lowest), max(highest))

    def __call__(self, state: State, batch: Tree, meta: Tree) -> State:
        """The state after one step on `batch`. With gradients enabled the result keeps its graph, otherwise not.

        Raises:
            NonFiniteError: if the loss or its gradient is NaN or infinite.
            ValueError: if the loss has the wrong shape or does not depend on the parameters.
        """
        keep_graph = torch.is_grad_enabled()
        # Without a graph the parameters are fresh leaves: whatever produced them is not differentiated here.
        params = {
            name: value if keep_graph and value.requires_grad else value.detach().requires_grad_()
            for name, value in state.params.items()
        }
        gradient, buffers, rng = self._gradient(params, state, batch, meta, keep_graph)
        new_params, optimizer = self._update(gradient, state.optimizer, params if keep_graph else state.params, meta)
        return State(new_params, buffers, optimizer, rng, state.step + 1)

    def vjp(self, state: State, batch: Tree, meta: Tree, *, wrt_state: bool) -> tuple[State, Pull]:
        """The state after one step on `batch`, and the map that pulls its cotangent back (docs/theory.md, eq. 4–6).

        Without `wrt_state` no Hessian product is formed; if besides the loss is `weighted` and no weight of the batch
        is (nearly) 0, one forward-mode pass replaces the second backward. The map can be used once.

        Cost: 9 forward passes in all (12 with micro-batches); at most 6 where only weights are asked for.
        """
        # Fresh leaves: the cotangent will carry everything that comes after this step.
        params, optimizer, meta = fresh(state.params), fresh(state.optimizer), fresh(meta)
        param_leaves, optimizer_leaves, meta_leaves = map(floating_leaves, (params, optimizer, meta))
        # Forward mode is checked against the gradient, in which an example of weight 0 does not appear.
        linear = isinstance(self.loss, WeightedLoss) and self.loss.can_be_checked(batch, meta)
        forward_mode = not wrt_state and linear
        keep_graph = self.microbatch_size is None and not forward_mode

        def total(contribution: Contribution, params: Params = params) -> list[Tensor]:
            return self._sum_over_pieces(contribution, params, state, batch, meta)[0]

        gradient, buffers, rng = self._gradient(params, state, batch, meta, keep_graph)
        # Detached: the update is pulled back first, the gradient's own graph after it.
        leaves = [g.detach().requires_grad_() for g in gradient]
        with torch.enable_grad():
            update = self._update(leaves, optimizer, params, meta)

        def pull(cotangent: Sequence[Tensor]) -> Pullback:
            # eq. 4: through the update, to the gradient (γ) and to everything the update reads directly.
            sources = (leaves, param_leaves, optimizer_leaves, meta_leaves)
            pulled = pull_gradient(floating_leaves(update), [leaf for group in sources for leaf in group], cotangent)
            gamma, to_params, to_optimizer, to_meta = grouped(pulled, sources)

            # eq. 5 and 6: through the gradient, to the parameters (Hγ) and to meta.
            groups = (param_leaves if wrt_state else [], meta_leaves)
            inputs = [leaf for group in groups for leaf in group]
            if keep_graph:
                second = pull_gradient(gradient, inputs, gamma)
            elif forward_mode and (fast := pull_forward(total, params, gradient, gamma, inputs)):
                second = fast
            else:
                second = total(lambda loss: pull_gradient(loss_gradient(loss, params, True), inputs, gamma))
            hessian, mixed = grouped(second, groups)

            meta_cotangent = [a + b for a, b in zip(to_meta, mixed, strict=True)]
            if not wrt_state:
                return Pullback(None, meta_cotangent)
            return Pullback([*(a + b for a, b in zip(to_params, hessian, strict=True)), *to_optimizer], meta_cotangent)

        new_params, new_optimizer = detached(update)
        return State(new_params, buffers, new_optimizer, rng, state.step + 1), pull

    def _gradient(
        self, params: Params, state: State, batch: Tree, meta: Tree, keep_graph: bool
    ) -> tuple[list[Tensor], Params, tuple[Tensor, ...]]:
        """∇_θ of the batch's mean loss (eq. 1), checked to be finite; then the buffers and randomness after."""
        gradient, buffers, rng = self._sum_over_pieces(
            lambda loss: loss_gradient(loss, params, keep_graph), params, state, batch, meta
        )
        refuse_non_finite_gradient(params, gradient, state.step)
        return gradient, buffers, rng

    def _sum_over_pieces(
        self,
        contribution: Contribution,
        params: Params,
        state: State,
        batch: Tree,
        meta: Tree,
    ) -> tuple[list[Tensor], Params, tuple[Tensor, ...]]:
        """`contribution` of each micro-batch's share of the mean loss, summed; then the buffers and randomness after.

        Buffers and random numbers start from the state at every call, so each pass over a batch sees the same.
        """
        devices = cuda_devices(state.params)
        # Cloned: modules update their buffers in place, and the state is a value.
        buffers = {name: value.clone() for name, value in state.buffers.items()}
        total: list[Tensor] = []
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            write_rng(state.rng, devices)
            for piece in cut(batch, self.microbatch_size):
                variables = {**params, **buffers}
                share = mean_share(self.loss(variables, piece.batch, meta), piece, state.step)
                buffers = {name: constant_buffer(name, variables[name]) for name in buffers}
                new = contribution(share)
                total = [a + b for a, b in zip(total, new, strict=True)] if total else new
            return total, buffers, read_rng(devices)

    def _update(self, gradient: Sequence[Tensor], optimizer: Tree, params: Params, meta: Tree) -> tuple[Params, Tree]:
        """Parameters and optimizer state after the update by `gradient` (in the order of `params`)."""
        updates, new_optimizer = self._transformation(meta).update(
            dict(zip(params, gradient, strict=True)), optimizer, params=params, inplace=False
        )
        new_params: Params = torchopt.apply_updates(params, updates, inplace=False)
        refuse_changed_shapes(params, new_params)
        return new_params, new_optimizer

    def _transformation(self, meta: Tree) -> GradientTransformation:
        chosen = self.optimizer if isinstance(self.optimizer, GradientTransformation) else self.optimizer(meta)
        return chosen if self.clip_norm is None else torchopt.chain(clip(self.clip_norm), chosen)
