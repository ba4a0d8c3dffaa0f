"""A state of which every rank has rows: cut, gathered for a metric, and shown as torch's distributed tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import optree
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from metagrad._exchange import gathered, rows
from metagrad._ranks import Ranks
from metagrad._tree import map_tensors, with_floating_leaves
from metagrad._types import NonFiniteError, Params, State, Tree

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Of whole parameters, by name."""


class Memory(NamedTuple):
    """What a sharded state has in the place of the optimizer's: that of its rows, and the shapes of whole parameters.

    The shapes are in the state because a state is a value: nothing else need be remembered to put it together.
    """

    shapes: dict[str, tuple[int, ...]]
    optimizer: Tree


def own_rows(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A copy of this rank's rows of a tensor that every rank has whole, or that is distributed in any way."""
    if _is_distributed(tensor):
        given: Any = tensor.detach()
        if _is_ours(given, ranks):
            return torch.clone(given.to_local(), memory_format=torch.contiguous_format)
        tensor = given.full_tensor()
    return rows(tensor.detach(), ranks.rank, ranks.num_ranks).clone(memory_format=torch.contiguous_format)


def given_whole(tree: Tree) -> Tree:
    """The tensors of `tree` that every rank was given whole."""
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor) and not _is_distributed(leaf)]


def seen_by_a_metric(state: State, ranks: Ranks) -> State:
    """`state` with whole parameters, whose graph leads to the rows; its optimizer's state stays divided."""
    shapes = state.optimizer.shapes
    own = list(state.params.values())
    whole = gathered(own, [shapes[name] for name in state.params], ranks, "the parameters for the metric")
    with torch.enable_grad():
        params = {
            name: _Whole.apply(part, ranks, made, f"params[{name!r}]")  # type: ignore[no-untyped-call]
            for (name, part), made in zip(state.params.items(), whole, strict=True)
        }
    return state._replace(params=params, optimizer=OutOfSight())


class OutOfSight:
    """What a metric of a sharded run finds in the place of the optimizer's state."""

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def __getitem__(self, key: object) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "the metric reads `state.optimizer`, which a sharded run gathers for nobody. Read `state.params` and "
            "`state.buffers`, or pass the step without `Sharded`."
        )


class _Whole(torch.autograd.Function):
    """This rank's rows ↦ the whole tensor, of which each rank computes the same; back, the rows of the cotangent."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, whole: Tensor, name: str) -> Tensor:
        ctx.ranks, ctx.name = ranks, name
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # Here, where every rank has all of it: of the rows those of one rank alone may be wrong.
        if not bool(torch.isfinite(cotangent).all()):
            raise NonFiniteError(f"the gradient of the metric is not finite in state.{ctx.name}.")
        return own_rows(cotangent, ctx.ranks), None, None, None


class _OfEach(torch.autograd.Function):
    """A number of each rank ↦ those of all ranks, of which each may make something else."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        numbers = number.new_zeros(ranks.num_ranks)
        numbers[ranks.rank] = number.detach()
        return ranks.sum([numbers], "the norm of the gradient")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, None]:
        return ctx.ranks.sum([cotangent], "the norm of the gradient")[0][ctx.ranks.rank], None


def of_each(number: Tensor, ranks: Ranks) -> Tensor:
    """The numbers of all ranks, differentiable."""
    numbers: Tensor = _OfEach.apply(number, ranks)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return numbers


def distributed(part: State, ranks: Ranks, num_metrics: int | None) -> State:
    """A sharded state, or its gradient, as `DTensor`s: `.full_tensor()` gives each whole, on every rank together.

    Args:
        num_metrics: entries of an axis that every tensor leads with; None where there is none.
    """
    from torch.distributed.device_mesh import DeviceMesh  # Only here: it takes a second to import.

    memory: Memory = part.optimizer
    mesh = DeviceMesh.from_group(ranks.group, next(iter(part.params.values())).device.type)
    leading = () if num_metrics is None else (num_metrics,)

    def shown(own: Tensor, name: str) -> Tensor:
        return _distributed(own, memory.shapes[name], leading, ranks, mesh)

    # The memory of an elementwise optimizer has the names of the parameters.
    paths, leaves, _ = optree.tree_flatten_with_path(memory.optimizer)
    pairs = [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor)]
    remembered = [shown(leaf, path[-1]) for path, leaf in pairs if leaf.is_floating_point()]
    params = {name: shown(own, name) for name, own in part.params.items()}
    return part._replace(params=params, optimizer=with_floating_leaves(memory.optimizer, remembered))


def _distributed(own: Tensor, shape: tuple[int, ...], leading: tuple[int, ...], ranks: Ranks, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not shape:  # A number has no axis to be divided along.
        row = own.movedim(-1, 0) if leading else own
        whole = gathered([row], [(1, *leading)], ranks, "a parameter of shape ()")[0].reshape(leading)
        return DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    like = torch.empty((*leading, *shape), device="meta")
    place = Shard(len(leading))
    return DTensor.from_local(own, mesh, [place], run_check=False, shape=like.shape, stride=like.stride())


def _is_distributed(tensor: Tensor) -> bool:
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _is_ours(tensor: Any, ranks: Ranks) -> bool:
    """Whether a distributed tensor is divided as ours are."""
    from torch.distributed.tensor import Shard

    processes: Sequence[int] = tensor.device_mesh.mesh.flatten().tolist()
    return tuple(tensor.placements) == (Shard(0),) and processes == dist.get_process_group_ranks(ranks.group)


def cut(tree: Tree, ranks: Ranks) -> Tree:
    """This rank's rows of all floating-point tensors of `tree`, and copies of the others."""
    return map_tensors(lambda leaf: own_rows(leaf, ranks) if leaf.is_floating_point() else leaf.detach().clone(), tree)


def like_whole(params: Params, shapes: Shapes) -> Params:
    """What whole parameters are, without their values: tensors of torch's meta device."""
    return {name: torch.empty(shapes[name], dtype=own.dtype, device="meta") for name, own in params.items()}
