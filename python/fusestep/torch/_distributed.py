"""The norm of gradients that lie in shards over several processes."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ._tensors import is_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


# Squares are summed once more at this scale, for norms whose square a float64 cannot hold.
_SMALL = 2.0**-600


class _Distribution(NamedTuple):
    """The mesh of a DTensor, and the dimensions of the mesh along which it is split."""

    mesh: Any
    split: tuple[int, ...]


def global_norm(gradients: Sequence[tuple[Tensor, float, bool]]) -> tuple[float, bool]:
    """Return the L2 norm of all gradients together, and whether all are finite, on all processes.

    Every process of the mesh must call this, with the same parameters in the same order.

    Parameters
    ----------
    gradients
        For each gradient its parameter, the norm of this process's part, and whether that part is
        finite.

    Notes
    -----
    A replicated parameter counts once: squares are summed over the dimensions of the mesh along
    which it is sharded, and only over these. What is not finite counts wherever it is met.
    """
    totals: defaultdict[_Distribution | None, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    totals[None] = [0.0, 0.0, 0.0]
    for parameter, norm, is_finite in gradients:
        total = totals[_distribution(parameter)]
        total[0] += norm * norm
        total[1] += (norm * _SMALL) ** 2
        total[2] += not is_finite
    sums = [_over_all_processes(total, where) for where, total in totals.items()]
    square, small_square, not_finite = map(sum, zip(*sums, strict=True))
    norm = math.sqrt(small_square) / _SMALL if math.isinf(square) else square**0.5
    return norm, not_finite == 0


def _distribution(parameter: Any) -> _Distribution | None:
    if not is_sharded(parameter):
        return None
    placements = parameter.placements
    # Not is_shard(): FSDP over tensor parallelism has shards of shards, which deny being any.
    split = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return _Distribution(parameter.device_mesh, split)


def _over_all_processes(total: list[float], where: _Distribution | None) -> list[float]:
    if where is None:
        return total
    sums = torch.tensor(total, dtype=torch.float64, device=where.mesh.device_type)
    for dimension in range(where.mesh.ndim):
        operation = dist.ReduceOp.SUM if dimension in where.split else dist.ReduceOp.MAX
        dist.all_reduce(sums, operation, group=where.mesh.get_group(dimension))
    result: list[float] = sums.tolist()
    return result
