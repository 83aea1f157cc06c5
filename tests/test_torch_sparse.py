"""fusestep.torch: sparse gradients, as nn.Embedding(sparse=True) makes them."""

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
from rules import PLAIN, RULES, Rule

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from torch_copies import assert_same, snapshot, through_a_file, through_pickle  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# torch's Adagrad warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are:UserWarning")

EPS = 1e-12  # torch's SparseAdam adds it before the bias correction


def table(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape or (40, 3), generator=generator, dtype=torch.float64)
    return nn.Parameter(numbers.to(dtype))


def rows_of(p: Tensor, rows: Any, values: Tensor) -> Tensor:
    rows = torch.as_tensor(rows, dtype=torch.int64).reshape(1, -1)
    return torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=False)


def some_rows(p: Tensor, seed: int, count: int = 12) -> Tensor:
    """A gradient of rows of which some come several times."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.randint(max(p.shape[0], 1), (count,), generator=generator)
    values = torch.randn((count, *p.shape[1:]), generator=generator, dtype=torch.float64)
    return rows_of(p, rows, values.to(p.dtype))


def coalesced(gradient: Tensor) -> Tensor:
    return gradient.coalesce()


def as_it_is(gradient: Tensor) -> Tensor:
    return gradient


in_both_forms = pytest.mark.parametrize("form", [coalesced, as_it_is])


def train(opt: Any, params: list[Tensor], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = some_rows(p, 10 * step + i)
        opt.step()


def make(rule: Rule, params: Any, **options: Any) -> Any:
    return getattr(fst, rule.cls.__name__)(params, **{**rule.options, **options})


# ---- the same steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@in_both_forms
def test_the_bits_are_those_of_the_array_class(
    rule: Rule, form: Callable[[Tensor], Tensor], pointers: str
) -> None:
    """Beside a dense parameter; in some steps there is no sparse gradient, or a dense one."""
    params = [table(), table(5, 4, seed=1), table(30, seed=2)]
    arrays = [p.detach().numpy().copy() for p in params]
    opt, twin = make(rule, params), rule.cls(arrays, **rule.options)
    for step in range(20):
        params[0].grad = form(some_rows(params[0], step))
        params[1].grad = torch.full((5, 4), 0.1 * step - 1)
        params[2].grad = None if step % 3 == 0 else form(some_rows(params[2], -step))
        if step % 5 == 4:
            params[0].grad = params[0].grad.to_dense()
        gradients = [as_array(p.grad) for p in params]
        opt.step()
        twin.step(gradients)
    for i, (p, array) in enumerate(zip(params, arrays, strict=True)):
        np.testing.assert_array_equal(p.detach().numpy(), array)
        for name in rule.states:
            np.testing.assert_array_equal(opt.state[p][name].numpy(), twin.state[i][name])


def as_array(gradient: Tensor | None) -> Any:
    if gradient is None:
        return None
    if not gradient.is_sparse:
        return gradient.numpy()
    return fs.Rows(gradient._indices()[0].numpy(), gradient._values().numpy())


def same_course(opt: Any, other: Any, params: Any, others: Any, form: Any = as_it_is) -> None:
    """Two hundred steps, never brought back together; the learning rate falls."""
    rate = opt.param_groups[0]["lr"]
    for step in range(200):
        for p, q in zip(params, others, strict=True):
            p.grad = form(some_rows(p, step))
            q.grad = p.grad.clone()
        for each in (opt, other):
            each.param_groups[0]["lr"] = rate / (1 + step / 50)
            each.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def doubles() -> list[Tensor]:
    return [table(dtype=torch.float64), table(25, dtype=torch.float64, seed=1)]


@in_both_forms
@pytest.mark.parametrize("maximize", [False, True])
def test_adam_is_torchs_sparse_adam(form: Any, maximize: bool, pointers: str) -> None:
    params, others = doubles(), doubles()
    opt = fst.Adam(params, lr=0.01, eps=EPS, maximize=maximize)
    other = torch.optim.SparseAdam(others, lr=0.01, eps=EPS, maximize=maximize)
    same_course(opt, other, params, others, form)
    for p, q in zip(params, others, strict=True):
        assert opt.state[p]["step"] == other.state[q]["step"]
        torch.testing.assert_close(opt.state[p]["exp_avg"], other.state[q]["exp_avg"])


@in_both_forms
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_is_torchs(form: Any, maximize: bool, pointers: str) -> None:
    params, others = doubles(), doubles()
    opt = fst.SGD(params, lr=0.1, maximize=maximize)
    other = torch.optim.SGD(others, lr=0.1, maximize=maximize, foreach=False)
    same_course(opt, other, params, others, form)


@in_both_forms
@pytest.mark.parametrize(
    "options", [{}, {"lr_decay": 0.01, "initial_accumulator_value": 0.5}, {"maximize": True}]
)
def test_adagrad_is_torchs(form: Any, options: dict[str, Any], pointers: str) -> None:
    params, others = doubles(), doubles()
    opt = fst.Adagrad(params, lr=0.1, **options)
    other = torch.optim.Adagrad(others, lr=0.1, foreach=False, **options)
    same_course(opt, other, params, others, form)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_all_rows_are_a_dense_gradient(rule: Rule, pointers: str) -> None:
    params, others = [table()], [table()]
    opt, other = make(rule, params), make(rule, others)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        order = torch.randperm(40, generator=generator)
        values = torch.randn(40, 3, generator=generator)
        params[0].grad = rows_of(params[0], order, values)
        others[0].grad = params[0].grad.to_dense()
        opt.step()
        other.step()
    assert_same(snapshot(opt, params), snapshot(other, others))


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_absent_rows_stay(rule: Rule, pointers: str) -> None:
    p = table()
    opt = make(rule, [p])
    train(opt, [p], 3)
    before = copy.deepcopy([p.detach(), *(opt.state[p][name] for name in rule.states)])
    p.grad = rows_of(p, [7, 2, 7], torch.ones(3, 3))
    opt.step()
    for old, new in zip(before, [p, *(opt.state[p][name] for name in rule.states)], strict=True):
        assert sorted((old != new).any(1).nonzero().flatten().tolist()) == [2, 7]
    if rule.states and rule.cls not in (fs.SGD, fs.NAG):
        assert opt.state[p]["step"] == 4


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(PLAIN),
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16", "complex64", "complex128"]),
    count=st.integers(0, 20),
    layout=st.sampled_from(["plain", "transposed", "every other", "expanded"]),
    use_table=st.booleans(),
)
def test_any_table(
    rule: Rule, shape: list[int], dtype: str, count: int, layout: str, use_table: bool
) -> None:
    """One step is the step with the sum of the values, gathered beforehand by row."""
    count = count if shape[0] else 0
    p = table(*shape, dtype=getattr(torch, dtype))
    if layout == "transposed":
        p = nn.Parameter(p.detach().transpose(0, -1).contiguous().transpose(0, -1))
    twin = nn.Parameter(p.detach().clone())
    gradient = some_rows(p, 0, count)
    rows, values = gradient._indices()[0], gradient._values()
    if layout == "every other":
        values = torch.stack([values, values], -1)[..., 0]
        rows = torch.stack([rows, rows], -1)[:, 0]
    if layout == "expanded":
        values = values[:1].expand(values.shape)
    p.grad = rows_of(p, rows, values)
    present = rows.unique()
    wide = torch.complex128 if p.is_complex() else torch.float64
    sums = torch.zeros(len(present), *shape[1:], dtype=wide)
    sums.index_add_(0, torch.searchsorted(present, rows.contiguous()), values.to(wide))
    twin.grad = rows_of(twin, present, sums.to(p.dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fst._tensors, "USE_EXCHANGE_TABLE", use_table)
        for each in (p, twin):
            make(rule, [each], state_dtype=torch.float64).step()
    tolerance = {"float64": 1e-9, "complex128": 1e-9}.get(dtype, 2e-2)
    torch.testing.assert_close(p, twin, rtol=tolerance, atol=tolerance)


def test_complex_tables_are_seen_as_real(pointers: str) -> None:
    p = table(9, 2, dtype=torch.complex64)
    parts = nn.Parameter(torch.view_as_real(p.detach()).clone())
    opt, other = fst.Adam([p]), fst.Adam([parts])
    for step in range(5):
        p.grad = some_rows(p, step)
        values = torch.view_as_real(p.grad._values())
        parts.grad = rows_of(parts, p.grad._indices(), values)
        opt.step()
        other.step()
    assert torch.equal(torch.view_as_real(p.detach()), parts)


def test_values_of_another_dtype(pointers: str) -> None:
    """As a parameter's that has been converted since."""
    p = table()
    p.grad = rows_of(p, [1, 3], torch.full((2, 3), 0.1))
    p.data = p.data.double()
    expected = p.detach().clone()
    expected[[1, 3]] -= float(np.float32(0.1))
    fst.SGD([p], lr=1.0).step()
    assert torch.equal(p, expected)


