"""State dicts of torch's form, checked whole before any of them is used."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from .._averages import ENTRY as AVERAGE
from .._averages import check_decay
from .._hyperparameters import check_seed, clip_value, flag, max_norm, number
from .._narrow import powers_name
from .._state import Conversions, entries, piece_of
from .._state_dict import BLOCK_ENTRIES, count, expect_keys, mapping, taken_missed_steps
from . import _anchors, _masters, _pieces, _selections, _state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from .optimizer import MissedSteps, Optimizer, Rule

_EXTRAS: dict[str, Callable[[str, Any], Any]] = {
    "max_norm": max_norm,
    "clip_value": clip_value,
    "skip_nonfinite": flag,
    "stochastic_rounding": flag,
    "ema_decay": lambda name, value: check_decay(name, number(name, value)),
    "skipped_steps": count,
    "steps": count,
    "seed": lambda _, value: check_seed(value),
}


def matched_groups(
    groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return copies of the saved groups with the optimizer's own parameters in them."""
    if len(groups) != len(saved):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved)}; expected {len(groups)}"
        )
    matched = []
    for i, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(saved_group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {i} has {len(saved_group['params'])} parameters; "
                f"expected {len(group['params'])}"
            )
        new = deepcopy({name: value for name, value in saved_group.items() if name != "params"})
        new["params"] = group["params"]
        if "param_names" in group:
            new.setdefault("param_names", group["param_names"])
        matched.append(new)
    return matched


def fitted_state(
    saved: Mapping[Any, Any],
    places: Sequence[tuple[Any, Tensor, str, Rule]],
    optimizer: Optimizer,
) -> tuple[defaultdict[Any, Any], Conversions]:
    """Return a copy of a saved state that fits an optimizer's parameters, and what it converts.

    `places` has, for each parameter, its key in `saved`, itself, what error messages call it, and
    its rule. What belongs to no parameter is taken over as it is.
    """
    state: defaultdict[Any, Any] = defaultdict(dict)
    conversions = Conversions()
    for key, parameter, label, rule in places:
        if key in saved:
            entry = mapping(saved[key], f"the state of {label}")
            fitted = _fitted_entry(entry, parameter, label, rule, optimizer, conversions)
            if fitted or not entry:  # there may have been nothing but missed steps
                state[parameter] = fitted
    keys = {key for key, *_ in places}
    state.update({key: value for key, value in saved.items() if key not in keys})
    return state, conversions


def missed_steps(
    saved: Mapping[Any, Any], places: Sequence[tuple[Any, Tensor, str, Rule]], rule: str, rows: str
) -> list[MissedSteps]:
    """Return the parameters of which rows have missed steps, with what these are, checked.

    `rows` is what the optimizer does about them; the rest is as for :func:`fitted_state`.
    """
    result = []
    for key, parameter, label, _ in places:
        entry = dict(mapping(saved.get(key, {}), f"the state of {label}"))
        shape = tuple(parameter.shape[:1])
        missed, recent = taken_missed_steps(
            entry, f"the missed steps of {label}", shape, rule, rows
        )
        if missed.any():
            result.append((parameter, missed, recent.tolist()))
    return result


def block_counts(
    saved: Mapping[Any, Any], places: Sequence[tuple[Any, Tensor, str, Rule]], rows: str
) -> list[_selections.BlockCounts]:
    """Return the parameters whose blocks have come differently far, and how far, checked."""
    result = []
    for key, parameter, label, rule in places:
        entry = dict(mapping(saved.get(key, {}), f"the state of {label}"))
        if found := _selections.taken(entry, parameter, label, rule, rows):
            result.append(found)
    return result


def _fitted_entry(
    entry: Mapping[str, Any],
    parameter: Tensor,
    label: str,
    rule: Rule,
    optimizer: Optimizer,
    conversions: Conversions,
) -> dict[str, Any]:
    state_dtype = optimizer._state_dtype
    present = {
        name: value
        for name, value in entry.items()
        if value is not None and name not in ("missed_steps", "recent_steps", *BLOCK_ENTRIES)
    }
    anchor = _anchors.taken(present, parameter, label, state_dtype)
    besides = _masters.loaded(optimizer, present, parameter, label)
    average = present.pop(AVERAGE, None)
    if average is not None and AVERAGE in optimizer._kept_besides(parameter):
        wide = _state.dtype_for(None, parameter)
        besides[AVERAGE] = _state.loaded(average, f"the average of {label}", parameter, wide)
    needed = {*rule.scalars, *rule.states}
    if rule.scalars and (
        present or anchor or besides
    ):  # a rule without scalars knows a first step by its lack of state
        expect_keys(present, f"the state of {label}", needed, {*present})
    elif present and needed and not needed & present.keys():
        expect_keys(present, f"the state of {label}", needed, set())
    dtype = _state.dtype_for(state_dtype, parameter)
    # Those, too, that the rule had before its options were changed.
    states = optimizer._all_states()
    pieces = {name: piece_of(present, name) for name in states if name in present}
    for name in states:
        present.pop(powers_name(name), None)
    fitted: dict[str, Any] = {}
    for name, value in present.items():
        if name in pieces:
            piece = _pieces.loaded(
                pieces[name], name, label, parameter, dtype, is_signed=states[name]
            )
            old, new = _pieces.dtype_of(pieces[name]), _pieces.dtype_of(piece)
            conversions.note(old, new, parameter.dtype)
            fitted.update(entries(name, piece))
        elif name in rule.scalars:
            there = number(f"the {name} of {label}", value)
            fitted[name] = torch.tensor(there, dtype=_state.scalar_dtype([value]))
        elif isinstance(value, torch.Tensor):
            fitted[name] = _state.copied(value.to(parameter.device))
        else:
            fitted[name] = deepcopy(value)
    return {**fitted, **anchor, **besides}


def checked_extras(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return our own settings in a state dict, checked."""
    saved = mapping(state_dict.get("fusestep", {}), "'fusestep'")
    return {name: check(name, saved[name]) for name, check in _EXTRAS.items() if name in saved}
