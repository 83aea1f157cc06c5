"""torch's tests of its optimizers, for the classes of fusestep.torch, from torch's own tables.

PyTorch keeps a table of its optimizers (an `OptimizerInfo` for each: the arguments to try, the
arguments to refuse, the schedulers to try them with) and one test file that goes through it. Here
is a table of the same form for the classes of fusestep.torch, with torch's rows, and a test of
the same name for each of torch's cases that can be asked of them. Where torch compares two of its
implementations, fusestep's class is compared with torch's plain loop over the parameters, over
hundreds of steps.

`LEFT_OUT` names the cases without a test here. Tests below the last heading have no counterpart in
that file, but belong to what a torch.optim class is expected to do.
"""

from __future__ import annotations

import inspect
import io
import itertools
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # torch.testing._internal needs it
tables = pytest.importorskip("torch.testing._internal.common_optimizers")

from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau  # noqa: E402
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusestep.torch as fst  # noqa: E402
from torch_copies import through_a_file, through_pickle  # noqa: E402

ACCELERATOR = "the adapter takes parameters on the CPU"
MEMORY = "64 GB and more; test_large.py has parameters of more than 2**31 elements"
LBFGS = "about LBFGS, which fusestep does not have"
LEFT_OUT = {
    "test_forloop_goes_right_direction_multigpu": ACCELERATOR,
    "test_peak_memory_foreach": "asks CUDA's allocator, of foreach's intermediate lists",
    "test_foreach_large_tensor": MEMORY,
    "test_fused_large_tensor": MEMORY,
    "test_cpu_load_state_dict": ACCELERATOR,
    "test_state_dict_cross_device": ACCELERATOR,
    "test_fused_cpu_matches_device": ACCELERATOR,
    "test_defaults_changed_to_foreach": "which of torch's functions runs: none of them does",
    "test_fused_mixed_precision_state_init": "bfloat16 state; fusestep has float32 or float64",
    "test_fused_mixed_precision_hook_skips_existing_state": "bfloat16 state",
    "test_fused_mixed_precision_numerics": "bfloat16 state",
    "test_second_order_optims_return_consistent_types": LBFGS,
    "test_step_iteration": LBFGS,
    "TestDifferentiableOptimizer": "refused (test_a_differentiable_step_is_refused)",
    "CompiledOptimizerParityTests": "the step is compiled already; torch.compile has nothing to do",
    "TestLRScheduler": "about schedulers; those of the tables are in the tests with_lrsched",
    "TestSWAUtils": "about averages of models",
}

CLASSES = {name: getattr(fst, name) for name in ("SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad")}
THEIRS = {name: getattr(torch.optim, "SGD" if name == "NAG" else name) for name in CLASSES}


def nag_inputs(device: str, dtype: Any = None) -> list[Any]:
    """SGD's rows, without what NAG has no argument for."""
    rows = [r for r in tables.optim_inputs_func_sgd(device, dtype) if "dampening" not in r.kwargs]
    for row in rows:
        row.kwargs.pop("nesterov", None)
    return rows


def info_of(name: str) -> Any:
    """The row for one of our classes: torch's, but for what the adapter does not do."""
    row = next(i for i in tables.optim_db if i.optim_cls is THEIRS[name])
    return tables.OptimizerInfo(
        CLASSES[name],
        optim_inputs_func=nag_inputs if name == "NAG" else row.optim_inputs_func,
        optim_error_inputs_func=row.optim_error_inputs_func,
        scheduler_inputs=row.scheduler_inputs,
        supported_impls=tuple(i for i in row.supported_impls if i != "differentiable"),
        supports_fused_on=("cpu",) if "fused" in row.supported_impls else (),
        not_og_supported_flags=row.not_og_supported_flags,
        supports_sparse=row.supports_sparse,
        metadata_for_sparse=row.metadata_for_sparse,
    )


INFOS = {name: info_of(name) for name in CLASSES}


@dataclass(frozen=True)
class Case:
    """A class with one row of arguments, and at most one of the flags that choose how to step."""

    name: str
    row: int
    flag: str = ""

    @property
    def info(self) -> Any:
        return INFOS[self.name]

    def kwargs(self, dtype: Any = torch.float32) -> dict[str, Any]:
        """Made afresh each time: schedulers write into a learning rate that is a tensor."""
        return dict(self.info.optim_inputs_func("cpu", dtype)[self.row].kwargs)

    def ours(self, params: Any, **more: Any) -> Any:
        flag = {self.flag: True} if self.flag else {}
        return CLASSES[self.name](params, **{**self.kwargs(), **flag, **more})

    def theirs(self, params: Any, **more: Any) -> Any:
        fixed = {"momentum": 0.9, "nesterov": True} if self.name == "NAG" else {}
        return THEIRS[self.name](params, **{**fixed, **self.kwargs(), "foreach": False, **more})

    @property
    def grows(self) -> bool:
        return bool(self.kwargs().get("maximize", False))

    def __str__(self) -> str:
        row = self.info.optim_inputs_func("cpu")[self.row].desc
        return "-".join(filter(None, (self.name, row.replace(" ", "_"), self.flag)))


