"""Parameters that several processes hold in parts while they are trained (FSDP2, `torch.distributed.fsdp`).

Of every trained parameter of a module each process keeps the n-th part by rows, and with it that part of its gradient
and of Adam's moments; `fully_shard` gathers a module's parameters before it runs, frees them behind it, and averages
and scatters their gradients on the way back. What is not trained stays whole. A parameter of no dimension, or of
another dtype than most of its module's (FSDP gathers one dtype at a time), stays whole too and has its gradient
averaged by `parallel.average_gradients`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearize.calibration.parallel import summed
from linearize.errors import RewriteError


@contextmanager
def sharded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Shard what requires gradients in each module; gives what stands for each sharded parameter meanwhile. Behind it
    the parameters are whole again, wherever they are, with the values that training gave them; after an error they are
    lost.

    Raises:
        RewriteError: a parameter is in two of the modules.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, because these take half a second
    from torch.distributed.fsdp import fully_shard

    places = [place for module in modules for place in _places(module)]
    _check_once(places)
    kind = places[0][-1].device.type if places else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for module in dict.fromkeys(module for module, *_ in places):
        chosen = set(_chosen([own for top, *_, own in places if top is module]))
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(module.parameters()) - chosen)
    stands = {own: getattr(owner, name) for _, owner, name, own in places}
    stands = {own: now for own, now in stands.items() if now is not own}
    for own in stands:
        own.data = own.new_empty(0)  # it is held in parts
    yield stands
    for own, now in stands.items():
        own.data = whole(now.detach())
    for _, owner, name, own in places:
        setattr(owner, name, own)


Place = tuple[nn.Module, nn.Module, str, nn.Parameter]  # (module to shard, the one below that has it, name, parameter)


def _places(module: nn.Module) -> list[Place]:
    return [
        (module, owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad
    ]


def _check_once(places: Sequence[Place]) -> None:
    tops: dict[nn.Parameter, nn.Module] = {}
    for module, _, name, parameter in places:
        if tops.setdefault(parameter, module) is not module:
            raise RewriteError(
                f"{name}, {list(parameter.shape)}, is trained in two blocks of the model and cannot be sharded by "
                "block; leave sharding out (the recipe's distill.shard = false)"
            )


def _chosen(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those of the dtype that has the most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in set(parameters):
        sizes[parameter.dtype] += parameter.nbytes if parameter.dim() else 0
    dtype = sizes.most_common(1)[0][0] if sizes else None
    return [parameter for parameter in parameters if parameter.dim() and parameter.dtype == dtype]


def is_sharded(tensor: Any) -> bool:
    """Whether it is a `DTensor`."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process has to ask. A tensor that is not sharded is given back as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def own_part(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor that every process has: what this one holds, sharded as `like` is."""
    value = value.to(like.device, like.dtype).reshape(like.shape)
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharding: Any = like
    return distribute_tensor(value, sharding.device_mesh, sharding.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, which does not take sharded and whole parameters together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if is_sharded(gradient)]  # type: ignore[attr-defined]
    rest = [gradient for gradient in gradients if not is_sharded(gradient)]
    if not parts:
        torch.nn.utils.clip_grad_norm_(parameters, most)
        return
    (inside,) = summed([_squares(parts)])
    norm = (inside + (_squares(rest) if rest else 0.0)).sqrt()
    for gradient in [*parts, *rest]:
        gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0).to(gradient.dtype))


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()
