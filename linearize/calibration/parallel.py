"""Several processes, each with a part of the data (`torchrun`, `accelerate launch`): sums over all of them.

Every process holds the same mixers and walks the same sites. Errors and moments are sums over tokens, so that adding
them over the processes gives what one process finds on the union of the data. Gradients are averaged, so that a step
sees the batches of all. What is searched on one batch is searched by the first process and sent to the others. With
one process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearize.errors import DataError

T = TypeVar("T")


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def launched_rank() -> int:
    """This process's number as a launcher gave it, before the group is joined; 0 for one that was started alone."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """The group that a launcher's environment describes, unless there is one already or none is described: `nccl` for
    what is on a GPU, `gloo` for what is not."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ
    if alone or not dist.is_available() or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def share(batches: Sequence[Tensor], what: str) -> list[Tensor]:
    """This process's batches: every `world()`-th, from its rank on.

    Raises:
        DataError: there are fewer batches than processes.
    """
    if len(batches) < world():
        raise DataError(
            f"{len(batches)} batches to {what} are fewer than the {world()} processes; give more tokens, make batches "
            "smaller (the recipe's fit.batch), or start fewer processes"
        )
    return list(batches[rank() :: world()])


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all processes, in the tensors' own dtype; every process gives the same shapes."""
    if world() == 1:
        return list(tensors)
    found = [tensor.clone() for tensor in tensors]
    for tensor in found:
        dist.all_reduce(tensor)
    return found


def summed_numbers(*numbers: float) -> list[float]:
    if world() == 1:
        return list(numbers)
    return [float(number) for number in summed([torch.tensor(numbers, dtype=torch.float64, device=_place())])[0]]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of all parameters that have one, as one tensor."""
    gradients = [one.grad for one in parameters if one.grad is not None] if world() > 1 else []
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def from_first(module: nn.Module) -> None:
    """Every process takes over the first one's parameters and buffers."""
    for tensor in module.state_dict().values() if world() > 1 else ():
        dist.broadcast(tensor, 0)


def told_by_first(value: T) -> T:
    """What the first process has for this."""
    if world() == 1:
        return value
    said: list[Any] = [value]
    dist.broadcast_object_list(said, 0)
    return said[0]  # type: ignore[no-any-return]


def _place() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