CASES = [
    Case(name, row)
    for name, info in INFOS.items()
    for row in range(len(info.optim_inputs_func("cpu")))
]
FLAGGED = [
    Case(case.name, case.row, flag) for case in CASES for flag in ("", *case.info.supported_impls)
]
FUSED = [case for case in FLAGGED if case.flag == "fused"]
HAVE_FUSED = [name for name, info in INFOS.items() if "fused" in info.supported_impls]

each_class = pytest.mark.parametrize("name", CLASSES)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_flag = pytest.mark.parametrize("case", FLAGGED, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def default_dtype() -> Iterator[Any]:
    """Set torch's default dtype; it is set back afterwards."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


class Line:
    """W x + b, whose squared length is to be made small; always the same numbers."""

    def __init__(self, dtype: Any = torch.float32, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)

        def numbers(*shape: int) -> Any:
            if contiguous:
                return torch.randn(shape, generator=generator, dtype=dtype)
            return torch.randn((*shape, 2), generator=generator, dtype=dtype)[..., 0]

        self.weight = torch.nn.Parameter(numbers(10, 5))
        self.bias = torch.nn.Parameter(numbers(10))
        self.x = numbers(5)
        self.params = [self.weight, self.bias]

    def named(self, named: bool = True) -> list[Any]:
        return list(zip(("weight", "bias"), self.params, strict=True)) if named else self.params

    def loss(self) -> Any:
        """The loss as it is; the parameters have its gradient afterwards."""
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.x) + self.bias).square().sum()
        loss.backward()
        return loss.detach()

    def go(self, opt: Any, steps: int) -> None:
        for _ in range(steps):
            self.loss()
            opt.step()


def twins(params: Sequence[Any]) -> list[Any]:
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in params]


def noise(shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Any]:
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def give(grads: Sequence[Any], *lists: Sequence[Any]) -> None:
    """Each list of parameters gets the gradients, each parameter a tensor of its own."""
    for params in lists:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.to(p.dtype, copy=True)


def close(name: str, actual: Any, expected: Any) -> None:
    """As close as the two ways to round are; torch keeps NAdam's product of momenta in float32."""
    single = actual.dtype in (torch.float32, torch.complex64)
    rtol, atol = (1e-4, 2e-4) if single else (1e-9, 1e-11)
    if name == "NAdam":
        atol = max(atol, 1e-8)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def same_course(name: str, ours: Any, theirs: Any) -> None:
    """Parameters and state of two optimizers agree, group by group."""
    assert len(ours.param_groups) == len(theirs.param_groups)
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, t in zip(group["params"], other["params"], strict=True):
            close(name, p, t)
            state, expected = ours.state.get(p, {}), theirs.state.get(t, {})
            assert state.keys() == expected.keys()
            for key, value in state.items():
                assert value.shape == expected[key].shape
                if key == "mu_product":  # which torch casts to the parameter's dtype when loading
                    assert value.item() == pytest.approx(expected[key].item(), rel=1e-4)
                else:
                    assert value.dtype == expected[key].dtype
                    close(name, value, expected[key])


def groups_without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the last bit, through dicts and lists."""
    assert type(actual) is type(expected)
    if isinstance(actual, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual:
            assert_same(actual[key], expected[key])
    elif isinstance(actual, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


# ---- the table itself, and what a constructor refuses


@each_class
def test_optim_infos_do_not_specify_global_cliquey_kwargs(name: str) -> None:
    for row in INFOS[name].optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & row.kwargs.keys()


def error_inputs() -> Iterator[Any]:
    for name, info in INFOS.items():
        for row, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32)):
            description = error.optimizer_error_input.desc.replace(" ", "_")
            yield pytest.param(name, row, id=f"{name}-{description}")


@pytest.mark.parametrize(("name", "row"), list(error_inputs()))
def test_errors(name: str, row: int) -> None:
    error = INFOS[name].optim_error_inputs_func("cpu", torch.float32)[row]
    assert error.error_on is tables.OptimizerErrorEnum.CONSTRUCTION_ERROR
    kind, arguments = error.error_type, error.optimizer_error_input
    expected = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with expected(kind, match=error.error_regex):
        CLASSES[name](arguments.params, **arguments.kwargs)


# ---- the right direction


@each_case
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(case: Case, contiguous: bool) -> None:
    more = {"foreach": False}
    line, other = Line(contiguous=contiguous), Line(contiguous=contiguous)
    opt, theirs = case.ours(line.params, **more), case.theirs(other.params)
    before = line.loss()
    line.go(opt, 20)
    assert line.loss() > before if case.grows else line.loss() < before
    other.go(theirs, 20)
    same_course(case.name, opt, theirs)


def advance(schedulers: list[Any], loss: Any) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()


@each_case
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction_with_lrsched(case: Case, contiguous: bool) -> None:
    for constructors in case.info.scheduler_inputs:
        line, other = (Line(torch.float64, contiguous) for _ in range(2))
        opt, theirs = case.ours(line.params), case.theirs(other.params)
        schedulers = [make(opt) for make in constructors]
        their_schedulers = [make(theirs) for make in constructors]
        before = line.loss()
        for _ in range(60):
            loss = line.loss()
            opt.step()
            advance(schedulers, loss)
            their_loss = other.loss()
            theirs.step()
            advance(their_schedulers, their_loss)
        assert line.loss() > before if case.grows else line.loss() < before
        assert float(opt.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
        same_course(case.name, opt, theirs)


@each_class
def test_param_group_with_lrscheduler_goes_right_direction(name: str) -> None:
    for constructors in INFOS[name].scheduler_inputs:
        line, other = Line(torch.float64), Line(torch.float64)
        case = Case(name, 0)
        opt, theirs = (
            make([{"params": [this.weight]}, {"params": [this.bias], "lr": 0.01}])
            for make, this in ((case.ours, line), (case.theirs, other))
        )
        schedulers = [[make(o) for make in constructors] for o in (opt, theirs)]
        before = line.loss()
        for _ in range(60):
            advance(schedulers[0], opt.step(line.loss))
            advance(schedulers[1], theirs.step(other.loss))
        assert line.loss() < before
        for group, expected in zip(opt.param_groups, theirs.param_groups, strict=True):
            assert group["lr"] == expected["lr"]
        same_course(name, opt, theirs)


# ---- the learning rate as a tensor


@each_flag
@pytest.mark.parametrize("ndim", [0, 1, 2])
def test_tensor_lr(case: Case, ndim: int) -> None:
    lr = torch.tensor(1e-3).reshape((1,) * ndim)
    number = lr.item()
    line, other = Line(), Line()
    if case.flag == "foreach" and case.name in ("Adam", "AdamW"):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            case.ours(line.params, lr=lr)
        return
    opt, expected = case.ours(line.params, lr=lr), case.ours(other.params, lr=number)
    line.go(opt, 10)
    other.go(expected, 10)
    assert_same(line.params, other.params)
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == number

    lr.fill_(0.01)  # as schedulers do
    expected.param_groups[0]["lr"] = lr.item()
    line.go(opt, 10)
    other.go(expected, 10)
    assert_same(line.params, other.params)


# ---- complex parameters


def as_real(tensor: Any) -> Any:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@each_case
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(case: Case, dtype: Any) -> None:
    shapes = ((10, 5), (10,), (), (2, 3))
    params = noise(shapes, dtype)
    params[3] = torch.randn(shapes[3], dtype=dtype.to_real(), requires_grad=True)
    others = twins(params)
    real = twins([as_real(p.detach()).requires_grad_() for p in params])
    opt, theirs, of_real = case.ours(params), case.theirs(others), case.ours(real)
    for _ in range(100):
        grads = [torch.randn_like(p) for p in params]
        give(grads, params, others)
        give([as_real(g) for g in grads], real)
        for each in (opt, theirs, of_real):
            each.step()
        assert_same([as_real(p) for p in params], real)
    same_course(case.name, opt, theirs)


def rosenbrock(point: Any) -> Any:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@each_case
def test_complex_2d(case: Case) -> None:
    point = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = twins([point.real, point.imag])
    whole, apart = case.ours([point]), case.ours([p.requires_grad_() for p in parts])
    for _ in range(3):  # a few more, and SGD is at infinity
        whole.zero_grad()
        rosenbrock(point).abs().backward()
        give([point.grad.real, point.grad.imag], parts)
        whole.step()
        apart.step()
        assert_same([point.real, point.imag], parts)


# ---- sparse gradients


def rosenbrock_gradient(point: Any, coordinate: int, sparse: bool) -> Any:
    """The gradient of one coordinate, which is to be summed of two parts where it is sparse."""
    leaf = point.detach().clone().requires_grad_()
    rosenbrock(leaf).backward()
    whole = leaf.grad[coordinate]
    if not sparse:
        return torch.zeros(2, dtype=point.dtype).index_fill_(0, torch.tensor(coordinate), whole)
    parts = torch.stack([whole / 4, whole - whole / 4])
    rows = torch.full((1, 2), coordinate)
    return torch.sparse_coo_tensor(rows, parts, (2,), check_invariants=False)


# NAG has momentum, and torch's SGD moves all rows by it; fusestep's only those of the gradient.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are:UserWarning")
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.info.supports_sparse and c.name != "NAG"], ids=str
)
def test_rosenbrock_sparse(case: Case) -> None:
    fixed, constructors = case.info.metadata_for_sparse
    points = [torch.tensor([1.5, 1.5], dtype=torch.float64, requires_grad=True) for _ in range(3)]
    before = rosenbrock(points[0]).item()
    optimizers = [
        make([point], **fixed)
        for make, point in zip((case.ours, case.theirs, case.ours), points, strict=True)
    ]
    schedulers = [[make(opt) for make in constructors] for opt in optimizers]
    for step in range(100):
        for point, opt, theirs in zip(points, optimizers, schedulers, strict=True):
            point.grad = rosenbrock_gradient(point, step % 2, sparse=point is not points[2])
            opt.step()
            advance(theirs, rosenbrock(point).detach())
    after = rosenbrock(points[0]).item()
    assert after > before if optimizers[0].param_groups[0]["maximize"] else after < before
    same_course(case.name, optimizers[0], optimizers[1])
    close(case.name, points[0], points[2])


# ---- Adam and AdamW are told apart by an entry of the group


def test_adamw_serialization() -> None:
    line = Line()
    saved = {name: CLASSES[name](line.params).state_dict() for name in ("Adam", "AdamW")}
    older = deepcopy(saved["AdamW"])
    del older["param_groups"][0]["decoupled_weight_decay"]

    def loaded(name: str, state_dict: dict[str, Any]) -> bool:
        opt = CLASSES[name](line.params)
        opt.load_state_dict(state_dict)
        return opt.param_groups[0]["decoupled_weight_decay"]

    assert saved["Adam"]["param_groups"][0]["decoupled_weight_decay"] is False
    assert loaded("Adam", saved["AdamW"]) is True
    assert loaded("AdamW", saved["Adam"]) is True
    assert loaded("AdamW", older) is True
    assert loaded("Adam", older) is False


def test_adam_decays_as_the_state_dict_it_has_loaded_says() -> None:
    line, other = Line(torch.float64), Line(torch.float64)
    adam, adamw = fst.Adam(line.params), fst.AdamW(other.params, weight_decay=0.3)
    adam.load_state_dict(adamw.state_dict())
    line.go(adam, 50)
    other.go(adamw, 50)
    assert_same(line.params, other.params)


# ---- one implementation against another


SHAPES = ((3, 2), (3,), (1, 3), (1,), (0, 4), ())


def wander(opt: Any, theirs: Any, params: list[Any], others: list[Any], steps: int) -> None:
    """Random gradients; now and then none at all, and for a while none for one parameter."""
    for step in range(steps):
        grads = [torch.randn_like(p) for p in params]
        if step % 9 == 2:
            grads = [None] * len(params)
        elif steps // 3 < step < steps // 2:
            grads[2] = None
        give(grads, params, others)
        opt.step()
        theirs.step()


@each_flag
def test_foreach_and_fused_match_forloop(case: Case) -> None:
    params = noise(SHAPES, torch.float64)
    others = twins(params)
    opt, theirs = case.ours(params), case.theirs(others)
    wander(opt, theirs, params, others, 200)
    same_course(case.name, opt, theirs)


@each_case
def test_matches_forloop_in_float32(case: Case) -> None:
    params = noise(SHAPES, torch.float32)
    others = twins(params)
    opt, theirs = case.ours(params), case.theirs(others)
    wander(opt, theirs, params, others, 200)
    same_course(case.name, opt, theirs)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_forloop_in_half_the_bits(case: Case, dtype: Any) -> None:
    """State is float32. So torch steps float32 parameters, rounded to `dtype` after each step."""
    params = noise(SHAPES, dtype)
    others = [p.detach().float().requires_grad_() for p in params]
    kwargs = case.kwargs(dtype)
    opt, theirs = case.ours(params, **kwargs), case.theirs(others, **kwargs)
    one_ulp = torch.finfo(dtype).eps
    for _ in range(100):
        give([torch.randn_like(p) for p in params], params, others)
        opt.step()
        theirs.step()
        for p, t in zip(params, others, strict=True):
            torch.testing.assert_close(p.float(), t, rtol=one_ulp, atol=2e-7)
            t.data.copy_(p)
            for key, value in opt.state.get(p, {}).items():
                if key not in ("step", "mu_product"):
                    expected = theirs.state[t][key]
                    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@each_case
def test_mixed_device_dtype(case: Case) -> None:
    """Several dtypes in one group: each parameter moves as it does alone. (There is one device.)"""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    params = [torch.randn(2, 3, dtype=d, requires_grad=True) for d in dtypes]
    alone = twins(params)
    together, each = case.ours(params), [case.ours([p]) for p in alone]
    for _ in range(50):
        give([torch.randn_like(p) for p in params], params, alone)
        for opt in (together, *each):
            opt.step()
    assert_same(params, alone)


@each_case
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_set_default_dtype_works_with_foreach(case: Case, default: Any, default_dtype: Any) -> None:
    default_dtype(default)
    params = noise(SHAPES, torch.float64)
    others = twins(params)
    more = {"foreach": True} if "foreach" in case.info.supported_impls else {}
    opt, theirs = case.ours(params, **more), case.theirs(others)
    wander(opt, theirs, params, others, 20)
    same_course(case.name, opt, theirs)


# ---- fused=True: what torch's fused kernels ask and are told


@pytest.mark.parametrize("name", HAVE_FUSED)
def test_fused_error_on_params_on_meta(name: str) -> None:
    model = torch.nn.Linear(3, 2, device="meta")
    opt = CLASSES[name](model.parameters(), fused=True)
    state = {p: set(entry) for p, entry in opt.state.items()}
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises((RuntimeError, TypeError), match="meta"):
        opt.step()
    assert {p: set(entry) for p, entry in opt.state.items()} == state
    opt.zero_grad(set_to_none=True)
    opt.step()  # nothing to do any more


@pytest.mark.parametrize("case", FUSED, ids=str)
@pytest.mark.parametrize("grad_scale", [None, 1.0, 4.0])
def test_fused_does_not_step_if_foundinf(case: Case, grad_scale: float | None) -> None:
    params = [torch.ones(1) for _ in range(5)]
    opt = case.ours(params)
    opt.grad_scale = None if grad_scale is None else torch.full((1,), grad_scale)
    opt.found_inf = torch.ones(())
    give([torch.full((1,), torch.inf)] * 5, params)
    opt.step()
    assert_same(params, [torch.ones(1)] * 5)
    for p in params:
        assert float(opt.state.get(p, {}).get("step", 0.0)) == 0.0

    others = twins(params)
    plain = Case(case.name, case.row).ours(others)
    opt.found_inf = torch.zeros(())
    give([torch.full((1,), 0.5 * (grad_scale or 1.0))] * 5, params)
    give([torch.full((1,), 0.5)] * 5, others)
    opt.step()
    plain.step()
    assert_same(params, others)


# ---- parameter groups


@each_flag
def test_param_groups_weight_decay(case: Case) -> None:
    """Arguments and flags stand in the groups, and the constructor is given none."""
    line, other = Line(torch.float64), Line(torch.float64)
    flag = {case.flag: True} if case.flag else {}
    fixed = {"momentum": 0.9, "nesterov": True} if case.name == "NAG" else {}
    opt = CLASSES[case.name](
        [
            {"params": [line.weight], **case.kwargs(), **flag},
            {"params": [line.bias], **case.kwargs(), **flag, "weight_decay": 0.0},
        ]
    )
    theirs = THEIRS[case.name](
        [
            {"params": [other.weight], **case.kwargs()},
            {"params": [other.bias], **case.kwargs(), "weight_decay": 0.0},
        ],
        foreach=False,
        **fixed,
    )
    before = line.loss()
    line.go(opt, 50)
    assert line.loss() > before if case.grows else line.loss() < before
    other.go(theirs, 50)
    same_course(case.name, opt, theirs)


@each_flag
def test_param_groups_lr(case: Case) -> None:
    line = Line()
    kwargs = {"lr": 1e-3, **case.kwargs(), **({case.flag: True} if case.flag else {})}
    still = torch.nn.Parameter(torch.randn(2, 2))
    where = still.detach().clone()
    opt = CLASSES[case.name]([{"params": line.params, **kwargs}, {"params": [still]}], lr=1e-28)
    before = line.loss()
    for _ in range(20):
        line.loss()
        still.grad = torch.rand_like(still)
        opt.step()
    assert line.loss() > before if case.grows else line.loss() < before
    assert_same(still.detach(), where)


# ---- steps that do nothing


@each_flag
def test_step_is_noop_when_params_have_no_grad(case: Case) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = twins(params)
    opt = case.ours(params)
    state = deepcopy(list(opt.state.values()))
    loss = torch.tensor([1.0])
    assert opt.step(lambda: loss) is loss
    assert_same(params, before)
    assert_same(list(opt.state.values()), state)


@each_flag
def test_step_is_noop_for_zero_grads(case: Case) -> None:
    params = [torch.randn(5, 1, requires_grad=True)]
    before = twins(params)
    opt = case.ours(params, weight_decay=0)
    for _ in range(20):
        params[0].grad = torch.zeros_like(params[0])
        opt.step(lambda: torch.tensor([1.0]))
    assert_same(params, before)


@each_flag
def test_grads_are_never_inplaced_into(case: Case) -> None:
    params = [torch.randn(5, 1, requires_grad=True)]
    grad = torch.rand(5, 1)
    give([grad], params)
    opt = case.ours(params)
    version = params[0].grad._version
    for _ in range(5):
        opt.step(lambda: torch.tensor([1.0]))
        assert params[0].grad._version == version
        assert_same(params[0].grad, grad)


@each_case
def test_optimizer_can_be_printed(case: Case) -> None:
    opt = case.ours([{"params": noise(((2, 3),), torch.float32), "lr": 0.125}])
    text = repr(opt)
    assert text.startswith(f"{case.name} (\nParameter Group 0\n")
    assert "    lr: 0.125\n" in text


# ---- state dicts


@each_case
@pytest.mark.parametrize("named", list(itertools.product([True, False], repeat=2)), ids=str)
def test_state_dict_deterministic(case: Case, named: tuple[bool, bool]) -> None:
    line, copied = Line(), Line()
    opt = case.ours(line.named(named[0]))
    line.go(opt, 10)
    for p, source in zip(copied.params, line.params, strict=True):
        p.data.copy_(source)
    second = case.ours(copied.named(named[1]))
    saved = opt.state_dict()
    second.load_state_dict(deepcopy(saved))
    assert_same(groups_without_names(second.state_dict()), groups_without_names(saved))
    line.go(opt, 10)
    copied.go(second, 10)
    assert_same(copied.params, line.params)
    assert_same(groups_without_names(second.state_dict()), groups_without_names(opt.state_dict()))

    # A parameter that stands in two groups has one number.
    second.param_groups.extend(second.param_groups)
    groups = groups_without_names(second.state_dict())["param_groups"]
    assert_same(groups[-1], groups[0])


@each_flag
def test_can_load_older_state_dict(case: Case) -> None:
    line, other = Line(torch.float64), Line(torch.float64)
    opt, theirs = case.ours(line.params), case.theirs(other.params)
    line.go(opt, 3)
    other.go(theirs, 3)
    for each in (opt, theirs):
        older = deepcopy(each.state_dict())
        for group in older["param_groups"]:
            for flag in case.info.not_og_supported_flags:
                group.pop(flag, None)
        each.load_state_dict(older)
    line.go(opt, 30)
    other.go(theirs, 30)
    same_course(case.name, opt, theirs)


@each_case
@pytest.mark.parametrize("named", list(itertools.product([True, False], repeat=2)), ids=str)
def test_can_load_from_to_named_state_dict(case: Case, named: tuple[bool, bool]) -> None:
    line, other = Line(), Line()
    first, second = case.ours(line.named(named[0])), case.ours(other.named(named[1]))
    line.go(first, 3)
    second.load_state_dict(deepcopy(first.state_dict()))
    other.go(second, 1)
    group = second.state_dict()["param_groups"][0]
    assert group.get("param_names") == (["weight", "bias"] if any(named) else None)


@each_case
@pytest.mark.parametrize("named", [True, False], ids=["named", "numbered"])
def test_save_load_equality_with_weights_only(case: Case, named: bool) -> None:
    line = Line()
    opt = case.ours(line.named(named))
    line.go(opt, 3)
    state_dict = opt.state_dict()
    file = io.BytesIO()
    torch.save(state_dict, file)
    for weights_only in (True, False):
        file.seek(0)
        assert_same(torch.load(file, weights_only=weights_only), state_dict)


@each_flag
@pytest.mark.parametrize("number", [int, float])
def test_load_nontensor_step(case: Case, number: type) -> None:
    line, copied = Line(), Line()
    opt, second = case.ours(line.params), case.ours(copied.params)
    line.go(opt, 3)
    state_dict = deepcopy(opt.state_dict())
    for state in state_dict["state"].values():
        if "step" in state:
            state["step"] = number(state["step"])
    for p, source in zip(copied.params, line.params, strict=True):
        p.data.copy_(source)
    second.load_state_dict(state_dict)
    for state in second.state.values():
        assert "step" not in state or state["step"].shape == ()
    line.go(opt, 20)
    copied.go(second, 20)
    assert_same(copied.params, line.params)
    assert_same(second.state_dict(), opt.state_dict())


# ---- hooks of state dicts


def add_to_state(opt: Any) -> None:
    opt.state["test"] = 1


def take_from_state(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "found": state_dict["state"].pop("test", None)}


@each_case
def test_state_dict_pre_hook(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params)
    opt.register_state_dict_pre_hook(add_to_state)
    assert opt.state_dict()["state"]["test"] == 1
    line.go(opt, 3)  # a stranger in the state is left alone
    assert opt.state["test"] == 1


@each_case
def test_state_dict_post_hook(case: Case) -> None:
    opt = case.ours(Line().params)
    opt.register_state_dict_post_hook(take_from_state)
    assert opt.state_dict()["found"] is None


@each_case
def test_state_dict_pre_post_hook(case: Case) -> None:
    opt = case.ours(Line().params)
    opt.register_state_dict_pre_hook(add_to_state)
    opt.register_state_dict_post_hook(take_from_state)
    state_dict = opt.state_dict()
    assert state_dict["found"] == 1
    assert "test" not in state_dict["state"]


def lr_in_place(opt: Any, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def lr_in_a_copy(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


def note_lr(opt: Any) -> None:
    opt.state["lr after loading"] = opt.param_groups[0]["lr"]


@each_case
def test_load_state_dict_pre_hook_and_prepend(case: Case) -> None:
    opt = case.ours(Line().params)
    state_dict = opt.state_dict()
    opt.register_load_state_dict_pre_hook(lr_in_place)
    opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["lr"] == 0.002
    opt.register_load_state_dict_pre_hook(lr_in_a_copy, prepend=True)
    opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["lr"] == 0.002
    opt.register_load_state_dict_pre_hook(lr_in_a_copy)
    opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["lr"] == 0.003


@each_case
def test_load_state_dict_post_hook(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params, lr=0.125)
    opt.register_load_state_dict_post_hook(note_lr)
    line.go(opt, 3)
    opt.load_state_dict(opt.state_dict())
    assert opt.state["lr after loading"] == 0.125
    line.go(opt, 3)
    opt.load_state_dict(opt.state_dict())


@each_case
def test_load_state_dict_pre_post_hook(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params)
    opt.register_load_state_dict_pre_hook(lr_in_a_copy)
    opt.register_load_state_dict_post_hook(note_lr)
    opt.load_state_dict(opt.state_dict())
    assert opt.state["lr after loading"] == 0.003


# ---- hooks of steps


@each_flag
def test_step_pre_hook(case: Case) -> None:
    opt = case.ours([torch.ones(1, 2)])
    seen = []
    handle = opt.register_step_pre_hook(lambda *arguments: seen.append(arguments))
    assert opt.step() is None
    assert opt.step(float) == 0.0
    handle.remove()
    opt.step()
    assert seen == [(opt, (opt,), {}), (opt, (opt, float), {})]

    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, int), kwargs))
    assert repr(opt.step(float)) == "0"  # int(), which the hook has put in the place of float()


@each_flag
def test_step_post_hook(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params)
    seen = []
    handle = opt.register_step_post_hook(lambda *arguments: seen.append(line.weight._version))
    line.go(opt, 2)
    handle.remove()
    line.go(opt, 1)
    assert len(seen) == 2
    assert 0 < seen[0] < seen[1] < line.weight._version


@each_flag
def test_step_all_hooks(case: Case) -> None:
    params = [torch.ones(1, 2)]
    opts = [case.ours(params), case.theirs(params)]  # whose class is patched, too
    seen: list[str] = []

    def note(what: str) -> Any:
        return lambda *_: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    for opt in opts:
        handles.append(opt.register_step_pre_hook(note("pre")))
        handles.append(opt.register_step_post_hook(note("post")))
    try:
        for opt in (*opts, opts[0]):
            seen.clear()
            opt.step()
            assert seen == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    for opt in opts:
        opt.step()
    assert seen == []


# ---- copies, and what state there is


@each_case
def test_deepcopy_copies_all_public_attrs(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params)
    line.go(opt, 3)
    copied = deepcopy(opt)

    def public(obj: Any) -> set[str]:
        return {k for k in vars(obj) if not k.startswith("_")}

    assert public(copied) == public(opt)
    assert type(copied) is type(opt)


@each_case
def test_non_empty_state(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params)
    line.go(opt, 1)
    assert all(len(state) > 0 for state in opt.state.values())
    momentum = case.kwargs().get("momentum", 0)
    assert len(opt.state) == (0 if case.name == "SGD" and momentum == 0 else 2)


# ---- not in torch's file


@each_class
def test_a_class_is_torchs_class_with_torchs_arguments(name: str) -> None:
    assert issubclass(CLASSES[name], THEIRS[name])
    assert CLASSES[name].__name__ == name
    ours = inspect.signature(CLASSES[name]).parameters
    theirs = inspect.signature(THEIRS[name]).parameters
    if name == "NAG":
        theirs = {k: p for k, p in theirs.items() if k not in ("dampening", "nesterov")}
        assert ours["momentum"].default == 0.9
    assert list(ours)[: len(theirs)] == list(theirs) or name == "NAG"
    for key, parameter in theirs.items():
        assert ours[key].kind == parameter.kind
        assert ours[key].default == parameter.default or (name, key) == ("NAG", "momentum")
    for key in ours.keys() - theirs.keys():
        assert ours[key].kind is inspect.Parameter.KEYWORD_ONLY


REFUSED = (TypeError, ValueError, RuntimeError, NotImplementedError)


def refused(name: str, params: Any, match: str, **kwargs: Any) -> None:
    """Refused by the constructor or, at the latest, by the first step."""
    with pytest.raises(REFUSED, match=match):
        CLASSES[name](params, **kwargs).step()


@each_class
def test_a_differentiable_step_is_refused(name: str) -> None:
    line = Line()
    line.loss()
    before = twins(line.params)
    refused(name, line.params, "differentiable", differentiable=True)
    refused(name, [{"params": line.params, "differentiable": True}], "differentiable")
    assert_same([p.detach() for p in line.params], [p.detach() for p in before])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam"])
def test_a_capturable_step_is_refused(name: str) -> None:
    line = Line()
    line.loss()
    before = twins(line.params)
    refused(name, line.params, "capturable", capturable=True)
    refused(name, [{"params": line.params, "capturable": True}], "capturable")
    assert_same([p.detach() for p in line.params], [p.detach() for p in before])


@pytest.mark.parametrize("name", HAVE_FUSED)
def test_fused_and_foreach_together_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        CLASSES[name](Line().params, fused=True, foreach=True)


@each_flag
def test_a_closure_is_called_once_with_gradients_on_and_its_value_returned(case: Case) -> None:
    line, other = Line(), Line()
    opt, plain = case.ours(line.params), case.ours(other.params)
    enabled = []

    def closure() -> Any:
        enabled.append(torch.is_grad_enabled())
        return line.loss()

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert enabled == [True]
    assert loss == other.loss()
    assert plain.step() is None
    assert_same(line.params, other.params)
    assert opt.step(closure=lambda: 7) == 7


@each_case
def test_a_graph_from_before_the_step_cannot_be_used_after_it(case: Case) -> None:
    line = Line()
    opt = case.ours(line.params)
    line.loss()
    loss = line.weight.square().sum()
    versions = [p._version for p in line.params]
    opt.step()
    assert all(p._version > v for p, v in zip(line.params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_case
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(case: Case, set_to_none: bool) -> None:
    line = Line()
    opt = case.ours(line.params)
    line.loss()
    grads = [p.grad for p in line.params]
    opt.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in line.params)
    else:
        assert all(p.grad is g for p, g in zip(line.params, grads, strict=True))
        assert not any(g.any() for g in grads)


@each_flag
@pytest.mark.parametrize("copy", [deepcopy, through_pickle, through_a_file])
def test_a_copy_goes_on_as_the_original(case: Case, copy: Any) -> None:
    line = Line()
    opt = case.ours(line.named())
    for steps in (0, 3):
        line.go(opt, steps)
        other, second = copy((line, opt))
        assert second.param_groups[0]["params"][0] is other.weight
        line.go(opt, 10)
        other.go(second, 10)
        assert_same(other.params, line.params)
        assert_same(second.state_dict(), opt.state_dict())
        assert repr(second) == repr(opt)


@each_case
def test_checkpoints_pass_between_fusestep_and_torch(case: Case) -> None:
    """Every 20 steps each of the two loads what the other has saved."""
    line, other = Line(torch.float64), Line(torch.float64)
    opt, theirs = case.ours(line.params), case.theirs(other.params)
    for _ in range(6):
        line.go(opt, 20)
        other.go(theirs, 20)
        ours, others = deepcopy(opt.state_dict()), deepcopy(theirs.state_dict())
        opt.load_state_dict(others)
        theirs.load_state_dict(ours)
        assert_same(opt.param_groups[0]["lr"], theirs.param_groups[0]["lr"])
        same_course(case.name, opt, theirs)


@each_case
def test_what_is_written_into_state_and_groups_between_steps_counts(case: Case) -> None:
    line, other = Line(torch.float64), Line(torch.float64)
    opts = [case.ours(line.params), case.theirs(other.params)]

    def both(steps: int = 10) -> None:
        line.go(opts[0], steps)
        other.go(opts[1], steps)
        same_course(case.name, *opts)

    both()
    for opt in opts:
        for state in opt.state.values():
            for key, value in state.items():
                if key == "step":
                    value.fill_(3)
                elif key != "mu_product":
                    value.mul_(0.5)
    both()
    for opt in opts:
        for state in opt.state.values():
            for key in state:
                state[key] = state[key].clone()
        opt.param_groups[0]["lr"] = 0.004
        opt.param_groups[0]["weight_decay"] = 0.25
        opt.param_groups[0]["maximize"] = not case.grows
        if "momentum" in opt.param_groups[0]:
            opt.param_groups[0]["momentum"] = 0.4
        if "betas" in opt.param_groups[0]:
            opt.param_groups[0]["betas"] = (0.4, 0.8)
    both()
    for p in (*line.params, *other.params):
        p.data = 0.5 * p.detach().clone()  # other memory
    both()
    for opt in opts:
        opt.state.clear()
    both()


@each_case
def test_a_group_can_be_added_later(case: Case) -> None:
    line, other = Line(torch.float64), Line(torch.float64)
    opt, theirs = case.ours([line.weight]), case.theirs([other.weight])
    line.go(opt, 10)
    other.go(theirs, 10)
    opt.add_param_group({"params": line.bias, "lr": 0.002})
    theirs.add_param_group({"params": other.bias, "lr": 0.002})
    line.go(opt, 50)
    other.go(theirs, 50)
    same_course(case.name, opt, theirs)


@pytest.mark.parametrize("name", ["SGD", "NAG", "Adam", "AdamW", "NAdam"])
def test_a_scheduler_may_move_the_momentum(name: str) -> None:
    row = {"SGD": 4}.get(name, 0)  # with momentum
    line, other = Line(torch.float64), Line(torch.float64)
    opt, theirs = Case(name, row).ours(line.params), Case(name, row).theirs(other.params)
    schedulers = [OneCycleLR(o, max_lr=0.01, total_steps=101) for o in (opt, theirs)]
    for _ in range(100):
        line.go(opt, 1)
        other.go(theirs, 1)
        for scheduler in schedulers:
            scheduler.step()
    same_course(name, opt, theirs)


def double(value: float) -> Any:
    return torch.tensor(value, dtype=torch.float64)


@each_case
@pytest.mark.parametrize("kind", [float, double])
def test_other_ways_to_write_hyper_parameters(case: Case, kind: Any) -> None:
    """Integers, and betas in tensors."""
    more: dict[str, Any] = {"weight_decay": 1}
    if "betas" in case.theirs(Line().params).defaults and case.name != "NAdam":
        more["betas"] = (kind(0.5), kind(0.75))
    line, other = Line(torch.float64), Line(torch.float64)
    opt, theirs = case.ours(line.params, **more), case.theirs(other.params, **more)
    line.go(opt, 20)
    other.go(theirs, 20)
    same_course(case.name, opt, theirs)


@pytest.mark.parametrize("case", [*CASES, *FUSED], ids=str)
def test_grad_scaler(case: Case) -> None:
    """Loss scaling, with steps that overflow: as torch with the same flag, to the same scale."""
    line, other = Line(), Line()
    opt = case.ours(line.params)
    theirs = case.theirs(other.params, **({"fused": True} if case.flag else {}))
    scales = []
    for each, this in ((opt, line), (theirs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
        for step in range(30):
            each.zero_grad()
            loss = (this.weight.mv(this.x) + this.bias).square().sum()
            scaler.scale(loss).backward()
            if step % 11 == 5:
                this.bias.grad[3] = torch.inf
            scaler.step(each)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    for p, t in zip(line.params, other.params, strict=True):
        close(case.name, p, t)
        if "step" in opt.state.get(p, {}):
            assert opt.state[p]["step"] == theirs.state[t]["step"]
