"""Anchors of torch parameters: three entries in the state of each.

There they are saved, copied and moved with the rest, and the native half finds them as it finds the
state that a rule needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _penalties
from .._hyperparameters import non_negative
from .._penalties import ENTRIES, Anchor
from . import _state, _tensors

if TYPE_CHECKING:
    from torch import Tensor

    from .optimizer import Optimizer


def add(optimizer: Optimizer, strength: Any, reference: Any, importance: Any) -> None:
    """Check all arguments, then anchor each parameter that they name."""
    parameters = optimizer._parameters()
    targets = [target(p, label, optimizer._state_dtype) for p, label in parameters]
    tasks = _penalties.tasks(
        targets,
        _spread(parameters, strength, "strength"),
        None if reference is None else _spread(parameters, reference, "reference"),
        None if importance is None else _spread(parameters, importance, "importance"),
    )
    optimizer.flush()  # the present values are those of rows that are up to date
    found = {i: of(optimizer.state.get(p, {})) for i, (p, _) in enumerate(parameters)}
    present = {i: anchor for i, anchor in found.items() if anchor is not None}
    ready = {}
    for i, anchor in _penalties.added(targets, present, tasks).items():
        parameter = parameters[i][0]
        new = entries(anchor, parameter, optimizer._state_dtype)
        # torch takes for granted that state which is not empty has all that its rule needs.
        ready[parameter] = {**optimizer._first_state(parameter), **new}
    nothing_had_state = not optimizer.state
    for parameter, new in ready.items():
        _attach(optimizer, parameter, new)
    if nothing_had_state:
        optimizer._adopt_scalars()


def release_all(optimizer: Optimizer) -> None:
    """Drop all anchors, when rows that have missed steps have been pulled by them."""
    optimizer.flush()
    for parameter in all_of(optimizer):
        _attach(optimizer, parameter, {})


def all_of(optimizer: Optimizer) -> dict[Tensor, Anchor]:
    """Return the anchors that there are."""
    anchors = {p: of(optimizer.state.get(p, {})) for p, _ in optimizer._parameters()}
    return {p: anchor for p, anchor in anchors.items() if anchor is not None}


def of(entry: Mapping[str, Any]) -> Anchor | None:
    """Return the anchor in the state of a parameter."""
    strength, reference, importance = (entry.get(name) for name in ENTRIES)
    if strength is None and reference is None:
        return None
    return Anchor(strength, reference, importance)  # type: ignore[arg-type]  # fitted() checks


def entries(anchor: Anchor, parameter: Tensor, state_dtype: str | None) -> dict[str, Any]:
    """Return what an anchor adds to the state of a parameter: copies that a kernel can walk."""
    dtype = _state.wide_dtype_for(state_dtype, parameter)

    def tensor(values: Any) -> Tensor:
        storable = torch.from_numpy(_penalties.storable(values, _name_of(dtype)))
        return _state.new(parameter, dtype, 0.0).copy_(storable)

    strength, *arrays = anchor
    copies = [None if array is None else tensor(array) for array in arrays]
    return _penalties.entries(Anchor(strength, *copies))


def kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a parameter's anchor has of its state, as it is there."""
    return {name: entry[name] for name in ENTRIES if name in entry}


def _attach(optimizer: Optimizer, parameter: Tensor, new: Mapping[str, Any]) -> None:
    """Give a parameter these entries of an anchor, in place of what there was."""
    old = optimizer.state.get(parameter, {})
    entry = {**{name: value for name, value in old.items() if name not in ENTRIES}, **new}
    if entry:
        optimizer.state[parameter] = entry
    else:  # as if there had never been one: to some rules, state means that there was a step
        optimizer.state.pop(parameter, None)


def taken(
    entry: dict[str, Any], parameter: Tensor, label: str, state_dtype: str | None
) -> dict[str, Any]:
    """Take an anchor from a state that is being loaded; return the entries that it becomes."""
    if not entry.keys() & {*ENTRIES}:
        return {}
    anchor = _penalties.taken(entry, target(parameter, label, state_dtype))
    return {} if anchor is None else entries(anchor, parameter, state_dtype)


def fitted(
    entry: Mapping[str, Any], parameter: Tensor, label: str, state_dtype: str | None
) -> dict[str, Any]:
    """Return the anchor in the state of a parameter, as a step can use it; nothing without one."""
    anchor = of(entry)
    if anchor is None:
        return {}
    where = target(parameter, label, state_dtype)
    _penalties.check_target(where)
    _penalties.check_is_whole(where, anchor.strength, anchor.reference)
    non_negative(f"the strength for {label}", anchor.strength)
    dtype = _state.wide_dtype_for(state_dtype, parameter)
    reference = _state.fitted(anchor.reference, f"the anchor of {label}", parameter, dtype)
    importance = anchor.importance
    if importance is not None:
        importance = _state.fitted(importance, f"the importance of {label}", parameter, dtype)
    return _penalties.entries(Anchor(anchor.strength, reference, importance))


def target(parameter: Tensor, label: str, state_dtype: str | None) -> _penalties.Target:
    """Return a parameter as something that can be anchored."""
    return _penalties.Target(
        label,
        parameter.detach(),
        tuple(parameter.shape),
        _refusal(parameter),
        _name_of(_state.wide_dtype_for(state_dtype, parameter)),
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(parameter: Tensor) -> str | None:
    device = _tensors.device_of(parameter)
    if device.type not in ("cpu", "cuda"):
        return f"is on {device}"
    if _tensors.is_sharded(parameter):
        return f"is a {type(parameter).__name__}"
    return "is complex" if parameter.is_complex() else None


def _spread(parameters: Sequence[tuple[Tensor, str]], value: Any, what: str) -> list[Any]:
    """Return one value for each parameter, from a dict or list of them; or one strength for all."""
    if isinstance(value, Mapping):
        return from_mapping(parameters, value, what)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(parameters):
            raise ValueError(f"{what} has {len(value)} entries for {len(parameters)} parameters")
        return list(value)
    if what != "strength" and len(parameters) > 1:
        raise TypeError(
            f"{what} is a {type(value).__name__}; expected a dict from parameters to tensors, or a "
            "list in their order"
        )
    return [value] * len(parameters)


def from_mapping(
    parameters: Sequence[tuple[Tensor, str]], given: Mapping[Any, Any], what: str
) -> list[Any]:
    """Return what a dict with parameters as keys has for each; None where it has nothing."""
    known = {id(parameter) for parameter, _ in parameters}
    for key in given:
        if id(key) not in known:
            shown = f"a tensor of shape {tuple(key.shape)}" if _is_tensor(key) else repr(key)
            raise ValueError(
                f"{what} has {shown}, which is not a parameter of this optimizer; expected the "
                "parameters themselves as keys"
            )
    values = {id(key): value for key, value in given.items()}
    return [values.get(id(parameter)) for parameter, _ in parameters]


def _is_tensor(key: Any) -> bool:
    return isinstance(key, torch.Tensor)
