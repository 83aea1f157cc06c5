"""The state of torch parameters: allocated, completed and widened; rounded only when loaded."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from .. import _cpu
from .._hyperparameters import number
from .._state import NARROW
from . import _tensors
from ._tensors import STATE_DTYPES, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

_COMPLEX = {
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
    torch.bfloat16: torch.complex64,  # torch has none that is as narrow
    torch.int8: torch.complex64,
}


def dtype_for(state_dtype: str | None, parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: complex where the parameter is.

    ``torch.int8`` stands for state in 8 bits; see ``_pieces.py``.
    """
    is_double = parameter.dtype in (torch.float64, torch.complex128)
    default = torch.float64 if is_double else torch.float32
    real: torch.dtype = default if state_dtype is None else getattr(torch, state_dtype)
    return _COMPLEX[real] if parameter.is_complex() else real


def wide_dtype_for(state_dtype: str | None, parameter: Tensor) -> torch.dtype:
    """Return the dtype of what is kept besides the state, which is never narrower than float32."""
    return dtype_for(None if state_dtype in NARROW else state_dtype, parameter)


def new(parameter: Tensor, dtype: torch.dtype, fill: float) -> Tensor:
    """Return state of a parameter's shape, strides, device and (for a DTensor) placements."""
    value = complex(fill, fill) if dtype.is_complex else fill
    return _empty_like(parameter, dtype).fill_(value)


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor like `tensor`, in memory of our own if it can be.

    A step need not ask where that is; see ``csrc/arrays/state_memory.h``.
    """
    like = functools.partial(torch.empty_like, dtype=dtype, requires_grad=False)
    if not is_plain(tensor) or _tensors.device_of(tensor).type != "cpu":
        with torch.no_grad():
            return like(tensor)
    strides = like(tensor, device="meta").stride()
    code, bits = STATE_DTYPES[dtype]
    return from_dlpack(_cpu.allocate_state(tensor.shape, strides, code, bits))


def fitted(value: Any, label: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` on the parameter's device, dense, widened to `dtype` if it is narrower.

    Raises
    ------
    TypeError
        It is not a tensor of floats, or complex where the parameter is not.
    ValueError
        It has another shape than the parameter.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{label} is a {type(value).__name__}; expected a tensor")
    if value.shape != parameter.shape:
        raise ValueError(
            f"{label} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}"
        )
    if value.is_complex() != parameter.is_complex() or not (
        value.is_floating_point() or value.is_complex()
    ):
        raise TypeError(f"{label} has dtype {value.dtype}; expected {dtype}")
    # Sparse: the momentum of torch.optim.SGD, where the gradients have been.
    dense: Tensor = value.to_dense() if value.is_sparse else value
    return dense.to(device=parameter.device, dtype=torch.promote_types(value.dtype, dtype))


def loaded(value: Any, label: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of what is being loaded, :func:`fitted`; rounded where `dtype` is bfloat16."""
    tensor = fitted(value, label, parameter, dtype)
    return copied(tensor.to(dtype) if dtype == torch.bfloat16 else tensor)


