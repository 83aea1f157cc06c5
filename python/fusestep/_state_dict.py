"""State dicts: torch.optim's form, checked whole before any of it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _anchors, _arrays, _averages, _cpu, _narrow, _penalties, _state
from ._arrays import backend_of
from ._hyperparameters import check_seed, number
from ._state import as_state
from ._version import __version__

if TYPE_CHECKING:
    import numpy.typing as npt

    from .optimizer import Optimizer

# Entries of a group that are not hyper-parameters of ours.
_IGNORED_OPTIONS = frozenset({"params", "state_dtype"})

# What fusestep.torch keeps outside of torch's groups.
OUR_SETTINGS = ("max_norm", "clip_value", "skip_nonfinite", "stochastic_rounding", "ema_decay")

# How far the blocks of a parameter have come, where they differ.
BLOCK_ENTRIES = ("block_size", "block_steps", "block_mu_products")

# The largest count that a float64 holds exactly, and more steps than anybody takes.
_MOST = 2**53


def export(optimizer: Optimizer, *, copy: bool, dtype: str | None = None) -> dict[str, Any]:
    """Return the state dict; its arrays are copies, or with ``copy=False`` the live ones.

    With a `dtype`, state that is narrower is widened.
    """
    state = optimizer.state
    for i, entry in enumerate(state.values()) if copy else ():
        for name, value in optimizer._arrays[i].items():
            if dtype is None:
                entry.update(_state.entries(name, _state.copied(value)))
                continue
            for part in _state.entries(name, value):
                del entry[part]
            entry[name] = _state.widened(value, dtype, is_signed=optimizer._state_signs[name])
    for entry, average in zip(state.values(), optimizer._averages, strict=False):
        entry[_averages.ENTRY] = backend_of(average).copy(average) if copy else average
    for i, entry in enumerate(state.values()):
        entry.update(_missed_steps(optimizer, i))
        entry.update(_block_progress(optimizer, i))
        entry.update(_anchor(optimizer, i, copy=copy))
    lr, ema_decay = (optimizer._hyperparameters[name] for name in ("lr", "ema_decay"))
    group = {
        **optimizer._hyperparameters,
        **optimizer._fixed,
        "lr": None if callable(lr) else lr,
        "ema_decay": None if callable(ema_decay) else ema_decay,
        "state_dtype": optimizer._state_dtype,
        "params": list(optimizer._parameters.keys),
    }
    counters = {
        "version": __version__,
        "rule": type(optimizer).__name__,
        "steps": optimizer.steps,
        "skipped_steps": optimizer.skipped_steps,
        "seed": optimizer.seed,
    }
    return {"state": state, "param_groups": [group], "fusestep": counters}


def _missed_steps(optimizer: Optimizer, i: int) -> dict[str, Any]:
    """Return what rows of a parameter have missed; nothing where all are up to date."""
    missed = optimizer._native.missed_steps(i)
    if missed is None:
        return {}
    return {"missed_steps": missed[0], "recent_steps": np.array(missed[1])}


def _block_progress(optimizer: Optimizer, i: int) -> dict[str, Any]:
    """Return how many updates each block of a parameter has had; nothing where all had the same."""
    progress = optimizer._native.block_progress(i)
    if progress is None:
        return {}
    return block_entries(*progress)


def block_entries(block: int, steps: Any, products: Any) -> dict[str, Any]:
    """Return what the progress of blocks adds to a parameter's state."""
    values = (block, steps.astype(np.int64), products if len(products) else None)
    return {
        name: value for name, value in zip(BLOCK_ENTRIES, values, strict=True) if value is not None
    }


def _anchor(optimizer: Optimizer, i: int, *, copy: bool) -> dict[str, Any]:
    """Return a parameter's anchor; nothing where it has none."""
    anchor = optimizer._anchors.get(i)
    if anchor is None:
        return {}
    strength, *arrays = anchor
    copies = [backend_of(a).copy(a) if copy and a is not None else a for a in arrays]
    return _penalties.entries(_penalties.Anchor(strength, *copies))


@dataclass
class _Entry:
    """What one parameter is to be given: arrays in the order of the rule's state."""

    step: int
    momentum_product: float
    arrays: list[Any]  # None: the rule's initial value
    missed: npt.NDArray[np.int64]  # by each row, of the steps in `recent`
    recent: npt.NDArray[np.float64]
    anchor: _penalties.Anchor | None = None
    average: Any = None  # None: it begins anew, at the parameter
    # Elements of a block, and updates and products of momenta of each, where they differ.
    blocks: tuple[int, npt.NDArray[np.uint32], npt.NDArray[np.float64]] | None = None


