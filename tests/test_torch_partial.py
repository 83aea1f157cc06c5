"""fusestep.torch: rows="exact", anchors, and tables that grow."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from concurrency import in_threads
from rules import PLAIN, RULES, Rule

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from test_anchors import Penalty, pulled  # noqa: E402
from test_torch_sparse import EPS, Words, as_array, rows_of, some_rows, table  # noqa: E402
from torch_copies import assert_same, snapshot, through_a_file, through_pickle  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# torch's Adagrad warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are:UserWarning")

# torch keeps the product of momenta in float32, and so does the adapter.
WITHOUT_NADAM = [rule for rule in RULES if rule.cls is not fs.NAdam]

# What moves, or fades, without a gradient: Adagrad rests.
RESTLESS = [rule for rule in [*PLAIN, RULES[1]] if rule.cls is not fs.Adagrad and rule != RULES[0]]


def make(rule: Rule, params: Any, **options: Any) -> Any:
    return getattr(fst, rule.cls.__name__)(params, **{**rule.options, **options})


def torchs(rule: Rule, params: Any) -> Any:
    return getattr(torch.optim, rule.torch)(params, **{**rule.options, **rule.torch_options})


def is_behind(opt: Any) -> bool:
    return any("missed_steps" in entry for entry in opt.state_dict()["state"].values())


def behind(rule: Rule | None = None, *shape: int, steps: int = 7, **options: Any) -> Any:
    """An exact optimizer of one table, of which rows have missed steps; and the table."""
    p = table(*(shape or (12, 3)), dtype=options.pop("dtype", torch.float32))
    opt = make(rule, [p], rows="exact", **options) if rule else exact_adam([p], **options)
    p.grad = torch.ones_like(p)
    opt.step()
    for step in range(steps):
        p.grad = rows_of(p, [step % 5, step % 3], torch.ones(2, *p.shape[1:], dtype=p.dtype))
        opt.step()
    assert is_behind(opt)
    return opt, p


def exact_adam(params: Any, **options: Any) -> Any:
    return fst.AdamW(params, **{"lr": 0.01, "rows": "exact", **options})


def dense(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.to_dense()


# ---- rows="exact": the same steps ----------------------------------------------------------------


@pytest.mark.parametrize("rule", WITHOUT_NADAM, ids=str)
def test_the_bits_are_those_of_the_array_class(rule: Rule, pointers: str) -> None:
    """Tables beside a dense parameter and a scalar; some steps have no gradient, or a dense one."""
    params = [table(), table(5, 4, seed=1), table(30, seed=2), nn.Parameter(torch.tensor(0.5))]
    arrays = [p.detach().numpy().copy() for p in params]
    opt = make(rule, params, rows="exact")
    twin = rule.cls(arrays, rows="exact", **rule.options)
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        params[0].grad = some_rows(params[0], step, 3)
        params[1].grad = torch.full((5, 4), 0.1 * (step % 7) - 1)
        params[2].grad = None if step % 3 == 0 else some_rows(params[2], -step, 2)
        params[3].grad = torch.tensor(0.1)
        if step % 40 == 39:
            params[0].grad = params[0].grad.to_dense()
        gradients = [as_array(p.grad) for p in params]
        opt.param_groups[0]["lr"] = twin.lr = rule.options["lr"] / (1 + step % 11)
        opt.step()
        twin.step(gradients)
        if step % 10 == 0:
            rows = torch.randint(40, (4,), generator=generator)
            opt.catch_up({params[0]: rows})
            twin.catch_up([rows.numpy(), None, None, None])
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), array)
    opt.flush()
    twin.flush()
    for i, (p, array) in enumerate(zip(params, arrays, strict=True)):
        np.testing.assert_array_equal(p.detach().numpy(), array)
        for name in rule.states:
            np.testing.assert_array_equal(opt.state[p][name].numpy(), twin.state[i][name])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tables_move_as_in_the_dense_optimizer(rule: Rule, pointers: str) -> None:
    """Two groups, hundreds of steps, a schedule of the rate; rows are right when they are read."""
    params = [table(dtype=torch.float64), table(25, 2, dtype=torch.float64, seed=1)]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    groups, their_groups = (
        [{"params": [p[0]], "lr": rule.options["lr"]}, {"params": [p[1]], "lr": 0.003}]
        for p in (params, others)
    )
    opt = make(rule, groups, rows="exact")
    other = torchs(rule, their_groups)
    schedules = [lr_scheduler.CosineAnnealingWarmRestarts(each, 37) for each in (opt, other)]
    for step in range(250):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = some_rows(p, 2 * step + i, 1 + step % 4)
            if step % 50 > 25:  # only some rows for a while
                p.grad = rows_of(p, p.grad._indices() % 6, p.grad._values())
            if step % 9 == i:
                p.grad = None
            q.grad = dense(p.grad)
        rows = [None if p.grad is None else p.grad._indices()[0] for p in params]
        opt.catch_up(dict(zip(params, rows, strict=True)))
        for p, q, read in zip(params, others, rows, strict=True):
            if read is not None:
                torch.testing.assert_close(p[read], q[read], rtol=1e-6, atol=1e-6)
        for each in (opt, other, *schedules):
            each.step()
    opt.flush()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        for name in rule.states:
            torch.testing.assert_close(
                opt.state[p][name], other.state[q][name], rtol=1e-6, atol=1e-9
            )


def test_a_schedule_that_changes_more_than_the_rate(pointers: str) -> None:
    p = table(dtype=torch.float64)
    q = nn.Parameter(p.detach().clone())
    opt, other = exact_adam([p]), torch.optim.AdamW([q], lr=0.01)
    schedules = [lr_scheduler.OneCycleLR(each, 0.05, total_steps=301) for each in (opt, other)]
    for step in range(300):
        p.grad = some_rows(p, step, 2)
        q.grad = p.grad.to_dense()
        opt.param_groups[0]["weight_decay"] = other.param_groups[0]["weight_decay"] = step / 3000
        for each in (opt, other, *schedules):
            each.step()
    opt.flush()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bag", [None, "sum", "mean"])
def test_a_model_learns_as_with_dense_gradients(bag: str | None, pointers: str) -> None:
    model, twin = Words(bag).double(), Words(bag).double()
    twin.words.sparse = False
    opt = fst.AdamW(model.parameters(), lr=0.01, rows="exact", max_norm=0.5)
    other = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for step in range(60):
        texts = torch.randint(
            200, (16, 5), generator=torch.Generator().manual_seed(step % 10), dtype=torch.int64
        )
        opt.catch_up({model.words.weight: texts})
        assert model.learn(step) == pytest.approx(twin.learn(step), abs=1e-9)
        assert (model.words.weight.grad.to_dense() - twin.words.weight.grad).abs().max() < 1e-9
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for each in (opt, other):
            each.step()
            each.zero_grad()
        del texts
    opt.flush()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_closures_and_hooks(pointers: str) -> None:
    p = table(dtype=torch.float64)
    q = nn.Parameter(p.detach().clone())
    opt, other = exact_adam([p]), torch.optim.AdamW([q], lr=0.01)
    seen = []
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append(is_behind(opt)))
    for step in range(50):

        def closure(step: int = step) -> float:
            p.grad = some_rows(p, step, 2)
            q.grad = p.grad.to_dense()
            return 1.0

        assert opt.step(closure) == other.step(closure) == 1.0
    assert seen == [True] * 50
    opt.flush()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_gradients_without_rows_are_steps() -> None:
    """As zero_grad(set_to_none=False) and step(zero_grad=True) leave them."""
    opt, p = behind(dtype=torch.float64)
    twin, q = behind(dtype=torch.float64)
    opt.zero_grad(set_to_none=False)
    assert p.grad.is_sparse
    for _ in range(3):
        opt.step(zero_grad=True)
        q.grad = torch.zeros_like(q)
        twin.step()
    opt.flush()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_lazy_is_the_default_and_torchs_sparse_adam(pointers: str) -> None:
    params = [table(dtype=torch.float64), table(dtype=torch.float64), table(dtype=torch.float64)]
    opts = [
        fst.Adam([params[0]], lr=0.01, eps=EPS, rows="lazy"),
        fst.Adam([params[1]], lr=0.01, eps=EPS),
        torch.optim.SparseAdam([params[2]], lr=0.01, eps=EPS),
    ]
    assert opts[0].rows == opts[1].rows == "lazy"
    for step in range(200):
        for p, opt in zip(params, opts, strict=True):
            p.grad = some_rows(p, step, 3)
            opt.step()
        opts[0].catch_up(torch.arange(40))
        opts[0].flush()
    assert torch.equal(params[0], params[1])
    torch.testing.assert_close(params[0], params[2], rtol=0, atol=1e-9)


def test_a_history_that_is_full_is_made_up_for() -> None:
    p = table(4, 2)
    array = p.detach().numpy().copy()
    opt, twin = fst.NAG([p], lr=1e-3, rows="exact"), fs.NAG([array], lr=1e-3, rows="exact")
    p.grad = torch.ones(4, 2)
    opt.step()
    twin.step([p.grad.numpy()])
    p.grad = rows_of(p, [1], torch.full((1, 2), 1e-3))
    rows = [as_array(p.grad)]
    for _ in range(65_536):
        opt.step()
        twin.step(rows)
    assert not is_behind(opt)
    np.testing.assert_array_equal(p.detach().numpy(), array)


# ---- rows="exact": whatever happens in between ---------------------------------------------------


def through_state_dict(opt: Any) -> Any:
    """Another optimizer of the same parameters."""
    group = opt.param_groups[0]
    other = type(opt)(group["params"], rows="exact")
    other.load_state_dict(through_a_file(opt.state_dict()))
    return other


def copied(opt: Any, copy_of: Callable[[Any], Any]) -> Any:
    """A copy with the same parameters, which the original is not to notice."""
    before = snapshot(opt, opt.param_groups[0]["params"])
    other = copy_of(opt)
    assert_same(snapshot(opt, opt.param_groups[0]["params"]), before)
    assert_same(snapshot(other, other.param_groups[0]["params"]), before)
    return other


def one_more_group(opt: Any) -> None:
    opt.add_param_group({"params": [table(3)]})


def other_memory(opt: Any) -> None:
    p = opt.param_groups[0]["params"][0]
    p.data = p.data.clone()


def shared_memory(opt: Any) -> None:
    opt.param_groups[0]["params"][0].data.share_memory_()


def other_state(opt: Any) -> None:
    for entry in opt.state.values():
        for name in entry:
            entry[name] = entry[name].clone()


def shared_state(opt: Any) -> None:
    for entry in opt.state.values():
        for tensor in entry.values():
            tensor.share_memory_()


def other_dicts(opt: Any) -> None:
    for p in list(opt.state):
        opt.state[p] = dict(opt.state[p])
    opt.param_groups = [dict(group) for group in opt.param_groups]


def notes_in_the_state(opt: Any) -> None:
    opt.state[opt.param_groups[0]["params"][0]]["seen"] = 1
    opt.param_groups[0]["mine"] = "note"


def away_and_back(opt: Any) -> None:
    params = opt.param_groups[0]["params"]
    p = params.pop()
    opt.step()
    params.append(p)


def a_frozen_while(opt: Any) -> None:
    p = opt.param_groups[0]["params"][0]
    p.requires_grad_(False)
    p.grad = None
    opt.step()
    p.requires_grad_(True)


def a_step_that_raises(opt: Any) -> None:
    p = opt.param_groups[0]["params"][0]
    p.grad = rows_of(p, [0, 12], torch.ones(2, 3))
    with pytest.raises(IndexError):
        opt.step()


def a_skipped_step(opt: Any) -> None:
    p = opt.param_groups[0]["params"][0]
    p.grad = rows_of(p, [0, 1], torch.full((2, 3), torch.nan))
    opt.skip_nonfinite = True
    opt.step()
    opt.skip_nonfinite = False
    assert opt.skipped_steps == 1


def nothing_to_catch_up(opt: Any) -> None:
    opt.catch_up(torch.tensor([], dtype=torch.int64))


DISTURBANCES = [
    one_more_group,
    other_memory,
    shared_memory,
    other_state,
    shared_state,
    other_dicts,
    notes_in_the_state,
    away_and_back,
    a_frozen_while,
    a_step_that_raises,
    a_skipped_step,
    nothing_to_catch_up,
]


def go_on(opt: Any, start: int, steps: int = 60) -> list[Tensor]:
    p = opt.param_groups[0]["params"][0]
    for step in range(start, start + steps):
        p.grad = some_rows(p, step, 1 + step % 2)
        opt.param_groups[0]["lr"] = 0.01 / (1 + step % 7)
        opt.step()
    before = p.detach().clone()
    opt.flush()
    return [before, p.detach().clone(), *(opt.state[p].get(n, torch.zeros(0)) for n in STATES)]


STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


@pytest.mark.parametrize("rule", RESTLESS, ids=str)
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda each: each.__name__)
def test_nothing_that_is_owed_is_lost(
    rule: Rule, disturb: Callable[[Any], None], pointers: str
) -> None:
    results = []
    for is_disturbed in (True, False):
        opt, _ = behind(rule, steps=40)
        if is_disturbed:
            disturb(opt)
        results.append(go_on(opt, 0))
    assert_same(*results)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, through_pickle, through_a_file, through_state_dict]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interrupted_is_uninterrupted(
    rule: Rule, copy_of: Callable[[Any], Any], dtype: Any, pointers: str
) -> None:
    """In the middle of a block of the history, and after it; the bits are the same."""
    if rule.cls is fs.Adagrad:
        return  # checked by any sequence of operations: no row misses anything
    opt, p = behind(rule, steps=300, dtype=dtype)
    before = p.detach().clone()
    other = copied(opt, copy_of)
    if copy_of is through_state_dict:  # it has the very parameter
        q = nn.Parameter(before)
        other = type(opt)([q], rows="exact")
        other.load_state_dict(opt.state_dict())
    assert other.rows == "exact"
    assert_same(go_on(other, 0), go_on(opt, 0))


def test_copies_of_a_model_and_its_optimizer_go_on_together() -> None:
    model = Words()
    opt = fst.AdamW(model.parameters(), lr=0.01, rows="exact")
    for step in range(5):
        model.learn(step)
        opt.step()
        opt.zero_grad()
    pair = copy.deepcopy((model, opt))
    assert pair[1].param_groups[0]["params"][0] is pair[0].words.weight
    for each, its in ((model, opt), pair):
        for step in range(5):
            each.learn(step)
            its.step()
            its.zero_grad()
        its.flush()
    assert_same(model.state_dict(), pair[0].state_dict())


def test_a_state_dict_is_a_copy_of_what_was_missed() -> None:
    opt, p = behind()
    saved = opt.state_dict()
    missed = saved["state"][0]["missed_steps"].clone()
    assert missed.dtype == torch.int64
    assert missed.shape == (12,)
    assert missed.max() == 7
    assert saved["state"][0]["recent_steps"].dtype == torch.float64
    assert "missed_steps" not in opt.state[p]
    opt.flush()
    assert torch.equal(saved["state"][0]["missed_steps"], missed)
    assert list(opt.state_dict()["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]


def test_hooks_of_state_dicts_see_what_was_missed() -> None:
    opt, _ = behind()
    seen = []
    opt.register_state_dict_post_hook(lambda opt, d: seen.append("missed_steps" in d["state"][0]))
    opt.state_dict()
    opt.state_dict()
    assert seen == [True, True]


def test_loaded_state_replaces_what_was_missed() -> None:
    opt, p = behind()
    fresh = exact_adam([nn.Parameter(p.detach().clone())])
    p.grad = None
    opt.load_state_dict(fresh.state_dict())
    before = p.detach().clone()
    opt.flush()
    assert torch.equal(p, before)
    sgd, p = behind(RULES[1])  # of which groups look the same afterwards, and there is no state
    sgd.load_state_dict(make(RULES[1], [table(12, 3)]).state_dict())
    before = p.detach().clone()
    sgd.flush()
    assert torch.equal(p, before)


def test_sgd_without_state_keeps_none() -> None:
    opt, p = behind(RULES[1])
    assert {*opt.state_dict()["state"][0]} == {"missed_steps", "recent_steps"}
    other = make(RULES[1], [nn.Parameter(p.detach().clone())], rows="exact")
    other.load_state_dict(opt.state_dict())
    opt.flush()
    other.flush()
    assert torch.equal(p, other.param_groups[0]["params"][0])
    assert opt.state_dict()["state"] == other.state_dict()["state"] == {}


@pytest.mark.parametrize("rule", WITHOUT_NADAM, ids=str)
def test_array_classes_go_on_with_it(rule: Rule) -> None:
    if rule.cls is fs.Adagrad:
        return
    opt, p = behind(rule, steps=20)
    array = p.detach().numpy().copy()
    twin = rule.cls([array], rows="exact", **rule.options)
    twin.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "fusestep"})
    for step in range(20):
        p.grad = some_rows(p, step, 1)
        opt.step()
        twin.step([as_array(p.grad)])
    opt.flush()
    twin.flush()
    np.testing.assert_array_equal(p.detach().numpy(), array)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_torchs_classes_go_on_after_a_flush_and_ours_with_theirs(rule: Rule) -> None:
    p = table(dtype=torch.float64)
    q = nn.Parameter(p.detach().clone())
    opt, other = make(rule, [p], rows="exact"), torchs(rule, [q])
    for step in range(60):
        p.grad = some_rows(p, step, 2)
        q.grad = p.grad.to_dense()
        opt.step()
        other.step()
        if step % 20 == 19:  # and now the other way round
            opt.flush()
            saved = through_a_file(opt.state_dict()), through_a_file(other.state_dict())
            keys = [list(each["state"].get(0, {})) for each in saved]
            assert sorted(keys[0]) == sorted(keys[1])
            opt, other = make(rule, [p], rows="exact"), torchs(rule, [q])
            opt.load_state_dict(saved[1])
            other.load_state_dict(saved[0])
    opt.flush()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_conversion_takes_the_choice() -> None:
    p = table()
    opt = fst.convert(torch.optim.AdamW([p]), rows="exact")
    assert opt.rows == "exact"
    for step in range(3):
        p.grad = some_rows(p, step, 2)
        opt.step()
    assert is_behind(opt)


@pytest.mark.parametrize("rule", [RULES[2], RULES[7], RULES[11]], ids=str)
def test_parameters_and_state_of_another_dtype(rule: Rule, pointers: str) -> None:
    """Rows have missed steps in float32, and make up for them in float64, and the other way."""
    p = table(12, 3)
    q = nn.Parameter(p.detach().double().clone())
    opt, other = make(rule, [p], rows="exact"), torchs(rule, [q])
    for step in range(90):
        p.grad = some_rows(p, step, 1)
        q.grad = p.grad.to_dense().double()
        opt.step()
        other.step()
        if step == 30:
            p.grad = None
            p.data = p.data.double()
        if step == 60:
            for name in rule.states:
                opt.state[p][name] = opt.state[p][name].double()
    opt.flush()
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_state_that_was_widened_alone(pointers: str) -> None:
    opt, p = behind(steps=40)
    twin, q = behind(steps=40)
    for name in ("exp_avg", "exp_avg_sq"):
        opt.state[p][name] = opt.state[p][name].double()
    opt.flush()
    twin.flush()
    assert opt.state[p]["exp_avg"].dtype == torch.float64
    torch.testing.assert_close(p, q)


def test_state_in_a_narrower_dtype_is_widened_for_a_flush() -> None:
    """What is written in the course of it is in the state afterwards."""
    opt, p = behind()
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].bfloat16()
    before = opt.state[p]["exp_avg"].clone()
    opt.flush()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    assert not torch.equal(opt.state[p]["exp_avg"], before.float())
    assert not is_behind(opt)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_a_flush_before_a_first_step_makes_no_state(rule: Rule, pointers: str) -> None:
    """To SGD, state would mean that there has been a step."""
    results = []
    for flushes in (True, False):
        p, other = table(12, 3), table(12, 3, seed=1)
        opt = make(rule, [p], rows="exact")
        p.grad = some_rows(p, 0)
        opt.step()
        opt.add_param_group({"params": [other]})
        other.grad = some_rows(other, 1)
        if flushes:
            before = dict(opt.state.get(other, {}))
            opt.flush()
            opt.catch_up({other: [1, 2]})
            assert opt.state.get(other, {}) == before
        opt.step()
        opt.flush()
        results.append((p, other.detach(), dict(opt.state.get(other, {}))))
    torch.testing.assert_close(
        results[0][0], results[1][0]
    )  # its steps were made up for one by one
    assert_same(results[0][1:], results[1][1:])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES), use_table=st.booleans())
def test_any_sequence_of_operations(data: Any, rule: Rule, use_table: bool) -> None:
    """Rows that are up to date are those of torch's dense optimizer, whatever came before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fst._tensors, "USE_EXCHANGE_TABLE", use_table)
        p = table(6, 2, dtype=torch.float64)
        q = nn.Parameter(p.detach().clone())
        opt, other = make(rule, [p], rows="exact"), torchs(rule, [q])
        rows = st.lists(st.integers(0, 5), max_size=4)
        for step in range(data.draw(st.integers(1, 25))):
            name = data.draw(
                st.sampled_from(
                    [
                        "rows",
                        "rows",
                        "rows",
                        "dense",
                        "none",
                        "catch_up",
                        "flush",
                        "lr",
                        "copy",
                        "memory",
                        "group",
                        "resize",
                    ]
                )
            )
            if name in ("rows", "dense", "none"):
                p.grad = some_rows(p, step, len(data.draw(rows)))
                q.grad = p.grad.to_dense()
                if name == "dense":
                    p.grad = q.grad.clone()
                if name == "none":
                    p.grad = q.grad = None
                opt.step()
                other.step()
            elif name == "catch_up":
                wanted = data.draw(rows)
                opt.catch_up({p: wanted})
                assert torch.allclose(p[wanted], q[wanted], rtol=1e-6, atol=1e-6)
            elif name == "flush":
                opt.flush()
                assert torch.allclose(p, q, rtol=1e-6, atol=1e-6)
            elif name == "lr":
                rate = data.draw(st.sampled_from([0.0, 1e-3, 0.05]))
                opt.param_groups[0]["lr"] = other.param_groups[0]["lr"] = rate
            elif name == "copy":
                way = data.draw(st.sampled_from([copy.deepcopy, through_pickle, None]))
                if way is None:
                    saved = opt.state_dict()
                    groups = [{"params": group["params"]} for group in opt.param_groups]
                    opt = make(rule, groups, rows="exact")
                    opt.load_state_dict(saved)
                else:
                    p, opt = way((p, opt))
            elif name == "memory":
                p.data = p.data.clone()
            elif name == "group":
                opt.add_param_group({"params": [table(2)]})
            elif name == "resize":  # the other one has had the rows all along: they have rested
                larger, its = copy.deepcopy((p, opt))
                its.resize(larger, 9, init=7)
                its.flush()
                assert (larger[6:] == 7).all()
                assert torch.allclose(larger[:6], q, rtol=1e-6, atol=1e-6)
        opt.flush()
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-6)


