"""How many bytes a training takes, told before it begins."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusestep as fs
from rules import RULES, Rule

DTYPES = [np.dtype(t) for t in ("f4", "f8", "f2")] + [np.dtype(ml_dtypes.bfloat16)]


def allocated(opt: fs.Optimizer) -> int:
    return sum(
        array.nbytes
        for entry in opt.state.values()
        for array in entry.values()
        if isinstance(array, np.ndarray) and array.ndim > 0
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, "float64"])
def test_what_an_optimizer_allocates(rule: Rule, state_dtype: Any) -> None:
    params = [np.zeros((7, 5 + i), dtype) for i, dtype in enumerate(DTYPES)]
    own = {k: v for k, v in rule.options.items() if k != "lr"}
    told = fs.memory(params, rule.cls, state_dtype=state_dtype, **own)
    opt = rule.cls(params, state_dtype=state_dtype, **rule.options)
    assert told.parameters == told.gradients == sum(p.nbytes for p in params)
    assert told.state == allocated(opt)
    assert told.total == 2 * told.parameters + told.state


def test_anything_with_a_shape() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(30, 20, device="meta", dtype=torch.bfloat16)
    expected = fs.Adam([np.zeros((20, 30), "f2"), np.zeros(20, "f2")])
    for rule in (fs.Adam, "adam", "Adam", fs.torch.Adam, fs.torch.AdamW):
        told = fs.memory(model.parameters(), rule)
        assert (told.parameters, told.state) == (1240, allocated(expected))
    assert fs.memory({"w": np.zeros(3)}, "sgd") == (24, 24, 0)
    assert fs.memory(np.zeros(3, "f4"), "sgd", gradients=False, momentum=0.9) == (12, 0, 12)
    assert fs.memory([np.zeros(())]).state == 16


def test_it_prints_a_table() -> None:
    lines = str(fs.memory([np.broadcast_to(np.float32(0), (1000, 1234))])).splitlines()
    assert [line.split() for line in lines] == [
        ["parameters", "4.94", "MB"],
        ["gradients", "4.94", "MB"],
        ["state", "9.87", "MB"],
        ["total", "19.7", "MB"],
    ]
    assert "498 MB" in str(fs.memory(np.broadcast_to(np.float32(0), 124_439_808), "sgd"))
    assert "12 B" in str(fs.memory(np.zeros(3, "f4"), "sgd"))
    assert "1.20 GB" in str(fs.memory(np.broadcast_to(np.float32(0), 300_000_000), "sgd"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([3.0],), {}, TypeError, "parameter 0 is a float"),
        ((np.zeros(3, int),), {}, TypeError, "has dtype int64"),
        ((np.zeros(3), "adamax"), {}, ValueError, "rule is 'adamax'; expected one of"),
        ((np.zeros(3), fs.Optimizer), {}, TypeError, "expected an optimizer class"),
        ((np.zeros(3), int), {}, TypeError, "expected an optimizer class"),
        ((np.zeros(3), fs.Adam), {"momentum": 0.9}, TypeError, "momentum"),
        ((np.zeros(3), fs.SGD), {"momentum": -1}, ValueError, "momentum"),
        ((np.zeros(3), fs.SGD), {"state_dtype": "int3"}, ValueError, "state_dtype"),
    ],
)
def test_what_makes_no_sense(
    arguments: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fs.memory(*arguments, **options)
