"""Averages of torch parameters: an entry in the state of each."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .._averages import ENTRY
from . import _state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from .optimizer import Optimizer


def wanted(optimizer: Optimizer) -> list[str]:
    """Return what a parameter's state needs for its average: an entry, or none."""
    return [] if optimizer.ema_decay is None else [ENTRY]


def fitted(
    optimizer: Optimizer, entry: Mapping[str, Any], parameter: Tensor, label: str, source: Tensor
) -> dict[str, Tensor]:
    """Return the average in a parameter's state, as a step can use it, or one that begins.

    That is where `source` is now: the parameter, or its master.
    """
    if not wanted(optimizer):
        return {}
    if not _state.is_there(entry.get(ENTRY)):
        return {ENTRY: fresh(parameter, source)}
    dtype = _state.dtype_for(None, parameter)
    average = _state.fitted(entry[ENTRY], f"the average of {label}", parameter, dtype)
    return {ENTRY: average}


def fresh(parameter: Tensor, source: Tensor) -> Tensor:
    """Return an average that begins with these values."""
    dtype = _state.dtype_for(None, parameter)
    return _state.new(parameter, dtype, 0.0).copy_(source.detach())


def of(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return the average of a parameter; where it has none yet, a copy of itself."""
    average = optimizer.state.get(parameter, {}).get(ENTRY)
    if not _state.is_there(average):
        return fresh(parameter, parameter)
    return average  # type: ignore[no-any-return]


# ---- in the parameters' place --------------------------------------------------------------------


@contextmanager
def in_place_of_parameters(optimizer: Optimizer) -> Iterator[None]:
    """Have parameters hold the values of their averages meanwhile."""
    native = optimizer._native
    kept: dict[Tensor, Tensor] = {}

    def put_in() -> None:
        optimizer._check_not_swapped()
        entries = ((p, optimizer.state.get(p, {}).get(ENTRY)) for p, _ in optimizer._parameters())
        averages = {p: average for p, average in entries if _state.is_there(average)}
        kept.update({p: p.detach().clone() for p in averages})
        native.is_swapped = True
        try:
            _write(averages)
        except BaseException:
            put_back()
            raise

    def put_back() -> None:
        native.is_swapped = False
        _write(kept)

    native.exclusively(put_in)
    try:
        yield
    finally:
        native.exclusively(put_back)


def _write(values: Mapping[Tensor, Tensor]) -> None:
    """Write to all parameters that can be written to."""
    errors = []
    with torch.no_grad():
        for parameter, tensor in values.items():
            try:
                if parameter.shape != tensor.shape:
                    raise ValueError(
                        f"a parameter has been given shape {tuple(parameter.shape)}; expected "
                        f"{tuple(tensor.shape)}"
                    )
                parameter.copy_(tensor)
            except Exception as error:  # noqa: PERF203 - raised once the others are written to
                errors.append(error)
    if errors:
        raise errors[0]
