"""Tensors in files that are whole or absent: written beside and renamed, the checksum of all bytes in the name."""

import errno
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metagrad._tree import describe, map_tensors, separate, tensor_leaves
from metagrad._types import ResumeError, Tree

CHUNK = 1 << 22  # bytes read at a time
REMEDY = "Delete the folder to start again, or continue from an undamaged copy of it."


def write_tree(folder: Path, name: str, tree: Tree) -> Path:
    """Write the tensors and numbers of `tree` to `folder/name.<checksum>.safetensors`, durably, and return the path.

    Raises:
        OSError: if it cannot be written, for instance on a full disk; nothing of it is left then.
    """
    unfinished = folder / f"{name}.unfinished"
    try:
        save_file(_separate(_by_name(tree)), unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        path = folder / f"{name}.{_checksum(unfinished):08x}.safetensors"
        unfinished.rename(path)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise could_not_write(name, folder, error) from error
    return path


def could_not_write(name: str, folder: Path, error: Exception) -> OSError:
    """What to tell a user whose disk is full, or gone."""
    code = error.errno if isinstance(error, OSError) else errno.EIO
    return OSError(
        code,
        f"{name} could not be written to {folder} ({error}). Everything written before is still there: make room, "
        "and call again; with the same `resume` the run goes on.",
    )


class Blueprint(NamedTuple):
    """What a tree is made of, without its values: tensors of torch's meta device, and where each belongs."""

    tree: Tree
    devices: list[torch.device]

    @staticmethod
    def of(tree: Tree) -> "Blueprint":
        """The blueprint of `tree`."""
        devices = [leaf.device for leaf in tensor_leaves(tree)]
        return Blueprint(map_tensors(lambda leaf: torch.empty_like(leaf, device="meta"), tree), devices)


def read_tree(path: Path, like: Blueprint) -> Tree:
    """The tree that was written to `path`.

    Tensors that are not in `like` are passed over.

    Raises:
        ResumeError: if a byte of the file has changed, or it lacks a tensor of `like`.
    """
    if path.suffixes[-2:-1] != [f".{_checksum(path):08x}"]:
        raise ResumeError(f"{path} is damaged: its bytes do not have the checksum that its name tells. {REMEDY}")
    tensors = load_file(path)
    for name, wanted in _by_name(like.tree).items():
        found = tensors.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ResumeError(
                f"{path} holds {describe(found)} as {name}, where {describe(wanted)} was expected. {REMEDY}"
            )
    order, devices = iter(_by_name(like.tree)), iter(like.devices)

    def read(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # Copied: torch's own memory is aligned, a mapped file's is not, and a matrix product may differ in its last
            # bit.
            return torch.empty_like(leaf, device=next(devices)).copy_(tensors[next(order)])
        return type(leaf)(tensors[next(order)].item()) if isinstance(leaf, int | float) else leaf

    return optree.tree_map(read, like.tree)


def _by_name(tree: Tree) -> dict[str, Tensor]:
    """The tensors and the numbers of `tree`, these as tensors, by where they are."""
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return {
        accessor.codify(""): leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=_exact(leaf))
        for accessor, leaf in zip(accessors, leaves, strict=True)
        if isinstance(leaf, Tensor | int | float)
    }


def _exact(number: Tree) -> torch.dtype:
    return torch.float64 if isinstance(number, float) else torch.int64


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as the format demands."""
    return dict(
        zip(tensors, separate([tensor.detach().cpu().contiguous() for tensor in tensors.values()]), strict=True)
    )


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
