"""Selections in fusestep.torch: the array classes' results, bit for bit, and torch's habits."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = ["SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad"]
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1},
    "NAG": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1},
    "NAdam": {"lr": 0.1, "weight_decay": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01},
}
SHAPES = [(700, 3), (5,), (1100,)]
SELECTIONS: list[Callable[[], fs.selections.Selection]] = [
    lambda: fs.RandomBlocks(0.4, block=64),
    lambda: fs.RandomBlocks(lambda step: min(1.0, 0.1 * step), block=7, frozen="track"),
    lambda: fs.CyclicBlocks(3),
    lambda: fs.TopK(0.3),
    lambda: fs.TopK(0.3, by="update", frozen="track"),
]


def arrays(seed: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES]


def parameters(values: list[np.ndarray[Any, Any]]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in values]


def masks(rng: np.random.Generator) -> list[Any]:
    """Return one of each form: of rows, none, of elements."""
    return [rng.random(SHAPES[0][0]) < 0.5, None, rng.random(SHAPES[2]) < 0.2]


def step_torch(opt: Any, params: list[Any], grads: list[Any], **kwargs: Any) -> None:
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = None if grad is None else torch.from_numpy(grad.copy())
    opt.step(**kwargs)


def assert_same(params: list[Any], values: list[np.ndarray[Any, Any]]) -> None:
    for parameter, value in zip(params, values, strict=True):
        np.testing.assert_array_equal(parameter.detach().numpy(), value)


def pair(name: str, **options: Any) -> tuple[Any, list[Any], Any, list[Any]]:
    """Return an optimizer of torch parameters and one of arrays, which begin alike."""
    values = arrays(0)
    params = parameters(values)
    chosen = OPTIONS[name] | options
    return (
        getattr(fs.torch, name)(params, **chosen),
        params,
        getattr(fs, name)(values, **chosen),
        values,
    )


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("selection", range(len(SELECTIONS)))
def test_as_the_array_classes(name: str, selection: int) -> None:
    theirs, params, ours, values = pair(name, seed=11)
    for i in range(12):
        grads = arrays(100 + i)
        where = SELECTIONS[selection]() if i % 4 != 3 else None
        step_torch(theirs, params, grads, where=where)
        ours.step(grads, where=where)
    assert_same(params, values)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam"])
@pytest.mark.parametrize("form", ["list", "dict", "tensors"])
def test_masks(name: str, form: str) -> None:
    theirs, params, ours, values = pair(name)
    rng = np.random.default_rng(1)
    for i in range(6):
        each, grads = masks(rng), arrays(i)
        given: Any = each
        if form == "dict":
            given = {p: m for p, m in zip(params, each, strict=True) if m is not None}
        if form == "tensors":
            given = [None if m is None else torch.from_numpy(m) for m in each]
        step_torch(theirs, params, grads, where=given)
        ours.step(grads, where=each)
    assert_same(params, values)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(CLASSES),
    steps=st.lists(st.sampled_from([None, 0, 1, 2, 3, 4]), min_size=1, max_size=10),
    stop=st.integers(0, 9),
    way=st.sampled_from(["state_dict", "file", "pickle", "deepcopy"]),
)
def test_goes_on_from_anywhere(name: str, steps: list[int | None], stop: int, way: str) -> None:
    """Saved and loaded in the middle, in any way, nothing is different."""
    values = arrays(0)
    straight, broken = parameters(values), parameters(values)
    cls, options = getattr(fs.torch, name), OPTIONS[name] | {"seed": 5}
    first, second = cls(straight, **options), cls(broken, **options)
    for i, kind in enumerate(steps):
        if i == stop:
            second, broken = reloaded(second, broken, way, lambda p: cls(p, **OPTIONS[name]))
        where = None if kind is None else SELECTIONS[kind]()
        grads = arrays(50 + i)
        step_torch(first, straight, grads, where=where)
        step_torch(second, broken, grads, where=where)
    assert_same(straight, [p.detach().numpy() for p in broken])


def reloaded(opt: Any, params: list[Any], way: str, make: Callable[[Any], Any]) -> tuple[Any, Any]:
    if way == "deepcopy":
        opt = copy.deepcopy(opt)
        return opt, opt.param_groups[0]["params"]
    if way == "pickle":
        opt = pickle.loads(pickle.dumps(opt))
        return opt, opt.param_groups[0]["params"]
    state = opt.state_dict()
    if way == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    params = parameters([p.detach().numpy() for p in params])
    opt = make(params)
    opt.load_state_dict(state)
    return opt, params


def test_the_array_class_goes_on_from_it() -> None:
    theirs, params, ours, values = pair("NAdam")
    grads, where = arrays(3), fs.RandomBlocks(0.5, block=16)
    step_torch(theirs, params, grads, where=where)
    ours.load_state_dict(theirs.state_dict())
    for value, parameter in zip(values, params, strict=True):
        value[...] = parameter.detach().numpy()
    step_torch(theirs, params, arrays(4))
    ours.step(arrays(4))
    assert_same(params, values)


def test_without_selections_the_state_dict_is_as_before() -> None:
    opt, params, _, _ = pair("Adam")
    step_torch(opt, params, arrays(1))
    state = opt.state_dict()
    assert "fusestep" not in state
    assert not any("block_steps" in entry for entry in state["state"].values())
    assert set(torch.optim.Adam(params).state_dict()) == set(state)


def test_steps_are_counted_from_the_first_selection() -> None:
    """A run that is resumed before its first selection draws what one in a single piece does."""
    where = fs.RandomBlocks(0.5, 10)
    expected = where.mask(1100, step=0, seed=3, parameter=2)
    for steps_before in (0, 3):
        params = parameters(arrays(0))
        opt = fs.torch.SGD(params, lr=1.0, seed=3)
        for _ in range(steps_before):
            step_torch(opt, params, [None, None, np.zeros(1100, np.float32)])
        before = params[2].detach().clone()
        step_torch(opt, params, [None, None, np.ones(1100, np.float32)], where=where)
        np.testing.assert_array_equal((params[2].detach() != before).numpy(), expected)


def test_sparse_gradients_move_where_they_are_selected() -> None:
    table = torch.nn.Parameter(torch.zeros(10, 4))
    opt = fs.torch.SGD([table], lr=1.0)
    rows = torch.tensor([[1, 3, 1]])
    table.grad = torch.sparse_coo_tensor(rows, torch.ones(3, 4), (10, 4), check_invariants=False)
    opt.step(where=torch.arange(10) < 3)
    expected = torch.zeros(10, 4)
    expected[1] = -2
    assert torch.equal(table, expected)


def test_blocks_outlive_what_is_told() -> None:
    """New groups and loaded state have everything told again; what blocks have done stays."""
    theirs, params, ours, values = pair("Adam")
    for i in range(8):
        grads, where = arrays(i), fs.CyclicBlocks(2)
        if i == 3:
            theirs.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        if i == 5:
            theirs.param_groups[0]["params"] = list(params)
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = torch.from_numpy(grad)
        theirs.step(where=where)
        ours.step(grads, where=where)
    assert_same(params, values)


def test_tables_that_grow() -> None:
    table = torch.nn.Parameter(torch.zeros(6, 2))
    opt = fs.torch.Adam([table], lr=0.1)
    table.grad = torch.ones(6, 2)
    for _ in range(3):
        opt.step(where=torch.arange(6) < 4)
    opt.resize(table, 8)
    steps = opt.state_dict()["state"][0]["block_steps"]
    assert steps.tolist() == [3, 3, 3, 3, 0, 0, 0, 0]
    table.grad = torch.ones(8, 2)
    opt.step()
    torch.testing.assert_close(table[6:], torch.full((2, 2), -0.1))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (torch.ones(3), TypeError, "booleans"),
        ([None], ValueError, "1 entries for 3"),
        ({torch.ones(1): None}, ValueError, "not a parameter"),
        ([torch.ones(2, dtype=torch.bool), None, None], ValueError, r"has shape \(2,\)"),
        ("all", TypeError, "expected a selection"),
        (fs.RandomBlocks(lambda step: 2.0), ValueError, "from 0 to 1"),
    ],
)
def test_what_cannot_be_changes_nothing(where: Any, error: type[Exception], message: str) -> None:
    opt, params, _, values = pair("Adam")
    if isinstance(where, torch.Tensor):
        where = [where, None, None]
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=message):
        step_torch(opt, params, arrays(1), where=where)
    assert_same(params, values)
    assert repr(opt.state_dict()) == repr(before)
    step_torch(opt, params, arrays(1))  # and goes on


def test_exact_rows_are_refused() -> None:
    table = torch.nn.Parameter(torch.zeros(6, 2))
    table.grad = torch.ones(6, 2)
    with pytest.raises(ValueError, match="rows='exact'"):
        fs.torch.Adam([table], rows="exact").step(where=fs.CyclicBlocks(2))


def test_other_memory_of_another_size_is_refused() -> None:
    table = torch.nn.Parameter(torch.zeros(6, 2))
    opt = fs.torch.SGD([table], lr=0.1)
    table.grad = torch.ones(6, 2)
    opt.step(where=fs.CyclicBlocks(2))
    table.data = torch.zeros(8, 2)
    table.grad = torch.ones(8, 2)
    with pytest.raises(ValueError, match=r"use resize\(\)"):
        opt.step()


def test_hooks_see_where() -> None:
    opt, params, _, _ = pair("SGD")
    seen = []
    opt.register_step_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)))
    where = fs.CyclicBlocks(2)
    step_torch(opt, params, arrays(1), where=where)
    assert seen == [((opt,), {"where": where})]


def test_clipping_and_clearing() -> None:
    theirs, params, ours, values = pair("SGD", max_norm=0.5)
    grads, where = arrays(1), fs.CyclicBlocks(4)
    step_torch(theirs, params, grads, where=where, zero_grad=True)
    ours.step(grads, where=where)
    assert_same(params, values)
    assert all(not p.grad.any() for p in params)


def test_bad_seeds() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="seed"):
        fs.torch.Adam([parameter], seed=-1)
    with pytest.raises(TypeError, match="seed"):
        fs.torch.Adam([parameter], seed=1.5)