# ---- models --------------------------------------------------------------------------------------


class Words(nn.Module):
    """Which of two kinds a short text is."""

    def __init__(self, bag: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        if bag is None:
            self.words: nn.Module = nn.Embedding(200, 8, sparse=True)
        else:
            self.words = nn.EmbeddingBag(200, 8, sparse=True, mode=bag)
        self.head = nn.Linear(8, 2)

    def forward(self, texts: Tensor) -> Tensor:
        words = self.words(texts)
        return self.head(words.sum(1) if words.ndim == 3 else words)

    def learn(self, step: int, form: Any = as_it_is) -> float:
        generator = torch.Generator().manual_seed(step % 10)
        texts = torch.randint(200, (16, 5), generator=generator)
        loss = nn.functional.cross_entropy(self(texts), texts[:, 0] % 2)
        loss.backward()
        self.words.weight.grad = form(self.words.weight.grad)
        return loss.item()


@in_both_forms
@pytest.mark.parametrize("bag", [None, "sum", "mean"])
def test_a_model_learns_as_with_torchs_optimizers(
    form: Any, bag: str | None, pointers: str
) -> None:
    """One optimizer for what takes two of torch's."""
    model, twin = Words(bag).double(), Words(bag).double()
    opt = fst.Adam(model.parameters(), lr=0.01, eps=EPS)
    others = [
        torch.optim.SparseAdam(twin.words.parameters(), lr=0.01, eps=EPS),
        torch.optim.Adam(twin.head.parameters(), lr=0.01, eps=EPS),
    ]
    losses = []
    for step in range(50):
        losses.append(model.learn(step, form))
        twin.learn(step)
        for each in (opt, *others):
            each.step()
            each.zero_grad()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_a_model_learns_with_every_rule(rule: Rule) -> None:
    model = Words()
    opt = make(rule, model.parameters())
    losses = []
    for step in range(50):
        losses.append(model.learn(step))
        opt.step()
        opt.zero_grad()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_a_step_inside_backward() -> None:
    model, twin = Words(), Words()
    p = model.words.weight
    opt, other = fst.Adam([p]), fst.Adam([twin.words.weight])

    def step(p: Tensor) -> None:
        opt.step()
        opt.zero_grad()

    p.register_post_accumulate_grad_hook(step)
    for i in range(3):
        nn.functional.cross_entropy(model(torch.tensor([[i, i, 9]])), torch.tensor([1])).backward()
        nn.functional.cross_entropy(twin(torch.tensor([[i, i, 9]])), torch.tensor([1])).backward()
        other.step()
        other.zero_grad()
    assert torch.equal(p, twin.words.weight)


def test_gradients_that_are_accumulated(pointers: str) -> None:
    model, twin = Words(), Words()
    opt, other = fst.SGD(model.parameters()), fst.SGD(twin.parameters())
    for step in range(3):
        model.learn(step)
        twin.learn(step)
    twin.words.weight.grad = twin.words.weight.grad.to_dense()
    opt.step()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_groups_and_schedules(pointers: str) -> None:
    """Two tables with options of their own, as two optimizers would move them."""
    params, others = [table(), table(seed=1)], [table(), table(seed=1)]
    opt = fst.AdamW(
        [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:], "lr": 0.1}]
    )
    others_of = [fst.AdamW(others[:1], weight_decay=0.3), fst.AdamW(others[1:], lr=0.1)]
    schedulers = [lr_scheduler.ExponentialLR(each, 0.9) for each in (opt, *others_of)]
    for step in range(6):
        for p, q in zip(params, others, strict=True):
            p.grad = some_rows(p, step)
            q.grad = some_rows(q, step)
        for each in (opt, *others_of, *schedulers):
            each.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler(fused: bool) -> None:
    """What overflows leaves out the step."""
    p, q = table(), table()
    opt, other = fst.Adam([p], fused=fused), fst.Adam([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        scaler.scale(torch.ones(()))
        p.grad = some_rows(p, step) * scaler.get_scale()
        if step == 2:
            p.grad._values()[3, 1] = float("inf")
        else:
            q.grad = some_rows(q, step)
            other.step()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 512
    assert opt.state[p]["step"] == 4
    torch.testing.assert_close(p, q)


# ---- what a step can do besides ------------------------------------------------------------------


def test_grad_scale(pointers: str) -> None:
    p, q = table(), table()
    opt, other = fst.Adam([p]), fst.Adam([q])
    for step in range(3):
        p.grad, q.grad = some_rows(p, step) * 256, some_rows(q, step)
        opt.step(grad_scale=1 / 256)
        other.step()
    assert torch.equal(p, q)


def test_max_norm_is_over_sparse_and_dense_gradients(pointers: str) -> None:
    params, others = ([table(), table(4, 5, seed=1)] for _ in range(2))
    opt, other = fst.SGD(params, lr=1.0, max_norm=0.5), torch.optim.SGD(others, lr=1.0)
    for step in range(5):
        for each in (params, others):
            each[0].grad = some_rows(each[0], step)
            each[1].grad = torch.full((4, 5), 0.3)
        others[0].grad = others[0].grad.to_dense()
        nn.utils.clip_grad_norm_(others, 0.5)
        opt.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_skipping_what_is_not_finite(bad: float, zero_grad: bool, pointers: str) -> None:
    params = [table(), table(4, 5, seed=1)]
    opt = fst.Adam(params, skip_nonfinite=True)
    train(opt, params, 2)
    params[0].grad = some_rows(params[0], 5)
    params[0].grad._values()[3, 1] = bad
    before = snapshot(opt, params)
    opt.step(zero_grad=zero_grad)
    after = snapshot(opt, params)
    assert after[1].pop("fusestep")["skipped_steps"] == opt.skipped_steps == 1
    del before[1]["fusestep"]
    assert_same(after, before)
    assert bool(params[0].grad.to_dense().any()) != zero_grad


def test_clearing_gradients(pointers: str) -> None:
    """They stay sparse and have no rows, as after torch's own: none that would move next time."""
    params, others = [table(), table(4, 5, seed=1)], [table(), table(4, 5, seed=1)]
    opt, other = fst.Adam(params), fst.Adam(others)
    for step in range(4):
        for each in (params, others):
            for p in each:
                gradient = some_rows(p, step)
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        gradients = [p.grad for p in params]
        versions = [gradient._version for gradient in gradients]
        values = gradients[0]._values()
        opt.step(zero_grad=True)
        other.step()
        other.zero_grad(set_to_none=False)
        assert not values.any()
        for p, gradient, version in zip(params, gradients, versions, strict=True):
            assert p.grad is gradient
            assert p.grad.is_sparse
            assert p.grad._nnz() == 0
            assert p.grad._version > version
    assert_same(snapshot(opt, params), snapshot(other, others))


def test_clearing_a_gradient_that_has_a_graph(pointers: str) -> None:
    p = table()
    p.grad = rows_of(p, [3, 4], torch.ones(2, 3, requires_grad=True))
    p.grad = p.grad.detach().requires_grad_()
    fst.SGD([p]).step(zero_grad=True)
    assert p.grad._nnz() == 0


def test_values_that_overlap_themselves_cannot_be_cleared(pointers: str) -> None:
    p = table()
    p.grad = rows_of(p, [3, 4], torch.ones(1, 1).expand(2, 3))
    before = p.detach().clone()
    opt = fst.SGD([p])
    with pytest.raises(ValueError, match="gradient of parameter 0 overlaps itself"):
        opt.step(zero_grad=True)
    assert torch.equal(p, before)
    assert p.grad.to_dense().sum() == 6


def test_two_gradients_with_the_same_values_cannot_be_cleared(pointers: str) -> None:
    params = [table(), table(seed=1)]
    values = torch.ones(2, 3)
    for p in params:
        p.grad = rows_of(p, [3, 4], values)
    opt = fst.SGD(params)
    with pytest.raises(ValueError, match="two gradients share memory"):
        opt.step(zero_grad=True)
    opt.step()


def test_autograd_knows_that_parameters_have_changed(pointers: str) -> None:
    p = table()
    loss = (p**2).sum()
    version = p._version
    p.grad = some_rows(p, 0)
    fst.Adam([p]).step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_no_rows_at_all(rule: Rule, pointers: str) -> None:
    """The step counts, as with torch's SparseAdam."""
    p = table()
    opt = make(rule, [p], max_norm=1.0, skip_nonfinite=True)
    before = p.detach().clone()
    p.grad = rows_of(p, [], torch.empty(0, 3))
    opt.step()
    opt.step(zero_grad=True)
    assert torch.equal(p, before)
    assert list(opt.state[p]) == [*opt._rules[0].scalars, *rule.states]
    if "step" in opt.state[p]:
        assert opt.state[p]["step"] == 2
    train(opt, [p], 1)
    assert not torch.equal(p, before)


# ---- state ---------------------------------------------------------------------------------------


def test_sparse_adams_state_is_adams(pointers: str) -> None:
    """There and back: the trajectory is the one that it would have been."""
    params, others = doubles(), doubles()
    theirs = torch.optim.SparseAdam(others, lr=0.01, eps=EPS)
    for opt, each in ((theirs, others), (torch.optim.SparseAdam(params, lr=0.01, eps=EPS), params)):
        train(opt, each, 5)
    ours = fst.Adam(params)
    ours.load_state_dict(opt.state_dict())
    assert isinstance(opt.state[params[0]]["step"], int)
    assert ours.state[params[0]]["step"] == 5
    train(ours, params, 5, start=5)
    train(theirs, others, 5, start=5)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    back = torch.optim.SparseAdam(params)
    back.load_state_dict(ours.state_dict())
    train(back, params, 5, start=10)
    train(theirs, others, 5, start=10)
    for p, q in zip(params, others, strict=True):  # it computes with step, now a float32 tensor
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["load", "convert"])
def test_sgds_sparse_momentum_becomes_dense(how: str, pointers: str) -> None:
    """Which is what torch's SGD keeps where all its gradients have been sparse."""
    params, others = [table(dtype=torch.float64)], [table(dtype=torch.float64)]
    opt, other = (torch.optim.SGD(x, lr=0.1, momentum=0.9) for x in (params, others))
    train(opt, params, 3)
    train(other, others, 3)
    assert opt.state[params[0]]["momentum_buffer"].is_sparse
    if how == "convert":
        ours = fst.convert(opt)
    else:
        ours = fst.SGD(params, lr=0.1, momentum=0.9)
        ours.load_state_dict(opt.state_dict())
    for p in (params[0], others[0]):
        p.grad = some_rows(p, 3).to_dense()
    other.state[others[0]]["momentum_buffer"] = other.state[others[0]]["momentum_buffer"].to_dense()
    ours.step()
    other.step()
    assert ours.state[params[0]]["momentum_buffer"].layout is torch.strided
    torch.testing.assert_close(params[0], others[0])


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_go_on_alike(through: Callable[[Any], Any]) -> None:
    params = [table(), table(4, 5, seed=1)]
    opt = fst.NAdam(params, max_norm=1.0)
    train(opt, params, 3)
    other, others = through((opt, params))
    train(opt, params, 3, start=3)
    train(other, others, 3, start=3)
    assert_same(snapshot(other, others), snapshot(opt, params))


@pytest.mark.parametrize("cls", [fst.Adam, fst.Adagrad, fst.SGD])
def test_state_has_the_shape_of_the_table(cls: Any, pointers: str) -> None:
    p = table(dtype=torch.bfloat16)
    opt = cls([p], **({"momentum": 0.9} if cls is fst.SGD else {}))
    train(opt, [p], 1)
    for name, value in opt.state_dict()["state"][0].items():
        assert value.layout is torch.strided
        assert value.dtype is torch.float32
        assert value.shape == (() if name == "step" else p.shape)


# ---- all or nothing ------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "a row too far": (
        lambda p: rows_of(p, [3, 40], torch.ones(2, 3)),
        IndexError,
        r"gradient of parameter 1 has row 40 \(at position 1 .*expected 0 to 39",
    ),
    "a row before the first": (
        lambda p: rows_of(p, [-1], torch.ones(1, 3)),
        IndexError,
        "gradient of parameter 1 has row -1",
    ),
    "single elements": (
        lambda p: torch.ones(p.shape).to_sparse(),
        TypeError,
        "gradient of parameter 1 is sparse in 2 dimensions; expected one of rows",
    ),
    "itself": (
        lambda p: rows_of(p, [1, 3], p.detach()[5:7]),
        ValueError,
        "gradient of parameter 1 shares memory with parameter 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_raises_has_changed_nothing(
    rule: Rule, case: str, steps_before: int, pointers: str
) -> None:
    gradient, error, message = BAD[case]
    params = [table(), table(seed=1)]
    opt = make(rule, params)
    train(opt, params, steps_before)
    for step, p in enumerate(params):
        p.grad = some_rows(p, 90 + step)
    params[1].grad = gradient(params[1])
    before = snapshot(opt, params)
    versions = [p._version for p in params]
    for zero_grad in (False, True):
        with pytest.raises(error, match=message):
            opt.step(zero_grad=zero_grad)
    assert_same(snapshot(opt, params), before)
    assert [p._version for p in params] == versions
    assert params[0].grad.to_dense().any()
    others = [table(), table(seed=1)]
    other = make(rule, others)
    train(other, others, steps_before)
    for each, each_opt in ((params, opt), (others, other)):
        train(each_opt, each, 2, start=20)
    assert_same(snapshot(opt, params), snapshot(other, others))


