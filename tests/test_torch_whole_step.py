"""What a step for torch writes besides the parameters, and how it rounds.

Averages, masters, clipped values and narrow state: against torch's own tools for each, against the
array classes bit for bit, and through all that users do to optimizers.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs

torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from collections.abc import Callable

nn = torch.nn
swa_utils = torch.optim.swa_utils

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "NAG": {"lr": 0.05, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "Adagrad": {"lr": 0.05},
}
PLAIN_SGD = ("SGD", {"lr": 0.05})  # keeps no state of its own
RULES = [*OPTIONS.items(), PLAIN_SGD]
SHAPES = [(33, 5), (7,), (), (0, 3), (1100,)]
NARROW = [torch.bfloat16, torch.float16]


def values(seed: int, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def parameters(dtype: Any = torch.float32) -> list[Any]:
    return [nn.Parameter(value) for value in values(0, dtype)]


def give(params: list[Any], seed: int, scale: float = 1.0) -> None:
    """Give parameters gradients that are the same numbers in every dtype."""
    for parameter, value in zip(params, values(seed, torch.bfloat16), strict=True):
        parameter.grad = (value * scale).to(parameter.dtype)


def make(name: str, params: Any, **options: Any) -> Any:
    return getattr(fs.torch, name)(params, **OPTIONS[name] | options)


def make_torchs(name: str, params: Any) -> Any:
    extra = {"nesterov": True, "momentum": 0.9} if name == "NAG" else {}
    cls = getattr(torch.optim, "SGD" if name == "NAG" else name)
    return cls(params, **OPTIONS[name] | extra)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def master_of(opt: Any, parameter: Any) -> Any:
    """Return the float32 numbers that a parameter is the rounding of."""
    entry = opt.state[parameter]
    if opt.master == "float32":
        return entry["master"]
    # As csrc/core/split.h says, in other words: the lower half is signed, and carries no bit.
    halves = parameter.detach().contiguous().view(torch.int16), entry["master_low"]
    upper, lower = (np.asarray(half.numpy(), np.int64) for half in halves)
    bits = np.asarray((upper << 16) + lower, np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def masters(opt: Any) -> list[Any]:
    return [master_of(opt, p) for group in opt.param_groups for p in group["params"]]


def assert_are_roundings(narrow: list[Any], wide: list[Any], kind: str = "float32") -> None:
    """Each is the nearest one; between two, the even one or, split, the larger in magnitude."""
    for a, b in zip(narrow, wide, strict=True):
        found, exact = a.detach(), b.detach()
        if kind == "split":
            bits = np.asarray(exact.numpy().view(np.uint32), np.int64) + 0x8000
            nearest = np.asarray(bits >> 16 << 16, np.uint32).view(np.float32)
            expected = torch.from_numpy(nearest)
            assert torch.equal(found.float(), expected)
        else:
            assert torch.equal(found, exact.to(found.dtype))


# ---- against torch's own tools -------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_the_whole_chain(name: str) -> None:
    """Norm, value, step and average are what torch's four calls make of them."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    opt = make(name, ours, max_norm=20.0, clip_value=0.5, ema_decay=0.95)
    other = make_torchs(name, theirs)
    average = [p.detach().clone() for p in theirs]
    update = swa_utils.get_ema_multi_avg_fn(0.95)
    for i in range(200):
        give(ours, i)
        give(theirs, i)
        before = [p.grad.clone() for p in ours]
        opt.step()
        assert_same([p.grad for p in ours], before)
        nn.utils.clip_grad_norm_(theirs, 20.0)
        nn.utils.clip_grad_value_(theirs, 0.5)
        other.step()
        with torch.no_grad():
            update(average, [p.detach() for p in theirs], i)
    tolerance = 1e-5 if name == "NAdam" else 1e-9  # torch keeps a product of momenta in float32
    assert_close(ours, theirs, tolerance)
    assert_close(opt.averages, average, tolerance)


def test_an_averaged_model() -> None:
    """The average of a model is AveragedModel's, and evaluates as it does."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    theirs = copy.deepcopy(ours)
    opt = make("AdamW", ours.parameters(), ema_decay=0.9)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    averaged = swa_utils.AveragedModel(theirs, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(theirs)  # the first update is a copy
    x = torch.randn(16, 5)
    for _ in range(50):
        for model, each in ((ours, opt), (theirs, other)):
            each.zero_grad()
            model(x).square().mean().backward()
            each.step()
        averaged.update_parameters(theirs)
    with opt.swap_averages():
        torch.testing.assert_close(ours(x), averaged(x), rtol=1e-4, atol=1e-5)


def test_batch_norm_by_update_bn() -> None:
    """Buffers are not averaged: update_bn finds those that belong to the averages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    opt = make("SGD", model.parameters(), ema_decay=0.9)
    batches = [torch.randn(16, 5) for _ in range(5)]
    for x in batches:
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    trained = model[1].running_mean.clone()
    with opt.swap_averages():
        swa_utils.update_bn(batches, model)
        expected = torch.stack([model[0](x).mean(0) for x in batches]).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected)
    assert not torch.equal(model[1].running_mean, trained)  # a buffer stays as it was left


@pytest.mark.parametrize("after", [0, 5])
def test_a_warm_up_is_timms(after: int) -> None:
    """ModelEmaV3.update(model, step), with steps from 1, written out."""
    params = parameters(torch.float64)
    schedule = fs.EmaWarmup(0.99, 0.1, after, warmup_gamma=2.0, warmup_power=0.75)
    opt = make("SGD", params, ema_decay=schedule)
    average = [p.detach().clone() for p in params]
    for i in range(1, 60):
        give(params, i)
        opt.step()
        step = max(0, i - after - 1)
        decay = 0.0
        if step > 0:
            decay = max(min(1 - (1 + step / 2.0) ** -0.75, 0.99), 0.1)
        average = [
            a * decay + p.detach() * (1 - decay) for a, p in zip(average, params, strict=True)
        ]
        assert_close(opt.averages, average, 1e-12)


