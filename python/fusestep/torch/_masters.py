"""Master weights: the float32 numbers that narrow parameters are the roundings of.

Either an array of their own (``"float32"``), which a step moves, writing the parameter in the same
pass. What counts is the parameter: where it is no longer the rounding of its master, since somebody
has written to it, the master takes its value. Or (``"split"``) the bits that a bfloat16 lacks of a
float32, beside it; see ``csrc/core/split.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _state, _tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from .optimizer import Optimizer

WIDE, LOWER_HALF = "master", "master_low"
"""The names of these two in a parameter's state."""

_KINDS = {
    "float32": (WIDE, (torch.bfloat16, torch.float16)),
    "split": (LOWER_HALF, (torch.bfloat16,)),
}
_DTYPES = {WIDE: torch.float32, LOWER_HALF: torch.int16}


def check_kind(value: Any) -> str | None:
    """Return None, "float32" or "split": how masters are kept."""
    if value is None or (isinstance(value, str) and value in _KINDS):
        return value
    raise ValueError(f"master is {value!r}; expected None, 'float32' or 'split'")


def check_parameters(optimizer: Optimizer, parameters: Iterable[tuple[Tensor, str]]) -> None:
    """Raise ValueError for a parameter that cannot have a master."""
    for parameter, label in parameters:
        if WIDE in wanted(optimizer, parameter) and _tensors.is_sharded(parameter):
            raise ValueError(
                f"{label} is a DTensor, which master='float32' is not for: use master='split', or "
                "shard the model in float32, with FSDP's MixedPrecisionPolicy"
            )


def wanted(optimizer: Optimizer, parameter: Tensor) -> list[str]:
    """Return what a parameter's state needs for its master: an entry, or none."""
    if optimizer.master is None:
        return []
    name, dtypes = _KINDS[optimizer.master]
    return [name] if parameter.dtype in dtypes else []


def fitted(
    optimizer: Optimizer, entry: Mapping[str, Any], parameter: Tensor, label: str
) -> dict[str, Tensor]:
    """Return the master in a parameter's state, brought up to date, or a new one."""
    check_parameters(optimizer, [(parameter, label)])
    return {name: _fitted(name, entry, parameter, label) for name in wanted(optimizer, parameter)}


def _fitted(name: str, entry: Mapping[str, Any], parameter: Tensor, label: str) -> Tensor:
    if not _state.is_there(entry.get(name)):
        return fresh(parameter, name)
    if name == LOWER_HALF:
        return checked_bits(entry[name], parameter, label)
    master = _state.fitted(entry[name], f"the master of {label}", parameter, torch.float32)
    return up_to_date(master.to(torch.float32), parameter)


def checked_bits(value: Any, parameter: Tensor, label: str) -> Tensor:
    """Return the lower half of a parameter's bits, on its device.

    Raises
    ------
    TypeError
        It is not a tensor of int16.
    ValueError
        It has another shape than the parameter.
    """
    what = f"the {LOWER_HALF} of {label}"
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int16:
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{what} is of {kind}; expected a tensor of torch.int16")
    if value.shape != parameter.shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}"
        )
    return value.to(parameter.device)


def up_to_date(master: Tensor, parameter: Tensor) -> Tensor:
    """Return a master of which the parameter is the rounding: this one, or a new one."""
    if _tensors.is_on_gpu(parameter) and _tensors.is_capturing():
        return master  # nothing can be looked at
    values = parameter.detach()
    is_rounding = master.to(values.dtype) == values
    if bool(is_rounding.all()):
        return master
    return _like(parameter, torch.where(is_rounding, master, values.to(master.dtype)), WIDE)


def refresh(optimizer: Optimizer) -> None:
    """Have masters follow parameters that have been written to."""
    for parameter, _ in optimizer._parameters():
        entry = optimizer.state.get(parameter, {})
        if WIDE in wanted(optimizer, parameter) and _state.is_there(entry.get(WIDE)):
            entry[WIDE] = up_to_date(entry[WIDE], parameter)


def value(parameter: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """Return the numbers that a parameter stands for: those of its master, where it has one."""
    if _state.is_there(entry.get(WIDE)):
        return entry[WIDE]  # type: ignore[no-any-return]
    if _state.is_there(entry.get(LOWER_HALF)):
        return _joined(parameter.detach(), entry[LOWER_HALF])
    return parameter.detach()


def loaded(
    optimizer: Optimizer, entry: dict[str, Any], parameter: Tensor, label: str
) -> dict[str, Tensor]:
    """Take a master, of either kind, from a state that is being loaded; return a copy.

    It is of the kind that the optimizer keeps. Nothing where there is none: torch's classes round
    the lower halves that they carry along, so that nothing can be made of them.
    """
    wide, bits = entry.pop(WIDE, None), entry.pop(LOWER_HALF, None)
    if isinstance(bits, torch.Tensor) and bits.is_floating_point():
        bits = None
    found = {}
    if wide is not None:
        found[WIDE] = _state.fitted(wide, f"the master of {label}", parameter, torch.float32)
    elif bits is not None and parameter.dtype == torch.bfloat16:
        found[LOWER_HALF] = checked_bits(bits, parameter, label)
    names = wanted(optimizer, parameter)
    if not found or not names or names[0] in found:
        return {name: _state.copied(tensor) for name, tensor in found.items() if name in names}
    if names == [WIDE]:
        return {WIDE: _like(parameter, value(parameter, found), WIDE)}
    return {LOWER_HALF: _like(parameter, _lower_half(found[WIDE].float()), LOWER_HALF)}


def fresh(parameter: Tensor, name: str) -> Tensor:
    """Return a master of which the parameter has all the digits."""
    master = _state.new(parameter, _DTYPES[name], 0)
    return master.copy_(parameter.detach()) if name == WIDE else master


def _like(parameter: Tensor, values: Tensor, name: str) -> Tensor:
    return _state.new(parameter, _DTYPES[name], 0).copy_(values)


# ---- halves of numbers, as in csrc/core/split.h --------------------------------------------------


def _joined(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the float32 numbers of which these are the two halves."""
    bits = upper.contiguous().view(torch.int16).to(torch.int32)
    low = lower.to(torch.int32) & 0xFFFF
    low = torch.where(((bits & 0x7FFF) == 0) & (low >= 0x8000), 0, low)
    return ((((bits - (low >> 15)) & 0xFFFF) << 16) | low).view(torch.float32)


def _lower_half(values: Tensor) -> Tensor:
    """Return the lower half of float32 numbers, of which torch has rounded the upper one.

    Of two that are equally near, torch takes the even one. To what it has rounded down there, a
    lower half that says so belongs: the nearest of these.
    """
    bits = values.contiguous().view(torch.int32)
    low = bits & 0xFFFF
    is_even_tie = (low == 0x8000) & ((bits & 0x10000) == 0)
    low = torch.where(is_even_tie, 0x7FFF, low)
    return torch.where(low >= 0x8000, low - 0x10000, low).to(torch.int16)