def test_a_gradient_from_before_the_table_shrank(pointers: str) -> None:
    p = table()
    p.grad = rows_of(p, [1, 3], torch.ones(2, 3))
    p.data = p.data[:30].clone()
    with pytest.raises(ValueError, match="gradient of parameter 0 is of 40 rows; expected 30"):
        fst.SGD([p]).step()
    p = table()
    p.grad = rows_of(p, [1, 3], torch.ones(2, 3))
    p.data = p.data[:, :2].clone()
    with pytest.raises(ValueError, match=r"the rows for parameter 0 have values of shape \(2, 3\)"):
        fst.SGD([p]).step()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("cls", [fst.SGD, fst.Adam])
def test_a_sparse_parameter_is_refused(cls: Any, layout: Any, pointers: str) -> None:
    p = torch.ones(4, 3).to_sparse(layout=layout)
    p.grad = p.clone()
    with pytest.raises(TypeError, match=f"parameter 0 is sparse .{layout}.; expected a dense"):
        cls([p]).step()


# ---- tensors of other kinds ----------------------------------------------------------------------


class Named(nn.Parameter):
    pass


def test_a_parameter_of_a_class_of_its_own(pointers: str) -> None:
    p, q = Named(table().detach()), table()
    train(fst.Adam([p]), [p], 3)
    train(fst.Adam([q]), [q], 3)
    assert torch.equal(p.detach().as_subclass(torch.Tensor), q)


