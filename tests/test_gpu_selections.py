"""Steps with ``where=`` on a GPU are those on the CPU, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from devices import Capsule, Interface, Library, assert_same, in_use, on_host
from rules import PLAIN, ROWWISE, RULES, Rule
from test_gpu import DTYPES, LAYOUTS, REAL, needs, refused, standard
from test_gpu_rows import RowsPair, dtype_for, layout_for, some_importance

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

f32 = np.float32


@pytest.fixture(scope="module", params=["simulated", *REAL])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each library in turn."""
    yield from in_use(request.param)


class WherePair(RowsPair):
    """The same where a part moves: blocks must have been counted alike, too."""

    def check(self) -> None:
        super().check()
        for i in range(len(self.places)):
            np.testing.assert_equal(
                self.gpu._native.block_progress(i), self.cpu._native.block_progress(i)
            )


def of_rows(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return np.asarray(rng.random(shape[0]) < 0.5)


def of_elements(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Here and there, or all of a stretch."""
    share = np.repeat(rng.choice([0.0, 0.3, 1.0], 8), -(-int(np.prod(shape)) // 8))
    return np.asarray(rng.random(shape) < share[: int(np.prod(shape))].reshape(shape))


def random_wheres(rng: np.random.Generator, params: Sequence[np.ndarray], count: int) -> list[Any]:
    """Everything that is selected, and steps of all, in any order."""
    wheres: list[Any] = []
    for _ in range(count):
        kind = int(rng.integers(0, 7))
        block = int(rng.choice([1, 3, 8, 31, 128, 129, 1000, 1023, 1024, 1025, 2048]))
        frozen: Any = rng.choice(["freeze", "freeze", "track"])
        if kind == 0:
            wheres.append(None)
        elif kind == 1:
            wheres.append(fs.CyclicBlocks(int(rng.integers(1, 6)), frozen=frozen))
        elif kind == 2:
            share = float(rng.choice([0.0, 0.2, 0.5, 1.0]))
            wheres.append(fs.RandomBlocks(share, block, frozen=frozen))
        elif kind == 3:
            by: Any = rng.choice(["gradient", "update"])
            wheres.append(fs.TopK(float(rng.choice([0.0, 0.1, 1.0])), by=by, frozen=frozen))
        else:
            of = of_rows if kind == 4 else of_elements
            one_by_one = [
                fs.RandomBlocks(0.5, block)
                if x.ndim == 0
                else fs.Mask(of(rng, x.shape), frozen=frozen)
                for x in params
            ]
            wheres.append([None if rng.random() < 0.2 else where for where in one_by_one])
    return wheres


LENGTHS = [0, 1, 3, 255, 1023, 1024, 1025, 2048, 4099]
TABLES = [(9, 1), (40, 5), (9, 64), (5, 1023), (5, 1024), (4, 1025), (3, 2048), (3, 5, 64, 7)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_and_dtype(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Sizes around those of tiles and blocks; in sequences of any selections."""
    needs(lib, dtype)
    params = [standard(rng, shape, dtype) for shape in [*LENGTHS, *TABLES]]
    pair = WherePair(lib, rule.cls, params, seed=3, **rule.options)
    for i, where in enumerate(random_wheres(rng, params, 9)):
        grads = [standard(rng, x.shape, lib.dtypes[(i + x.size) % len(lib.dtypes)]) for x in params]
        pair.step(grads, where=where, zero_grad=i % 2 == 1)
        pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("block", [1, 3, 8, 31, 128, 129, 1000, 1023, 1024, 1025, 2048])
def test_blocks_of_every_size(
    lib: Library, rule: Rule, block: int, rng: np.random.Generator
) -> None:
    """The last one may be shorter; neighbours that have come equally far, or differently."""
    params = [standard(rng, shape) for shape in [*LENGTHS, *TABLES, 9 * block + 5, 6 * block]]
    pair = WherePair(lib, rule.cls, params, seed=5, **rule.options)
    for step in range(7):
        where = fs.RandomBlocks(0.5, block) if step % 3 < 2 else None
        pair.step([standard(rng, x.shape) for x in params], where=where, zero_grad=step == 4)
        pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(
    "options",
    [{"max_norm": 0.5}, {"skip_nonfinite": True}, {"max_norm": 0.5, "skip_nonfinite": True}],
    ids=str,
)
def test_norms_have_the_same_bits(
    lib: Library, rule: Rule, dtype: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Of what is selected, summed as on the CPU; in float64, too, which shows the last bit."""
    params = [standard(rng, shape, dtype) for shape in [*LENGTHS, *TABLES]]
    pair = WherePair(lib, rule.cls, params, seed=4, **options, **rule.options)
    for where in random_wheres(rng, params, 12):
        pair.step([standard(rng, x.shape, dtype) for x in params], where=where, zero_grad=True)
        pair.check()


@pytest.mark.parametrize("block", [1024, 4096, 1000, 7])
def test_norms_of_many_blocks(lib: Library, block: int, rng: np.random.Generator) -> None:
    """Sums of sums of tiles; squares that overflow."""
    params = [standard(rng, 3_000_001, "f8"), standard(rng, (1500, 64), "f8")]
    pair = WherePair(lib, fs.SGD, params, lr=0.5, max_norm=0.3)
    for scale in (1.0, 1e200, 1e-200):
        grads = [standard(rng, x.shape, "f8") * scale for x in params]
        pair.step(grads, where=[fs.RandomBlocks(0.6, block), of_rows(rng, (1500,))])
    pair.check()


@settings(max_examples=400, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.sampled_from([(5, 1024), (3, 1025), (2500,), (3, 5, 64, 8), (2, 1, 2000)]),
    ),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=2),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    kind=st.sampled_from(["rows", "elements", "blocks", "top"]),
    frozen=st.sampled_from(["freeze", "track"]),
    gradient_is_of_rows=st.booleans(),
    mask_is_on_gpu=st.booleans(),
    is_anchored=st.sampled_from([None, False, True]),
    zero_grad=st.booleans(),
    grad_scale=st.sampled_from([1.0, -0.3]),
    options=st.sampled_from(
        [{}, {"max_norm": 0.7}, {"skip_nonfinite": True}, {"state_dtype": "float64"}]
    ),
)
def test_any_layout(
    lib: Library,
    rule: Rule,
    shape: tuple[int, ...],
    layouts: list[str],
    dtypes: tuple[np.dtype, np.dtype],
    kind: str,
    frozen: Any,
    gradient_is_of_rows: bool,
    mask_is_on_gpu: bool,
    is_anchored: bool | None,
    zero_grad: bool,
    grad_scale: float,
    options: dict[str, Any],
) -> None:
    """The bits of the CPU, and nothing else, nor what is between the elements, is touched."""
    w_dtype, g_dtype = (dtype_for(lib, dtype) for dtype in dtypes)
    of_parameter, of_gradient = (layout_for(lib, layout) for layout in layouts)
    rng = np.random.default_rng(6)
    start = of_parameter(standard(rng, shape, w_dtype))
    pair = WherePair(lib, rule.cls, [start], **options, **rule.options)
    if is_anchored is not None:  # with importance, or without
        importance = [some_importance(rng, shape)] if is_anchored else None
        for opt in (pair.cpu, pair.gpu):
            opt.anchor(3.0, None, importance)
    for is_partial in (True, True, False, True):
        where: Any = None
        if is_partial and kind in ("rows", "elements"):
            mask: Any = (of_rows if kind == "rows" else of_elements)(rng, shape)
            where = fs.Mask(lib.put(mask) if mask_is_on_gpu else mask, frozen=frozen)
        elif is_partial and kind == "blocks":
            where = fs.RandomBlocks(0.5, int(rng.choice([1, 7, 64])), frozen=frozen)
        elif is_partial and not gradient_is_of_rows:
            where = fs.TopK(0.3, frozen=frozen)
        if rule in ROWWISE and kind != "rows":
            where = None
        g: Any = of_gradient(standard(rng, shape, g_dtype))
        if gradient_is_of_rows:
            numbers = rng.integers(0, shape[0], 6 if shape[0] else 0)
            g = fs.Rows(numbers, of_gradient(standard(rng, (len(numbers), *shape[1:]), g_dtype)))
        pair.step([g], where=[where], zero_grad=zero_grad, grad_scale=grad_scale)
        pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_more_ages_than_a_launch_takes(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    """A table for each count of updates, of which there are many; then a step of all blocks."""
    params = [standard(rng, (60, 33)), standard(rng, 5000), standard(rng, (50, 40)).T]
    pair = WherePair(lib, rule.cls, params, **rule.options)
    for step in range(60):
        where = [np.arange(len(x)) % (step + 1) == 0 for x in params]
        pair.step([standard(rng, x.shape) for x in params], where=where)
    assert len(np.unique(pair.gpu.state_dict()["state"][0]["block_steps"])) > 8
    for options in ({}, {"zero_grad": True}):
        pair.step([standard(rng, x.shape) for x in params], **options)
    pair.check()


def test_many_parameters(lib: Library, rng: np.random.Generator) -> None:
    """More tables than a launch takes, beside those that move as a whole and are anchored."""
    shapes = [(int(n), 3) if n % 3 else (int(n),) for n in rng.integers(1, 900, 100)]
    params = [standard(rng, shape) for shape in shapes]
    pair = WherePair(lib, fs.Adam, params, lr=0.1, max_norm=1.0)
    for opt in (pair.cpu, pair.gpu):
        opt.anchor([2.0 if i % 5 == 0 else None for i in range(100)])
    for _ in range(4):
        where = [[None, fs.RandomBlocks(0.5, 16), fs.CyclicBlocks(2)][i % 3] for i in range(100)]
        grads = [None if rng.random() < 0.2 else standard(rng, shape) for shape in shapes]
        pair.step(grads, where=where, zero_grad=True)
    pair.check()


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_several_devices(lib: Library, options: dict[str, Any], rng: np.random.Generator) -> None:
    places = {"a": 0, "b": None, "c": 1 if lib.devices() > 1 else 0, "d": 0}
    params = {key: standard(rng, (60, 70)) for key in places}
    pair = WherePair(lib, fs.NAdam, params, places=places, seed=1, **options)
    for step in range(6):
        mask = of_rows(rng, (60,))
        where: Any = [fs.RandomBlocks(0.5, 100), {"a": mask, "b": mask, "c": None}, None][step % 3]
        grads = {key: standard(rng, (60, 70)) for key in places}
        if step == 3 and options:
            grads["c"][-1, -1] = np.nan
            where = None
        pair.step(grads, where=where, zero_grad=True)
        pair.check()
    assert pair.gpu.skipped_steps == (1 if options else 0)


@pytest.mark.parametrize("has_max_norm", [False, True])
def test_what_is_not_finite(lib: Library, has_max_norm: bool, rng: np.random.Generator) -> None:
    """Where it is selected, the step is left out, and does not count; elsewhere it is not seen.

    Before, between and after steps of all, of which it is the GPU that decides.
    """
    options = {"max_norm": 0.5} if has_max_norm else {}
    params = [standard(rng, (5, 100)), standard(rng, 3000)]
    pair = WherePair(lib, fs.Adam, params, lr=0.1, skip_nonfinite=True, **options)
    rows = np.arange(5) < 3

    def step(where: Any, bad: tuple[int, int] | None = None) -> None:
        grads = [standard(rng, x.shape) for x in params]
        if bad:
            grads[0][bad] = np.inf
        pair.step(grads, where=where, zero_grad=True)

    for where in (None, [rows, None], None):
        step(where)
        step(where, bad=(0, 0))
        step([rows, fs.CyclicBlocks(3)], bad=(4, 99))
    pair.check()
    assert (pair.gpu.steps, pair.gpu.skipped_steps) == (6, 3)


@pytest.mark.parametrize("rule", ROWWISE, ids=str)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_rowwise_rules(lib: Library, rule: Rule, layout: str, rng: np.random.Generator) -> None:
    """Whole rows: by a mask, or in blocks of some."""
    of = layout_for(lib, layout)
    params = [of(standard(rng, (40, 30))), of(standard(rng, (3, 1500)))]
    for options in ({}, {"max_norm": 0.5, "skip_nonfinite": True}):
        pair = WherePair(lib, rule.cls, [x.copy() for x in params], **options, **rule.options)
        for where in (
            [of_rows(rng, x.shape) for x in params],
            [fs.RandomBlocks(0.5, 60), fs.CyclicBlocks(3)],
            None,
            [np.zeros(40, bool), None],
        ):
            grads = [of(standard(rng, x.shape)) for x in params]
            pair.step(grads, where=where, zero_grad=True)
        pair.check()


WAYS = ["state_dict", "file", "pickle", "deepcopy"]


@pytest.mark.parametrize("way", WAYS)
def test_counts_are_kept(lib: Library, way: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """And go from the CPU to the GPU and back."""
    params = [standard(rng, (40, 30)), standard(rng, 3000)]
    pair = WherePair(lib, fs.NAdam, params, lr=0.1, skip_nonfinite=True)

    def step(where: Any = None) -> list[np.ndarray]:
        grads = [standard(rng, x.shape) for x in params]
        pair.step(grads, where=where)
        return grads

    for where in (fs.RandomBlocks(0.5, 100), [of_rows(rng, (40,)), None]):
        step(where)
    if way == "state_dict":
        saved = pair.cpu.state_dict(), pair.gpu.state_dict()
        pair.cpu.load_state_dict(saved[1])
        pair.gpu.load_state_dict(saved[0])
    elif way == "file":
        pair.cpu.save(tmp_path / "cpu")
        pair.gpu.save(tmp_path / "gpu")
        pair.gpu.load(tmp_path / "cpu")
        pair.cpu.load(tmp_path / "gpu")
    else:
        other = (
            copy.deepcopy(pair.gpu) if way == "deepcopy" else pickle.loads(pickle.dumps(pair.gpu))
        )
        grads = step()
        other.step([lib.put(g) for g in grads])
        for x, expected in zip(other.params, pair.cpu.params, strict=True):
            assert_same(on_host(x), expected)
    step()
    step(fs.RandomBlocks(0.5, 100))
    pair.check()


@pytest.mark.parametrize("where", [fs.TopK(0.3), np.arange(3000) % 7 == 0], ids=["top", "mask"])
def test_counts_of_elements(lib: Library, where: Any, rng: np.random.Generator) -> None:
    """Which selections on the CPU have left behind."""
    start = standard(rng, 3000)
    pair = WherePair(lib, fs.Adam, [start], lr=0.1, max_norm=0.5)
    pair.cpu.step([standard(rng, 3000)], where=[where])
    lib.set(pair.gpu.params[0], start)
    pair.gpu.load_state_dict(pair.cpu.state_dict())
    for after in (None, fs.RandomBlocks(0.5, 100), None):
        pair.step([standard(rng, 3000)], where=after)
        pair.check()


def test_selections_on_one_gradient_after_another(lib: Library, rng: np.random.Generator) -> None:
    """What has been planned for a part does not outlast it."""
    pair = WherePair(lib, fs.Adam, [standard(rng, (40, 30))], lr=0.1)
    g = standard(rng, (40, 30))
    likes, _ = pair.mirrored([g])
    for where in (None, fs.CyclicBlocks(1), None, fs.CyclicBlocks(1), None):
        pair.cpu.step([g], where=where)
        pair.gpu.step(likes, where=where)
        pair.check()


def test_masks_of_any_array(lib: Library, rng: np.random.Generator) -> None:
    """On the host or the GPU, of any library; and views."""
    start, g = standard(rng, (10, 6)), standard(rng, (10, 6))
    mask = of_rows(rng, (10,))
    wide = np.stack([mask, ~mask], 1)
    expected = start.copy()
    fs.SGD([expected], lr=1.0).step([g], where=[mask])
    forms: list[Any] = [mask, wide[:, 0], fs.Mask(mask), lib.put(mask), lib.put(wide)[:, 0]]
    forms += [fs.Mask(lib.put(mask)), Interface(lib.put(mask)), Capsule(lib, lib.put(mask))]
    for form in forms:
        w = lib.put(start)
        lib.synchronize()
        fs.SGD([w], lr=1.0).step([lib.put(g)], where=[form])
        assert_same(on_host(w), expected)


def test_masks_on_the_gpu_select_on_the_cpu(lib: Library, rng: np.random.Generator) -> None:
    start, g = standard(rng, (10, 6)), standard(rng, (10, 6))
    mask = np.asarray(rng.random((10, 6)) < 0.5)
    expected = start.copy()
    fs.SGD([expected], lr=1.0).step([g], where=[mask])
    fs.SGD([start], lr=1.0).step([g], where=[lib.put(mask)])
    assert_same(start, expected)


def test_steps_are_in_the_order_of_streams(lib: Library, rng: np.random.Generator) -> None:
    """Gradients and masks that the current stream is still to write."""
    start, values, mask = standard(rng, (400, 40)), standard(rng, (400, 40)), of_rows(rng, (400,))
    w, g, on_gpu = lib.put(start), lib.put(np.zeros_like(values)), lib.put(np.zeros_like(mask))
    late, late_mask = lib.put(values), lib.put(mask)
    opt, cpu = fs.Adam([w], max_norm=0.5), fs.Adam([start], max_norm=0.5)
    with lib.stream():
        if lib.name != "simulated":
            lib.spin()
        g[...] = late
        on_gpu[...] = late_mask
        opt.step([g], where=[on_gpu], zero_grad=True)
        opt.step([late], where=fs.RandomBlocks(0.5, 100))
        lib.fill(g, np.nan)
    cpu.step([values.copy()], where=[mask])
    cpu.step([values], where=fs.RandomBlocks(0.5, 100))
    assert_same(on_host(w), start)


# ---- what there is not --------------------------------------------------------------------------


@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_what_is_refused_changes_nothing(
    lib: Library, common: dict[str, Any], rng: np.random.Generator
) -> None:
    arrays = [lib.put(standard(rng, 4)), lib.put(standard(rng, (5, 3)))]
    grads = [lib.put(standard(rng, 4)), lib.put(standard(rng, (5, 3)))]
    opt = fs.Adam(arrays, **common)
    opt.step(grads, where=fs.RandomBlocks(0.5, 2))
    rows = fs.Rows([1], lib.put(standard(rng, (1, 3))))
    bad_rows = fs.Rows([5], lib.put(standard(rng, (1, 3))))
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ([grads[0], rows], [None, fs.TopK(0.5)], ValueError, "TopK cannot take a fraction"),
        ([grads[0], bad_rows], fs.CyclicBlocks(2), IndexError, "row 5"),
        (grads, [None, np.zeros(4, bool)], ValueError, "has shape (4,); expected (5, 3) or one"),
        (grads, [None, np.zeros(5)], TypeError, "expected an array of booleans"),
        (grads, [None], ValueError, "1 entries for 2 parameters"),
        ([grads[0], grads[0]], fs.CyclicBlocks(2), ValueError, "has shape (4,); expected (5, 3)"),
        ([grads[0], arrays[1]], fs.CyclicBlocks(2), ValueError, "shares memory with parameter 1"),
    ]
    for gradients, where, error, words in cases:
        refused(
            opt,
            [*arrays, *grads],
            lambda g=gradients, where=where: opt.step(g, where=where, zero_grad=True),
            error,
            words,
        )
    opt.step(grads, where=fs.RandomBlocks(0.5, 2))
    assert opt.steps == 2


def test_parameters_in_other_orders_have_rows(lib: Library, rng: np.random.Generator) -> None:
    """Blocks of whole rows are rows; others, pieces of memory, down to single elements."""
    start = standard(rng, (40, 30)).T
    pair = WherePair(lib, fs.Adam, [start], lr=0.1, max_norm=0.5)
    for where in (
        fs.RandomBlocks(0.5, 80),
        fs.CyclicBlocks(5),
        fs.RandomBlocks(0.5, 5000),
        fs.RandomBlocks(0.5, 100),
        None,
    ):
        pair.step([standard(rng, (40, 30)).T], where=where)
        pair.check()


def test_not_with_capturable(lib: Library, rng: np.random.Generator) -> None:
    w, g = lib.put(standard(rng, 40)), lib.put(standard(rng, 40))
    opt = fs.Adam([w], capturable=True)
    opt.step([g])
    refused(
        opt,
        [w, g],
        lambda: opt.step([g], where=fs.CyclicBlocks(2), zero_grad=True),
        ValueError,
        "capturable=True",
    )
    other = fs.Adam([lib.put(standard(rng, 40))])
    other.step([g], where=fs.CyclicBlocks(2))
    opt.load_state_dict(other.state_dict())
    refused(opt, [w, g], lambda: opt.step([g], zero_grad=True), ValueError, "capturable=True")


def test_not_in_a_graph(lib: Library, rng: np.random.Generator) -> None:
    """Also where the next step would be the same: it would not be counted, nor drawn anew."""
    w, g = lib.put(standard(rng, 40)), lib.put(standard(rng, 40))
    opt = fs.SGD([w], lr=0.5)
    with lib.stream():
        opt.step([g], where=fs.CyclicBlocks(2))
    for where in (fs.CyclicBlocks(2), None):
        refused(
            opt,
            [w, g],
            lambda where=where: lib.capture(lambda: opt.step([g], where=where)),
            RuntimeError,
            "CUDA graph is being captured",
            "where=",
        )
    opt.step([g], where=fs.CyclicBlocks(2))