# ---- rows="exact": what is refused ---------------------------------------------------------------


def two_tables() -> tuple[Any, Tensor, Tensor]:
    p, q = table(12, 3), table(7, 3, seed=1)
    opt = exact_adam([{"params": [p]}, {"params": [q], "lr": 0.1}])
    for step in range(5):
        p.grad, q.grad = some_rows(p, step, 2), some_rows(q, step, 1)
        opt.step()
    return opt, p, q


@pytest.mark.parametrize(
    "form",
    [
        torch.tensor([3, 1, 3]),
        torch.tensor([[3, 1], [1, 3]], dtype=torch.int32),
        torch.tensor([[3, 9, 1, 9]])[:, ::2],
        np.array([3, 1]),
        [1, 3],
        (3, 1),
    ],
    ids=str,
)
def test_forms_of_rows(form: Any) -> None:
    opt, p = behind()
    twin, q = behind()
    opt.catch_up(form)
    twin.catch_up({q: torch.tensor([1, 3])})
    assert_same(snapshot(opt, [p]), snapshot(twin, [q]))
    missed = opt.state_dict()["state"][0]["missed_steps"]
    assert missed[[1, 3]].tolist() == [0, 0]
    assert missed[8] == 7


def test_rows_of_several_tables() -> None:
    opt, p, q = two_tables()
    opt.catch_up({q: [0, 6]})
    opt.catch_up({p: None, q: None})
    opt.catch_up({})
    missed = [opt.state_dict()["state"][i].get("missed_steps") for i in (0, 1)]
    assert missed[0].max() > 0
    assert missed[1][[0, 6]].tolist() == [0, 0]