def test_a_schedule_is_asked_once_a_step() -> None:
    asked: list[int] = []

    def decay(steps: int) -> float:
        asked.append(steps)
        return 0.5

    params = parameters()
    opt = make("Adam", params, ema_decay=decay, skip_nonfinite=True)
    for i in range(3):
        give(params, i)
        opt.step()
    params[0].grad[0, 0] = float("nan")
    opt.step()  # left out
    give(params, 5)
    opt.step()
    assert asked == [0, 1, 2, 3, 3]
    assert opt.ema_decay is decay


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan"), "much"])
def test_a_schedule_that_says_nonsense(bad: Any) -> None:
    params = parameters()
    opt = make("Adam", params, ema_decay=lambda _: bad)
    give(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises((ValueError, TypeError)):
        opt.step()
    assert_same([p.detach() for p in params], before)
    assert not opt.state


# ---- masters -------------------------------------------------------------------------------------


KINDS = ["float32", "split"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float32", torch.bfloat16), ("float32", torch.float16), ("split", torch.bfloat16)],
)
@pytest.mark.parametrize(("name", "options"), RULES)
def test_masters_move_as_a_float32_model(
    name: str, options: dict[str, Any], kind: str, dtype: Any
) -> None:
    """With the same gradients, to the bit; and each parameter is its master's rounding."""
    narrow = parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    cls = getattr(fs.torch, name)
    chosen = options | {"ema_decay": 0.9, "max_norm": 30.0, "clip_value": 0.5}
    opt, other = cls(narrow, **chosen, master=kind), cls(wide, **chosen)
    for i in range(30):
        give(narrow, i)
        give(wide, i)
        opt.step()
        other.step()
        assert_same(masters(opt), [p.detach() for p in wide])
        assert_are_roundings(narrow, wide, kind)
        assert_same(opt.averages, other.averages)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_train_where_bfloat16_stands_still(kind: str) -> None:
    """Steps far below the last place add up."""
    params = [nn.Parameter(torch.ones(100, dtype=torch.bfloat16)) for _ in range(3)]
    plain = fs.torch.SGD([params[0]], lr=1e-4)
    mastered = fs.torch.SGD([params[1]], lr=1e-4, master=kind)
    rounded = fs.torch.SGD([params[2]], lr=1e-4, stochastic_rounding=True)
    for _ in range(1000):
        for parameter, opt in zip(params, (plain, mastered, rounded), strict=True):
            parameter.grad = torch.ones_like(parameter)
            opt.step()
    means = [p.detach().float().mean().item() for p in params]
    assert means[0] == 1
    assert means[1] == pytest.approx(0.9, abs=4e-3)  # within the last place
    assert means[2] == pytest.approx(0.9, abs=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_are_for_narrow_parameters_only(kind: str) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bfloat16]
    params = [nn.Parameter(v.to(d)) for v, d in zip(values(0), dtypes, strict=True)]
    opt = make("Adam", params, master=kind)
    give(params, 1)
    opt.step()
    name, dtype = ("master", torch.float32) if kind == "float32" else ("master_low", torch.int16)
    with_one = [name in opt.state[p] for p in params]
    assert with_one == [True, kind == "float32", False, False, True]
    assert opt.state[params[0]][name].dtype == dtype
    assert opt.master == kind


def test_a_gradient_in_float32() -> None:
    """Where torch lets a gradient have a wider dtype than its parameter, all of it counts."""
    parameter = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    if not hasattr(parameter, "grad_dtype"):
        pytest.skip("torch before 2.10 has gradients in the parameter's dtype")
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((5,), 1.0 + 2.0**-20)
    opt = fs.torch.SGD([parameter], lr=1.0, master="float32")
    opt.step()
    assert opt.state[parameter]["master"].tolist() == [-(2.0**-20)] * 5


WRITES: dict[str, Callable[[Any], None]] = {
    "copy_": lambda p: p.copy_(torch.full_like(p, 0.75)),
    "in part": lambda p: p[:2].fill_(0.75),
    "data": lambda p: setattr(p, "data", torch.full_like(p, 0.75)),
    "init": lambda p: nn.init.constant_(p, 0.75),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_others_write_is_the_new_master(how: str) -> None:
    narrow = nn.Parameter(values(0, torch.bfloat16)[0])
    wide = nn.Parameter(narrow.detach().float())
    opt = make("Adam", [narrow], master="float32")
    other = make("Adam", [wide])
    for i in range(6):
        if i == 3:
            before = opt.state[narrow]["master"].clone()
            with torch.no_grad():
                WRITES[how](narrow)
                changed = narrow != before.bfloat16()
                wide.copy_(torch.where(changed, narrow.float(), wide))
        narrow.grad = values(i, torch.bfloat16)[0]
        wide.grad = narrow.grad.float()
        opt.step()
        other.step()
        assert torch.equal(opt.state[narrow]["master"], wide.detach())


@pytest.mark.parametrize("written", [0.0, -0.0, 1.0, -3.0])
def test_whatever_is_written_to_the_upper_half_counts(written: float) -> None:
    """To within half of its last place, in whatever way it is written."""
    for way in (lambda p: p.data.fill_(written), lambda p: p.detach().fill_(written)):
        parameter = nn.Parameter(values(0, torch.bfloat16)[4])
        opt = fs.torch.SGD([parameter], lr=0.01, master="split")
        for i in range(3):
            parameter.grad = values(i, torch.bfloat16)[4]
            opt.step()
        way(parameter)
        parameter.grad = torch.zeros_like(parameter)
        opt.step()
        expected = torch.full_like(parameter, written).detach()
        assert torch.equal(parameter.detach().float().abs(), expected.float().abs())


def test_writing_through_data_needs_to_be_said() -> None:
    parameter = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    opt = fs.torch.SGD([parameter], lr=1.0, master="float32")
    parameter.grad = torch.zeros_like(parameter)
    opt.step()
    parameter.data.mul_(2)
    opt.refresh_masters()
    opt.step()
    assert parameter.tolist() == [2.0] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_outlasts_other_memory(kind: str) -> None:
    """What has the same values in another place has lost nothing."""
    narrow = nn.Parameter(values(0, torch.bfloat16)[0])
    wide = nn.Parameter(narrow.detach().float())
    opt, other = make("Adam", [narrow], master=kind), make("Adam", [wide])
    for i in range(6):
        narrow.grad = values(i, torch.bfloat16)[0]
        wide.grad = narrow.grad.float()
        opt.step()
        other.step()
        if i == 2:
            narrow.share_memory_()
        if i == 3:
            narrow.data = narrow.data.clone()
        if i == 4:
            with torch.no_grad():
                narrow.copy_(narrow.clone())
    assert torch.equal(master_of(opt, narrow), wide.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_checkpoint_of_a_model_in_bfloat16(order: str, kind: str) -> None:
    """Model and optimizer are loaded in either order; the masters' digits survive."""
    params = parameters(torch.bfloat16)
    opt = make("AdamW", params, master=kind, ema_decay=0.9)
    for i in range(5):
        give(params, i)
        opt.step()
    weights, saved = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
    others = [nn.Parameter(v) for v in values(99, torch.bfloat16)]
    second = make("AdamW", others, master=kind, ema_decay=0.9)
    if order == "optimizer first":
        second.load_state_dict(saved)
    with torch.no_grad():
        for parameter, weight in zip(others, weights, strict=True):
            parameter.copy_(weight)
    if order == "model first":
        second.load_state_dict(saved)
    for i in range(5, 10):
        for each, one in ((params, opt), (others, second)):
            give(each, i)
            one.step()
    assert_same(masters(second), masters(opt))
    assert_same(second.averages, opt.averages)


def test_a_parameter_that_becomes_wide_and_narrow_again() -> None:
    parameter = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    opt = fs.torch.SGD([parameter], lr=0.125, master="float32")
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
        parameter.grad = torch.ones_like(parameter)
        opt.step()
    assert parameter.tolist() == [0.625] * 5


@pytest.mark.parametrize(("before", "after"), [KINDS, KINDS[::-1]])
def test_from_one_kind_of_master_to_the_other(before: str, after: str) -> None:
    params = parameters(torch.bfloat16)
    opt = make("Adam", params, master=before)
    for i in range(5):
        give(params, i)
        opt.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make("Adam", others, master=after)
    other.load_state_dict(opt.state_dict())
    assert_close(masters(other), masters(opt), 0)
    narrow = [nn.Parameter(p.detach().clone()) for p in params]
    plain = make("Adam", narrow)
    plain.load_state_dict(opt.state_dict())
    assert not any(entry.keys() & {"master", "master_low"} for entry in plain.state.values())


def test_a_tie_of_a_wide_master() -> None:
    """torch rounds it to even; the lower half that belongs to that is a bit of float32 away."""
    exact = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-9, 2.0**-133])
    parameter = nn.Parameter(exact.bfloat16())
    opt = fs.torch.SGD([parameter], lr=0.0, master="float32")
    parameter.grad = torch.zeros_like(parameter)
    opt.step()
    opt.state[parameter]["master"].copy_(exact)
    split = fs.torch.SGD([parameter], lr=0.0, master="split")
    split.load_state_dict(opt.state_dict())
    torch.testing.assert_close(master_of(split, parameter), exact, rtol=2.0**-23, atol=0)


def test_lower_halves_of_other_kinds() -> None:
    params, opt = stepped(torch.bfloat16, master="split")
    good = opt.state[params[0]]["master_low"]
    for bad, error, message in (
        (good.float(), TypeError, "of torch.float32; expected a tensor of torch.int16"),
        (good[:3], ValueError, r"has shape \(3, 5\); expected \(33, 5\)"),
        (3, TypeError, "of int; expected a tensor"),
    ):
        opt.state[params[0]]["master_low"] = bad
        with pytest.raises(error, match=message):
            opt.step()
    opt.state[params[0]]["master_low"] = good
    opt.step()


@pytest.mark.parametrize("bad", ["float64", True, 1])
def test_masters_of_other_kinds(bad: Any) -> None:
    with pytest.raises(ValueError, match="master is"):
        make("Adam", parameters(), master=bad)


# ---- in the parameters' place --------------------------------------------------------------------


def stepped(dtype: Any = torch.float32, **options: Any) -> tuple[list[Any], Any]:
    params = parameters(dtype)
    opt = make("Adam", params, ema_decay=0.5, **options)
    for i in range(3):
        give(params, i)
        opt.step()
    return params, opt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swap(dtype: Any) -> None:
    params, opt = stepped(dtype)
    kept, averages = [p.detach().clone() for p in params], [a.clone() for a in opt.averages]
    places = [p.data_ptr() for p in params]
    versions = [p._version for p in params]
    with opt.swap_averages():
        assert_same([p.detach() for p in params], [a.to(dtype) for a in averages])
        assert_same(opt.averages, averages)
        assert [p.data_ptr() for p in params] == places
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
    assert_same([p.detach() for p in params], kept)
    assert_same(opt.averages, averages)


@pytest.mark.parametrize(
    "what",
    [
        lambda opt: opt.step(),
        lambda opt: opt.step(closure=lambda: 0.0),
        lambda opt: opt.state_dict(),
        lambda opt: opt.load_state_dict({}),
        lambda opt: pickle.dumps(opt),
        lambda opt: copy.deepcopy(opt),
        lambda opt: opt.anchor(1.0),
        lambda opt: opt.resize(opt.param_groups[0]["params"][0], 40),
        lambda opt: opt.refresh_masters(),
        lambda opt: opt.swap_averages().__enter__(),
    ],
)
def test_what_is_refused_within(what: Callable[[Any], Any]) -> None:
    params, opt = stepped()
    kept = [p.detach().clone() for p in params]
    with opt.swap_averages():
        inside = [p.detach().clone() for p in params]
        with pytest.raises(RuntimeError, match="in the parameters' place"):
            what(opt)
        assert_same([p.detach() for p in params], inside)
    assert_same([p.detach() for p in params], kept)
    opt.step()
    assert opt.state_dict()


def test_an_error_within_puts_parameters_back() -> None:
    params, opt = stepped()
    kept = [p.detach().clone() for p in params]
    with pytest.raises(KeyError), opt.swap_averages():
        raise KeyError
    assert_same([p.detach() for p in params], kept)


def test_training_goes_on_after_a_swap_as_without_one() -> None:
    for kind in (None, *KINDS):
        params, opt = stepped(torch.bfloat16, master=kind)
        others, other = stepped(torch.bfloat16, master=kind)
        for i in range(3, 8):
            with opt.swap_averages() if i % 2 else nullcontext():
                pass
            for each, one in ((params, opt), (others, other)):
                give(each, i)
                one.step()
        assert_same([p.detach() for p in params], [p.detach() for p in others])
        assert_same(opt.averages, other.averages)


def test_a_graph_from_before_a_swap_is_refused() -> None:
    params, opt = stepped()
    loss = params[0].square().sum()
    with opt.swap_averages():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_averages_by_parameter() -> None:
    params = parameters()
    opt = make("Adam", [{"params": params[:2]}, {"params": params[2:]}], ema_decay=0.5)
    assert_same(opt.averages, [p.detach() for p in params])
    give(params, 0)
    params[1].grad = None
    still = params[1].detach().clone()
    opt.step()
    assert "average" not in opt.state.get(params[1], {})
    assert torch.equal(opt.average_of(params[1]), still)
    assert opt.average_of(params[4]) is opt.state[params[4]]["average"] is opt.averages[4]
    with torch.no_grad():
        params[1].fill_(5)  # an average begins where the parameter is before its first step
    give(params, 1)
    opt.step()
    expected = 0.5 * 5 + 0.5 * params[1].detach()
    torch.testing.assert_close(opt.average_of(params[1]), expected)
    with pytest.raises(KeyError, match="not a parameter"):
        opt.average_of(torch.zeros(3))


def test_without_averages() -> None:
    opt = make("Adam", parameters())
    for what in (
        lambda: opt.averages,
        lambda: opt.average_of(opt.param_groups[0]["params"][0]),
        lambda: opt.swap_averages(),
    ):
        with pytest.raises(AttributeError, match="there are no averages"):
            what()
    with pytest.raises(ValueError, match="decides whether there are averages"):
        opt.ema_decay = 0.5


def test_settings_may_be_assigned() -> None:
    params, opt = stepped()
    opt.ema_decay = 0.0
    opt.clip_value = 0.0
    opt.stochastic_rounding = True
    give(params, 9)
    opt.step()
    assert_same(opt.averages, [p.detach() for p in params])
    assert (opt.ema_decay, opt.clip_value, opt.stochastic_rounding) == (0.0, 0.0, True)
    saved = opt.state_dict()["fusestep"]
    assert (saved["ema_decay"], saved["clip_value"], saved["stochastic_rounding"]) == (0, 0, True)
    for name, bad in (("ema_decay", 2.0), ("clip_value", -1.0), ("stochastic_rounding", 1)):
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(opt, name, bad)
    with pytest.raises(ValueError, match="decides"):
        opt.ema_decay = None


# ---- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", OPTIONS)
def test_rounding_is_the_array_classes(name: str, dtype: Any) -> None:
    options = {"stochastic_rounding": True, "seed": 7, "clip_value": 0.3, "ema_decay": 0.9}
    params, tensors = parameters(dtype), values(0, dtype)
    opt = make(name, params, **options)
    other = getattr(fs, name)(tensors, **OPTIONS[name] | options)
    for i in range(10):
        give(params, i)
        opt.step()
        other.step([p.grad for p in params])
        assert_same([p.detach() for p in params], tensors)
    for average, theirs in zip(opt.averages, other.averages, strict=True):
        assert np.array_equal(average.numpy(), np.asarray(theirs))


def test_rounding_depends_on_the_seed_alone() -> None:
    def train(seed: int, stop: int | None = None) -> list[Any]:
        params = parameters(torch.bfloat16)
        opt = make("Adam", params, stochastic_rounding=True, seed=seed)
        for i in range(8):
            give(params, i)
            opt.step()
            if i == stop:
                saved, opt = opt.state_dict(), make("Adam", params)
                opt.load_state_dict(saved)
        return [p.detach() for p in params]

    assert_same(train(1), train(1))
    assert_same(train(1), train(1, stop=3))
    assert not torch.equal(train(1)[0], train(2)[0])


# ---- state in bfloat16 ---------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_state_in_bfloat16(name: str, given: Any) -> None:
    params, others = parameters(), parameters()
    opt = make(name, params, state_dtype=given)
    other = make(name, others)
    for i in range(50):
        give(params, i)
        give(others, i)
        opt.step()
        other.step()
    assert opt.state_dtype == "bfloat16"
    names = {x for x, value in other.state[others[0]].items() if value.ndim}
    assert names
    for p in params:
        assert {opt.state[p][name].dtype for name in names} == {torch.bfloat16}
    assert_close(params, others, 0.1)


@pytest.mark.parametrize("bad", ["uint8", torch.uint8, torch.float16, "half"])
def test_state_in_other_dtypes(bad: Any) -> None:
    with pytest.raises(ValueError, match="state_dtype is"):
        make("Adam", parameters(), state_dtype=bad)


def test_anchors_averages_and_complex_state_stay_wide() -> None:
    params = [*parameters(), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    opt = make("Adam", params, state_dtype="bfloat16", ema_decay=0.5)
    opt.anchor([1.0] * 5 + [None])
    give(params[:5], 0)
    params[5].grad = torch.ones_like(params[5])
    opt.step()
    for p in params[:5]:
        entry = opt.state[p]
        assert entry["exp_avg"].dtype == torch.bfloat16
        assert entry["anchor"].dtype == entry["average"].dtype == torch.float32
    assert opt.state[params[5]]["exp_avg"].dtype == torch.complex64
    assert opt.averages[5].dtype == torch.complex64


def trained(dtype: Any, state_dtype: Any, cls: Any = None) -> Any:
    params = parameters(dtype)
    opt = (cls or fs.torch.Adam)(params, **({"state_dtype": state_dtype} if cls is None else {}))
    for i in range(3):
        give(params, i)
        opt.step()
    return opt


@pytest.mark.parametrize(
    ("dtype", "saved", "into", "becomes", "warns"),
    [
        (torch.float32, "bfloat16", None, torch.float32, True),
        (torch.float32, None, "bfloat16", torch.bfloat16, True),
        (torch.float32, "float64", "bfloat16", torch.bfloat16, True),
        (torch.float32, "float64", None, torch.float64, False),  # stays what it is
        (torch.float32, None, "float64", torch.float64, False),
        (torch.bfloat16, "bfloat16", None, torch.float32, False),  # torch's layout
        (torch.bfloat16, None, "bfloat16", torch.bfloat16, True),
        (torch.bfloat16, None, "float64", torch.float64, False),
        (torch.bfloat16, "bfloat16", "float64", torch.float64, False),
        (torch.bfloat16, "bfloat16", "bfloat16", torch.bfloat16, False),
        (torch.float64, None, "bfloat16", torch.bfloat16, True),
    ],
)
def test_loading_other_dtypes(dtype: Any, saved: Any, into: Any, becomes: Any, warns: bool) -> None:
    old, new = trained(dtype, saved), fs.torch.Adam(parameters(dtype), state_dtype=into)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new.load_state_dict(old.state_dict())
    assert [w.category for w in caught] == [UserWarning] * warns
    assert all(str(w.message).startswith("state is converted from") for w in caught)
    for a, b in zip(old.state.values(), new.state.values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert b[name].dtype == becomes
            assert torch.equal(b[name], a[name].to(becomes))  # rounded to nearest


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    old, new = trained(torch.float32, "bfloat16"), fs.torch.Adam(parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            new.load_state_dict(old.state_dict())
    assert not new.state


def test_a_bad_state_dict_changes_nothing() -> None:
    old, new = trained(torch.float32, "bfloat16"), trained(torch.float32, None)
    saved = copy.deepcopy(old.state_dict())
    saved["state"][4]["exp_avg"] = torch.zeros(3)
    before = copy.deepcopy(new.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is anything said
        with pytest.raises(ValueError, match="exp_avg of parameter 4"):
            new.load_state_dict(saved)
    after = new.state_dict()
    for key, entry in before["state"].items():
        assert_same(entry.values(), after["state"][key].values())


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, None), *((torch.bfloat16, kind) for kind in KINDS)]
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_to_torch(name: str, dtype: Any, kind: Any) -> None:
    """torch.optim loads what we save, and goes on."""
    params = parameters(dtype)
    opt = make(name, params, ema_decay=0.9, clip_value=5.0, master=kind)
    for i in range(5):
        give(params, i)
        opt.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make_torchs(name, others)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch goes on in the very tensors
    for i in range(5, 8):
        give(params, i)
        give(others, i)
        opt.step()
        other.step()
    assert_close(params, others, 1e-4 if dtype == torch.float32 else 0.1)
    # And back: averages and masters that torch has carried along are what they were to it.
    copies = [nn.Parameter(p.detach().clone()) for p in others]
    again = make(name, copies, ema_decay=0.9, master=kind)
    again.load_state_dict(other.state_dict())
    assert all(a.dtype == torch.float32 for a in again.averages)
    give(copies, 9)
    again.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_from_torch(name: str) -> None:
    """Averages begin anew, at the parameters."""
    others = parameters()
    other = make_torchs(name, others)
    for i in range(5):
        give(others, i)
        other.step()
    params = [nn.Parameter(p.detach().clone()) for p in others]
    opt = make(name, params, ema_decay=0.75)
    opt.load_state_dict(other.state_dict())
    start = [p.detach().clone() for p in params]
    assert_same(opt.averages, start)
    give(params, 5)
    opt.step()
    expected = [0.75 * a + 0.25 * p for a, p in zip(start, params, strict=True)]
    assert_close(opt.averages, expected, 1e-6)


WAYS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "pickle": lambda opt, params: pickle.loads(pickle.dumps((opt, params))),
    "deepcopy": lambda opt, params: copy.deepcopy((opt, params)),
}


def through_a_file(opt: Any, params: list[Any], name: str, options: Any) -> tuple[Any, list[Any]]:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(name, copies, **options)
    other.load_state_dict(torch.load(file))
    return other, copies


@pytest.mark.parametrize("way", [*WAYS, "state_dict"])
@pytest.mark.parametrize(
    ("schedule", "kind"), [(0.9, "float32"), (fs.EmaWarmup(0.95), "split"), (0.9, None)]
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_goes_on_bit_for_bit(name: str, schedule: Any, kind: Any, way: str) -> None:
    options = {
        "ema_decay": schedule,
        "clip_value": 0.5,
        "stochastic_rounding": True,
        "state_dtype": "bfloat16",
        "master": kind,
        "seed": 4,
    }
    params = parameters(torch.bfloat16)
    opt = make(name, params, **options)
    for i in range(4):
        give(params, i)
        opt.step()
    if way == "state_dict":
        other, others = through_a_file(opt, params, name, options)
    else:
        other, others = WAYS[way](opt, params)
    assert (other.master, other.clip_value, other.stochastic_rounding) == (kind, 0.5, True)
    for i in range(4, 8):
        for each, one in ((params, opt), (others, other)):
            give(each, i)
            one.step()
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    assert_same(other.averages, opt.averages)
    if kind is not None:
        assert_same(masters(other), masters(opt))


def test_averages_and_masters_that_are_not_kept_are_left_out() -> None:
    params, opt = stepped(torch.bfloat16, master="float32")
    plain = make("Adam", parameters(torch.bfloat16))
    plain.load_state_dict(opt.state_dict())
    assert all(entry.keys() & {"average", "master"} == set() for entry in plain.state.values())
    give(params, 0)
    opt.step()


def test_an_array_optimizer_loads_it() -> None:
    params, opt = stepped(clip_value=0.5)
    arrays = [p.detach().numpy().copy() for p in params]
    other = fs.Adam(arrays, lr=0.01, amsgrad=True, ema_decay=0.1)
    other.load_state_dict(opt.state_dict())
    assert (other.ema_decay, other.clip_value) == (0.5, 0.5)
    give(params, 5)
    grads = [p.grad.numpy().copy() for p in params]
    opt.step()
    other.step(grads)
    for p, average, array, theirs in zip(params, opt.averages, arrays, other.averages, strict=True):
        assert np.array_equal(p.detach().numpy(), array)
        assert np.array_equal(average.numpy(), theirs)


# ---- all that users do to optimizers -------------------------------------------------------------


def test_a_first_step_that_fails_leaves_nothing() -> None:
    params = parameters(torch.bfloat16)
    opt = make("Adam", params, ema_decay=0.9, master="float32")
    give(params, 0)
    params[4].grad = params[4].detach()  # shares memory with the parameter
    with pytest.raises(ValueError, match="share"):
        opt.step()
    assert not opt.state


def test_closures_hooks_and_zero_grad() -> None:
    params, others = parameters(), parameters()
    opt, other = make("Adam", params, ema_decay=0.9), make("Adam", others, ema_decay=0.9)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        give(params, len(seen))
        return 1.5

    for _ in range(3):
        give(others, len(seen) + 1)
        other.step()
        assert opt.step(closure, zero_grad=True) == 1.5
        assert all((p.grad == 0).all() for p in params)
    assert seen == ["before", "after"] * 3
    assert_same(opt.averages, other.averages)


def test_grad_scaler() -> None:
    params, others = parameters(), parameters()
    options = {"ema_decay": 0.9, "clip_value": 0.5}
    opt, other = make("Adam", params, **options), make("Adam", others, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(5):
        give(params, i, 1024.0)
        give(others, i)
        scaler.scale(torch.zeros(()))  # makes it begin
        if i == 2:
            params[0].grad[0, 0] = float("inf")
        else:
            other.step()
        scaler.step(opt)
        if i != 2:
            scaler.update()
        else:
            scaler.update(1024.0)
    assert_same([p.detach() for p in params], [p.detach() for p in others])
    assert_same(opt.averages, other.averages)


def test_groups_that_come_later() -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    options = {"ema_decay": 0.9, "master": "float32"}
    opt, other = make("Adam", params[:2], **options), make("Adam", others, **options)
    give(params, 0)
    opt.step()
    for p in others[2:]:
        p.grad = None
    for p, q in zip(others[:2], params, strict=False):
        p.grad = q.grad.clone()
    other.step()
    opt.add_param_group({"params": params[2:]})
    for i in range(1, 4):
        give(params, i)
        give(others, i)
        opt.step()
        other.step()
    assert_same([p.detach() for p in params], [p.detach() for p in others])
    assert_same(opt.averages, other.averages)
    assert_same(masters(opt), masters(other))


def test_state_that_users_write_to() -> None:
    params, opt = stepped()
    opt.state[params[0]]["average"].zero_()
    opt.state[params[1]]["average"] = torch.ones(7, dtype=torch.float16)
    give(params, 3)
    opt.step()
    torch.testing.assert_close(opt.averages[0], 0.5 * params[0].detach())
    torch.testing.assert_close(opt.averages[1], 0.5 + 0.5 * params[1].detach())
    opt.state[params[2]]["average"] = torch.ones(3)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"average of parameter 2 has shape \(3,\)"):
        opt.step()
    assert_same([p.detach() for p in params], before)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_that_grow(kind: str) -> None:
    params = parameters(torch.bfloat16)
    opt = make("Adam", params, ema_decay=0.5, master=kind)
    give(params, 0)
    opt.step()
    table = params[0]
    old = master_of(opt, table).clone(), opt.averages[0].clone()
    opt.resize(table, 40, init=0.3)
    master, average = master_of(opt, table), opt.averages[0]
    assert_same((master[:33], average[:33]), old)
    assert torch.equal(master[33:], table.detach()[33:].float())
    assert torch.equal(average[33:], table.detach()[33:].float())
    before = average.clone()
    table.grad = torch.ones_like(table)
    opt.step()
    torch.testing.assert_close(opt.averages[0], 0.5 * before + 0.5 * master_of(opt, table))
    assert_are_roundings([table], [master_of(opt, table)], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_sparse_gradients(rows: Any, kind: str) -> None:
    """Rows that are not listed keep their average; masters make up for missed steps, too."""
    narrow = nn.Parameter(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).bfloat16())
    wide = nn.Parameter(narrow.detach().float())
    options = {"lr": 0.1, "rows": rows} | ({"ema_decay": 0.9} if rows == "lazy" else {})
    opt = fs.torch.Adam([narrow], master=kind, **options)
    other = fs.torch.Adam([wide], **options)
    for i in range(6):
        index = torch.tensor([[i, 7, 7]])
        each = torch.randn(3, 3, generator=torch.Generator().manual_seed(i)).bfloat16()
        for parameter, one in ((narrow, opt), (wide, other)):
            grad = torch.sparse_coo_tensor(
                index, each.to(parameter.dtype), (20, 3), check_invariants=True
            )
            parameter.grad = grad
            one.step()
        if i == 3 and rows == "exact":
            opt.catch_up([0, 1])
            other.catch_up([0, 1])
    opt.flush()
    other.flush()
    assert_same(masters(opt), [wide.detach()])
    assert_are_roundings([narrow], [wide], kind)
    if rows == "lazy":
        assert_same(opt.averages, other.averages)
        assert torch.equal(opt.averages[0][15:], wide.detach()[15:])


def test_exact_rows_have_no_averages() -> None:
    with pytest.raises(ValueError, match="leave out ema_decay"):
        make("Adam", parameters(), rows="exact", ema_decay=0.9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "where", [fs.RandomBlocks(0.5, block=16), fs.TopK(0.25), fs.CyclicBlocks(3)]
)
def test_selections(where: Any, kind: str) -> None:
    narrow = nn.Parameter(values(0, torch.bfloat16)[4])
    wide = nn.Parameter(narrow.detach().float())
    opt = make("Adam", [narrow], master=kind, ema_decay=0.9, seed=3)
    other = make("Adam", [wide], ema_decay=0.9, seed=3)
    for i in range(6):
        narrow.grad = values(i, torch.bfloat16)[4]
        wide.grad = narrow.grad.float()
        opt.step(where=where)
        other.step(where=where)
    assert_same(masters(opt), [wide.detach()])
    assert_are_roundings([narrow], [wide], kind)
    assert_same(opt.averages, other.averages)


def test_what_is_not_selected_keeps_its_average() -> None:
    parameter = nn.Parameter(torch.ones(10))
    opt = fs.torch.SGD([parameter], lr=1.0, ema_decay=0.5)
    mask = torch.arange(10) < 4
    parameter.grad = torch.ones(10)
    opt.step(where=mask)
    parameter.data.fill_(7.0)
    opt.step(where=mask)
    assert opt.averages[0].tolist() == [0.5 * 0.5 + 0.5 * 6.0] * 4 + [1.0] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_pull_the_master(kind: str) -> None:
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    opt, other = make("AdamW", narrow, master=kind), make("AdamW", wide)
    opt.anchor(3.0)
    other.anchor(3.0)
    for i in range(6):
        give(narrow, i)
        give(wide, i)
        opt.step()
        other.step()
    assert_same(masters(opt), [p.detach() for p in wide])


def test_samples() -> None:
    params = parameters()
    opt, other = make("Adam", params, ema_decay=0.9), make("Adam", parameters(), ema_decay=0.9)
    weight = torch.tensor([1.0, 0.5])
    for p, q, a, b in zip(
        params, other.param_groups[0]["params"], values(1), values(2), strict=True
    ):
        p.grad_sample = torch.stack([a, b])
        q.grad = a + 0.5 * b
    opt.step(sample_weight=weight, sample_options={"reduction": "sum"})
    other.step()
    assert_close(opt.averages, other.averages, 1e-6)


def test_fused_layers() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    theirs = copy.deepcopy(ours)
    fs.torch.fuse_linear(ours)
    options: dict[str, Any] = {"lr": 0.05, "master": "float32", "ema_decay": 0.9}
    opt = fs.torch.Adam(ours.parameters(), **options)
    other = fs.torch.Adam(theirs.parameters(), **options)
    for i in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i)).bfloat16()
        for model, one in ((ours, opt), (theirs, other)):
            one.zero_grad()
            model(x).float().square().mean().backward()
            one.step()
    assert ours[0].weight.grad is None
    assert_close(opt.averages, other.averages, 0.02)
    for p in ours.parameters():
        assert torch.equal(p.detach(), opt.state[p]["master"].bfloat16())


def test_compiled_around_it() -> None:
    params, others = parameters(), parameters()
    opt, other = make("Adam", params, ema_decay=0.9), make("Adam", others, ema_decay=0.9)

    def step() -> None:
        opt.step()

    compiled = torch.compile(step, backend="eager")
    for i in range(3):
        give(params, i)
        give(others, i)
        compiled()
        other.step()
    assert_same(opt.averages, other.averages)


def test_dtensors(mesh: Any) -> None:
    """Averages are local shards; masters are refused."""
    tensor = torch.distributed.tensor
    full = nn.Parameter(torch.arange(6.0))
    split = nn.Parameter(tensor.distribute_tensor(torch.arange(6.0), mesh, [tensor.Shard(0)]))
    opt, other = (fs.torch.Adam([p], lr=0.1, ema_decay=0.5) for p in (split, full))
    for _ in range(3):
        full.grad = torch.ones(6)
        split.grad = tensor.distribute_tensor(torch.ones(6), mesh, [tensor.Shard(0)])
        opt.step()
        other.step()
    assert torch.equal(opt.averages[0].full_tensor(), other.averages[0])
    kept = split.detach().full_tensor()
    with opt.swap_averages():
        assert torch.equal(split.detach().full_tensor(), other.averages[0])
    assert torch.equal(split.detach().full_tensor(), kept)
    narrow = nn.Parameter(tensor.distribute_tensor(torch.ones(6).bfloat16(), mesh))
    with pytest.raises(ValueError, match="is a DTensor"):
        fs.torch.Adam([narrow], master="float32")
    opt = fs.torch.SGD([narrow], lr=2.0**-10, master="split", ema_decay=0.5)
    for _ in range(3):
        narrow.grad = tensor.distribute_tensor(torch.ones(6).bfloat16(), mesh)
        opt.step()
    assert opt.state[narrow]["master_low"].full_tensor().tolist() == [0x4000] * 6


def test_capturable_takes_no_schedule() -> None:
    opt = make("Adam", parameters(), ema_decay=fs.EmaWarmup())
    group = {"params": [nn.Parameter(torch.ones(2, device="meta"))], "capturable": True}
    with pytest.raises(ValueError, match="which a CUDA graph cannot call"):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


def test_taking_over_from_torch() -> None:
    params = parameters(torch.bfloat16)
    torchs = torch.optim.Adam(params, lr=0.01)
    give(params, 0)
    torchs.step()
    opt = fs.torch.convert(torchs, ema_decay=0.5, master="float32", clip_value=1.0)
    start = [p.detach().float() for p in params]
    give(params, 1)
    opt.step()
    expected = [0.5 * a + 0.5 * b for a, b in zip(start, masters(opt), strict=True)]
    assert_close(opt.averages, expected, 1e-6)


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["fusestep.torch.groups", "fusestep.torch.optimizer"])
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_decay_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    conv, norm, linear = model
    decayed, others = fs.torch.decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert [*map(id, decayed["params"])] == [id(conv.weight), id(linear.weight)]
    rest = [conv.bias, norm.weight, norm.bias, linear.bias]
    assert [*map(id, others["params"])] == [*map(id, rest)]
    by_name = fs.torch.decay_groups(
        model.named_parameters(), 0.1, skip=lambda name, _: name.startswith("0.")
    )
    assert [*map(id, by_name[1]["params"])] == [id(conv.weight), id(conv.bias)]
    opt = fs.torch.AdamW(fs.torch.decay_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {p: p.detach().clone() for p in model.parameters()}
    opt.step()
    for parameter, old in before.items():
        kept = parameter.ndim < 2
        assert torch.equal(parameter.detach(), old) == kept


@pytest.mark.parametrize("kind", ["float32", "split"])
def test_a_model_that_becomes_narrow_later_gets_masters(kind: str) -> None:
    module = torch.nn.Linear(8, 8)
    opt = fs.torch.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0, master=kind)
    with torch.no_grad():
        module.weight.fill_(1.0)

    def step() -> None:
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        opt.step()

    step()
    module.to(torch.bfloat16)
    for _ in range(100):
        step()
    assert torch.all((module.weight.float() - 0.99).abs() < 2**-8)
    module.float()
    for _ in range(3):
        step()
    assert module.weight.dtype == torch.float32
    module.to(torch.bfloat16)
    step()


