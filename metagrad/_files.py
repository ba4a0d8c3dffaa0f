"""Tensors in files that are whole or absent: written beside and renamed, the checksum of all bytes in the name."""

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import optree
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from metagrad._tree import describe, map_tensors, separate, tensor_leaves
from metagrad._types import ResumeError, Tree

CHUNK = 1 << 22  # bytes read at a time
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of numbers, as safetensors names them."""

REMEDY = "Delete the folder to start again, or continue from an undamaged copy of it."


def write_tree(folder: Path, name: str, tree: Tree, *, durable: bool = True) -> Path:
    """Write the tensors and numbers of `tree` to `folder/name.<checksum>.safetensors`, and return the path.

    Args:
        durable: wait until the disk has them, so that a machine that loses power does not lose them.

    Raises:
        OSError: if it cannot be written, for instance on a full disk; nothing of it is left then.
    """
    unfinished = folder / f"{name}.unfinished"
    try:
        save_file(_separate(_by_name(tree)), unfinished)
        if durable:
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
        path = folder / f"{name}.{_checksum(unfinished):08x}.safetensors"
        unfinished.rename(path)
        if durable:
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

    Tensors that are not in `like` are passed over. No more memory is taken than for the tree.

    Raises:
        ResumeError: if a byte of the file has changed, or it lacks a tensor of `like`.
    """
    if path.suffixes[-2:-1] != [f".{_checksum(path):08x}"]:
        raise ResumeError(f"{path} is damaged: its bytes do not have the checksum that its name tells. {REMEDY}")
    wanted, devices = _by_name(like.tree), iter(like.devices)
    order = iter(wanted)
    with open(path, "rb") as file:
        header, start = _header(file)
        for name, leaf in wanted.items():
            found = header.get(name)
            if found is None or (found.kind, found.shape) != (KINDS[leaf.dtype], list(leaf.shape)):
                raise ResumeError(
                    f"{path} holds {found or 'nothing'} as {name}, where {describe(leaf)} was expected. {REMEDY}"
                )

        def read(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor | int | float):
                return leaf
            name = next(order)
            # Into torch's own memory, which is aligned: a mapped file's is not, and a matrix product may differ in its
            # last bit.
            tensor = torch.empty(wanted[name].shape, dtype=wanted[name].dtype)
            file.seek(start + header[name].offsets[0])
            file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if not isinstance(leaf, Tensor):
                return type(leaf)(tensor.item())
            device = next(devices)
            if device.type == "cpu" and leaf.is_contiguous():
                return tensor
            return torch.empty_like(leaf, device=device).copy_(tensor)  # In the order that it had in memory.

        return optree.tree_map(read, like.tree)


class _Entry(NamedTuple):
    """What a file's header says of a tensor."""

    kind: str
    shape: list[int]
    offsets: list[int]

    def __str__(self) -> str:
        return f"a tensor of {self.kind} and shape {tuple(self.shape)}"


def _header(file: BinaryIO) -> tuple[dict[str, _Entry], int]:
    """The header of a safetensors file, and where the bytes of its tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    return {name: _Entry(e["dtype"], e["shape"], e["data_offsets"]) for name, e in entries.items()}, 8 + length


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