BAD_ROWS = [
    (lambda p, q: {p: [0, 12]}, IndexError, "row 12"),
    (lambda p, q: {p: [0], q: [-1]}, IndexError, "row -1"),
    (lambda p, q: {p: [0.5]}, TypeError, "list of int"),
    (lambda p, q: {p: torch.tensor([0.5])}, TypeError, "int"),
    (lambda p, q: {p: torch.tensor([True])}, TypeError, "int"),
    (lambda p, q: [0, 1], TypeError, "2 parameters"),
    (lambda p, q: torch.tensor([0]), TypeError, "2 parameters"),
    (lambda p, q: {"weight": [0]}, ValueError, "'weight', which is not a parameter"),
    (lambda p, q: {p.detach(): [0]}, ValueError, r"shape \(12, 3\), which is not a parameter"),
    (lambda p, q: {p: [1], table(2): [0]}, ValueError, "not a parameter"),
]


@pytest.mark.parametrize(("rows", "error", "words"), BAD_ROWS, ids=lambda each: str(each))
def test_bad_rows_change_nothing(rows: Any, error: type[Exception], words: str) -> None:
    opt, p, q = two_tables()
    before = snapshot(opt, [p, q])
    with pytest.raises(error, match=words):
        opt.catch_up(rows(p, q))
    assert_same(snapshot(opt, [p, q]), before)