def test_a_graph_of_the_gradient(pointers: str) -> None:
    """What backward(create_graph=True) leaves: a gradient that itself has one."""
    p, q = table(), table()
    factor = torch.full((2, 1), 0.5, requires_grad=True)
    p.grad = rows_of(p, [3, 4], factor * torch.ones(2, 3))
    q.grad = rows_of(q, [3, 4], torch.full((2, 3), 0.5))
    assert p.grad.requires_grad
    for each in (p, q):
        fst.Adam([each]).step()
    assert torch.equal(p, q)


def test_nothing_stays_behind(pointers: str) -> None:
    p = table()
    opt = fst.Adam([p])
    for step in range(2):
        p.grad = some_rows(p, step)
        gradient, values = weakref.ref(p.grad), weakref.ref(p.grad._values().untyped_storage())
        opt.step(zero_grad=step == 1)
        opt.zero_grad()
        gc.collect()
        assert gradient() is None
        assert values() is None


def test_steps_change_no_bit_with_the_number_of_threads() -> None:
    tables = []
    for threads in (1, 2, 5):
        fs.set_num_threads(threads)
        p = table(5000, 16)
        opt = fst.Adam([p], max_norm=1.0)
        for step in range(3):
            p.grad = some_rows(p, step, 20_000)
            opt.step()
        tables.append(p.detach())
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