def copied(tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory, and carries no gradient."""
    return _empty_like(tensor, tensor.dtype).copy_(tensor.detach())


def scalar_dtype(values: Iterable[Any] = ()) -> torch.dtype:
    """Return torch.optim's dtype of a step count, or float64 if one of these tensors has it."""
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    is_double = torch.get_default_dtype() == torch.float64 or torch.float64 in dtypes
    return torch.float64 if is_double else torch.float32


def initial_scalar(name: str) -> float:
    """Return what a scalar is before the first step."""
    return 1.0 if name == "mu_product" else 0.0


def is_there(state: Any) -> bool:
    """Return whether a piece of state exists, and not only as a promise on the meta device."""
    return state is not None and not getattr(state, "is_meta", False)


class Scalars:
    """The scalars of all parameters (``step`` and the like): one tensor a name and device.

    In the state of a parameter each is a tensor of no dimensions, as in torch, and a view of one of
    these: so a step finds the scalars of all parameters with a single look. Tensors that somebody
    else has made, to share them between processes or for whatever reason, are used where they are.

    Parameters
    ----------
    names
        The rule's scalars.
    entries
        The state of each parameter, or an empty dict. Each has a column, which is given away once:
        state that is saved, or put away for a while, keeps it.
    devices
        Where the scalars of each parameter are to be.
    """

    def __init__(
        self,
        names: Sequence[str],
        entries: Sequence[Mapping[str, Any]],
        devices: Sequence[torch.device],
    ) -> None:
        self._names = names
        self._devices = list(devices)
        dtypes = {name: scalar_dtype(entry.get(name) for entry in entries) for name in names}
        self._tensors = {
            (name, device): _tensors.zeros(len(entries), dtypes[name], device)
            for device in dict.fromkeys(devices)
            for name in names
        }
        self._given: set[int] = set()

    def suit(self, entries: Sequence[Mapping[str, Any]], devices: Sequence[torch.device]) -> bool:
        """Return whether each of these can have its scalars in its own column, or elsewhere."""
        return self._devices == list(devices) and all(
            self._suits(entry, column) for column, entry in enumerate(entries)
        )

    def _suits(self, entry: Mapping[str, Any], column: int) -> bool:
        for name in self._names:
            value = entry.get(name)
            if not self._is_usable(value, column):
                if column in self._given:
                    return False
            elif self._owns(value) and not _is_at(value, self._place(name, column)):
                return False
        return True

    def own(self, entry: Mapping[str, Any]) -> bool:
        """Return whether some of these scalars are ours."""
        return any(self._owns(entry.get(name)) for name in self._names)

    def completed(self, entry: Mapping[str, Any], column: int, label: str) -> dict[str, Tensor]:
        """Return the scalars of a parameter: those there are, or new ones in its column."""
        return {
            name: entry[name]
            if self._is_usable(entry.get(name), column)
            else self._put(name, entry.get(name), column, f"the {name} of {label}")
            for name in self._names
        }

    def moved(self, entry: Mapping[str, Any], column: int) -> dict[str, Any]:
        """Return a state with its scalars, as far as there are any, in our column."""
        there = [name for name in self._names if is_there(entry.get(name))]
        return {**entry, **{name: self._put(name, entry[name], column, name) for name in there}}

    def places(self, entry: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
        """Return where the scalars of a parameter are: a tensor, and the element of it."""
        return [_place_of(entry[name]) for name in self._names]

    def _place(self, name: str, column: int) -> Tensor:
        return self._tensors[name, self._devices[column]][column]

    def _put(self, name: str, value: Any, column: int, what: str) -> Tensor:
        self._given.add(column)
        there = number(what, value) if is_there(value) else initial_scalar(name)
        return self._place(name, column).fill_(there)

    def _is_usable(self, value: Any, column: int) -> bool:
        return _is_scalar(value) and _tensors.device_of(value) == self._devices[column]

    def _owns(self, value: Any) -> bool:
        return any(_lies_in(value, tensor) for tensor in self._tensors.values())


def _place_of(value: Tensor) -> tuple[Tensor, int]:
    """Return the tensor of many scalars that one is a view of, and which of them; or itself."""
    base = value._base
    if base is None or base.ndim != 1 or base.dtype != value.dtype or not base.is_contiguous():
        return value, 0
    offset = int(value.storage_offset() - base.storage_offset())
    is_inside = value.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    return (base, offset) if is_inside and 0 <= offset < len(base) else (value, 0)


def _is_scalar(value: Any) -> bool:
    return (
        type(value) is torch.Tensor
        and value.ndim == 0
        and value.dtype in (torch.float32, torch.float64)
    )


def _lies_in(value: Any, tensor: Tensor) -> bool:
    if not _is_scalar(value):
        return False
    offset = value.data_ptr() - tensor.data_ptr()
    return bool(0 <= offset < tensor.numel() * tensor.element_size())


def _is_at(value: Any, place: Tensor) -> bool:
    return bool(value.data_ptr() == place.data_ptr() and value.dtype == place.dtype)