def test_scalars_have_no_rows() -> None:
    p = nn.Parameter(torch.tensor(1.0))
    opt = exact_adam([p])
    p.grad = torch.tensor(1.0)
    opt.step()
    opt.flush()
    with pytest.raises(ValueError, match="no dimensions, and so no rows"):
        opt.catch_up([0])


def test_other_choices_are_refused() -> None:
    for cls in (fst.SGD, fst.NAG, fst.Adam, fst.AdamW, fst.NAdam, fst.Adagrad):
        with pytest.raises(ValueError, match="rows is 'dense'; expected 'lazy' or 'exact'"):
            cls([table()], lr=0.1, rows="dense")
        assert cls([table()], lr=0.1, rows="exact").rows == "exact"


def test_tables_in_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And more rows for a parameter on a device of another kind."""
    p, q = table(), table(seed=1)
    device_of = fst._tensors.device_of
    opt = exact_adam([p])
    device = torch.device("cuda:0")
    monkeypatch.setattr(
        fst._tensors, "device_of", lambda tensor: device if tensor is q else device_of(tensor)
    )
    with pytest.raises(ValueError, match="capturable=True is for CUDA graphs, and rows='exact'"):
        exact_adam([q], capturable=True)
    with pytest.raises(ValueError, match="capturable=True is for CUDA graphs, and rows='exact'"):
        opt.add_param_group({"params": [q], "capturable": True})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match="capturable=True is for CUDA graphs, and rows='exact'"):
        fst.convert(torch.optim.Adam([q], capturable=True), rows="exact")
    opt.add_param_group({"params": [q]})
    device = torch.device("xpu:0")
    with pytest.raises(TypeError, match="parameter 0 of group 1 is on xpu:0; only parameters on"):
        opt.resize(q, 20)


@pytest.mark.parametrize("rows", [11, 13])
def test_another_number_of_rows_while_some_are_behind(rows: int, pointers: str) -> None:
    """Nobody could say which of them have missed what. With the old ones back, all is well."""
    opt, p = behind(RULES[1])
    twin, q = behind(RULES[1])
    old = p.data
    p.grad = None
    p.data = torch.ones(rows, 3)
    for attempt in (opt.flush, lambda: opt.catch_up([1]), opt.release_anchor):
        with pytest.raises(ValueError, match=f"has been given {rows} rows where it had 12"):
            attempt()
    p.grad = rows_of(p, [1], torch.ones(1, 3))
    with pytest.raises(ValueError, match=f"has been given {rows} rows where it had 12"):
        opt.step()
    assert torch.equal(p, torch.ones(rows, 3))
    p.grad = None
    p.data = old
    opt.flush()
    twin.flush()
    assert_same(snapshot(opt, [p]), snapshot(twin, [q]))
    p.data = torch.ones(rows, 3)  # nothing is owed any more
    p.grad = rows_of(p, [1], torch.ones(1, 3))
    opt.step()
    opt.catch_up([rows - 1])


@pytest.mark.parametrize(
    ("rule", "change"),
    [(RULES[7], {"amsgrad": True}), (RULES[1], {"momentum": 0.9}), (RULES[3], {"momentum": 0.0})],
    ids=str,
)
def test_options_that_decide_about_state_while_rows_are_behind(
    rule: Rule, change: dict[str, Any], pointers: str
) -> None:
    opt, p = behind(rule)
    group = opt.param_groups[0]
    was = {name: group[name] for name in change}
    before = snapshot(opt, [p])
    for attempt in (opt.step, opt.flush):
        group.update(change)
        with pytest.raises(ValueError, match=r"call flush\(\) before|lacks the state"):
            attempt()
        group.update(was)
        assert_same(snapshot(opt, [p]), before)
    opt.flush()
    group.update(change)
    opt.step()


def test_state_that_is_gone_while_rows_are_behind() -> None:
    opt, p = behind()
    p.grad = None
    entry = opt.state.pop(p)
    with pytest.raises(ValueError, match="lacks the state"):
        opt.flush()
    opt.state[p] = entry
    opt.flush()
    assert not is_behind(opt)


@pytest.mark.parametrize("rule", RESTLESS, ids=str)
def test_lazy_optimizers_refuse_rows_that_are_behind(rule: Rule) -> None:
    opt, _ = behind(rule)
    lazy = make(rule, [table(12, 3)])
    before = snapshot(lazy, lazy.param_groups[0]["params"])
    with pytest.raises(ValueError, match="rows='exact', or call flush"):
        lazy.load_state_dict(opt.state_dict())
    assert_same(snapshot(lazy, lazy.param_groups[0]["params"]), before)
    opt.flush()
    lazy.load_state_dict(opt.state_dict())


def as_torch_would_cast(entry: dict[str, Any]) -> None:
    for name in ("missed_steps", "recent_steps"):
        entry[name] = entry[name].float()


DAMAGES: list[Any] = [
    lambda entry: entry.pop("missed_steps"),
    lambda entry: entry.pop("recent_steps"),
    lambda entry: entry.update(missed_steps=entry["missed_steps"][:-1]),
    lambda entry: entry.update(missed_steps=entry["missed_steps"] + 1),
    lambda entry: entry.update(missed_steps=entry["missed_steps"] - 1),
    lambda entry: entry.update(missed_steps=entry["missed_steps"].double()),
    lambda entry: entry.update(missed_steps="7"),
    lambda entry: entry.update(recent_steps=entry["recent_steps"][:, :-1]),
    lambda entry: entry.update(recent_steps=entry["recent_steps"] * torch.nan),
    lambda entry: entry.update(recent_steps=-entry["recent_steps"]),
    lambda entry: entry.update(recent_steps=entry["recent_steps"][1:]),
    as_torch_would_cast,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_histories_change_nothing(damage: Callable[[dict[str, Any]], Any]) -> None:
    opt, p = behind()
    saved = opt.state_dict()
    damage(saved["state"][0])
    for step in range(3):
        p.grad = rows_of(p, [step], torch.ones(1, 3))
        opt.step()
    before = snapshot(opt, [p])
    with pytest.raises((TypeError, ValueError), match="missed steps"):
        opt.load_state_dict(saved)
    assert_same(snapshot(opt, [p]), before)


# ---- rows="exact": autograd and memory -----------------------------------------------------------


def test_autograd_is_told_that_rows_have_moved() -> None:
    opt, p = behind()
    loss = (p * p).sum()
    opt.catch_up([9])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = (p * p).sum()
    opt.flush()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_are_not_kept_alive() -> None:
    opt, p = behind()
    assert weakref.getweakrefcount(p) == 0  # or torch.utils.swap_tensors would refuse it
    opt.flush()
    seen = weakref.ref(p)
    del opt.param_groups[0]["params"][:]
    opt.state.clear()
    del p
    opt.step()
    opt.flush()
    gc.collect()
    assert seen() is None


def test_what_cannot_be_made_up_for_is_said() -> None:
    opt, p = behind()
    opt.param_groups[0]["params"].clear()
    with pytest.warns(RuntimeWarning, match="in no group"):
        opt.flush()
    opt.param_groups[0]["params"].append(p)
    opt.flush()


# ---- anchors -------------------------------------------------------------------------------------


def some_importance(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.exponential(1, shape) ** 2 * (rng.random(shape) < 0.7)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("has_importance", [True, False])
def test_a_pull_is_the_formula(rule: Rule, has_importance: bool, pointers: str) -> None:
    p = table(5, 4, dtype=torch.float64)
    w, state = p.detach().numpy().copy(), {}
    reference = np.random.default_rng(1).standard_normal((5, 4))
    importance = some_importance((5, 4)) if has_importance else None
    opt = make(rule, [p])
    if has_importance:
        opt.anchor(3.0, [reference], [torch.from_numpy(importance)])
    else:
        opt.anchor(3.0, {p: torch.from_numpy(reference)})
    penalty = Penalty(3.0, reference, 1.0 if importance is None else importance)
    for step in range(50):
        g = np.random.default_rng(step).standard_normal((5, 4))
        w = rule.reference(w, g, state, **rule.options)
        w = pulled(w, rule.options["lr"], penalty)
        p.grad = torch.from_numpy(g)
        opt.step()
    # torch keeps NAdam's product of momenta in float32
    tolerance = 1e-6 if rule.cls is fs.NAdam else 1e-11
    np.testing.assert_allclose(p.detach().numpy(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", WITHOUT_NADAM, ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_pulls_are_those_of_the_array_class(
    rule: Rule, rows: str, dtype: Any, pointers: str
) -> None:
    """Two tasks, dense gradients and sparse ones, a release."""
    params = [table(12, 3, dtype=dtype), table(5, dtype=dtype, seed=1), table(4, dtype=dtype)]
    arrays = [p.detach().numpy().copy() for p in params]
    opt, twin = make(rule, params, rows=rows), rule.cls(arrays, rows=rows, **rule.options)
    importance = [some_importance(tuple(p.shape), i) for i, p in enumerate(params)]
    for step in range(80):
        if step == 5:
            opt.anchor({params[0]: 2.0, params[1]: 0.5})
            twin.anchor([2.0, 0.5, None])
        if step == 25:
            opt.anchor(1.5, importance=dict(zip(params[1:], importance[1:], strict=True)))
            twin.anchor(1.5, importance=[None, *importance[1:]])
            assert len(opt.anchors) == 3
        if step == 60:
            opt.release_anchor()
            twin.release_anchor()
            assert opt.anchors == {}
        params[0].grad = some_rows(params[0], step, 2)
        params[1].grad = torch.full((5,), 0.1 * (step % 5) - 0.2, dtype=dtype)
        params[1].grad = params[1].grad[:, None].expand(5, 3) if params[1].ndim == 2 else None
        params[2].grad = None if step % 3 else some_rows(params[2], step, 1).to_dense()
        gradients = [as_array(p.grad) for p in params]
        opt.step()
        twin.step(gradients)
        for p, array in zip(params, arrays, strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), array)
    opt.flush()
    twin.flush()
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), array)


def anchored(rule: Rule = RULES[11], **options: Any) -> tuple[Any, list[Tensor]]:
    params = [table(6, 2), table(3, 2, seed=1), nn.Parameter(torch.tensor(2.0))]
    opt = make(rule, params, **options)
    for step in range(3):
        step_all(params, step)
        opt.step()
    opt.anchor(2.0, {params[0]: torch.zeros(6, 2), params[2]: torch.tensor(1.0)})
    opt.anchor(3.0, importance={params[0]: some_importance((6, 2))})
    step_all(params, 3)
    opt.step()
    return opt, params


def step_all(params: list[Tensor], step: int) -> None:
    for p in params:
        if p.grad is None or not p.grad.is_sparse:
            p.grad = torch.sin(torch.arange(p.numel()).reshape(p.shape) + step).to(p.dtype)


def go_on_anchored(opt: Any) -> list[Any]:
    params = opt.param_groups[0]["params"]
    for step in range(20):
        step_all(params, 100 + step)
        opt.step()
    return snapshot(opt, params)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_a_file])
def test_anchors_travel(rule: Rule, copy_of: Callable[[Any], Any], pointers: str) -> None:
    opt, params = anchored(rule)
    other = copied(opt, copy_of)
    twin = make(rule, [nn.Parameter(p.detach().clone()) for p in params])
    twin.load_state_dict(copy_of(opt.state_dict()))
    assert [len(each.anchors) for each in (opt, other, twin)] == [2, 2, 2]
    expected = go_on_anchored(opt)
    assert_same(go_on_anchored(other), expected)
    assert_same(go_on_anchored(twin), expected)


def test_anchors_are_in_the_state() -> None:
    opt, (p, free, scalar) = anchored()
    assert list(opt.anchors) == [p, scalar]
    assert opt.anchors[p]["strength"] == opt.state[p]["anchor_strength"] == 1.0
    assert opt.anchors[p]["reference"] is opt.state[p]["anchor"]
    assert opt.anchors[p]["importance"] is opt.state[p]["anchor_importance"]
    assert opt.anchors[scalar] == {
        "strength": 2.0,
        "reference": torch.tensor(1.0),
        "importance": None,
    }
    assert "anchor_importance" not in opt.state[scalar]
    assert "anchor" not in opt.state[free]
    opt.release_anchor()
    assert not any("anchor" in name for entry in opt.state.values() for name in entry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_anchors_go_through_torchs_own_class(dtype: Any) -> None:
    """Which has state in the parameter's dtype, and knows nothing of them."""
    p = table(6, 2, dtype=dtype)
    opt = fst.Adam([p], lr=0.01)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.anchor(5.0, {p: torch.zeros_like(p)}, {p: torch.full((6, 2), 3.0)})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert opt.anchors[p]["reference"].dtype == wide
    other = torch.optim.Adam([p], lr=0.01)
    other.load_state_dict(opt.state_dict())
    other.step()
    back = fst.Adam([p], lr=0.01)
    back.load_state_dict(through_a_file(other.state_dict()))
    assert back.state[p]["anchor"].dtype == wide
    assert back.anchors[p]["strength"] == opt.anchors[p]["strength"]
    assert torch.equal(back.anchors[p]["importance"], opt.anchors[p]["importance"])
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    back.step()
    assert (p.abs() < before.abs()).all()


