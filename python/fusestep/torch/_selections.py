"""Which part of torch parameters a step may touch: what ``where=`` means for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import _cpu
from .._state_dict import taken_blocks
from ..selections import Selection, as_selection
from . import _anchors, _tensors

if TYPE_CHECKING:
    from torch import Tensor

    from .optimizer import Optimizer, Rule

BlockCounts: TypeAlias = "tuple[Tensor, int, Any, Any]"
"""A parameter, the elements of its blocks, and the updates and products of momenta of each."""


def chosen(optimizer: Optimizer, where: Any) -> list[tuple[Tensor, _cpu.Where]]:
    """Return what moves of each parameter that does not move as a whole.

    From now on blocks of these may come differently far, and the optimizer's steps count.
    """
    if any(g.get("capturable") for g in optimizer.param_groups) and are_on_gpu(optimizer, where):
        raise ValueError(
            "where= is given for parameters on a GPU, but blocks are counted on the host, which a "
            "CUDA graph does not reach: set capturable=False in all groups"
        )
    parameters = optimizer._parameters()
    step = optimizer._native.steps if optimizer._has_selected else 0
    selections = [
        (parameter, as_selection(one)._native(step))
        for (parameter, _), one in zip(parameters, _one_by_one(parameters, where), strict=True)
        if one is not None
    ]
    count_steps(optimizer)
    for parameter, _ in selections:
        if parameter not in optimizer._blocks:
            optimizer._blocks[parameter] = _cpu.BlockProgress()
            optimizer._native.ask_again()
    return selections


def count_steps(optimizer: Optimizer) -> None:
    """Have the optimizer's steps be counted from now on, if they are not yet."""
    if not optimizer._has_selected:
        optimizer._native.steps = 0
        optimizer._has_selected = True


def are_on_gpu(optimizer: Optimizer, where: Any) -> bool:
    """Return whether parameters on a GPU move in part now, or have before."""
    if any(map(_tensors.is_on_gpu, optimizer._blocks)):
        return True
    return where is not None and any(_tensors.is_on_gpu(p) for p, _ in optimizer._parameters())


def _one_by_one(parameters: Sequence[tuple[Tensor, str]], where: Any) -> list[Any]:
    if isinstance(where, Selection):
        return [where] * len(parameters)
    if isinstance(where, Mapping):
        return _anchors.from_mapping(parameters, where, "where")
    if isinstance(where, (list, tuple)):
        if len(where) != len(parameters):
            raise ValueError(f"where has {len(where)} entries for {len(parameters)} parameters")
        return list(where)
    if len(parameters) == 1:
        return [where]
    raise TypeError(
        f"where is a {type(where).__name__}; expected a selection for all parameters, or a dict "
        "from parameters to selections or masks, or a list in their order"
    )


def counts(optimizer: Optimizer) -> list[BlockCounts]:
    """Return the parameters whose blocks have come differently far, and how far."""
    result = []
    for parameter, _ in optimizer._parameters():
        blocks = optimizer._blocks.get(parameter)
        found = None if blocks is None else blocks.counts()
        if found is not None:
            result.append((parameter, *found))
    return result


def restored(counts: Sequence[BlockCounts]) -> dict[Tensor, _cpu.BlockProgress]:
    """Return the progress of blocks that :func:`counts` has described."""
    blocks = {}
    for parameter, size, steps, products in counts:
        blocks[parameter] = _cpu.BlockProgress()
        blocks[parameter].restore(parameter.numel(), size, steps, products)
    return blocks


def taken(
    entry: dict[str, Any], parameter: Tensor, label: str, rule: Rule, rows: str
) -> BlockCounts | None:
    """Take from a state that is being loaded how far its blocks have come, and return it."""
    has_products = "mu_product" in rule.scalars
    found = taken_blocks(entry, label, parameter.numel(), has_products, rows)
    return None if found is None else (parameter, *found)
