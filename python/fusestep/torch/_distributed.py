"""The norm of gradients that lie in shards over several processes."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from ._tensors import is_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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
    A replicated parameter counts once: its squares are summed only over the dimensions of the mesh
    along which it is sharded. A gradient that is not finite counts along all of them.
    """
    totals: defaultdict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for parameter, norm, is_finite in gradients:
        total = totals[_distribution(parameter)]
        total[0] += norm * norm
        total[1] += not is_finite
    square, infinities = 0.0, 0.0
    for distribution, total in totals.items():
        square_here, infinities_here = _summed(distribution, total)
        square += square_here
        infinities += infinities_here
    return math.sqrt(square) if math.isfinite(square) else square, infinities == 0


def _distribution(parameter: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """Return the mesh of a DTensor and the dimensions along which it is sharded."""
    if not is_sharded(parameter):
        return None
    placements = parameter.placements  # type: ignore[attr-defined]
    sharded = tuple(i for i, placement in enumerate(placements) if placement.is_shard())
    return parameter.device_mesh, sharded  # type: ignore[attr-defined]


def _summed(distribution: tuple[Any, tuple[int, ...]] | None, total: list[float]) -> list[float]:
    if distribution is None:
        return total
    mesh, sharded = distribution
    sums = torch.tensor(total, dtype=torch.float64, device=mesh.device_type)
    for dimension in sharded:
        torch.distributed.all_reduce(sums, group=mesh.get_group(dimension))
    return sums.tolist()  # type: ignore[no-any-return]
