"""Master weights: what parameters of 16 bits are the roundings of, an entry in the state of each.

A step moves the master, and writes the parameter in the same pass. What counts is the parameter:
where it is no longer the rounding of its master, since somebody has written to it, the master takes
its value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _state, _tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from .optimizer import Optimizer

ENTRY = "master"
"""The master's name in a parameter's state."""

DTYPE = torch.float32

_NARROW = (torch.bfloat16, torch.float16)


def check_kind(value: Any) -> str | None:
    """Return None or "float32", how masters are kept."""
    if value == "split":
        raise ValueError("master is 'split', which this version does not have; expected 'float32'")
    if value is not None and value != "float32":
        raise ValueError(f"master is {value!r}; expected None or 'float32'")
    return None if value is None else str(value)


def check_parameters(optimizer: Optimizer, parameters: Iterable[tuple[Tensor, str]]) -> None:
    """Raise ValueError for a parameter that cannot have a master."""
    for parameter, label in parameters:
        if wanted(optimizer, parameter) and _tensors.is_sharded(parameter):
            raise ValueError(
                f"{label} is a DTensor, and master={optimizer.master!r} is for plain tensors: "
                "leave it out, and shard the model in float32, with FSDP's MixedPrecisionPolicy"
            )


def wanted(optimizer: Optimizer, parameter: Tensor) -> list[str]:
    """Return what a parameter's state needs for its master: an entry, or none."""
    return [ENTRY] if optimizer.master is not None and parameter.dtype in _NARROW else []


def fitted(
    optimizer: Optimizer, entry: Mapping[str, Any], parameter: Tensor, label: str
) -> dict[str, Tensor]:
    """Return the master in a parameter's state, brought up to date, or a new one."""
    if not wanted(optimizer, parameter):
        return {}
    check_parameters(optimizer, [(parameter, label)])
    if not _state.is_there(entry.get(ENTRY)):
        return {ENTRY: _like(parameter, parameter.detach())}
    master = _state.fitted(entry[ENTRY], f"the master of {label}", parameter, DTYPE)
    return {ENTRY: up_to_date(master.to(DTYPE), parameter)}


def up_to_date(master: Tensor, parameter: Tensor) -> Tensor:
    """Return a master of which the parameter is the rounding: this one, or a new one."""
    if _tensors.is_on_gpu(parameter) and _tensors.is_capturing():
        return master  # nothing can be looked at
    values = parameter.detach()
    is_rounding = master.to(values.dtype) == values
    if bool(is_rounding.all()):
        return master
    return _like(parameter, torch.where(is_rounding, master, values.to(DTYPE)))


def refresh(optimizer: Optimizer) -> None:
    """Have masters follow parameters that have been written to."""
    for parameter, _ in optimizer._parameters():
        entry = optimizer.state.get(parameter, {})
        if wanted(optimizer, parameter) and _state.is_there(entry.get(ENTRY)):
            entry[ENTRY] = up_to_date(entry[ENTRY], parameter)


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    return _state.new(parameter, DTYPE, 0.0).copy_(values)
