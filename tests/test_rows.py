"""Gradients of some rows: those rows move as by a dense step, and nothing else does."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import importlib.util
import math
import pickle
import platform
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
import simulated_cupy
from concurrency import in_threads
from conftest import AVAILABLE
from devices import assert_same, library
from fusestep import _cpu
from fusestep import functional as F  # noqa: N812
from rules import PLAIN, RULES, Rule
from strategies import GRAD_SCALES, MAX_NORMS
from test_bits import LAYOUTS
from test_dlpack import Foreign, numpy_speaks_version_1
from test_truth import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

f32 = np.float32
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2")] + [bfloat16]

ADAM, ADAGRAD = (next(r for r in RULES if r.cls is cls) for cls in (fs.Adam, fs.Adagrad))


# ---- what must come out -------------------------------------------------------------------------


def summed(
    indices: np.ndarray, values: np.ndarray, dtype: Any = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are listed, ascending, and the sums of their values in the list's order."""
    rows, first, inverse = np.unique(indices, return_index=True, return_inverse=True)
    again = np.ones(len(indices), bool)
    again[first] = False
    values = values.astype(dtype)
    sums = values[first]
    np.add.at(sums, inverse[again], values[again])
    return rows, sums


class Lazy:
    """A rule's reference, applied to the rows that are listed; only the step count is shared."""

    def __init__(self, rule: Rule, start: np.ndarray) -> None:
        self.rule, self.w = rule, start.astype(np.float64)
        initial = rule.options.get("initial_accumulator_value", 0.0)
        self.states = {name: np.full(start.shape, initial) for name in rule.states}
        self.steps, self.mu_product = 0, 1.0

    def step(self, indices: np.ndarray, values: np.ndarray) -> None:
        rows, sums = summed(indices, values)
        state = {"step": self.steps, "mu_product": self.mu_product}
        state |= {name: s[rows] for name, s in self.states.items()}
        if self.steps == 0:
            state.pop("momentum_buffer", None)  # its first value is the gradient
        self.w[rows] = self.rule.reference(self.w[rows], sums, state, **self.rule.options)
        for name, s in self.states.items():
            s[rows] = state[name]
        self.steps, self.mu_product = self.steps + 1, state["mu_product"]

    def check(self, opt: fs.Optimizer, w: np.ndarray, tolerance: float) -> None:
        np.testing.assert_allclose(w, self.w, rtol=0, atol=tolerance)
        for name, s in self.states.items():
            np.testing.assert_allclose(opt.state[0][name], s, rtol=tolerance, atol=tolerance)
        assert opt.state[0]["step"] == opt.steps == self.steps


def everything(opt: fs.Optimizer) -> dict[str, Any]:
    """All that a step may change: equal where every bit is, whatever the layout."""
    params = opt.params
    arrays = params.values() if isinstance(params, dict) else params
    found: dict[str, Any] = {"steps": opt.steps, "skipped_steps": opt.skipped_steps}
    for (key, state), parameter in zip(
        opt.state.items(), arrays if isinstance(params, (dict, list)) else [params], strict=True
    ):
        for name, value in {"value": parameter, **state}.items():
            is_array = isinstance(value, np.ndarray)
            found[f"{name} of {key}"] = (
                hashlib.sha256(value.tobytes()).hexdigest() if is_array else value
            )
    return found


def arrays_of(opt: fs.Optimizer) -> dict[str, np.ndarray]:
    """The one parameter and its state."""
    [w] = opt.params
    return {"parameter": w, **{k: v for k, v in opt.state[0].items() if np.ndim(v)}}


def checked_step(
    opt: fs.Optimizer, gradient: fs.Rows, *, state_dtype: str | None = None, **arguments: Any
) -> None:
    """A step of one parameter, which must be the dense step of a table of the listed rows alone.

    Bit for bit; and all other rows, the indices and the values must be left as they are.
    """
    arrays = arrays_of(opt)
    before = {name: array.copy() for name, array in arrays.items()}
    indices, values = np.asarray(gradient.indices).copy(), np.asarray(gradient.values).copy()
    in_double = np.dtype("f8") in [array.dtype for array in arrays.values()]
    rows, sums = summed(indices, values, np.float64 if in_double else np.float32)

    saved = opt.state_dict()
    for name in arrays.keys() - {"parameter"}:
        saved["state"][0][name] = saved["state"][0][name][rows]
    twin = type(opt)([before["parameter"][rows]], state_dtype=state_dtype)
    twin = _with_options(opt, twin, saved)
    twin.step([sums], **{k: v for k, v in arguments.items() if k != "zero_grad"})
    opt.step([gradient], **arguments)

    for name, array in arrays_of(twin).items():
        before[name][rows] = array
    for name, array in arrays.items():
        assert_same(array, before[name])
    scalars = [{k: v for k, v in o.state[0].items() if np.ndim(v) == 0} for o in (opt, twin)]
    assert scalars[0] == scalars[1]
    assert (opt.steps, opt.skipped_steps) == (twin.steps, twin.skipped_steps)
    np.testing.assert_array_equal(np.asarray(gradient.indices), indices)
    cleared = arguments.get("zero_grad", False)
    assert_same(np.asarray(gradient.values), np.zeros_like(values) if cleared else values)
