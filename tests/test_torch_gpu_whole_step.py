"""Averages, masters and narrow state on GPUs: what they are on the CPU, to the bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

import fusestep as fs

torch = pytest.importorskip("torch")

from test_torch_gpu import (  # noqa: E402
    CLASSES,
    SHAPES,
    Machine,
    Place,
    assert_same_course,
    give,
    give_rows,
    leaves,
    machine,
    new,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["machine"]

NARROW = [torch.bfloat16, torch.float16]
KINDS = ["float32", "split"]


def standing(opt: Any, params: list[Any]) -> list[Any]:
    averages = opt.averages if opt.ema_decay is not None else []
    state = [dict(opt.state.get(p, {})) for p in params]
    return [[p.detach() for p in params], state, averages]


OPTIONS: dict[str, dict[str, Any]] = {
    "average": {"ema_decay": 0.9},
    "schedule": {"ema_decay": fs.EmaWarmup(0.95)},
    "clipped": {"clip_value": 0.3, "max_norm": 3.0},
    "random": {"stochastic_rounding": True, "seed": 3},
    "narrow state": {"state_dtype": "bfloat16", "seed": 4},
    "8 bits": {"state_dtype": "int8", "seed": 4},
    "split and 8 bits": {"master": "split", "state_dtype": "int8", "ema_decay": 0.9},
    "wide": {"master": "float32", "ema_decay": 0.9},
    "split": {"master": "split", "ema_decay": 0.9},
    "split and random": {"master": "split", "stochastic_rounding": True, "seed": 6},
    "split and narrow": {
        "master": "split",
        "clip_value": 0.5,
        "max_norm": 3.0,
        "skip_nonfinite": True,
        "state_dtype": "bfloat16",
    },
    "all": {
        "master": "float32",
        "ema_decay": 0.9,
        "clip_value": 0.5,
        "max_norm": 3.0,
        "skip_nonfinite": True,
        "state_dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_as_on_the_cpu(machine: Machine, name: str, options: str, dtype: Any) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, *SHAPES, dtype=dtype)
        opt = new(name, params, **OPTIONS[options])
        train(machine, opt, params, 6)
        return standing(opt, params)

    assert_same_course(machine, course)


def save(opt: Any, _: Any) -> None:
    opt.load_state_dict(opt.state_dict())


def widen(opt: Any, _: Any) -> None:
    with pytest.warns(UserWarning, match="converted from float32 to int8"):
        opt.load_state_dict(opt.state_dict(state_dtype=torch.float32))


def copy_whole(opt: Any, params: list[Any]) -> None:
    params[0].detach().copy_(copy.deepcopy(opt).param_groups[0]["params"][0].detach())


@pytest.mark.parametrize("event", [save, widen, copy_whole])
@pytest.mark.parametrize("name", CLASSES)
def test_8_bits_go_on(machine: Machine, name: str, event: Callable[[Any, Any], None]) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, *SHAPES)
        opt = new(name, params, state_dtype="int8", seed=4)
        train(machine, opt, params, 3)
        if event is not widen or opt.state_dict()["state"]:
            event(opt, params)
        train(machine, opt, params, 3, start=3)
        return standing(opt, params)

    assert_same_course(machine, course)


def test_parts_of_blocks_are_refused_and_nothing_has_changed(machine: Machine) -> None:
    params = leaves(machine.gpu, (40, 64), (7, 5))
    opt = new("Adam", params, state_dtype="int8")
    train(machine, opt, params, 2)
    before = [x.clone() for x in tensors_of(opt, params)]
    with pytest.raises(ValueError, match="blocks of 64"):
        train(machine, opt, params, 1, where=fs.TopK(0.3))
    for x, y in zip(before, tensors_of(opt, params), strict=True):
        assert torch.equal(x, y)


def tensors_of(opt: Any, params: list[Any]) -> list[Any]:
    state = [value for p in params for value in opt.state[p].values()]
    return [*(p.detach() for p in params), *(x for x in state if isinstance(x, torch.Tensor))]


def swap(opt: Any, _: Any) -> None:
    with opt.swap_averages():
        pass


EVENTS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "swap": swap,
    "write": lambda _, params: params[0].detach().fill_(0.75),
    "save": lambda opt, _: opt.load_state_dict(opt.state_dict()),
    "anchor": lambda opt, _: opt.anchor(2.0),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_events(machine: Machine, kind: str, event: str) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, *SHAPES, dtype=torch.bfloat16)
        opt = new("Adam", params, master=kind, ema_decay=0.75)
        train(machine, opt, params, 3)
        EVENTS[event](opt, params)
        train(machine, opt, params, 3, start=3)
        return standing(opt, params)

    assert_same_course(machine, course)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [fs.RandomBlocks(0.5, block=16), fs.CyclicBlocks(3)])
def test_selections(machine: Machine, kind: str, where: Any) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, *SHAPES, dtype=torch.bfloat16)
        opt = new("Adam", params, master=kind, ema_decay=0.75, seed=5)
        train(machine, opt, params, 5, where=where)
        return standing(opt, params)

    assert_same_course(machine, course)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize("name", CLASSES)
def test_tables(machine: Machine, name: str, rows: str, kind: str) -> None:
    """Rows that are listed, anchored ones among them, and rows that catch up with what they have
    missed."""

    def course(place: Place) -> Any:
        params = leaves(place, (40, 64), (7, 5), (9, 1100), dtype=torch.bfloat16)
        opt = new(name, params, master=kind, rows=rows)
        for step in range(6):
            give_rows(machine, params, step)
            opt.step()
            if step == 2:
                opt.anchor(2.0)
        opt.flush()
        return standing(opt, params)

    assert_same_course(machine, course)


@pytest.mark.parametrize("written", [0.0, -0.0, float("nan"), float("inf"), 1e-40, 3.0])
def test_whatever_is_in_the_halves(machine: Machine, written: float) -> None:
    """Also what somebody has written to the upper one."""

    def course(place: Place) -> Any:
        params = leaves(place, (1030,), (65,), dtype=torch.bfloat16)
        opt = new("SGD", params, master="split", ema_decay=0.5)
        train(machine, opt, params, 2)
        for p in params:
            p.detach()[::3].fill_(written)
        train(machine, opt, params, 2, start=2)
        return standing(opt, params)

    assert_same_course(machine, course)


def test_halves_of_any_layout(machine: Machine) -> None:
    def course(place: Place) -> Any:
        transposed, every_third = leaves(place, (40, 60), (50, 300), dtype=torch.bfloat16)
        views = transposed.detach().t(), every_third.detach()[1::2, ::3]
        params = [view.requires_grad_() for view in views]
        opt = new("Adam", params, master="split", ema_decay=0.5)
        train(machine, opt, params, 3)
        return standing(opt, params)

    assert_same_course(machine, course)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_with_averages(machine: Machine, kind: str) -> None:
    """The decay is a constant of the graph; averages move with each replay."""

    def course(place: Place) -> Any:
        params = leaves(place, (300,), (5, 7), dtype=torch.bfloat16)
        options = {"capturable": True} if place.is_gpu else {}
        opt = new("Adam", params, master=kind, ema_decay=0.9, **options)
        give(machine, params, 0)
        with machine.beside():
            opt.step()
        graph = machine.record(opt.step) if place.is_gpu else None
        for _ in range(4):
            graph.replay() if graph else opt.step()
        machine.finish()
        return [[p.detach() for p in params], opt.averages]

    assert_same_course(machine, course)