def test_averages_are_put_back_where_they_can_be() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = fs.torch.SGD(params, lr=0.1, ema_decay=0.5)
    for p in params:
        p.grad = torch.ones(4)
    opt.step()
    kept = params[0].detach().clone()
    params[1].data = torch.ones(6)
    with pytest.raises(ValueError, match="shape"), opt.swap_averages():
        pass
    assert torch.equal(params[0], kept)
    params[1].data = torch.ones(4)
    with opt.swap_averages():
        assert not torch.equal(params[0], kept)
    opt.step()


@pytest.mark.parametrize("narrow", ["exp_avg", "exp_avg_sq"])
def test_pieces_of_state_may_differ_in_dtype(narrow: str) -> None:
    """Whoever replaces a piece of state decides how it is stored."""
    p = torch.nn.Parameter(torch.randn(4096))
    q = torch.nn.Parameter(p.detach().clone())
    ours = fs.torch.Adam([p], lr=0.1, state_dtype=torch.bfloat16)
    theirs = torch.optim.Adam([q], lr=0.1)
    for step in range(6):
        p.grad = torch.randn(4096)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        if step == 2:
            for name in ("exp_avg", "exp_avg_sq"):
                dtype = torch.bfloat16 if name == narrow else torch.float32
                ours.state[p][name] = theirs.state[q][name].to(dtype, copy=True)
    assert (p - q).abs().max() < 0.01
