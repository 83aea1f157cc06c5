"""fusestep.torch among what people train with: schedulers, averages, scalers, compile, hooks."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

from torch.optim import lr_scheduler, swa_utils  # noqa: E402
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CLASSES = ["SGD", "Adam", "AdamW", "NAdam", "Adagrad"]


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, generator=generator)
    return x, x[:, :3].sin()


def learn(model: Any, opt: Any, step: int) -> Tensor:
    x, y = batch(step)
    opt.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    opt.step()
    return loss.detach()


def assert_close(model: Any, other: Any, tolerance: float = 1e-6) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


# ---- schedulers ----------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.001, 0.1, 3, cycle_momentum=not isinstance(o, torch.optim.Adagrad)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=12, cycle_momentum=not isinstance(o, torch.optim.Adagrad)
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 4),
}


def test_every_scheduler_is_in_the_table() -> None:
    public = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert public <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(cls: str, name: str, tensor_lr: bool) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if cls == "SGD" else {}
    courses = []
    for module, extra in ((fst, {}), (torch.optim, {"foreach": False})):
        model = network()
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        with warnings.catch_warnings():  # some schedulers warn of what they do themselves
            warnings.simplefilter("ignore")
            opt = getattr(module, cls)(model.parameters(), lr=lr, **options, **extra)
            scheduler = SCHEDULERS[name](opt)
            rates = []
            for step in range(12):
                loss = learn(model, opt, step)
                scheduler.step(*[loss] * (name == "ReduceLROnPlateau"))
                rates.append(float(opt.param_groups[0]["lr"]))
        courses.append((rates, model))
    (rates, model), (other_rates, other) = courses
    assert rates == other_rates
    assert_close(model, other, 1e-5)


def test_a_scheduler_sees_that_the_step_was_taken() -> None:
    """It warns, and warnings are errors here, if nobody called the step it has wrapped."""
    model = network()
    opt = fst.Adam(model.parameters())
    scheduler = lr_scheduler.StepLR(opt, 1)
    learn(model, opt, 0)
    scheduler.step()
    late = fst.Adam(model.parameters())
    scheduler = lr_scheduler.StepLR(late, 1)
    with pytest.warns(UserWarning, match=r"before `optimizer\.step\(\)`"):
        scheduler.step()


# ---- averages ------------------------------------------------------------------------------------


def test_averaged_models() -> None:
    averages = []
    for new in (fst.Adam, torch.optim.Adam):
        model = network()
        opt = new(model.parameters(), lr=0.01)
        swa = swa_utils.AveragedModel(model)
        ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        for step in range(10):
            learn(model, opt, step)
            swa.update_parameters(model)
            ema.update_parameters(model)
        averages.append((swa, ema))
    for ours, theirs in zip(*averages, strict=True):
        assert_close(ours, theirs)


# ---- loss scaling --------------------------------------------------------------------------------


def scaled(model: Any, opt: Any, scaler: Any, step: int, *, overflow: bool, clip: bool) -> None:
    x, y = batch(step)
    opt.zero_grad()
    loss = (model(x) - y).square().mean()
    scaler.scale(loss * float("inf") if overflow else loss).backward()
    if clip:
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(cls: str, fused: bool, clip: bool) -> None:
    options: dict[str, Any] = {} if cls == "NAdam" else {"fused": fused}
    model, other = network(), network()
    opt = getattr(fst, cls)(model.parameters(), lr=0.01, **options)
    peer = getattr(torch.optim, cls)(other.parameters(), lr=0.01, foreach=False)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    for step in range(10):
        overflow = step in (0, 4)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        scaled(model, opt, scalers[0], step, overflow=overflow, clip=clip)
        scaled(other, peer, scalers[1], step, overflow=overflow, clip=clip)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        after = model.state_dict(), opt.state_dict()["state"]
        if overflow:
            assert repr(after) == repr(before)
        assert_close(model, other)


def test_skip_nonfinite_does_without_a_scaler() -> None:
    model = network()
    opt = fst.Adam(model.parameters(), skip_nonfinite=True)
    learn(model, opt, 0)
    before = copy.deepcopy(model.state_dict())
    model[0].weight.grad[0, 0] = float("nan")
    opt.step()
    assert opt.skipped_steps == 1
    assert repr(before) == repr(model.state_dict())


def test_scaling_by_hand() -> None:
    model, other = network(), network()
    opt, peer = fst.SGD(model.parameters(), lr=0.1), fst.SGD(other.parameters(), lr=0.1)
    x, y = batch(0)
    ((model(x) - y).square().mean() * 512).backward()
    (other(x) - y).square().mean().backward()
    opt.step(grad_scale=1 / 512)
    peer.step()
    assert_close(model, other, 0)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiling_the_model_and_the_whole_step(fresh_compiler: Any) -> None:
    models = [network() for _ in range(3)]
    opts = [fst.Adam(model.parameters(), lr=0.01) for model in models]
    whole = torch.compile(learn, backend="eager")
    compiled = torch.compile(models[1], backend="eager")
    for step in range(6):
        learn(models[0], opts[0], step)
        learn(compiled, opts[1], step)
        whole(models[2], opts[2], step)
    for model in models[1:]:
        assert_close(models[0], model)
    assert opts[2].state[models[2][0].weight]["step"] == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiling_nothing_but_the_step(fresh_compiler: Any) -> None:
    model, other = network(), network()
    opt, twin = (fst.Adam(m.parameters(), lr=0.01) for m in (model, other))
    step = torch.compile(opt.step, backend="eager")
    for m in (model, other):
        m(batch(0)[0]).sum().backward()
    for _ in range(4):
        step()
        twin.step()
    assert_close(model, other, 0)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
        assert not fresh_compiler["stats"].get("unique_graphs")


# ---- hooks, closures, profiler -------------------------------------------------------------------


def test_hooks_run_once_and_in_torchs_order() -> None:
    order = []
    for module in (fst, torch.optim):
        model = network()
        seen: list[Any] = []

        def hook(name: str, seen: list[Any] = seen) -> Callable[..., None]:
            return lambda opt, args, kwargs: seen.append((name, len(args), dict(kwargs)))

        opt = module.SGD(model.parameters(), lr=0.1)
        handles = [
            opt.register_step_post_hook(hook("post")),
            opt.register_step_pre_hook(hook("pre")),
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
        ]
        opt.step()
        opt.step(lambda: 3.0)
        for handle in handles:
            handle.remove()
        opt.step()
        order.append(seen)
    assert order[0] == order[1]
    assert len(order[0]) == 8


def test_a_pre_hook_may_change_the_arguments_and_the_gradients() -> None:
    w = torch.zeros(3, requires_grad=True)
    opt = fst.SGD([w], lr=1.0)
    w.grad = torch.ones(3)

    def double(opt: Any, args: Any, kwargs: Any) -> Any:
        w.grad = w.grad + 1
        return args, {**kwargs, "grad_scale": 10.0}

    opt.register_step_pre_hook(double)
    opt.step()
    assert (w == -20).all()


def test_hooks_of_a_subclass_run_once() -> None:
    class Mine(fst.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    w = torch.zeros(3, requires_grad=True)
    opt = Mine([w])
    calls: list[int] = []
    opt.register_step_pre_hook(lambda *_: calls.append(1))
    w.grad = torch.ones(3)
    opt.step()
    assert calls == [1]
    assert w.any()


def test_closures() -> None:
    model, other = network(), network()
    opt, peer = fst.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    losses = []
    for m, o in ((model, opt), (other, peer)):

        def closure(m: Any = m, o: Any = o) -> Tensor:
            o.zero_grad()
            loss = m(batch(0)[0]).square().mean()
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([float(o.step(closure)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1])
    assert_close(model, other)


def test_the_profiler_sees_the_step() -> None:
    model = network()
    opt = fst.Adam(model.parameters())
    learn(model, opt, 0)
    with torch.autograd.profiler.profile() as profile:
        learn(model, opt, 1)
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"} <= names


def test_a_step_from_within_a_hook_of_its_own() -> None:
    """Once more, from the post hook: as torch, the outer step is over by then."""
    w = torch.zeros(3, requires_grad=True)
    w.grad = torch.ones(3)
    opt = fst.SGD([w], lr=1.0)
    again = [True]

    def hook(opt: Any, args: Any, kwargs: Any) -> None:
        if again.pop() if again else False:
            opt.step()

    opt.register_step_post_hook(hook)
    opt.step()
    assert (w == -2).all()
