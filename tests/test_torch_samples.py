"""Gradients of samples in fusestep.torch: beside Opacus, and as the array classes take them."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

SHAPES = [(4, 3), (4,), ()]
CLASSES = ["SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad"]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "NAG": {"lr": 0.1}}


def leaves(dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def give(params: Iterable[Tensor], count: int, seed: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    values = []
    for p in params:
        p.grad_sample = torch.randn((count, *p.shape), generator=generator, dtype=p.dtype)
        values.append(p.grad_sample.numpy().copy())
    return values


def network() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)]
    return torch.nn.Sequential(*layers).double()


def batch(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, 6), generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_as_the_array_classes(name: str, max_norm: float | None) -> None:
    """With weights of any kind, selections, noise and all: bit for bit."""
    params = leaves()
    arrays = [p.detach().numpy().copy() for p in params]
    options = OPTIONS.get(name, {})
    opt = getattr(fst, name)(params, seed=5, **options)
    ours = getattr(fs, name)(arrays, seed=5, **options)
    how: dict[str, Any] = {"reduction": 8} if max_norm is None else {"max_norm": max_norm}
    if max_norm is not None:
        how["noise_multiplier"] = 0.5
    for step in range(6):
        values = give(params, 7, step)
        weight = torch.rand(7, generator=torch.Generator().manual_seed(step))
        where = fs.RandomBlocks(0.5, 3) if step % 2 == 0 else None
        opt.step(sample_weight=weight, sample_options=how, where=where, grad_scale=0.5)
        ours.step(
            [fs.Samples(v, weight.numpy(), **how) for v in values], where=where, grad_scale=0.5
        )
    for p, a in zip(params, arrays, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), a)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_beside_opacus(name: str) -> None:
    """Its DPOptimizer without noise, on batches of changing size, through an epoch of loops."""
    opacus = pytest.importorskip("opacus")
    optimizers = pytest.importorskip("opacus.optimizers")
    models = [opacus.GradSampleModule(network()) for _ in range(2)]
    options = OPTIONS.get(name, {"lr": 0.05})
    ours = getattr(fst, name)(models[0].parameters(), **options)
    theirs = optimizers.DPOptimizer(
        getattr(torch.optim, name)(models[1].parameters(), **options),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=16,
    )
    for step in range(20):
        x, y = batch(step, 10 + step % 7)
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
        ours.step(sample_options={"max_norm": 0.3, "reduction": 16})
        theirs.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_samples_of_torch_func() -> None:
    """Weighed per-sample gradients are the gradient of the weighed loss."""
    models = [network() for _ in range(2)]
    ours, theirs = (
        cls(m.parameters(), lr=0.05)
        for cls, m in zip((fst.Adam, torch.optim.Adam), models, strict=True)
    )

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(models[0], params, (x[None],))
        return torch.nn.functional.cross_entropy(output, y[None])

    for step in range(10):
        x, y = batch(step, 12)
        weight = torch.rand(12, dtype=torch.float64)
        params = {name: p.detach() for name, p in models[0].named_parameters()}
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
        for name, p in models[0].named_parameters():
            p.grad_sample = per_sample[name]
        ours.step(sample_weight=weight)
        theirs.zero_grad()
        each = torch.nn.functional.cross_entropy(models[1](x), y, reduction="none")
        (weight * each).mean().backward()
        theirs.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_several_batches_in_a_list() -> None:
    """As Opacus keeps them where a step takes several."""
    params, others = leaves(), leaves()
    opts = fst.SGD(params, lr=1.0), fst.SGD(others, lr=1.0)
    give(params, 5, 0)
    for p, q in zip(params, others, strict=True):
        q.grad_sample = [p.grad_sample[:2], p.grad_sample[2:]]
    for opt in opts:
        opt.step(sample_weight=[1, 2, 0, 1, 1])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_what_is_cleared() -> None:
    params = leaves()
    opt = fst.Adam(params)
    give(params, 2, 0)
    opt.zero_grad()
    assert all(p.grad_sample is not None for p in params)  # somebody else's, so far
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step(sample_weight=[1, 1], zero_grad=True)
    assert all(p.grad_sample is None and not p.grad.any() for p in params)
    give(params, 2, 1)
    opt.zero_grad()
    assert all(p.grad_sample is None and p.grad is None for p in params)


def test_only_those_with_samples_move() -> None:
    """What a gradient says is not looked at."""
    params = leaves()
    opt = fst.Adam(params)
    values = torch.ones(3, 4, 3)
    params[0].grad_sample = values
    params[0].grad = torch.full_like(params[0], float("nan"))
    before = [p.detach().clone() for p in params]
    opt.step(sample_weight=torch.ones(3))
    assert not torch.equal(params[0], before[0])
    assert params[0].isfinite().all()
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    assert set(opt.state) == {params[0]}
    opt.step(sample_weight=torch.zeros(3))
    assert int(opt.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_noise_goes_on_where_it_was(way: str) -> None:
    """It depends on the seed and the steps, which state dicts hold."""
    params = leaves()
    opt = fst.SGD(params, lr=1.0, seed=3)
    how = {"max_norm": 1.0, "noise_multiplier": 1.0}

    def step(opt: Any, params: list[Tensor], seed: int) -> None:
        give(params, 3, seed)
        opt.step(sample_options=how)

    for seed in range(2):
        step(opt, params, seed)
    if way == "deepcopy":
        other = copy.deepcopy(opt)
        copies = other.param_groups[0]["params"]
    else:
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = fst.SGD(copies, lr=1.0)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(2, 5):
        step(opt, params, seed)
        step(other, copies, seed)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_complex_parameters(name: str) -> None:
    """Two real numbers in each element, as for torch."""
    params, others = (leaves(torch.complex64) for _ in range(2))
    options = OPTIONS.get(name, {})
    ours, theirs = getattr(fst, name)(params, **options), getattr(fst, name)(others, **options)
    for step in range(3):
        give(params, 4, step)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad_sample.mean(0)
            if step == 1:
                p.grad_sample = p.grad_sample.conj().resolve_conj().conj()  # not yet conjugated
        ours.step(sample_options={})
        theirs.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_dtensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has a part of each sample's gradient, of which no norm can be taken."""
    params = leaves()
    opt = fst.Adam(params, max_norm=1.0)
    give(params, 2, 0)
    before = [p.detach().clone() for p in params]
    monkeypatch.setattr(fst._tensors, "is_sharded", lambda tensor: tensor is params[1])
    with pytest.raises(ValueError, match="parameter 1 is a DTensor"):
        opt.step(sample_weight=[1.0, 1.0])
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_what_is_refused_changes_nothing() -> None:
    params = leaves()
    opt = fst.Adam(params)
    give(params, 2, 0)
    before = [p.detach().clone() for p in params]
    one = [1.0, 1.0]

    def without(p: Tensor) -> None:
        p.grad, p.grad_sample = torch.ones_like(p), None

    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (None, {"sample_weight": [1.0]}, ValueError, "one weight for each gradient"),
        (None, {"sample_weight": [1.0, -1.0]}, ValueError, "the weight of sample 1"),
        (None, {"sample_options": {"norm": 1.0}}, TypeError, "sample_options is"),
        (None, {"sample_options": 3}, TypeError, "sample_options is"),
        (None, {"sample_options": {"max_norm": -1.0}}, ValueError, "positive number"),
        (lambda: without(params[1]), {"sample_weight": one}, ValueError, "parameter 1: there is"),
        (
            lambda: setattr(params[0], "grad_sample", torch.ones(2, 3, 4)),
            {"sample_weight": one},
            ValueError,
            "the samples for parameter 0 have values of shape (2, 3, 4)",
        ),
        (
            lambda: [setattr(p, "grad_sample", None) for p in params],
            {"sample_weight": one},
            ValueError,
            "no parameter has grad_sample",
        ),
    ]
    for change, arguments, error, words in cases:
        for p in params:
            p.grad = None
        give(params, 2, 0)
        if change:
            change()
        with pytest.raises(error) as caught:
            opt.step(**arguments)
        assert words in str(caught.value)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert not opt.state