@dataclass
class Plan:
    """A checked state dict: nothing in it can be refused any more."""

    entries: list[_Entry]
    hyperparameters: dict[str, Any]
    steps: int
    skipped_steps: int
    seed: int


def check(optimizer: Optimizer, state_dict: Any) -> Plan:
    """Check every part of a state dict against `optimizer`, changing nothing."""
    mapping(state_dict, "the state dict")
    expect_keys(state_dict, "the state dict", {"state", "param_groups"}, {"fusestep"})
    counters = mapping(state_dict.get("fusestep", {}), "'fusestep'")
    # fusestep.torch names no rule, and keeps here what torch's groups have no place for.
    is_torchs = "rule" not in counters
    settings = set(OUR_SETTINGS) if is_torchs else set()
    known = {"version", "rule", "steps", "skipped_steps", "seed"}
    expect_keys(counters, "'fusestep'", set(), known | settings)
    rule = counters.get("rule")
    if rule is not None and rule not in {cls.__name__ for cls in type(optimizer).__mro__}:
        raise ValueError(
            f"the state dict is of {rule}; this optimizer is {type(optimizer).__name__}"
        )

    groups = state_dict["param_groups"]
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"'param_groups' is a {type(groups).__name__}; expected a list")
    if len(groups) != 1:
        raise ValueError(
            f"the state dict has {len(groups)} parameter groups; expected 1 (one optimizer for "
            "each group)"
        )
    group = mapping(groups[0], "the parameter group")
    group = {**group, **{name: counters[name] for name in settings & counters.keys()}}
    hyperparameters = _check_group(optimizer, group, ours=not is_torchs)

    saved_keys = _match_keys(optimizer, group)
    state = mapping(state_dict["state"], "'state'")
    expect_keys(state, "'state'", set(), set(saved_keys))
    conversions = _state.Conversions()
    entries = [
        _check_entry(optimizer, i, state.get(key), conversions) for i, key in enumerate(saved_keys)
    ]

    most = max((entry.step for entry in entries), default=0)
    plan = Plan(
        entries,
        hyperparameters,
        count("steps", counters.get("steps", most)),
        count("skipped_steps", counters.get("skipped_steps", 0)),
        check_seed(counters.get("seed", optimizer.seed)),
    )
    conversions.warn(stacklevel=7)  # before anything changes
    return plan


def apply(optimizer: Optimizer, plan: Plan) -> None:
    """Make the optimizer what the plan says."""
    optimizer._apply_hyperparameters(plan.hyperparameters)
    initial = optimizer._initial_state()
    for i, entry in enumerate(plan.entries):
        for target, source in zip(optimizer._arrays[i].values(), entry.arrays, strict=True):
            _state.assign(target, initial if source is None else source)
        optimizer._native.set_progress(i, entry.step, entry.momentum_product)
        if optimizer.rows == "exact":  # what is still to be made up for is no longer to be
            optimizer._native.set_missed_steps(i, np.zeros_like(entry.missed), [])
        _anchors.release(optimizer, i)
        if entry.anchor is not None:
            _anchors.attach(optimizer, i, _anchors.stored(optimizer, i, entry.anchor))
        if optimizer.rows == "exact":
            optimizer._native.set_missed_steps(i, entry.missed, entry.recent)
        optimizer._native.set_block_progress(i, *(entry.blocks or (0, [], [])))
        if optimizer._averages:
            fresh = entry.average is None
            source = optimizer._parameters.arrays[i] if fresh else entry.average
            _arrays.write(optimizer._averages[i], source)
    optimizer._native.set_counts(plan.steps, plan.skipped_steps)
    optimizer.seed = plan.seed