def test_anchors_that_are_edited_count_from_the_next_step_on(pointers: str) -> None:
    p = nn.Parameter(torch.tensor([4.0]))
    opt = fst.SGD([p], lr=0.5)
    opt.anchor(2.0, {p: torch.zeros(1)})

    def step() -> float:
        p.data = torch.tensor([4.0])
        p.grad = torch.zeros(1)
        opt.step()
        return p.item()

    entry = opt.state[p]
    assert step() == 2.0
    entry["anchor_strength"] = 6.0
    assert step() == 1.0
    entry["anchor"].fill_(8.0)
    assert step() == 7.0
    entry["anchor"] = torch.tensor([0.0], dtype=torch.bfloat16)
    assert step() == 1.0
    entry["anchor"].share_memory_()
    entry["anchor"].fill_(4.0)
    assert step() == 4.0
    entry["anchor_importance"] = torch.zeros(1, dtype=torch.float64)
    entry["anchor"].fill_(0.0)
    assert step() == 4.0
    entry["anchor_importance"].fill_(1.0)
    assert step() == 1.0
    for name, bad in [
        ("anchor", torch.zeros(2)),
        ("anchor", "here"),
        ("anchor_strength", -1.0),
        ("anchor_strength", None),
        ("anchor_importance", torch.zeros(1, dtype=torch.int64)),
    ]:
        good, entry[name] = entry[name], bad
        with pytest.raises((TypeError, ValueError), match="parameter 0"):
            step()
        assert p.item() == 4.0
        entry[name] = good
    assert step() == 1.0
    for name in ("anchor", "anchor_strength", "anchor_importance"):
        del entry[name]
    assert step() == 4.0


def test_rates_of_groups_pull(pointers: str) -> None:
    params = [nn.Parameter(torch.tensor([4.0])) for _ in range(2)]
    opt = fst.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 1.5}], lr=0.5)
    opt.anchor([2.0, 2.0], [torch.zeros(1), np.zeros(1)])
    for p in params:
        p.grad = torch.zeros(1)
    opt.step()
    assert [p.item() for p in params] == [2.0, 1.0]


def test_only_steps_pull() -> None:
    opt, params = anchored()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = None
    opt.step()
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    opt.skip_nonfinite = True
    opt.step()
    assert_same([p.detach() for p in params], before)


@pytest.mark.parametrize("rule", [RULES[3], RULES[7]], ids=str)
def test_an_anchor_before_the_first_step_is_no_state(rule: Rule) -> None:
    """To SGD, state would mean that there has been a step, and dampening would set in. To torch's
    Adam, that all of it is there."""
    results = []
    for is_anchored in (True, False):
        p = table(4, 2)
        opt = make(rule, [p])
        if is_anchored:
            opt.anchor(0.0)
            opt = copy.deepcopy(opt)
            (p,) = opt.param_groups[0]["params"]
            saved = opt.state_dict()
            other = torchs(rule, [nn.Parameter(p.detach().clone())])
            other.load_state_dict(copy.deepcopy(saved))
            other.param_groups[0]["params"][0].grad = torch.ones_like(p)
            other.step()
            opt = make(rule, [p])
            opt.load_state_dict(saved)
            assert len(opt.anchors) == 1
        p.grad = torch.ones_like(p)
        opt.step()
        if is_anchored:
            torch.testing.assert_close(p, other.param_groups[0]["params"][0])
        opt.release_anchor()
        results.append((p.detach(), dict(opt.state[p])))
    assert_same(*results)