def mapping(value: Any, what: str) -> Mapping[Any, Any]:
    """Return `value` if it is a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a dict")
    return value


def expect_keys(found: Iterable[Any], what: str, required: set[Any], optional: set[Any]) -> None:
    """Raise ValueError unless `found` has all required keys and no unknown ones."""
    present = set(found)
    if missing := required - present:
        raise ValueError(f"{what} lacks {_listed(missing)}")
    if unknown := present - required - optional:
        raise ValueError(
            f"{what} has unknown keys: {_listed(unknown)}; expected "
            f"{_listed(required | optional) or 'none'}"
        )


def count(name: str, value: Any) -> int:
    """Return a whole number >= 0, which torch keeps as a float tensor."""
    result = number(name, value)
    if not (0 <= result <= _MOST and result == int(result)):
        raise ValueError(f"{name} is {value!r}; expected a whole number from 0 to 2**53")
    return int(result)


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(repr, keys)))


def _check_group(optimizer: Optimizer, group: Mapping[Any, Any], *, ours: bool) -> dict[str, Any]:
    known = set(optimizer._hyperparameters) | set(optimizer._fixed)
    # torch's groups also say how a step is computed (foreach, fused, ...) and hold what its
    # schedulers have put there (initial_lr, max_lr, ...): only in ours is an unknown key an error.
    others = _IGNORED_OPTIONS if ours else _IGNORED_OPTIONS | set(group)
    expect_keys(group, "the parameter group", {"params"}, known | others)
    for name, value in optimizer._fixed.items():
        if name in group and group[name] != value:
            raise ValueError(
                f"the parameter group has {name}={group[name]!r}; "
                f"{type(optimizer).__name__} has {name}={value!r}"
            )
    changes = {name: group[name] for name in optimizer._hyperparameters if name in group}
    for name in ("lr", "ema_decay"):
        if changes.get(name, 0) is None:  # a callable, or none at all
            del changes[name]
    if optimizer.ema_decay is None:  # then averages are left out, too
        changes.pop("ema_decay", None)
    return optimizer._checked_hyperparameters(changes)


def _match_keys(optimizer: Optimizer, group: Mapping[Any, Any]) -> list[Any]:
    """Return the saved key of each of the optimizer's parameters, in the optimizer's order."""
    saved, own = list(group["params"]), list(optimizer._parameters.keys)
    if len(set(saved)) < len(saved):
        raise ValueError(f"the parameter group lists a parameter twice: {saved}")
    both_named = all(isinstance(key, str) for key in saved + own)
    if both_named and set(saved) != set(own):
        raise ValueError(
            f"the state dict is of {_listed(saved)}; this optimizer has {_listed(own)}"
        )
    if both_named:
        return own
    if len(saved) != len(own):
        raise ValueError(
            f"the state dict is of {len(saved)} parameters; this optimizer has {len(own)}"
        )
    return saved


def _check_entry(
    optimizer: Optimizer, i: int, entry: Any, conversions: _state.Conversions
) -> _Entry:
    names = optimizer._state_names
    parameter = optimizer._parameters.labels[i]
    label = f"the state of {parameter}"
    entry = mapping({} if entry is None else entry, label)
    if not entry:  # torch has no entry for a parameter that never moved
        return _Entry(0, 1.0, [None] * len(names), *_check_missed_steps(optimizer, i, {}))

    entry = {name: value for name, value in entry.items() if value is not None}
    missed, recent = _check_missed_steps(optimizer, i, entry)
    for name in ("master", "master_low"):  # of fusestep.torch
        entry.pop(name, None)
    average = entry.pop(_averages.ENTRY, None)
    if average is not None and optimizer._averages:
        average = as_state(average, f"the average of {parameter}", optimizer._averages[i])
    anchor = _penalties.taken(entry, _anchors.target_of(optimizer, i))
    described = _anchors.described(optimizer, i)
    elements = int(np.prod(described.shape, dtype=np.int64))
    has_products = "mu_product" in optimizer._scalar_names
    blocks = taken_blocks(entry, parameter, elements, has_products, optimizer.rows)
    if blocks is not None and _state.are_in_blocks(optimizer._arrays[i]):
        check_moves_blocks(*blocks, elements, parameter)
    arrays_of = {name: _state.taken(entry, name) for name in names}
    for name, value in arrays_of.items():
        _state.check_is_whole(value, name, parameter)
    entry.update({name: value for name, value in arrays_of.items() if value is not None})
    scalars = set(optimizer._scalar_names)
    has_state = bool(names) and names[0] in entry
    # Where torch keeps no step (SGD), state says that there was one, and no more is needed.
    optional = set() if scalars else {"step", *names}
    expect_keys(entry, label, (scalars | set(names)) - optional, optional)

    like = optimizer._arrays[i]
    arrays = [
        _state.fitting(
            entry[name],
            f"the {name} of {parameter}",
            like[name],
            described.dtype,
            conversions,
            is_signed=optimizer._state_signs[name],
        )
        if name in entry
        else None
        for name in names
    ]
    step = count("step", entry.get("step", int(has_state)))
    if names and not has_state:
        step = 0  # whatever it says: without a momentum buffer the next step is the first
    product = number("mu_product", entry.get("mu_product", 1.0))
    if not 0 <= product <= 1:
        raise ValueError(f"mu_product is {product!r}; expected a number in [0, 1]")
    return _Entry(step, product, arrays, missed, recent, anchor, average, blocks)


def check_moves_blocks(
    block: int,
    steps: npt.NDArray[np.uint32],
    products: npt.NDArray[np.float64],
    elements: int,
    label: str,
) -> None:
    """Raise ValueError where a block of state would have to move in parts."""
    counts = [steps, products] if len(products) else [steps]
    if not _narrow.are_whole(block, *counts, elements=elements):
        raise ValueError(
            f"some elements of {label} have had more updates than others, in blocks of {block}, "
            f"and state in 8 bits moves in blocks of {_cpu.elements_of_block}: use "
            "state_dtype='bfloat16'"
        )


def taken_blocks(
    entry: dict[Any, Any], label: str, elements: int, has_products: bool, rows: str
) -> tuple[int, npt.NDArray[np.uint32], npt.NDArray[np.float64]] | None:
    """Take from an entry how many updates each block has had, and return it.

    `label` is the parameter's; `rows` is what the optimizer does about missed steps.
    """
    size, steps, products = (entry.pop(name, None) for name in BLOCK_ENTRIES)
    if size is None and steps is None and products is None:
        return None
    label = f"the block_steps of {label}"
    if rows == "exact":
        raise ValueError(f"{label} differ, which rows='exact' cannot go on from: use rows='lazy'")
    block = count("block_size", size)
    blocks = -(-elements // block) if block else 0
    try:
        found = _as_array(steps).astype(np.int64, casting="safe")
        momenta = _as_array(products if has_products else ()).astype(np.float64, casting="safe")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{label} cannot be read: {error}") from None
    if blocks == 0 or found.shape != (blocks,) or momenta.shape != (blocks * has_products,):
        raise ValueError(
            f"{label} have shape {found.shape}; expected one for each block of {block} elements "
            f"of {elements}: ({blocks},)"
        )
    if products is not None and not has_products:
        raise ValueError(f"{label} come with products of momenta, which the rule does not have")
    possible = (found >= 0).all() and (found < 2**32).all()
    if not (possible and (momenta >= 0).all() and (momenta <= 1).all()):
        raise ValueError(f"{label} are not numbers of updates")
    return block, found.astype(np.uint32), momenta


def _check_missed_steps(
    optimizer: Optimizer, i: int, entry: dict[Any, Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    label = f"the missed steps of {optimizer._parameters.labels[i]}"
    shape = _anchors.described(optimizer, i).shape
    return taken_missed_steps(entry, label, shape[:1], optimizer._rule, optimizer.rows)


def taken_missed_steps(
    entry: dict[Any, Any], label: str, rows_shape: tuple[int, ...], rule: str, rows: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Take from an entry what rows have missed, and return it; zeros where it has none.

    `rows_shape` is (rows,), or () of a parameter that has none; `rows` is what the optimizer does
    about missed steps.
    """
    columns = 3 + len(_cpu.option_names(rule))
    if "missed_steps" not in entry and "recent_steps" not in entry:
        return np.zeros(rows_shape, np.int64), np.zeros((0, columns))
    if rows != "exact":
        raise ValueError(
            f"{label} are still to be made up for, which this optimizer does not do: create it "
            "with rows='exact', or call flush() before state_dict()"
        )
    try:
        missed = _popped(entry, "missed_steps").astype(np.int64, casting="safe")
        recent = _popped(entry, "recent_steps").astype(np.float64, casting="safe")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{label} cannot be read: {error}") from None
    if missed.shape != rows_shape or recent.ndim != 2 or recent.shape[1] != columns:
        raise ValueError(
            f"{label} have shapes {missed.shape} and {recent.shape}; expected {rows_shape} and "
            f"(steps, {columns})"
        )
    names = _cpu.option_names(rule)
    possible = all(map(partial(_can_have_been, names), recent))
    if not (possible and (missed >= 0).all() and (missed <= len(recent)).all()):
        raise ValueError(f"{label} are not steps that can have been missed")
    return missed, recent


def _popped(entry: dict[Any, Any], name: str) -> npt.NDArray[Any]:
    return _as_array(entry.pop(name))


def _as_array(value: Any) -> npt.NDArray[Any]:
    return np.asarray(backend_of(value).to_numpy(value))


def _can_have_been(names: list[str], step: npt.NDArray[np.float64]) -> bool:
    """Return whether these are a rate, a step count, a momentum product and options."""
    rate, count_, product = step[:3]
    options = dict(zip(names, step[3:], strict=True))
    return bool(
        np.isfinite(step).all()
        and rate >= 0
        and 1 <= count_ <= _MOST
        and count_ == int(count_)
        and 0 <= product <= 1
        and all(0 <= options[name] < 1 for name in ("beta1", "beta2") if name in options)
    )