def test_anchors_of_an_array_optimizer_and_back() -> None:
    opt, params = anchored()
    arrays = [p.detach().numpy().copy() for p in params]
    twin = fs.AdamW(arrays, lr=0.01)
    twin.load_state_dict({k: v for k, v in opt.state_dict().items() if k != "fusestep"})
    assert list(twin.anchors) == [0, 2]
    go_on_anchored(opt)
    for step in range(20):
        twin.step(
            [torch.sin(torch.arange(a.size) + 100 + step).numpy().reshape(a.shape) for a in arrays]
        )
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), array)


def test_fisher_information_of_a_list_of_parameters() -> None:
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    fisher = fs.Fisher([p.detach() for p in params])
    fisher.add([torch.randn(8, *p.shape) for p in params])
    opt = fst.Adam(params)
    opt.anchor(1000.0, importance=fisher.importance)
    np.testing.assert_allclose(
        opt.anchors[params[0]]["importance"], fisher.importance[0], rtol=1e-6
    )


BAD_ANCHORS: list[Any] = [
    (lambda p, q: (-1.0,), ValueError, "strength for parameter 0"),
    (lambda p, q: (float("nan"),), ValueError, "strength"),
    (lambda p, q: ("strong",), TypeError, "strength"),
    (lambda p, q: ([1.0],), ValueError, "1 entries for 3 parameters"),
    (lambda p, q: ({"weight": 1.0},), ValueError, "'weight', which is not a parameter"),
    (lambda p, q: (1.0, torch.zeros(6, 2)), TypeError, "reference is a Tensor; expected a dict"),
    (lambda p, q: (1.0, {p: torch.zeros(2, 6)}), ValueError, r"\(2, 6\); expected \(6, 2\)"),
    (lambda p, q: (1.0, {p: p, q: torch.zeros(1)}), ValueError, "the anchor of parameter 1"),
    (lambda p, q: (1.0, {p: torch.full((6, 2), torch.inf)}), ValueError, "not finite"),
    (lambda p, q: (1.0, {p: np.full((6, 2), 1e300)}), ValueError, "float32 cannot hold"),
    (lambda p, q: (1.0, {p: torch.zeros(6, 2, dtype=torch.bool)}), TypeError, "dtype bool"),
    (lambda p, q: (1.0, None, {p: -torch.ones(6, 2)}), ValueError, "negative somewhere"),
    (lambda p, q: (1.0, None, {p.clone(): p}), ValueError, "not a parameter"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_ANCHORS, ids=lambda each: str(each))
def test_bad_anchors_change_nothing(arguments: Any, error: type[Exception], words: str) -> None:
    opt, params = anchored()
    before = snapshot(opt, params)
    with pytest.raises(error, match=words):
        opt.anchor(*arguments(*params[:2]))
    assert_same(snapshot(opt, params), before)


def test_complex_parameters_are_not_anchored() -> None:
    p = table(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"parameter 0 is complex.*has no anchors"):
        fst.Adam([p]).anchor(1.0)


def test_parameters_without_memory_are_not_anchored() -> None:
    with pytest.raises(TypeError, match=r"parameter 0 is on meta.*has no anchors"):
        fst.Adam([nn.Parameter(torch.empty(3, device="meta"))]).anchor(1.0)


def test_present_values_that_are_not_finite() -> None:
    opt, params = anchored()
    params[1].data[0, 0] = torch.inf
    before = snapshot(opt, params)
    with pytest.raises(ValueError, match="the present value of parameter 1 is not finite"):
        opt.anchor(1.0)
    assert_same(snapshot(opt, params), before)


def test_anchors_are_taken_when_rows_are_up_to_date() -> None:
    opt, p = behind()
    twin, q = behind()
    twin.flush()
    opt.anchor(1.0)
    assert not is_behind(opt)
    assert torch.equal(opt.anchors[p]["reference"], q.detach())


def test_rows_that_were_behind_are_pulled_by_the_anchor_of_that_time() -> None:
    opt, p = behind(dtype=torch.float64)
    opt.anchor(5.0, {p: torch.zeros(12, 3)})
    other = torch.optim.AdamW([q := nn.Parameter(p.detach().clone())], lr=0.01)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch shares what it loads
    for step in range(30):
        p.grad = some_rows(p, step, 1)
        q.grad = p.grad.to_dense()
        opt.step()
        other.step()
        q.data /= 1 + 0.01 * 5.0
        if step == 20:
            opt.anchor(0.0, {p: torch.zeros(12, 3)})
    opt.release_anchor()
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("anchor"),
        lambda entry: entry.pop("anchor_strength"),
        lambda entry: entry.update(anchor=entry["anchor"][:1]),
        lambda entry: entry.update(anchor_strength=-1.0),
        lambda entry: entry.update(anchor_importance=-entry["anchor_importance"]),
        lambda entry: entry.update(anchor_importance="much"),
    ],
)
def test_damaged_anchors_change_nothing(damage: Callable[[dict[str, Any]], Any]) -> None:
    opt, params = anchored()
    saved = copy.deepcopy(opt.state_dict())
    damage(saved["state"][0])
    before = snapshot(opt, params)
    with pytest.raises((TypeError, ValueError), match="parameter 0"):
        opt.load_state_dict(saved)
    assert_same(snapshot(opt, params), before)


# ---- tables that grow ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize("has_anchor", [False, True])
def test_growing_is_that_of_the_array_class(
    rule: Rule, rows: str, has_anchor: bool, pointers: str
) -> None:
    if rule.cls is fs.NAdam:
        return
    p, q = table(12, 3), table(4, 2, seed=1)
    arrays = [each.detach().numpy().copy() for each in (p, q)]
    opt, twin = make(rule, [p, q], rows=rows), rule.cls(arrays, rows=rows, **rule.options)
    for step in range(60):
        if step == 10 and has_anchor:
            opt.anchor(2.0, importance=[some_importance((12, 3)), None])
            twin.anchor(2.0, importance=[some_importance((12, 3)), None])
        if step in (15, 30, 31):
            count = len(p) + step % 4
            init = np.random.default_rng(step).standard_normal((count - len(p), 3))
            before, id_before = p.detach().clone(), id(p)
            assert opt.resize(p, count, init=torch.from_numpy(init)) is None
            twin.resize(0, count, init=init)
            assert p.shape == (count, 3)
            assert id(p) == id_before
            if not has_anchor:  # which has changed: what was missed is made up for with the old one
                assert torch.equal(p[: len(before)], before)
        p.grad, q.grad = some_rows(p, step, 2), torch.full((4, 2), 0.1)
        gradients = [as_array(each.grad) for each in (p, q)]
        opt.step()
        twin.step(gradients)
    np.testing.assert_array_equal(p.detach().numpy(), twin.params[0])
    opt.flush()
    twin.flush()
    np.testing.assert_array_equal(p.detach().numpy(), twin.params[0])
    for name in rule.states:
        np.testing.assert_array_equal(opt.state[p][name].numpy(), twin.state[0][name])


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("keeps_graphs", [True, False])
def test_a_module_goes_on(sparse: bool, keeps_graphs: bool, pointers: str) -> None:
    """Also while the graphs of earlier losses are held, which know the shape that it had."""
    words = nn.Embedding(10, 4, sparse=sparse)
    weight = words.weight
    opt = fst.Adam(words.parameters(), lr=0.1)
    schedule = lr_scheduler.ExponentialLR(opt, 0.9)
    calls = []
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    graphs = []
    for step in range(6):
        opt.zero_grad()
        loss = words(torch.tensor([1, 9 + 2 * step])).square().sum()
        loss.backward()
        opt.step()
        schedule.step()
        graphs.append(loss if keeps_graphs else None)
        opt.resize(words.weight, 12 + 2 * step, init=lambda shape: torch.ones(shape))
        words.num_embeddings = len(words.weight)
    assert words.weight is weight
    assert weight.is_leaf
    assert weight.requires_grad
    assert calls == [(10 + 2 * step, 4) for step in range(6)]
    assert opt.state[weight]["exp_avg"].shape == (22, 4)
    assert (weight[19] < 1).all()
    assert (weight[20:] == 1).all()
    larger = nn.Embedding(22, 4)
    larger.load_state_dict(words.state_dict())


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_grow_with_their_table(sparse: bool) -> None:
    results = []
    for resizes_first in (True, False):
        p = table(5, 2)
        opt = fst.AdamW([p], lr=0.1)
        if resizes_first:
            opt.resize(p, 8, init=1)
        g = some_rows(p, 0, 3) if not resizes_first else None
        small = table(5, 2)
        g = rows_of(p, (given := some_rows(small, 0, 3))._indices(), given._values())
        p.grad = g if sparse else g.to_dense()
        if not resizes_first:
            opt.resize(p, 8, init=1)
            assert p.grad.shape == (8, 2)
        opt.step()
        results.append(snapshot(opt, [p]))
    assert_same(*results)


@pytest.mark.parametrize("shape", [(0, 2), (3,), (2, 3, 4), (1, 0)], ids=str)
def test_shapes_of_tables(shape: tuple[int, ...]) -> None:
    p = table(*shape)
    opt = fst.NAG([p], lr=0.1, rows="exact")
    before = p.detach().clone()
    opt.resize(p, shape[0] + 2, init=3.0)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.resize(p, shape[0] + 2)
    opt.resize(p, shape[0] + 4)
    assert torch.equal(p[: shape[0]], before - 0.19)
    assert torch.equal(p[shape[0] + 2 :], torch.zeros(2, *shape[1:]))
    p.grad = rows_of(p, [0], torch.ones(1, *shape[1:]))
    opt.step()
    opt.flush()


def test_rows_of_a_transposed_table() -> None:
    p = nn.Parameter(table(3, 5).detach().t())
    opt = fst.Adam([p])
    p.grad = torch.ones(5, 3)
    opt.step()
    state = opt.state[p]["exp_avg"].clone()
    before = p.detach().clone()
    opt.resize(p, 6)
    assert torch.equal(p[:5], before)
    assert torch.equal(opt.state[p]["exp_avg"][:5], state)
    p.grad = torch.ones(6, 3)
    opt.step()


BAD_SIZES: list[Any] = [
    (lambda p, q: (torch.zeros(6, 2), 7), KeyError, "not a parameter"),
    (lambda p, q: (0, 7), KeyError, "not a parameter"),
    (lambda p, q: (p, 5), ValueError, "parameter 0 has 6 rows; it cannot be resized to 5"),
    (lambda p, q: (p, 7.5), TypeError, "float"),
    (lambda p, q: (p, 8, torch.zeros(1, 2)), ValueError, r"\(2, 2\); init has shape \(1, 2\)"),
    (lambda p, q: (p, 8, "zeros"), TypeError, "init"),
    (lambda p, q: (p, 8, lambda shape: torch.zeros(2)), ValueError, "init has shape"),
    (lambda p, q: (q, 8), ValueError, "parameter 2 has no dimensions"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_SIZES, ids=lambda each: str(each))
def test_bad_sizes_change_nothing(arguments: Any, error: type[Exception], words: str) -> None:
    opt, params = anchored()
    before = snapshot(opt, params)
    with pytest.raises(error, match=words):
        opt.resize(*arguments(params[0], params[2]))
    assert_same(snapshot(opt, params), before)


@pytest.mark.parametrize("what", ["grown", "new", "gradient"])
def test_memory_that_is_not_to_be_had_changes_nothing(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusestep import _penalties
    from fusestep.torch import _state, _tables

    opt, params = anchored()
    before = snapshot(opt, params)
    module, name = {
        "grown": (_penalties, "grown"),
        "new": (_state, "new"),
        "gradient": (_tables, "_grown_gradient"),
    }[what]

    def full(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(MemoryError):
            opt.resize(params[0], 9)
    assert_same(snapshot(opt, params), before)
    opt.resize(params[0], 9)
    params[0].grad = torch.ones(9, 2)
    opt.step()


def test_new_rows_are_not_anchored() -> None:
    opt, (p, *_) = anchored(RULES[1])
    opt.resize(p, 9, init=5.0)
    assert (opt.anchors[p]["importance"][6:] == 0).all()
    p.grad = torch.zeros(9, 2)
    opt.step()
    torch.testing.assert_close(p[6:], torch.full((3, 2), 5.0 * (1 - 0.1 * 0.1)))


def test_a_grown_table_travels() -> None:
    opt, p = behind()
    opt.resize(p, 15, init=1.0)
    p.grad = rows_of(p, [14, 2], torch.ones(2, 3))
    opt.step()
    other = copied(opt, copy.deepcopy)
    assert_same(go_on(other, 0), go_on(opt, 0))


def test_autograd_does_not_take_an_old_graph_for_a_new_one() -> None:
    p = table(4, 2)
    opt = fst.SGD([p], lr=0.1)
    loss = (p * p).sum()
    opt.resize(p, 5)
    with pytest.raises(RuntimeError):
        loss.backward()
    assert p.grad is None
    (p * p).sum().backward()
    opt.step()


# ---- threads -------------------------------------------------------------------------------------


def test_steps_and_readers_at_the_same_time() -> None:
    """Each waits for its turn; in the end, every step has been taken in every row."""
    p = table(300, 40, dtype=torch.float64)
    q = nn.Parameter(p.detach().clone())
    opt, other = exact_adam([p]), torch.optim.AdamW([q], lr=0.01)

    def work(thread: int) -> None:
        for _ in range(30):
            if thread == 0:
                for _ in range(3):
                    opt.step()
            elif thread == 1:
                opt.catch_up(torch.arange(0, 300, 7))
                opt.state_dict()
            else:
                opt.flush()
                opt.resize(p, 300)

    p.grad = rows_of(p, torch.arange(100), torch.ones(100, 40, dtype=torch.float64))
    q.grad = p.grad.to_dense()
    in_threads(3, work)
    opt.flush()
    for _ in range(90):
        other.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
