"""fusestep.torch on GPUs: the CPU's bits, and what torch's own optimizers do with CUDA tensors.

Every test runs twice: with real CUDA tensors (marked `gpu`, skipped where there is no GPU), and
with tensors in the host's memory that count as a GPU's, for which the kernels must be built to run
there, too. Neither needs the other. What only a GPU can show (streams, graphs, synchronisation)
runs there alone.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import io
import os
import subprocess
import sys
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fusestep as fs
from concurrency import in_threads
from rules import PLAIN, RULES, Rule

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

from torch.optim import lr_scheduler  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import simulated_torch  # noqa: E402
from torch_copies import through_a_file, through_pickle  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

SHAPES = [(1030,), (33, 65), (), (0,), (2, 0, 3), (5, 4, 3, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
CLASSES = ["SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad"]
FUSED = ["SGD", "NAG", "Adam", "AdamW", "Adagrad"]
CAPTURABLE = ["Adam", "AdamW", "NAdam"]
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "NAG": {"lr": 0.1},
    "Adam": {"lr": 0.05},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "NAdam": {"lr": 0.05},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
}

COUNTS = ("step", "mu_product")  # the state that is not of the parameter's shape

each_class = pytest.mark.parametrize("name", CLASSES)


# ---- two machines with a GPU, one of them simulated ----------------------------------------------


class Place:
    """The memory of a device, and how tensors get there."""

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self.machine = machine
        self.device = device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def put(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor on the CPU."""
        if self.machine.simulation:
            return self.machine.simulation.put(tensor, self.device)
        return tensor.detach().clone().to(self.device)

    def has(self, tensor: Tensor) -> bool:
        return fst._tensors.device_of(tensor) == self.device


class Machine:
    """A CPU, and a GPU or what counts as one."""

    def __init__(self, simulation: simulated_torch.Simulation | None) -> None:
        self.simulation = simulation
        self.cpu = Place(self, torch.device("cpu"))
        self.gpu = Place(self, torch.device("cuda", 0))

    @property
    def is_real(self) -> bool:
        return self.simulation is None

    def second_gpu(self) -> Place:
        if self.is_real and torch.cuda.device_count() < 2:
            pytest.skip("this machine has one GPU")
        return Place(self, torch.device("cuda", 1))

    def without_gpu(self) -> Any:
        """Have tensors on the CPU be just that."""
        return self.simulation.without_gpu() if self.simulation else nullcontext()

    def to_cpu(self, result: Any) -> Any:
        """Return a copy of the tensors in nested lists and dicts, on the CPU."""
        if isinstance(result, torch.Tensor):
            return self.cpu.put(result.detach().cpu())
        if isinstance(result, dict):
            return {key: self.to_cpu(value) for key, value in result.items()}
        if isinstance(result, (list, tuple)):
            return type(result)(map(self.to_cpu, result))
        return result

    def scaler(self, place: Place, **options: Any) -> Any:
        device = "cuda" if self.is_real and place.is_gpu else "cpu"
        return torch.amp.GradScaler(device, **options)

    def capturing(self) -> Any:
        """Have launches be captured, into a graph that nobody needs."""
        return self.simulation.capturing() if self.simulation else graph_of_nothing()

    def record(self, function: Callable[[], Any]) -> Any:
        """Return a CUDA graph of what a function does: it has replay()."""
        if self.simulation:
            return SimulatedGraph(self.simulation, function)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph

    def beside(self) -> Any:
        """Another stream, as warming up takes before a capture."""
        return beside() if self.is_real else nullcontext()

    def finish(self) -> None:
        if self.is_real:
            torch.cuda.synchronize()


class SimulatedGraph:
    """Nothing is recorded: a replay does it again, under the rules of a capture."""

    def __init__(self, simulation: simulated_torch.Simulation, function: Callable[[], Any]) -> None:
        self._simulation = simulation
        self._function = function

    def replay(self) -> None:
        with self._simulation.capturing():
            self._function()


@contextmanager
def graph_of_nothing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield


@contextmanager
def beside() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def kernels() -> str:
    """Return what this build has: "", "simulated" or "real"."""
    if importlib.util.find_spec("fusestep._cuda") is None:
        return ""
    return "simulated" if importlib.import_module("fusestep._cuda").is_simulated else "real"


@functools.cache
def why_not_real() -> str:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch has no NVIDIA GPU here"
    if kernels() != "real":
        return f"this build's kernels for GPUs: {kernels() or 'none'}"
    return ""


def real_machine() -> Machine:
    if why_not_real():
        pytest.skip(why_not_real())
    return Machine(None)


def simulated_machine(patch: pytest.MonkeyPatch) -> Machine:
    if kernels() != "simulated":
        pytest.skip("the kernels are not simulated; build with cmake -DFUSESTEP_CUDA=SIMULATED")
    return Machine(simulated_torch.Simulation(patch))


REAL = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[REAL, "simulated"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = real_machine() if request.param == "cuda" else simulated_machine(monkeypatch)
    yield machine
    machine.finish()


@pytest.fixture(params=[REAL])
def real(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine for tests of which nothing can be simulated."""
    machine = real_machine()
    yield machine
    torch.cuda.synchronize()


@pytest.fixture(params=["simulated"])
def simulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine for tests that a GPU does not bear."""
    return simulated_machine(monkeypatch)


# ---- one course, in two places -------------------------------------------------------------------


def numbers(shape: Sequence[int], dtype: Any, generator: torch.Generator) -> Tensor:
    exact = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator, dtype=exact).to(dtype)


def leaves(
    place: Place, *shapes: tuple[int, ...], dtype: Any = torch.float32, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [place.put(numbers(shape, dtype, generator)).requires_grad_() for shape in shapes]


def place_of(machine: Machine, tensor: Tensor) -> Place:
    return Place(machine, fst._tensors.device_of(tensor))


def give(machine: Machine, params: list[Tensor], seed: int, missing: Sequence[int] = ()) -> None:
    """New gradients, each where its parameter is; the same numbers everywhere."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, p in enumerate(params):
        gradient = numbers(p.shape, p.dtype, generator)
        p.grad = None if i in missing else place_of(machine, p).put(gradient)


def train(
    machine: Machine, opt: Any, params: list[Tensor], steps: int, start: int = 0, **options: Any
) -> None:
    for step in range(start, start + steps):
        give(machine, params, step)
        opt.step(**options)


def standing(opt: Any, params: list[Tensor]) -> dict[str, Any]:
    """Return parameters and state, as they are."""
    return {
        "params": [p.detach() for p in params],
        "state": [dict(opt.state.get(p, {})) for p in params],
    }


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, but for the payload of a NaN; types and keys and all."""
    assert type(actual) is type(expected), where
    if isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert actual.shape == expected.shape, where
        a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (actual, expected))
        same = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
        assert same.all(), f"{where}: {int((~same).sum())} of {same.numel()} differ"
    elif isinstance(actual, dict):
        assert list(actual) == list(expected), where
        for key in actual:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert actual == expected, where


def assert_same_course(
    machine: Machine, course: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """`course(place, ...)` returns the same on the CPU and on the GPU."""
    with machine.without_gpu():
        expected = machine.to_cpu(course(machine.cpu, *args, **kwargs))
    assert_same(machine.to_cpu(course(machine.gpu, *args, **kwargs)), expected)


def new(name: str, params: Any, **options: Any) -> Any:
    return getattr(fst, name)(params, **{**OPTIONS[name], **options})


def make(rule: Rule, params: Any, **options: Any) -> Any:
    return getattr(fst, rule.cls.__name__)(params, **{**rule.options, **options})


# What can be asked of a step, by which it takes other ways through the engine.
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_norm": {"max_norm": 0.5},
    "skip_nonfinite": {"skip_nonfinite": True},
    "max_norm,skip_nonfinite": {"max_norm": 0.5, "skip_nonfinite": True},
    "fused": {"fused": True},
    "fused,max_norm": {"fused": True, "max_norm": 0.5},
    "capturable": {"capturable": True},
    "tensor_lr": {"lr": torch.float32},
    "tensor_lr,float64": {"lr": torch.float64},
    "tensor_lr,bfloat16": {"lr": torch.bfloat16},
    "all": {"lr": torch.float32, "capturable": True, "max_norm": 0.5, "skip_nonfinite": True},
}
HOST_COUNTS = {"plain", "max_norm"}  # the modes in which step counts are on the CPU

each_mode = pytest.mark.parametrize("mode", MODES)


def has_mode(name: str, mode: str) -> bool:
    if "fused" in MODES[mode]:
        return name in FUSED
    return mode != "capturable" or name in CAPTURABLE


def each_class_and_mode(names: Sequence[str] = CLASSES, modes: Iterable[str] = MODES) -> Any:
    pairs = [(name, mode) for name in names for mode in modes if has_mode(name, mode)]
    return pytest.mark.parametrize(("name", "mode"), pairs)


def mode_options(place: Place, name: str, mode: str) -> dict[str, Any]:
    """Return options of a class by which it steps in a mode: on the CPU, the same ones there."""
    options = dict(MODES[mode])
    if "lr" in options:
        lr = torch.tensor(OPTIONS[name]["lr"], dtype=options["lr"])
        options["lr"] = place.put(lr)
    if name not in CAPTURABLE or not place.is_gpu:
        options.pop("capturable", None)
    return options


# ---- the bits of the CPU -------------------------------------------------------------------------


def many_steps(place: Place, rule: Rule, dtype: Any, maximize: bool) -> Any:
    machine = place.machine
    params = leaves(place, *SHAPES, dtype=dtype)
    groups = [
        {"params": params[:2], "lr": rule.options["lr"] / 2},
        {"params": params[2:], "weight_decay": 0.05, "maximize": not maximize},
    ]
    opt = make(rule, groups, maximize=maximize)
    for step in range(12):
        late = [i for i in range(len(params)) if step < i - 2]
        give(machine, params, step, missing=[*late, step % len(params)])
        if step == 7:
            opt.param_groups[0]["lr"] = rule.options["lr"] / 3
        opt.step()
    return standing(opt, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_bits_of_the_cpu(machine: Machine, rule: Rule, dtype: Any) -> None:
    """Groups of their own, gradients that come late or not at all, nothing, and single numbers."""
    assert_same_course(machine, many_steps, rule, dtype, maximize=dtype is torch.float64)


def all_dtypes(place: Place, name: str, mode: str) -> Any:
    params = [p for dtype in DTYPES for p in leaves(place, (1030,), (3, 5), (), dtype=dtype)]
    options = mode_options(place, name, mode)
    opt = new(
        name, [{"params": params[::2]}, {"params": params[1::2], "maximize": True}], **options
    )
    for step in range(8):
        give(place.machine, params, step, missing=[step, 2 * step])
        opt.step(grad_scale=0.5 if step % 2 else 1.0, zero_grad=step == 3)
    grads = [p.grad for p in params]
    return {**standing(opt, params), "grads": grads, "skipped": opt.skipped_steps}


@each_class_and_mode()
def test_the_bits_of_the_cpu_in_every_mode(machine: Machine, name: str, mode: str) -> None:
    """All dtypes in one optimizer."""
    assert_same_course(machine, all_dtypes, name, mode)


def transposed(place: Place, tensor: Tensor) -> Tensor:
    return place.put(tensor.transpose(0, -1).contiguous()).transpose(0, -1)


def every_other(place: Place, tensor: Tensor) -> Tensor:
    return place.put(torch.stack([tensor, tensor + 1], -1))[..., 0]


def offset(place: Place, tensor: Tensor) -> Tensor:
    flat = torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])
    return place.put(flat)[1:].view(tensor.shape)


def channels_last(place: Place, tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return place.put(tensor)


def as_it_is(place: Place, tensor: Tensor) -> Tensor:
    return place.put(tensor)


def expanded(place: Place, tensor: Tensor) -> Tensor:
    """One number, everywhere."""
    return place.put(tensor.reshape(-1)[:1]).expand(tensor.shape)


LAYOUTS = [as_it_is, transposed, every_other, offset, channels_last]


def odd_layouts(
    place: Place, name: str, of_params: Callable[..., Any], of_grads: Callable[..., Any], mode: str
) -> Any:
    """On the CPU all is in C order: strides must not matter."""
    if not place.is_gpu:
        of_params, of_grads = as_it_is, expanded if of_grads is expanded else as_it_is
    generator = torch.Generator().manual_seed(3)
    shapes = [(33, 65), (2, 3, 4, 5), (40, 1, 30), (7,)]
    values = [numbers(s, d, generator) for s in shapes for d in (torch.float32, torch.bfloat16)]
    values.append(numbers((6, 7), torch.complex64, generator))
    params = [of_params(place, value).requires_grad_() for value in values]
    opt = new(name, params, **mode_options(place, name, mode))
    for _ in range(3):
        for p in params:
            p.grad = of_grads(place, numbers(p.shape, p.dtype, generator))
        opt.step()
    return standing(opt, params)


@pytest.mark.parametrize("mode", ["plain", "max_norm,skip_nonfinite"])
@pytest.mark.parametrize("of_grads", [*LAYOUTS, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_params", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_any_layout(
    machine: Machine,
    name: str,
    of_params: Callable[..., Any],
    of_grads: Callable[..., Any],
    mode: str,
) -> None:
    assert_same_course(machine, odd_layouts, name, of_params, of_grads, mode)


def extreme_numbers(place: Place, name: str, dtype: Any, mode: str) -> Any:
    """Subnormal numbers, squares that overflow, zeros of both signs."""
    largest = 1e200 if dtype is torch.float64 else 1e30
    smallest = 5e-324 if dtype is torch.float64 else 1e-45
    scales = torch.tensor([smallest, 1e-40, 1e-38, 1e-20, 1.0, 1e10, largest], dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    columns = numbers((300,), torch.float64, generator)
    values = torch.cat([(scales[:, None] * columns).reshape(-1), torch.tensor([0.0, -0.0])])
    params = [place.put(values.flip(0).to(dtype)).requires_grad_()]
    opt = new(name, params, **mode_options(place, name, mode))
    for step in range(3):
        params[0].grad = place.put((values.roll(step)).to(dtype))
        opt.step()
    return standing(opt, params)


@pytest.mark.parametrize("mode", ["plain", "max_norm", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_class
def test_extreme_numbers(machine: Machine, name: str, dtype: Any, mode: str) -> None:
    assert_same_course(machine, extreme_numbers, name, dtype, mode)


def many_parameters(place: Place, mode: str) -> Any:
    """More than a launch can carry, of all sizes, some strided."""
    params = leaves(place, *[(1 + 37 * i % 101,) for i in range(700)], *[(3, 5)] * 300)
    groups = [{"params": params[i::9], "lr": 0.01 * (i + 1)} for i in range(9)]
    opt = fst.Adam(groups, **mode_options(place, "Adam", mode) | {"lr": 0.1})
    for step in range(3):
        give(place.machine, params, step, missing=range(step, 1000, 7))
        for p in params[700:]:
            if p.grad is not None:
                p.grad = p.grad.t().contiguous().t()
        opt.step()
    return standing(opt, params)


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_many_parameters(machine: Machine, mode: str) -> None:
    assert_same_course(machine, many_parameters, mode)


def one_large_parameter(place: Place) -> Any:
    """Sums of sums of sums, in the norm."""
    params = leaves(place, (1_200_000,), (5,))
    opt = fst.AdamW(params, max_norm=1.0, skip_nonfinite=True)
    train(place.machine, opt, params, 2)
    return standing(opt, params)


def test_one_large_parameter(machine: Machine) -> None:
    assert_same_course(machine, one_large_parameter)


def wide_state(place: Place, mode: str) -> Any:
    params = leaves(place, (33, 5), (7,)) + leaves(place, (9,), dtype=torch.bfloat16)
    opt = fst.Adam(params, state_dtype=torch.float64, **mode_options(place, "Adam", mode))
    train(place.machine, opt, params, 4)
    return standing(opt, params)


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_float64_state(machine: Machine, mode: str) -> None:
    assert_same_course(machine, wide_state, mode)


def beyond_float32(place: Place, mode: str) -> Any:
    """A step tensor of float32 stands still at 2^24; the step goes on counting."""
    params = leaves(place, (50,))
    opt = new("Adagrad", params, **mode_options(place, "Adagrad", mode))
    opt.param_groups[0]["lr_decay"] = 1e-7
    train(place.machine, opt, params, 1)
    opt.state[params[0]]["step"].fill_(2**24 - 2)
    for step in range(8):
        opt.state[params[0]]["sum"].zero_()  # or nothing would move any more
        give(place.machine, params, step)
        opt.step()
    return standing(opt, params)


@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_counting_beyond_what_a_float32_can(machine: Machine, mode: str) -> None:
    assert_same_course(machine, beyond_float32, mode)


def conjugated(place: Place) -> Any:
    w = place.put(torch.tensor([1 + 2j, 3 - 1j])).requires_grad_()
    w.grad = place.put(torch.tensor([1 + 1j, 2 - 3j])).conj()
    opt = fst.Adam([w], lr=0.1)
    opt.step(zero_grad=True)
    return {**standing(opt, [w]), "grad": w.grad.resolve_conj()}


def test_conjugated_gradients(machine: Machine) -> None:
    assert_same_course(machine, conjugated)


def test_views_of_one_buffer(machine: Machine) -> None:
    """That columns of a matrix do not overlap is found out without reading them."""

    def course(place: Place) -> Any:
        base = place.put(torch.zeros(40, 6))
        params = [base[:, :2].requires_grad_(), base[:, 2:3].requires_grad_()]
        params.append(base.view(-1)[3::6].requires_grad_())
        opt = fst.Adam(params)
        train(place.machine, opt, params, 2)
        return {**standing(opt, params), "base": base}

    assert_same_course(machine, course)


def test_views_that_overlap(machine: Machine) -> None:
    base = machine.gpu.put(torch.zeros(8, 8))
    params = [base[:, :5].requires_grad_(), base[:, 3:].requires_grad_()]
    give(machine, params, 0)
    with pytest.raises(ValueError, match="parameter 0 and parameter 1 share memory"):
        fst.Adam(params).step()
    assert not base.any()


# ---- beside torch.optim --------------------------------------------------------------------------

THEIRS = {"NAG": "SGD"}
THEIR_OPTIONS = {"NAG": {"momentum": 0.9, "nesterov": True}}


def theirs(name: str, params: Any, **options: Any) -> Any:
    cls = getattr(torch.optim, THEIRS.get(name, name))
    return cls(params, **{**OPTIONS[name], **THEIR_OPTIONS.get(name, {}), **options})


def has_way(name: str, way: str) -> bool:
    return name in {"fused": FUSED, "capturable": CAPTURABLE}.get(way, CLASSES)


def each_class_and_way(names: Sequence[str], ways: Sequence[str]) -> Any:
    pairs = [(name, way) for name in names for way in ways if has_way(name, way)]
    return pytest.mark.parametrize(("name", "way"), pairs)


def way_options(machine: Machine, way: str) -> dict[str, Any]:
    """Options by which torch's class steps in one of its ways."""
    if way == "capturable" and not machine.is_real:
        pytest.skip("torch's capturable=True needs a real GPU")
    return {"default": {}, "loop": {"foreach": False}}.get(way, {way: True})


def step_theirs(opt: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")
        try:
            opt.step()
        except (NotImplementedError, RuntimeError) as error:
            if not opt.param_groups[0].get("fused") or "_fused_" not in str(error):
                raise
            pytest.skip(f"this torch cannot: {error}")


def train_theirs(
    machine: Machine, opt: Any, params: list[Tensor], steps: int, start: int = 0
) -> None:
    for step in range(start, start + steps):
        give(machine, params, step)
        step_theirs(opt)
    if machine.simulation and not opt.param_groups[0].get("fused"):
        for scalar in scalars_of(opt):
            machine.simulation.mark(scalar, machine.cpu.device)


def assert_close(name: str, way: str, params: list[Tensor], others: list[Tensor]) -> None:
    """With capturable=True torch takes powers of beta in float32."""
    for p, q in zip(params, others, strict=True):
        is_single = p.dtype in (torch.float32, torch.complex64) or way == "capturable"
        atol = 2e-4 if is_single else 1e-8 if name == "NAdam" else 1e-10
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@each_class_and_way(CLASSES, ["loop", "foreach", "fused", "capturable"])
def test_trajectories_agree_with_torch(machine: Machine, name: str, way: str, dtype: Any) -> None:
    """Forty steps, never brought back together."""
    options = way_options(machine, way)
    if way == "fused" and dtype.is_complex:
        pytest.skip("torch's fused steps take real parameters")
    both = [leaves(machine.gpu, (11, 7), (), (30,), dtype=dtype) for _ in range(2)]
    groups = [[{"params": x[:1], "weight_decay": 0.02}, {"params": x[1:]}] for x in both]
    opt, other = new(name, groups[0]), theirs(name, groups[1], **options)
    for step in range(40):
        missing = [step % 9]
        for params in both:
            give(machine, params, step, missing)
        if step == 20:
            for each in (opt, other):
                each.param_groups[1]["lr"] /= 3
        opt.step()
        step_theirs(other)
    assert_close(name, way, *both)


# ---- where step counts are -----------------------------------------------------------------------


def scalars_of(opt: Any) -> list[Tensor]:
    return [entry[key] for entry in opt.state.values() for key in COUNTS if key in entry]


@each_class_and_mode(["Adam", "AdamW", "NAdam", "Adagrad"])
def test_where_step_counts_are(machine: Machine, name: str, mode: str) -> None:
    """On the CPU, as torch's; on the GPU where the host does not know them."""
    params = leaves(machine.gpu, (5,), ())
    opt = new(name, params, **mode_options(machine.gpu, name, mode))
    train(machine, opt, params, 2)
    scalars = scalars_of(opt)
    assert len(scalars) == (4 if name == "NAdam" else 2)
    expected = machine.cpu if mode in HOST_COUNTS else machine.gpu
    assert all(expected.has(scalar) for scalar in scalars)
    assert all(scalar.shape == () and scalar.dtype == torch.float32 for scalar in scalars)
    assert [int(opt.state[p]["step"]) for p in params] == [2, 2]
    for p in params:
        for key, value in opt.state[p].items():
            assert key in COUNTS or machine.gpu.has(value)


def group_option(key: str, value: Any) -> Callable[[Place, Any], None]:
    def change(place: Place, opt: Any) -> None:
        if not (key == "capturable" and not place.is_gpu):
            opt.param_groups[0][key] = value

    return change


def make_lr_a_tensor(place: Place, opt: Any) -> None:
    opt.param_groups[0]["lr"] = place.put(torch.tensor(0.05))


def make_lr_a_number(place: Place, opt: Any) -> None:
    opt.param_groups[0]["lr"] = torch.tensor(0.05).item()


def setting(name: str, value: Any) -> Callable[[Place, Any], None]:
    return lambda place, opt: setattr(opt, name, value)


SWITCHES: dict[str, list[Callable[[Place, Any], None]]] = {
    "fused": [group_option("fused", True), group_option("fused", False)],
    "capturable": [group_option("capturable", True), group_option("capturable", False)],
    "max_norm": [setting("max_norm", 0.5), setting("max_norm", None)],
    "skip_nonfinite": [setting("skip_nonfinite", True), setting("skip_nonfinite", False)],
    "lr": [make_lr_a_tensor, make_lr_a_number],
    "lr,skip_nonfinite": [
        make_lr_a_tensor,
        setting("skip_nonfinite", True),
        make_lr_a_number,
        setting("skip_nonfinite", False),
    ],
}
COUNTED = [
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    ("Adam", {"lr": 0.05}),
    ("AdamW", {"lr": 0.05, "amsgrad": True}),
    ("NAdam", {"lr": 0.05}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1}),
]


def switching(place: Place, name: str, options: dict[str, Any], what: str) -> Any:
    params = leaves(place, (33, 5), (), (4,))
    opt = getattr(fst, name)(params, **options)
    step = 0
    for change in [lambda *_: None, *SWITCHES[what], *SWITCHES[what]]:
        change(place, opt)
        for _ in range(2):
            give(place.machine, params, step, missing=[2] if step < 3 else [1] if step < 6 else [])
            opt.step()
            step += 1
        if place.is_gpu:
            group = opt.param_groups[0]
            on_gpu = group.get("fused") or group.get("capturable") or opt.skip_nonfinite
            on_gpu = on_gpu or isinstance(group["lr"], torch.Tensor)
            if on_gpu:
                assert all(place.has(scalar) for scalar in scalars_of(opt))
            elif what != "lr":  # a rate may be a tensor again soon
                assert all(place.machine.cpu.has(scalar) for scalar in scalars_of(opt))
    return standing(opt, params)


@pytest.mark.parametrize("what", SWITCHES)
@pytest.mark.parametrize(("name", "options"), COUNTED, ids=[name for name, _ in COUNTED])
def test_switching_between_steps_loses_nothing(
    machine: Machine, name: str, options: dict[str, Any], what: str
) -> None:
    assert_same_course(machine, switching, name, options, what)


@pytest.mark.parametrize("mode", [mode for mode in MODES if has_mode("NAdam", mode)])
def test_a_step_count_that_is_written_to_counts(machine: Machine, mode: str) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        opt = fst.NAdam(params, **mode_options(place, "NAdam", mode))
        train(place.machine, opt, params, 3)
        opt.state[params[0]]["step"].fill_(100)
        opt.state[params[1]]["mu_product"].fill_(0.25)
        train(place.machine, opt, params, 3, 3)
        opt.state[params[0]]["step"] = place.machine.cpu.put(torch.tensor(7.0))
        train(place.machine, opt, params, 2, 6)
        return standing(opt, params)

    assert_same_course(machine, course)


@each_mode
def test_a_step_count_that_is_no_count(machine: Machine, mode: str) -> None:
    """Where the host reads it, it says so; a GPU goes on with its own."""
    params = leaves(machine.gpu, (4,))
    opt = fst.Adam(params, **mode_options(machine.gpu, "Adam", mode))
    train(machine, opt, params, 2)
    opt.state[params[0]]["step"].fill_(-3)
    before = machine.to_cpu(standing(opt, params))
    if mode in HOST_COUNTS:
        with pytest.raises(ValueError, match="the step of parameter 0 is -3"):
            opt.step()
        assert_same(machine.to_cpu(standing(opt, params)), before)
    else:
        opt.step()
        assert int(opt.state[params[0]]["step"]) == 3


# ---- noticing what changes between steps ---------------------------------------------------------


def give_new_memory(place: Place, opt: Any, params: list[Tensor]) -> None:
    for p in params:
        p.data = place.put(p.data)


def replace_state(place: Place, opt: Any, params: list[Tensor]) -> None:
    for entry in opt.state.values():
        for key, value in entry.items():
            entry[key] = place_of(place.machine, value).put(value)


def give_state_new_memory(place: Place, opt: Any, params: list[Tensor]) -> None:
    for entry in opt.state.values():
        for key, value in entry.items():
            if key not in COUNTS:
                value.data = place.put(value.data)


def replace_everything(place: Place, opt: Any, params: list[Tensor]) -> None:
    opt.param_groups = [dict(group, params=list(group["params"])) for group in opt.param_groups]
    opt.state = copy.copy(opt.state)
    for p in list(opt.state):
        opt.state[p] = dict(opt.state[p])


def reload_itself(place: Place, opt: Any, params: list[Tensor]) -> None:
    opt.load_state_dict(opt.state_dict())


def transpose_memory(place: Place, opt: Any, params: list[Tensor]) -> None:
    params[0].data = place.put(params[0].data.t().contiguous()).t()


def bring_state_from_the_cpu(place: Place, opt: Any, params: list[Tensor]) -> None:
    """It is moved to where it belongs."""
    for entry in opt.state.values():
        for key, value in entry.items():
            entry[key] = place.machine.cpu.put(value.detach().cpu())


def move_step_counts(place: Place, opt: Any, params: list[Tensor]) -> None:
    for entry in opt.state.values():
        if "step" in entry:
            entry["step"] = place.put(entry["step"])


def ask(place: Place, opt: Any, params: list[Tensor]) -> None:
    opt.skipped_steps  # noqa: B018 - has the GPU be waited for


CHANGES = [
    give_new_memory,
    replace_state,
    give_state_new_memory,
    replace_everything,
    reload_itself,
    transpose_memory,
    bring_state_from_the_cpu,
    move_step_counts,
    ask,
]


def changing(place: Place, rule: Rule, mode: str, change: Callable[..., None]) -> Any:
    name = rule.cls.__name__
    params = leaves(place, (6, 5), (4,))
    opt = make(rule, params, **mode_options(place, name, mode))
    for step in range(6):
        give(place.machine, params, step)
        opt.step()
        if place.is_gpu:
            change(place, opt, params)
    return standing(opt, params)


@pytest.mark.parametrize("mode", ["plain", "skip_nonfinite", "all"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_what_changes_nothing(
    machine: Machine, rule: Rule, change: Callable[..., None], mode: str
) -> None:
    """Other memory, the same numbers: the course is the same, bit for bit."""
    assert_same_course(machine, changing, rule, mode, change)


def test_a_model_that_is_moved_before_its_first_step(machine: Machine) -> None:
    """To the GPU before the optimizer is created, or after."""

    def course(place: Place, late: bool) -> Any:
        params = leaves(place.machine.cpu if late else place, (6, 5), (4,))
        opt = fst.Adam(params, lr=0.1, skip_nonfinite=True)
        if late:
            for p in params:
                p.data = place.put(p.data)
        train(place.machine, opt, params, 3)
        if place.is_gpu:
            assert all(place.has(value) for p in params for value in opt.state[p].values())
        return standing(opt, params)

    for late in (False, True):
        assert_same_course(machine, course, late)


def moving_by_hand(place: Place, name: str, mode: str) -> Any:
    params = leaves(place.machine.cpu, (6, 5), (4,))
    opt = new(name, params, **mode_options(place, name, mode))
    train(place.machine, opt, params, 3)
    if place.is_gpu:
        for p in params:
            p.data, p.grad = place.put(p.data), None
            for value in opt.state[p].values():
                value.data = place.put(value.data)
    train(place.machine, opt, params, 3, 3)
    if opt.skip_nonfinite:
        params[0].grad[0, 0] = float("nan")
        opt.step()
    train(place.machine, opt, params, 2, 7)
    return {**standing(opt, params), "skipped": opt.skipped_steps}


@each_class_and_mode(
    ["SGD", "Adam", "NAdam"], ["plain", "max_norm", "fused", "skip_nonfinite", "tensor_lr"]
)
def test_moving_everything_by_hand(machine: Machine, name: str, mode: str) -> None:
    """Parameters and state in the middle of a training, through .data, as many programs do it."""
    assert_same_course(machine, moving_by_hand, name, mode)


@pytest.mark.parametrize("name", ["Adam", "NAdam"])
def test_step_counts_that_are_moved_by_hand(machine: Machine, name: str) -> None:
    """As the rest: they go on counting, and a checkpoint has them."""
    params = leaves(machine.cpu, (6, 5), (4,))
    opt = new(name, params)
    train(machine, opt, params, 3)
    for p in params:
        p.data = machine.gpu.put(p.data)
        for value in opt.state[p].values():
            value.data = machine.gpu.put(value.data)
    train(machine, opt, params, 2, 3)
    assert {float(entry["step"]) for entry in opt.state_dict()["state"].values()} == {5}


@pytest.mark.parametrize("mode", ["plain", "skip_nonfinite"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_moving_a_checkpoint_to_the_gpu(machine: Machine, name: str, mode: str) -> None:
    """model.to("cuda") and load_state_dict: the way that torch recommends."""

    def course(place: Place) -> Any:
        params = leaves(place.machine.cpu, (6, 5), (4,))
        opt = new(name, params, **mode_options(place.machine.cpu, name, mode))
        train(place.machine, opt, params, 3)
        for p in params:
            p.data, p.grad = place.put(p.data), None
        opt.load_state_dict(opt.state_dict())
        train(place.machine, opt, params, 3, 3)
        return standing(opt, params)

    assert_same_course(machine, course)


def test_another_dtype(machine: Machine) -> None:
    """model.to(bfloat16) in the middle: the state stays float32."""

    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        opt = fst.Adam(params, lr=0.1)
        train(place.machine, opt, params, 2)
        for p in params:
            p.data, p.grad = place.put(p.data.to(torch.bfloat16)), None
        train(place.machine, opt, params, 2, 2)
        return standing(opt, params)

    assert_same_course(machine, course)


def throw_state_away(opt: Any, params: list[Tensor]) -> None:
    opt.state.clear()


def throw_one_entry_away(opt: Any, params: list[Tensor]) -> None:
    del opt.state[params[1]]


def reorder(opt: Any, params: list[Tensor]) -> None:
    opt.param_groups[0]["params"].reverse()


def swap_entries(opt: Any, params: list[Tensor]) -> None:
    opt.state[params[0]], opt.state[params[1]] = opt.state[params[1]], opt.state[params[0]]


def write_a_number(opt: Any, params: list[Tensor]) -> None:
    """As checkpoints of long ago have it."""
    if "step" in opt.state[params[0]]:
        opt.state[params[0]]["step"] = 5


REARRANGEMENTS = [throw_state_away, throw_one_entry_away, reorder, swap_entries, write_a_number]


@pytest.mark.parametrize("rearrange", REARRANGEMENTS, ids=lambda f: f.__name__)
@each_class_and_mode(["SGD", "Adam", "NAdam"], ["plain", "skip_nonfinite", "fused", "all"])
def test_rearranged_state(
    machine: Machine, name: str, mode: str, rearrange: Callable[..., None]
) -> None:
    """The GPU does not remember what the state has forgotten."""

    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (6, 5), seed=1)
        options = {"dampening": 0.5} if name == "SGD" else {}
        opt = new(name, params, **mode_options(place, name, mode), **options)
        for step in range(4):
            give(place.machine, params, step, missing=[1] if step % 2 else [])
            opt.step()
        rearrange(opt, params)
        train(place.machine, opt, params, 3, 4)
        return standing(opt, params)

    assert_same_course(machine, course)


def joining(place: Place, name: str, mode: str) -> Any:
    params = leaves(place, (6, 5), (4,), (3, 3))
    opt = new(name, params[:1], **mode_options(place, name, mode))
    train(place.machine, opt, params[:1], 2)
    opt.add_param_group({"params": params[1], "lr": 0.5})
    train(place.machine, opt, params[:2], 2, 2)
    opt.add_param_group({"params": params[2:]})
    train(place.machine, opt, params, 2, 4)
    opt.param_groups[0]["params"].clear()
    give(place.machine, params, 9)
    opt.step()
    return standing(opt, params)


@each_class_and_mode()
def test_a_group_that_joins_later(machine: Machine, name: str, mode: str) -> None:
    assert_same_course(machine, joining, name, mode)


def test_groups_that_ask_for_different_things(machine: Machine) -> None:
    def course(place: Place) -> Any:
        lists = [leaves(place, (6, 5), (4,), seed=i) for i in range(4)]
        lists.append(leaves(machine.cpu, (7,), seed=4))
        groups = [{"params": params} for params in lists]
        groups[0]["fused"] = True
        groups[1]["lr"] = place.put(torch.tensor(0.02))
        groups[2]["capturable"] = place.is_gpu
        params = [p for some in lists for p in some]
        opt = fst.Adam(groups, lr=0.1)
        train(machine, opt, params, 4)
        if place.is_gpu:
            for p in params:
                assert place_of(machine, p).has(opt.state[p]["step"])
        return standing(opt, params)

    assert_same_course(machine, course)


def test_options_that_are_tensors(machine: Machine) -> None:
    """They are fetched, and followed when they are written to."""

    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        opt = fst.Adam(params, lr=0.1, skip_nonfinite=True)
        group = opt.param_groups[0]
        group["betas"] = tuple(place.put(torch.tensor(beta)) for beta in (0.9, 0.99))
        group["weight_decay"] = place.put(torch.tensor(0.125))
        for step in range(6):
            give(machine, params, step)
            opt.step()
            group["betas"][step % 2].mul_(0.9)
            group["weight_decay"].mul_(0.5)
        return standing(opt, params)

    assert_same_course(machine, course)


def test_subclasses_of_tensors(machine: Machine) -> None:
    class Mine(torch.Tensor):
        pass

    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        params[0] = params[0].detach().as_subclass(Mine).requires_grad_()
        params[1] = torch.nn.Parameter(params[1].detach())
        opt = fst.Adam(params, lr=0.1, skip_nonfinite=True, max_norm=1.0)
        train(machine, opt, params, 2)
        give(machine, params, 2)
        for p in params:
            p.grad = p.grad.as_subclass(Mine)
        opt.step()
        standing_now = standing(opt, params)
        values = [value.as_subclass(torch.Tensor) for value in standing_now["params"]]
        return {**standing_now, "params": values}

    assert_same_course(machine, course)


@each_class
def test_a_default_device(real: Machine, name: str) -> None:
    """What is made without saying where is made on the GPU: not what belongs on the CPU."""
    torch.set_default_device("cuda")
    try:
        params = [torch.ones(5, requires_grad=True)]
        params[0].grad = torch.ones(5)
        opt = new(name, params)
        opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
        assert all(real.cpu.has(scalar) for scalar in scalars_of(opt))
    finally:
        torch.set_default_device(None)
    others = leaves(real.cpu, (5,))
    others[0].data.fill_(1)
    others[0].grad = torch.ones(5)
    other = new(name, others)
    other.step()
    other.step()
    assert_same(real.to_cpu(standing(opt, params)), standing(other, others))


def test_a_group_on_the_gpu_joins_one_on_the_cpu(machine: Machine) -> None:
    def course(place: Place) -> Any:
        params = [*leaves(place.machine.cpu, (6, 5)), *leaves(place, (4,), seed=1)]
        opt = fst.NAdam(params[:1], skip_nonfinite=True)
        train(place.machine, opt, params[:1], 2)
        opt.add_param_group({"params": params[1:], "lr": 0.5})
        train(place.machine, opt, params, 3, 2)
        if place.is_gpu:
            entries = [opt.state[p] for p in params]
            assert place.machine.cpu.has(entries[0]["step"])
            assert place.has(entries[1]["step"])
        return standing(opt, params)

    assert_same_course(machine, course)


# ---- state dicts, copies, pickles ----------------------------------------------------------------

WAYS = ["default", "fused", "capturable"]


WITH_TORCHS_NAME = ["SGD", "Adam", "AdamW", "NAdam", "Adagrad"]


def our_options(way: str) -> dict[str, Any]:
    return {} if way == "default" else {way: True}


@each_class_and_way(WITH_TORCHS_NAME, WAYS)
@pytest.mark.parametrize("our_way", WAYS)
def test_state_dicts_come_from_torch(machine: Machine, name: str, way: str, our_way: str) -> None:
    others = leaves(machine.gpu, (6, 5), (4,), dtype=torch.float64)
    other = theirs(name, others, **way_options(machine, way))
    train_theirs(machine, other, others, 3)
    params = [machine.gpu.put(p.detach().cpu()).requires_grad_() for p in others]
    opt = new(name, params, **our_options(our_way) if has_way(name, our_way) else {})
    opt.load_state_dict(other.state_dict())
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            if key not in COUNTS:
                assert machine.gpu.has(value)
                assert torch.equal(value, other.state[q][key])
                assert value.data_ptr() != other.state[q][key].data_ptr()
    train(machine, opt, params, 3, 3)
    expected = machine.cpu if way == "default" else machine.gpu  # as the loaded groups ask
    assert all(expected.has(scalar) for scalar in scalars_of(opt))
    train_theirs(machine, other, others, 3, 3)
    assert_close(name, way, params, others)
    if name != "SGD":
        assert {int(opt.state[p]["step"]) for p in params} == {6}


@each_class_and_way(WITH_TORCHS_NAME, WAYS)
def test_state_dicts_go_to_torch(machine: Machine, name: str, way: str) -> None:
    way_options(machine, way)  # or skip
    params = leaves(machine.gpu, (6, 5), (4,), dtype=torch.float64)
    opt = new(name, params, **our_options(way))
    train(machine, opt, params, 3)
    others = [machine.gpu.put(p.detach().cpu()).requires_grad_() for p in params]
    other = theirs(name, others)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(machine, opt, params, 3, 3)
    train_theirs(machine, other, others, 3, 3)
    assert_close(name, way, params, others)
    if name != "SGD":
        assert {float(other.state[p]["step"]) for p in others} == {6}


@each_class_and_way(CLASSES, WAYS)
def test_state_dicts_are_torchs(machine: Machine, name: str, way: str) -> None:
    """The same keys, shapes, dtypes and devices."""
    params, others = (leaves(machine.gpu, (6, 5), (4,)) for _ in range(2))
    opt = new(name, params, **our_options(way))
    other = theirs(name, others, **way_options(machine, way))
    train(machine, opt, params, 2)
    train_theirs(machine, other, others, 2)
    ours, expected = opt.state_dict(), other.state_dict()
    assert list(ours) == list(expected)
    assert set(ours["param_groups"][0]) == set(expected["param_groups"][0])
    for entry, other_entry in zip(ours["state"].values(), expected["state"].values(), strict=True):
        assert list(entry) == list(other_entry)
        for key, value in entry.items():
            assert value.shape == other_entry[key].shape
            assert value.dtype == other_entry[key].dtype
            if machine.is_real:
                assert value.device == other_entry[key].device


@each_class_and_mode(
    ["SGD", "NAdam", "Adam", "Adagrad"],
    ["plain", "skip_nonfinite", "fused", "capturable", "tensor_lr"],
)
@pytest.mark.parametrize("direction", ["to the GPU", "to the CPU"])
def test_state_dicts_between_the_cpu_and_the_gpu(
    machine: Machine, name: str, direction: str, mode: str
) -> None:
    """With the course of an optimizer that stays on the CPU."""
    first, second = (machine.cpu, machine.gpu) if "GPU" in direction else (machine.gpu, machine.cpu)

    def at(place: Place) -> Any:
        return nullcontext() if place.is_gpu else machine.without_gpu()

    results = []
    for start, end in ((machine.cpu, machine.cpu), (first, second)):
        with at(start):
            params = leaves(start, (6, 5), (4,))
            opt = new(name, params, **mode_options(start, name, mode))
            train(machine, opt, params, 3)
            file = io.BytesIO()
            torch.save(machine.to_cpu(opt.state_dict()), file)
            values = machine.to_cpu(params)
        with at(end):
            params = [end.put(value).requires_grad_() for value in values]
            opt = new(name, params, **mode_options(end, name, mode))
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            opt.load_state_dict(
                {**loaded, "state": {k: machine.to_cpu(v) for k, v in loaded["state"].items()}}
            )
            train(machine, opt, params, 3, 3)
            results.append(machine.to_cpu(standing(opt, params)))
    assert_same(results[1], results[0])


def test_a_file_from_the_gpu_is_loaded_onto_the_cpu(real: Machine, tmp_path: Path) -> None:
    params = leaves(real.gpu, (6, 5))
    opt = fst.NAdam(params, skip_nonfinite=True)
    train(real, opt, params, 2)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    loaded = torch.load(tmp_path / "opt.pt", map_location="cpu", weights_only=True)
    others = leaves(real.cpu, (6, 5))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    other = fst.NAdam(others)
    other.load_state_dict(loaded)
    assert all(value.device.type == "cpu" for value in other.state[others[0]].values())
    train(real, opt, params, 2, 2)
    train(real, other, others, 2, 2)
    assert_same(real.to_cpu(standing(opt, params)), standing(other, others))


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_a_file])
@each_class_and_mode(["SGD", "NAdam", "Adam"])
def test_copies_go_on_alike(
    machine: Machine, name: str, through: Callable[[Any], Any], mode: str
) -> None:
    params = leaves(machine.gpu, (6, 5), (4,))
    opt = new(name, params, **mode_options(machine.gpu, name, mode))
    train(machine, opt, params, 2)
    if opt.skip_nonfinite:
        params[0].grad[0, 0] = float("nan")
        opt.step()
    twin = through(opt)
    twins = twin.param_groups[0]["params"]
    assert (twin.max_norm, twin.skip_nonfinite) == (opt.max_norm, opt.skip_nonfinite)
    assert twin.skipped_steps == opt.skipped_steps == int(opt.skip_nonfinite)
    assert twin._step_supports_amp_scaling == opt._step_supports_amp_scaling
    assert not {p.data_ptr() for p in params} & {p.data_ptr() for p in twins}
    expected = machine.cpu if mode in HOST_COUNTS else machine.gpu
    assert all(expected.has(scalar) for scalar in scalars_of(twin))
    train(machine, opt, params, 2, 2)
    train(machine, twin, twins, 2, 2)
    same = standing(opt, params), standing(twin, twins)
    assert_same(*map(machine.to_cpu, same))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda d: d["param_groups"][0]["params"].pop(), ValueError, "doesn't match the size"),
        (lambda d: d["state"][1].pop("exp_avg"), ValueError, "lacks 'exp_avg'"),
        (lambda d: d["state"][1].update(exp_avg=torch.ones(3)), ValueError, "has shape"),
        (lambda d: d["state"][1].update(step="x"), TypeError, "expected a number"),
        (lambda d: d["param_groups"][0].update(betas=(2, 0)), ValueError, "betas"),
        (lambda d: d["param_groups"][0].update(differentiable=True), ValueError, "different"),
        (lambda d: d.update(fusestep={"max_norm": -1}), ValueError, "max_norm"),
    ],
)
@pytest.mark.parametrize("mode", ["plain", "all"])
def test_state_dicts_that_do_not_fit(
    machine: Machine,
    spoil: Callable[[Any], Any],
    error: type[Exception],
    message: str,
    mode: str,
) -> None:
    """Nothing has changed then, and the optimizer goes on."""
    params, twins = (leaves(machine.gpu, (6, 5), (4,)) for _ in range(2))
    opt = fst.Adam(params, **mode_options(machine.gpu, "Adam", mode))
    twin = fst.Adam(twins, **mode_options(machine.gpu, "Adam", mode))
    train(machine, opt, params, 2)
    train(machine, twin, twins, 2)
    bad = copy.deepcopy(opt.state_dict())
    spoil(bad)
    before = machine.to_cpu([p.detach() for p in params]), machine.to_cpu(opt.state_dict())
    with pytest.raises(error, match=message):
        opt.load_state_dict(bad)
    assert_same(machine.to_cpu([p.detach() for p in params]), before[0])
    assert_same(machine.to_cpu(opt.state_dict()), before[1])
    train(machine, opt, params, 2, 2)
    train(machine, twin, twins, 2, 2)
    same = standing(opt, params), standing(twin, twins)
    assert_same(*map(machine.to_cpu, same))


def test_a_capturable_checkpoint_on_the_cpu(machine: Machine) -> None:
    """Trained in CUDA graphs, and looked at where there is no GPU: as without capturable."""
    params = leaves(machine.gpu, (6, 5))
    opt = fst.Adam(params, capturable=True)
    train(machine, opt, params, 2)
    saved, values = machine.to_cpu(opt.state_dict()), machine.to_cpu(params)
    train(machine, opt, params, 2, 2)
    with machine.without_gpu():
        others = [machine.cpu.put(value).requires_grad_() for value in values]
        other = fst.Adam(others)
        other.load_state_dict(saved)
        train(machine, other, others, 2, 2)
    assert_same(machine.to_cpu(standing(opt, params)), machine.to_cpu(standing(other, others)))


@each_class_and_way(WITH_TORCHS_NAME, WAYS)
def test_converting_a_live_optimizer(machine: Machine, name: str, way: str) -> None:
    options = way_options(machine, way)
    both = []
    for _ in range(2):
        params = leaves(machine.gpu, (6, 5), (4,), dtype=torch.float64)
        other = theirs(name, params, **options)
        schedule = lr_scheduler.CosineAnnealingLR(other, T_max=10)
        for step in range(4):
            train_theirs(machine, other, params, 1, step)
            schedule.step()
        both.append((params, other, schedule))
    (params, old, schedule), (others, other, other_schedule) = both
    addresses = [value.data_ptr() for p in params for value in old.state[p].values()]
    opt = fst.convert(old, max_norm=1e9)
    schedule.optimizer = opt
    for step in range(4, 9):
        train(machine, opt, params, 1, step)
        schedule.step()
        train_theirs(machine, other, others, 1, step)
        other_schedule.step()
    assert [value.data_ptr() for p in params for value in opt.state[p].values()] == addresses
    expected = machine.cpu if way == "default" else machine.gpu
    assert all(expected.has(scalar) for scalar in scalars_of(opt))
    assert_close(name, way, params, others)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_converting_keeps_fused(machine: Machine, name: str) -> None:
    """A scaler leaves unscaling to the step, as it did."""
    params = leaves(machine.gpu, (4,))
    opt = fst.convert(theirs(name, params, fused=True))
    assert opt._step_supports_amp_scaling


def test_what_cannot_be_converted(machine: Machine) -> None:
    params = leaves(machine.gpu, (4,))
    with pytest.raises(ValueError, match="differentiable"):
        fst.convert(torch.optim.Adam(params, differentiable=True))


# ---- learning rates on the GPU -------------------------------------------------------------------

RATES = [0.05, 0.02, 0.0, 0.3, 1e-6, 0.07]


def filling(place: Place, group: dict[str, Any], lr: float) -> None:
    group["lr"].fill_(lr)


def replacing(place: Place, group: dict[str, Any], lr: float) -> None:
    group["lr"] = place.put(torch.tensor(lr))


def reshaping(place: Place, group: dict[str, Any], lr: float) -> None:
    group["lr"] = place.put(torch.tensor([[lr]]))


def alternating(place: Place, group: dict[str, Any], lr: float) -> None:
    """Numbers, and tensors on either device, in turn."""
    tensor = torch.tensor(lr)
    if not isinstance(group["lr"], torch.Tensor):
        group["lr"] = place.machine.cpu.put(tensor)
    elif place.machine.cpu.has(group["lr"]):
        group["lr"] = place.put(tensor)
    else:
        group["lr"] = tensor.item()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("how", [filling, replacing, reshaping, alternating])
@each_class
def test_a_learning_rate_on_the_gpu(
    machine: Machine, name: str, how: Callable[..., None], capturable: bool
) -> None:
    if capturable and name not in CAPTURABLE:
        pytest.skip(f"torch's {name} has no capturable=True")

    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        options = {"capturable": True} if capturable and place.is_gpu else {}
        options["lr"] = place.put(torch.tensor(0.1))
        opt = new(name, [{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], **options)
        train(place.machine, opt, params, 1)
        for step, lr in enumerate(RATES):
            how(place, opt.param_groups[0], lr)
            train(place.machine, opt, params, 1, step + 1)
        return standing(opt, params)

    assert_same_course(machine, course)


def test_a_learning_rate_elsewhere(machine: Machine) -> None:
    """A tensor on the CPU for parameters on the GPU, and the other way round."""

    def course(place: Place, of_lr: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        lr = of_lr.put(torch.tensor(0.05))
        opt = fst.Adam(params, lr=lr)
        train(place.machine, opt, params, 2)
        lr.fill_(0.01)
        train(place.machine, opt, params, 2, 2)
        return standing(opt, params)

    with machine.without_gpu():
        expected = machine.to_cpu(course(machine.cpu, machine.cpu))
    for place, of_lr in ((machine.gpu, machine.cpu), (machine.cpu, machine.gpu)):
        result = course(place, of_lr)
        assert all(machine.cpu.has(entry["step"]) for entry in result["state"])
        assert_same(machine.to_cpu(result), expected)


def test_a_learning_rate_on_the_gpu_that_is_out_of_range(machine: Machine) -> None:
    """A number is checked, as on the CPU; a tensor on the GPU is not read by the host."""
    params = leaves(machine.gpu, (4,))
    opt = fst.Adam(params)
    train(machine, opt, params, 1)
    before = machine.to_cpu(standing(opt, params))
    for lr in (-1.0, float("nan"), machine.cpu.put(torch.tensor(float("inf")))):
        opt.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match="lr is"):
            opt.step()
    assert_same(machine.to_cpu(standing(opt, params)), before)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.8**t),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=12, cycle_momentum=not isinstance(o, torch.optim.Adagrad)
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR, of itself
@pytest.mark.parametrize("on_gpu", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_class
def test_schedulers(machine: Machine, name: str, scheduler: str, on_gpu: bool) -> None:
    """They write into the tensor. The rates they came to give the same bits on the CPU."""
    params = leaves(machine.gpu, (6, 5), (4,))
    lr: Any = machine.gpu.put(torch.tensor(0.05)) if on_gpu else 0.05
    opt = new(name, params, lr=lr)
    schedule = SCHEDULERS[scheduler](opt)
    used = []
    for step in range(10):
        group = opt.param_groups[0]
        used.append({key: group[key] for key in ("betas", "momentum") if key in group})
        used[-1]["lr"] = float(group["lr"])
        give(machine, params, step)
        opt.step()
        schedule.step()
        if on_gpu and scheduler != "OneCycleLR":
            assert opt.param_groups[0]["lr"] is lr
    assert len({options["lr"] for options in used}) > 1
    with machine.without_gpu():
        others = leaves(machine.cpu, (6, 5), (4,))
        other = new(name, others)
        for step, options in enumerate(used):
            other.param_groups[0].update(options)
            train(machine, other, others, 1, step)
    assert_same(machine.to_cpu(standing(opt, params)), machine.to_cpu(standing(other, others)))


# ---- CUDA graphs ---------------------------------------------------------------------------------

GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {"capturable": True}),
    "AdamW,amsgrad": ("AdamW", {"capturable": True, "amsgrad": True}),
    "NAdam": ("NAdam", {"capturable": True}),
    "Adam,fused": ("Adam", {"fused": True}),
    "Adam,skip_nonfinite": ("Adam", {"skip_nonfinite": True}),
    "Adam,max_norm": ("Adam", {"capturable": True, "max_norm": 0.5}),
    "Adam,all": ("Adam", {"capturable": True, "max_norm": 0.5, "skip_nonfinite": True}),
    "SGD": ("SGD", {}),
    "SGD,max_norm": ("SGD", {"max_norm": 0.5}),
    "SGD,dampening": ("SGD", {"dampening": 0.5}),
    "SGD,plain": ("SGD", {"momentum": 0}),
    "SGD,fused": ("SGD", {"fused": True}),
    "NAG": ("NAG", {}),
    "Adagrad": ("Adagrad", {"fused": True}),
}
quiet_graphs = pytest.mark.filterwarnings("ignore:.*AccumulateGrad:UserWarning")


def replaying(
    place: Place, name: str, options: dict[str, Any], tensor_lr: bool, anchored: bool = False
) -> Any:
    """Three steps, a graph, three replays, two steps more, two replays."""
    machine = place.machine
    params = leaves(place, (33, 65), (), (7,))
    options = {k: v for k, v in options.items() if place.is_gpu or k != "capturable"}
    if tensor_lr:
        options["lr"] = place.put(torch.tensor(0.05))
    opt = new(name, params, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    if anchored:
        anchor(opt, params)

    def load(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad.copy_(numbers(p.shape, p.dtype, generator))
        if tensor_lr:
            opt.param_groups[0]["lr"].fill_(0.1 / (1 + step))

    again = opt.step
    for step in range(10):
        load(step)
        if step == 3 and place.is_gpu:
            again = machine.record(opt.step).replay
        if step < 3:
            with machine.beside() if place.is_gpu else nullcontext():
                opt.step()
        elif step in (6, 7):
            opt.step()
        else:
            again()
    return {**standing(opt, params), "grads": [p.grad for p in params]}


@quiet_graphs
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_replays_are_steps(machine: Machine, graph: str, tensor_lr: bool) -> None:
    assert_same_course(machine, replaying, *GRAPHS[graph], tensor_lr)


@quiet_graphs
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_anchors_pull_in_replays(machine: Machine, graph: str, tensor_lr: bool) -> None:
    """By the learning rate of the replay."""
    assert_same_course(machine, replaying, *GRAPHS[graph], tensor_lr, anchored=True)


def loss_of(params: list[Tensor], x: Tensor) -> Tensor:
    """Of operations that give the same bits in a graph."""
    hidden = torch.tanh(x * params[0] + params[1])
    return (hidden * params[2]).square().mean()


@quiet_graphs
@pytest.mark.parametrize("graph", GRAPHS)
def test_whole_iterations_are_replayed(machine: Machine, graph: str) -> None:
    """Forward, backward, step: as the same without a graph."""
    name, options = GRAPHS[graph]
    generator = torch.Generator().manual_seed(5)
    inputs = [numbers((16, 40), torch.float32, generator) for _ in range(10)]
    results = []
    for by_graph in (False, True):
        params = leaves(machine.gpu, (40,), (40,), (40,))
        opt = new(name, params, lr=machine.gpu.put(torch.tensor(0.05)), **options)
        x = machine.gpu.put(inputs[0])

        def iterate(params: Any = params, opt: Any = opt, x: Tensor = x) -> None:
            opt.zero_grad()
            loss_of(params, x).backward()
            opt.step()

        again = iterate
        for i, batch in enumerate(inputs):
            if by_graph and i == 3:
                opt.zero_grad()  # the gradients are to be in the graph's memory
                again = machine.record(iterate).replay
            x.copy_(batch)
            opt.param_groups[0]["lr"].fill_(0.1 / (1 + i))
            with machine.beside() if i < 3 else nullcontext():
                again()
        machine.finish()
        results.append(machine.to_cpu(standing(opt, params)))
    assert_same(results[1], results[0])


@quiet_graphs
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_a_replay_that_is_not_finite(machine: Machine, name: str, max_norm: float | None) -> None:
    """It changes nothing and is counted; the next one goes on."""

    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = new(name, params, skip_nonfinite=True, max_norm=max_norm)
        for p in params:
            p.grad = torch.zeros_like(p)
        again = opt.step
        skipped = []
        for step in range(9):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad.copy_(numbers(p.shape, p.dtype, generator))
            if step == 2 and place.is_gpu:
                again = place.machine.record(opt.step).replay
            bad = step in (3, 4, 7)
            if bad:
                params[step % 2].grad.view(-1)[-1] = float("nan" if step % 2 else "-inf")
            before = place.machine.to_cpu(standing(opt, params))
            again()
            place.machine.finish()
            if bad:
                assert_same(place.machine.to_cpu(standing(opt, params)), before)
            if step > 4:
                skipped.append(opt.skipped_steps)
        return {**standing(opt, params), "skipped": skipped}

    assert_same_course(machine, course)


@quiet_graphs
@pytest.mark.parametrize("name", FUSED)
def test_a_loss_scaler_inside_a_graph(machine: Machine, name: str) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = new(name, params, fused=True)
        opt.grad_scale = place.put(torch.tensor(4.0))
        opt.found_inf = place.put(torch.tensor(0.0))
        for p in params:
            p.grad = torch.zeros_like(p)
        again = opt.step
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad.copy_(numbers(p.shape, p.dtype, generator))
            opt.grad_scale.fill_(2.0 ** (step % 3))
            opt.found_inf.fill_(float(step == 5))
            if step == 2 and place.is_gpu:
                again = place.machine.record(opt.step).replay
            again()
        return standing(opt, params)

    assert_same_course(machine, course)


NOT_CAPTURABLE = [
    ("Adam", {}),
    ("Adam", {"max_norm": 1.0}),
    ("NAdam", {}),
    ("Adagrad", {}),
]


@quiet_graphs
@pytest.mark.parametrize(("name", "options"), NOT_CAPTURABLE)
def test_a_graph_that_would_be_wrong_is_refused(
    machine: Machine, name: str, options: dict[str, Any]
) -> None:
    """The step count of now would be repeated. The optimizer goes on as if nothing had been."""

    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = new(name, params, **options)
        for step in range(5):
            give(place.machine, params, step)
            if place.is_gpu and step in (2, 3):
                refused(place.machine, opt, params, "capturable=True")
            opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


def refused(machine: Machine, opt: Any, params: list[Tensor], message: str) -> None:
    machine.finish()
    before = machine.to_cpu([p.detach() for p in params]), machine.to_cpu(opt.state_dict())
    with pytest.raises(RuntimeError, match=message), machine.capturing():
        opt.step()
    machine.finish()
    assert_same(machine.to_cpu([p.detach() for p in params]), before[0])
    assert_same(machine.to_cpu(opt.state_dict()), before[1])


@quiet_graphs
def test_the_first_step_with_momentum_is_not_repeated(machine: Machine) -> None:
    """It sets the buffer, which the next one would not do."""

    def course(place: Place) -> Any:
        params = leaves(place, (33,), (7,))
        opt = fst.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
        for step in range(3):
            give(place.machine, params, step)
            if place.is_gpu and step == 0:
                refused(place.machine, opt, params, "CUDA graph is being captured")
            opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


def load_own_state(place: Place, opt: Any, params: list[Tensor]) -> None:
    opt.load_state_dict(opt.state_dict())


def add_a_group(place: Place, opt: Any, params: list[Tensor]) -> None:
    params += leaves(place, (3,), seed=9)
    opt.add_param_group({"params": params[-1:]})
    give(place.machine, params, 50)


def reverse(place: Place, opt: Any, params: list[Tensor]) -> None:
    opt.param_groups[0]["params"].reverse()


def move_parameters(place: Place, opt: Any, params: list[Tensor]) -> None:
    params[0].data = place.put(params[0].data)


@quiet_graphs
@pytest.mark.parametrize(
    "change",
    [
        load_own_state,
        move_parameters,
        add_a_group,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("name", ["Adam", "NAdam"])
def test_a_capture_before_there_has_been_a_step(
    machine: Machine, name: str, change: Callable[..., None]
) -> None:
    """Since something has changed. It says so, and nothing is lost."""

    def course(place: Place) -> Any:
        params = leaves(place, (33,), (7,))
        opt = new(name, params, **{"capturable": True} if place.is_gpu else {})
        train(place.machine, opt, params, 2)
        give(place.machine, params, 2)
        change(place, opt, params)
        if place.is_gpu:
            refused(place.machine, opt, params, "take one( step| such step)? before the capture")
        opt.step()
        train(place.machine, opt, params, 1, 3)
        return standing(opt, params)

    assert_same_course(machine, course)


@quiet_graphs
@pytest.mark.parametrize("mode", ["capturable", "all", "skip_nonfinite", "fused"])
def test_a_capture_of_the_very_first_step(machine: Machine, mode: str) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (33,), (7,))
        opt = fst.Adam(params, **mode_options(place, "Adam", mode))
        for step in range(3):
            give(place.machine, params, step)
            if place.is_gpu and step == 0:
                refused(place.machine, opt, params, "before the capture")
                assert not opt.state
            opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


@pytest.mark.parametrize("change", [add_a_group, reverse], ids=lambda change: change.__name__)
def test_graphs_go_on_finding_the_step_counts(
    machine: Machine, change: Callable[..., None]
) -> None:
    """A graph writes to the memory that it has met, which must not become another's."""
    params = leaves(machine.gpu, (33,), (7,))
    opt = fst.NAdam(params, capturable=True)
    train(machine, opt, params, 2)
    kept = params[:]
    before = [value.data_ptr() for p in kept for value in opt.state[p].values()]
    change(machine.gpu, opt, params)
    train(machine, opt, params, 2, 2)
    assert [value.data_ptr() for p in kept for value in opt.state[p].values()] == before


@quiet_graphs
def test_two_graphs_of_one_optimizer(real: Machine) -> None:
    """Of different parameters, replayed in turns."""

    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = fst.Adam(params, **{"capturable": True} if place.is_gpu else {})
        train(real, opt, params, 2)
        grads = [p.grad for p in params]
        graphs = []
        for i in range(2):
            params[i].grad, params[1 - i].grad = grads[i], None
            graphs.append(real.record(opt.step).replay if place.is_gpu else None)
        for i in (0, 1, 1, 0, 1):
            params[i].grad, params[1 - i].grad = grads[i], None
            (graphs[i] or opt.step)()
        return standing(opt, params)

    assert_same_course(real, course)


@quiet_graphs
def test_what_a_replay_has_skipped_is_waited_for(real: Machine) -> None:
    """Also where the replay is in another stream than the capture was."""
    params = leaves(real.gpu, (33,))
    opt = fst.Adam(params, skip_nonfinite=True)
    train(real, opt, params, 2)

    def slowly() -> None:
        torch.cuda._sleep(SLEEP)
        opt.step()

    graph = real.record(slowly)
    params[0].grad.fill_(float("nan"))
    torch.cuda.synchronize()
    graph.replay()
    assert opt.skipped_steps == 1
    with beside():
        graph.replay()
        assert opt.skipped_steps == 2
    graph.replay()
    assert opt.state_dict()["fusestep"]["skipped_steps"] == 3
    graph.replay()
    opt.add_param_group({"params": leaves(real.gpu, (3,))})
    params[0].grad.zero_()
    opt.step()
    assert opt.skipped_steps == 4
    assert int(opt.state[params[0]]["step"]) == 3


# ---- nothing waits -------------------------------------------------------------------------------

SLEEP = 200_000_000  # cycles: a tenth of a second and more, in which any step is launched


@contextmanager
def nobody_waits() -> Iterator[None]:
    """For a block that must be through long before the GPU is."""
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    asleep = torch.cuda.Event()
    asleep.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not asleep.query(), "the host has waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@each_class_and_mode(modes=[mode for mode in MODES if "bfloat16" not in mode])
def test_a_step_does_not_wait(real: Machine, name: str, mode: str) -> None:
    params = leaves(real.gpu, (33, 65), (), (1030,))
    opt = new(name, params, **mode_options(real.gpu, name, mode))
    train(real, opt, params, 2)
    opt.step(grad_scale=0.5, zero_grad=True)
    opt.zero_grad()
    give(real, params, 5)
    with nobody_waits():
        opt.step()
        opt.step()
        opt.step(grad_scale=0.5, zero_grad=True)
        opt.zero_grad()


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("name", FUSED)
def test_a_scaler_does_not_wait_for_a_fused_step(
    real: Machine, name: str, max_norm: float | None
) -> None:
    params = leaves(real.gpu, (33, 65), (7,))
    opt = new(name, params, fused=True, max_norm=max_norm)
    scaler = real.scaler(real.gpu)
    scaler.scale(torch.ones((), device="cuda"))
    give(real, params, 0)

    def both_ways() -> None:
        scaler.step(opt)
        scaler.update()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()

    both_ways()
    with nobody_waits():
        both_ways()


def test_a_scaler_does_not_wait_for_a_converted_step(real: Machine) -> None:
    params = leaves(real.gpu, (33, 65), (7,))
    opt = fst.convert(torch.optim.Adam(params, fused=True))
    scaler = real.scaler(real.gpu)
    scaler.scale(torch.ones((), device="cuda"))
    give(real, params, 0)
    for _ in range(2):
        scaler.step(opt)
        scaler.update()
    with nobody_waits():
        scaler.step(opt)
        scaler.update()


# ---- loss scaling --------------------------------------------------------------------------------


def scaled(place: Place, name: str, fused: bool, how: str) -> Any:
    """Ten steps, of which the first and the fifth overflow."""
    machine = place.machine
    params = leaves(place, (33, 65), (), (7,))
    options: dict[str, Any] = {"fused": fused} if name in FUSED else {}
    if how == "max_norm":
        options["max_norm"] = 0.5
    if how == "skip_nonfinite":
        options["skip_nonfinite"] = True
    opt = new(name, params, **options)
    scaler = machine.scaler(place, init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(10):
        give(machine, params, step)
        factor = scaler.scale(place.put(torch.ones(())))
        for p in params:
            p.grad.mul_(factor)
        overflow = step in (0, 4)
        if overflow:
            params[2].grad[3] = float("inf")
        if how == "unscale":
            scaler.unscale_(opt)
            for p in params:
                p.grad.mul_(0.25)
        before = machine.to_cpu([p.detach() for p in params])
        scaler.step(opt)
        assert not hasattr(opt, "found_inf")
        if overflow:
            assert_same(machine.to_cpu([p.detach() for p in params]), before)
        scaler.update()
        scales.append(scaler.get_scale())
    if name not in ("SGD", "NAG"):
        assert {int(opt.state[p]["step"]) for p in params} == {8}
    assert scales[:5] == [512, 512, 512, 1024, 512]
    return {**standing(opt, params), "scales": scales, "skipped": opt.skipped_steps}


@pytest.mark.parametrize("how", ["plain", "unscale", "max_norm", "skip_nonfinite"])
@pytest.mark.parametrize("fused", [False, True])
@each_class
def test_grad_scaler(machine: Machine, name: str, fused: bool, how: str) -> None:
    if fused and name not in FUSED:
        pytest.skip(f"torch's {name} has no fused=True")
    assert_same_course(machine, scaled, name, fused, how)


def test_a_scaler_for_several_optimizers(machine: Machine) -> None:
    """One overflows, the others step; the scale is that of all."""

    def course(place: Place) -> Any:
        lists = [leaves(place, (33,), (7,), seed=i) for i in range(3)]
        opts = [
            fst.Adam(lists[0], fused=True),
            fst.SGD(lists[1], momentum=0.9),
            fst.Adagrad(lists[2], fused=True, max_norm=0.5),
        ]
        scaler = place.machine.scaler(place, init_scale=256.0, growth_interval=2)
        scales = []
        for step in range(6):
            for i, params in enumerate(lists):
                give(place.machine, params, 10 * step + i)
                factor = scaler.scale(place.put(torch.ones(())))
                for p in params:
                    p.grad.mul_(factor)
                if step == 1 + i:
                    params[0].grad[1] = float("nan")
            for opt in opts:
                scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        states = [standing(opt, params) for opt, params in zip(opts, lists, strict=True)]
        return {"states": states, "scales": scales}

    assert_same_course(machine, course)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_what_a_scaler_sets(machine: Machine, name: str, shape: Any, dtype: Any) -> None:
    """By hand, in other dtypes and shapes; one of the two, or both."""

    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = new(name, params, fused=True)
        for step in range(6):
            give(place.machine, params, step)
            if step != 2:
                opt.grad_scale = place.put(torch.full(shape, 4.0 + step, dtype=dtype))
            if step != 3:
                opt.found_inf = place.put(torch.full(shape, float(step == 4), dtype=dtype))
            opt.step(grad_scale=0.5)
            for what in ("grad_scale", "found_inf"):
                if hasattr(opt, what):
                    delattr(opt, what)
        return standing(opt, params)

    assert_same_course(machine, course)


def test_no_parameters_and_a_scaler(machine: Machine) -> None:
    params = leaves(machine.gpu, (4,))
    opt = fst.Adam(params, fused=True)
    opt.param_groups[0]["params"].clear()
    opt.grad_scale = machine.gpu.put(torch.tensor(2.0))
    opt.found_inf = machine.gpu.put(torch.tensor(0.0))
    opt.step()


def test_autocast(real: Machine) -> None:
    """A network as people train it, beside torch's."""
    models, losses = [], []
    for module in (fst, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)
        ).cuda()
        opt = module.AdamW(model.parameters(), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cuda")
        course = []
        for step in range(30):
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step)).cuda()
            opt.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = (model(x) - x[:, :8].sin()).square().mean()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            course.append(loss.item())
        models.append(model)
        losses.append(course)
    assert losses[0][-1] < losses[0][0] / 2
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=1e-3)


# ---- clipping and skipping -----------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
@each_class_and_mode(modes=["plain", "skip_nonfinite", "all"])
def test_max_norm_clips_as_torch_does(
    machine: Machine, name: str, mode: str, max_norm: float
) -> None:
    params, others = (leaves(machine.gpu, (11, 7), (4,), dtype=torch.float64) for _ in range(2))
    options = {**mode_options(machine.gpu, name, mode), "max_norm": max_norm}
    opt = new(name, [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], **options)
    lr = float(opt.param_groups[0]["lr"])
    groups = [{"params": others[:1], "lr": lr}, {"params": others[1:], "lr": 0.02}]
    other = theirs(name, groups, foreach=False)
    for step in range(15):
        give(machine, params, step)
        give(machine, others, step)
        opt.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p.grad, q.grad)  # ours is left as it was
        torch.nn.utils.clip_grad_norm_(others, max_norm)
        other.step()
    assert_close(name, "loop", params, others)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_steps_are_counted(machine: Machine, dtype: Any, value: str) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (1030,), (33, 65), (), dtype=dtype)
        opt = fst.NAdam(params, lr=0.05, skip_nonfinite=True, max_norm=1.0)
        counts = []
        for step in range(9):
            give(place.machine, params, step)
            if step in (1, 2, 5, 8):
                params[step % 3].grad.view(-1)[-1] = float(value)
            before = place.machine.to_cpu(standing(opt, params))
            opt.step()
            if step in (1, 2, 5, 8):
                assert_same(place.machine.to_cpu(standing(opt, params)), before)
            if step > 3:
                counts.append(opt.skipped_steps)
        assert opt.state_dict()["fusestep"]["skipped_steps"] == 4
        return {**standing(opt, params), "counts": counts}

    assert_same_course(machine, course)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adagrad"])
def test_skipping_the_very_first_step(machine: Machine, name: str) -> None:
    """Then the second is the first: of a momentum with dampening, for instance."""
    options: dict[str, Any] = {"dampening": 0.5} if name == "SGD" else {}

    def course(place: Place) -> Any:
        params = leaves(place, (33,), (7,))
        opt = new(name, params, skip_nonfinite=True, **options)
        give(place.machine, params, 0)
        params[1].grad[0] = float("nan")
        opt.step()
        assert opt.skipped_steps == 1
        train(place.machine, opt, params, 3, 1)
        return standing(opt, params)

    assert_same_course(machine, course)


def stop_skipping(place: Place, opt: Any, params: list[Tensor]) -> None:
    opt.skip_nonfinite = False


def go_on_with_a_copy(place: Place, opt: Any, params: list[Tensor]) -> Any:
    return copy.deepcopy(opt)


def first_skipped(place: Place, name: str, change: Callable[..., Any]) -> Any:
    params = leaves(place, (33,), (7,))
    options = {"dampening": 0.5} if name == "SGD" else {}
    opt = new(name, params, skip_nonfinite=True, **options)
    give(place.machine, params, 0)
    params[1].grad[0] = float("nan")
    opt.step()
    opt = change(place, opt, params) or opt
    params = [p for group in opt.param_groups for p in group["params"]]
    train(place.machine, opt, params, 3, 1)
    return standing(opt, params)


each_change = pytest.mark.parametrize(
    "change",
    [load_own_state, add_a_group, stop_skipping, go_on_with_a_copy],
    ids=lambda change: change.__name__,
)


@each_change
@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adagrad"])
def test_skipping_the_very_first_step_and_changing_things(
    machine: Machine, name: str, change: Callable[..., Any]
) -> None:
    """That no step was taken is still known."""
    assert_same_course(machine, first_skipped, name, change)


@each_change
def test_skipping_the_very_first_step_with_momentum_and_changing_things(
    machine: Machine, change: Callable[..., Any]
) -> None:
    assert_same_course(machine, first_skipped, "SGD", change)


def first_skipped_and_state_brought(place: Place, name: str, how: str) -> Any:
    params, others = leaves(place, (33,), (7,)), leaves(place, (33,), (7,), seed=1)
    options = {"dampening": 0.5} if name == "SGD" else {}
    opt = new(name, params, skip_nonfinite=True, **options)
    other = new(name, others, skip_nonfinite=True, **options)
    train(place.machine, other, others, 3)
    give(place.machine, params, 0)
    params[1].grad[0] = float("nan")
    opt.step()
    if how == "load_state_dict":
        opt.load_state_dict(other.state_dict())
    elif how == "state":
        opt.state.clear()
        for p, q in zip(params, others, strict=True):
            opt.state[p] = other.state[q]
    else:
        for p, q in zip(params, others, strict=True):
            for key, value in other.state[q].items():
                opt.state[p][key] = value
    saved = opt.state_dict()["state"]
    train(place.machine, opt, params, 2, 1)
    return {**standing(opt, params), "saved": saved}


@pytest.mark.parametrize("how", ["load_state_dict", "state", "entries"])
@pytest.mark.parametrize(
    "name",
    [
        "Adam",
        "NAdam",
        "SGD",
    ],
)
def test_state_that_comes_after_a_step_that_was_skipped(
    machine: Machine, name: str, how: str
) -> None:
    """It is of steps that were taken elsewhere, and counts."""
    assert_same_course(machine, first_skipped_and_state_brought, name, how)


def test_skipped_steps_outlast_everything(machine: Machine) -> None:
    params = leaves(machine.gpu, (33,), (7,))
    opt = fst.Adam(params, skip_nonfinite=True)

    def skip() -> None:
        give(machine, params, 0)
        params[0].grad[0] = float("nan")
        opt.step()

    skip()
    opt.add_param_group({"params": leaves(machine.gpu, (3,))})
    skip()
    opt.param_groups[0]["lr"] = machine.gpu.put(torch.tensor(0.1))
    skip()
    opt.param_groups[0]["lr"] = 0.1
    skip()
    params[0].data = machine.gpu.put(params[0].data)
    skip()
    assert opt.skipped_steps == 5
    opt.skip_nonfinite = False
    train(machine, opt, params, 1)
    opt.skip_nonfinite = True
    skip()
    assert opt.skipped_steps == 6
    opt.load_state_dict(opt.state_dict())
    skip()
    assert opt.skipped_steps == 7


def test_a_norm_that_is_not_finite_and_no_skipping(machine: Machine) -> None:
    """What the CPU does, the GPU does."""

    def course(place: Place) -> Any:
        params = leaves(place, (33,), (7,))
        opt = fst.SGD(params, lr=0.1, max_norm=1.0)
        give(place.machine, params, 0)
        params[1].grad[0] = float("inf")
        opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


def test_zeroing_gradients_of_a_step_that_is_skipped(machine: Machine) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = fst.Adam(params, skip_nonfinite=True)
        train(place.machine, opt, params, 1)
        params[1].grad[0] = float("nan")
        gradients = [p.grad for p in params]
        opt.step(zero_grad=True)
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
        return {**standing(opt, params), "grads": gradients}

    assert_same_course(machine, course)


# ---- sparse gradients ----------------------------------------------------------------------------


def give_rows(
    machine: Machine, tables: list[Tensor], seed: int, skipped: Sequence[bool] = ()
) -> None:
    """New gradients of some rows, each where its table is: unsorted, some of them repeated."""
    generator = torch.Generator().manual_seed(2000 + seed)
    for i, p in enumerate(tables):
        count = 0 if (seed + i) % 6 == 5 else 12
        rows = torch.randint(0, max(len(p), 1), (count if len(p) else 0,), generator=generator)
        values = numbers((len(rows), *p.shape[1:]), p.dtype, generator)
        if i < len(skipped) and skipped[i]:
            continue
        put = place_of(machine, p).put
        p.grad = None
        p.grad = torch.sparse_coo_tensor(
            put(rows[None]), put(values), p.shape, check_invariants=False
        )


def sparse_of(gradient: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a gradient of these rows, one for each of a dense one's."""
    indices = torch.tensor([[*rows]], device=gradient.device)
    return torch.sparse_coo_tensor(
        indices, gradient.detach(), gradient.shape, check_invariants=False
    )


TABLES = [(40, 3), (17,), (9, 2, 33), (0, 4), (5, 0)]


def sparse_steps(place: Place, rule: Rule, dtype: Any) -> Any:
    machine = place.machine
    params = leaves(place, *TABLES, (33,), dtype=dtype)
    opt = make(rule, params)
    for step in range(8):
        give(machine, params, step)
        give_rows(machine, params[:-1], step, skipped=[step == 4])
        opt.step()
    return standing(opt, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sparse_gradients(machine: Machine, rule: Rule, dtype: Any) -> None:
    assert_same_course(machine, sparse_steps, rule, dtype)


def sparse_in_mode(place: Place, name: str, mode: str) -> Any:
    """Steps that are left out where they are not finite; gradients that are cleared."""
    machine = place.machine
    params = leaves(place, (40, 3), (17,), (33,))
    opt = new(name, params, **mode_options(place, name, mode))
    cleared = []
    for step in range(8):
        give(machine, params, step)
        give_rows(machine, params[:2], step)
        gradients = [p.grad for p in params]
        values = [gradient._values() for gradient in gradients[:2]]
        if step == 3 and opt.skip_nonfinite:
            values[1][2] = float("inf")
        opt.step(grad_scale=0.5, zero_grad=step > 4)
        assert all(p.grad is gradient for p, gradient in zip(params, gradients, strict=True))
        if step > 4:
            assert [gradient._nnz() for gradient in gradients[:2]] == [0, 0]
        cleared.append([*values, gradients[2]])
    return {**standing(opt, params), "gradients": cleared, "skipped": opt.skipped_steps}


@each_class_and_mode()
def test_sparse_gradients_in_every_mode(machine: Machine, name: str, mode: str) -> None:
    assert_same_course(machine, sparse_in_mode, name, mode)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_coalesced_or_not(machine: Machine, name: str) -> None:
    """In float64, in which sums of these few do not depend on the order."""
    results = []
    for coalesced in (False, True):
        params = leaves(machine.gpu, (40, 3), dtype=torch.float64)
        opt = new(name, params)
        for step in range(4):
            rows = torch.tensor([[3, 39, 3, step, 0, 3]])
            values = torch.arange(18, dtype=torch.float64).reshape(6, 3) / 4 - step
            gradient = torch.sparse_coo_tensor(
                machine.gpu.put(rows), machine.gpu.put(values), (40, 3), check_invariants=False
            )
            params[0].grad = gradient.coalesce() if coalesced else gradient
            opt.step()
        results.append(machine.to_cpu(standing(opt, params)))
    assert_same(results[1], results[0])


def embedded(place: Place, mode: str) -> Any:
    """What nn.Embedding and nn.EmbeddingBag leave, of a loss whose gradients are exact."""
    words, bags = leaves(place, (40, 3), (30, 5))
    opt = new("Adam", [words, bags], **mode_options(place, "Adam", mode))
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        chosen = place.put(torch.randint(0, 30, (4, 6), generator=generator))
        weights = place.put(torch.randint(-8, 8, (4, 6, 3), generator=generator).float())
        rows = torch.nn.functional.embedding(chosen, words, sparse=True)
        sums = torch.nn.functional.embedding_bag(chosen, bags, mode="sum", sparse=True)
        loss = (rows * weights).sum() + (sums * weights[:, :5, 0]).sum()
        loss.backward()
        assert words.grad.is_sparse
        assert bags.grad.is_sparse
        opt.step()
        opt.zero_grad()
    return standing(opt, [words, bags])


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_embeddings(machine: Machine, mode: str) -> None:
    assert_same_course(machine, embedded, mode)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_scaler_and_sparse_gradients(machine: Machine, name: str, fused: bool) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (40, 3), (33,))
        opt = new(name, params, fused=fused)
        scaler = machine.scaler(place, init_scale=64.0, growth_interval=3)
        for step in range(8):
            give(machine, params, step)
            give_rows(machine, params[:1], step)
            factor = scaler.scale(place.put(torch.ones(())))
            values = params[0].grad._values(), params[1].grad
            for each in values:
                each.mul_(factor)
            if step in (0, 3):
                values[step % 2].view(-1)[2] = float("inf")
            scaler.step(opt)
            scaler.update()
        return {**standing(opt, params), "scale": scaler.get_scale()}

    assert_same_course(machine, course)


def test_indices_are_waited_for(real: Machine) -> None:
    """They are written on the GPU while the host is in the step already."""
    results = []
    for delay in (0, SLEEP):
        (p,) = leaves(real.gpu, (40, 3))
        opt = fst.SGD([p], lr=0.5)
        rows = torch.zeros((1, 4), dtype=torch.int64, device=real.gpu.device)
        p.grad = torch.sparse_coo_tensor(rows, torch.ones_like(p[:4]), p.shape)
        there = torch.tensor([[7, 8, 7, 39]], device=real.gpu.device)
        torch.cuda.synchronize()
        torch.cuda._sleep(delay)
        p.grad._indices().copy_(there)
        opt.step()
        results.append(real.to_cpu(p))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("mode", ["capturable", "all"])
def test_sparse_gradients_cannot_be_captured(machine: Machine, mode: str) -> None:
    """The host cannot see their indices then. The optimizer goes on as if nothing had been."""

    def course(place: Place) -> Any:
        params = leaves(place, (40, 3), (33,))
        opt = new("Adam", params, **mode_options(place, "Adam", mode))
        for step in range(5):
            give(machine, params, step)
            give_rows(machine, params[:1], step)
            if place.is_gpu and step in (0, 3):
                refused(
                    machine, opt, params, "row indices for parameter 0 would have to be fetched"
                )
            opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


def test_a_sparse_gradient_on_a_gpu_for_a_table_on_the_cpu(machine: Machine) -> None:
    (p,) = leaves(machine.cpu, (7,))
    opt = fst.Adam([p])
    p.grad = sparse_of(machine.cpu.put(torch.ones(7)), range(7))
    p.grad.data = sparse_of(machine.gpu.put(torch.ones(7)), range(7))
    before = machine.to_cpu(p)
    with pytest.raises(ValueError, match="gradient of parameter 0 is on cuda:0; expected cpu"):
        opt.step()
    with pytest.raises(RuntimeError, match="CUDA graph is being captured"), machine.capturing():
        opt.step()
    assert_same(machine.to_cpu(p), before)
    assert not opt.state


# ---- exact rows ----------------------------------------------------------------------------------


def exact_steps(place: Place, rule: Rule, dtype: Any) -> Any:
    """Rows that miss steps, some of which are asked for; what is noted goes into the state dict."""
    machine = place.machine
    params = leaves(place, *TABLES, (33,), dtype=dtype)
    opt = make(rule, params, rows="exact")
    for step in range(9):
        give(machine, params, step)
        give_rows(machine, params[:-1], step, skipped=[step == 4])
        opt.step()
        if step in (2, 6):
            asked = place.put(torch.tensor([[3, 1], [3, 39]]))
            opt.catch_up({params[0]: asked, params[2]: [0, 8]})
    behind = machine.to_cpu({"dict": opt.state_dict(), **standing(opt, params)})
    assert "missed_steps" in behind["dict"]["state"][1]
    opt.flush()
    return {"behind": behind, **standing(opt, params)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_exact_rows(machine: Machine, rule: Rule, dtype: Any) -> None:
    assert_same_course(machine, exact_steps, rule, dtype)


def exact_in_mode(place: Place, name: str, mode: str) -> Any:
    """Steps that are left out, rates that change, an anchor that comes and one that goes."""
    machine = place.machine
    params = leaves(place, (40, 3), (17,), (33,))
    options = {**mode_options(place, name, mode), "capturable": False}
    if name not in CAPTURABLE:
        del options["capturable"]
    opt = new(name, params, rows="exact", **options)
    for step in range(12):
        give(machine, params, step)
        give_rows(machine, params[:2], step)
        if step in (0, 3, 4) and opt.skip_nonfinite:
            params[0].grad._values().view(-1)[2] = float("nan")
        if step == 5:
            opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"] / 4
        if step == 7:
            anchor(opt, params)
        if step == 9:
            opt.release_anchor()
        opt.step(grad_scale=0.5, zero_grad=step % 2 == 0)
    behind = machine.to_cpu(standing(opt, params))
    opt.flush()
    return {"behind": behind, "skipped": opt.skipped_steps, **standing(opt, params)}


@each_class_and_mode()
def test_exact_rows_in_every_mode(machine: Machine, name: str, mode: str) -> None:
    assert_same_course(machine, exact_in_mode, name, mode)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_scaler_and_exact_rows(machine: Machine, name: str, fused: bool) -> None:
    """The host asks whether the step is taken."""

    def course(place: Place) -> Any:
        params = leaves(place, (40, 3), (33,))
        opt = new(name, params, rows="exact", fused=fused)
        scaler = machine.scaler(place, init_scale=64.0, growth_interval=3)
        for step in range(8):
            give(machine, params, step)
            give_rows(machine, params[:1], step)
            factor = scaler.scale(place.put(torch.ones(())))
            values = params[0].grad._values(), params[1].grad
            for each in values:
                each.mul_(factor)
            if step in (0, 3):
                values[step % 2].view(-1)[2] = float("inf")
            scaler.step(opt)
            scaler.update()
        opt.flush()
        return {**standing(opt, params), "scale": scaler.get_scale()}

    assert_same_course(machine, course)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_exact_tables_that_go_to_a_gpu_and_back(machine: Machine, rule: Rule) -> None:
    """With rows that are behind: what they have missed is noted on the host."""

    def course(place: Place) -> Any:
        (p,) = leaves(place.machine.cpu, (40, 3))
        opt = make(rule, [p], rows="exact")

        def move(to: Place) -> None:
            p.data = to.put(p.data)
            entry = opt.state[p]
            entry.update({name: to.put(x) for name, x in entry.items() if x.ndim > 0})

        for step in range(9):
            if step in (3, 6):
                move(place if step == 3 else place.machine.cpu)
            give_rows(machine, [p], step)
            opt.step()
        move(place)
        opt.flush()
        return standing(opt, [p])

    assert_same_course(machine, course)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_missed_steps_are_loaded_on_a_gpu(machine: Machine, rule: Rule) -> None:
    def course(place: Place) -> Any:
        (p,) = leaves(place, (40, 3))
        opt = make(rule, [p], rows="exact")
        for step in range(9):
            if step in (3, 6):
                saved = copy.deepcopy(opt.state_dict())
                opt = make(rule, [p], rows="exact")
                opt.load_state_dict(saved)
            give_rows(machine, [p], step)
            opt.step()
        opt.flush()
        return standing(opt, [p])

    assert_same_course(machine, course)


def test_exact_rows_cannot_be_captured(machine: Machine) -> None:
    """The optimizer goes on as if nothing had been."""
    words = "capturable=True is for CUDA graphs, and rows='exact'"
    with pytest.raises(ValueError, match=words):
        fst.Adam(leaves(machine.gpu, (40, 3)), rows="exact", capturable=True)

    def course(place: Place) -> Any:
        params = leaves(place, (40, 3))
        opt = fst.SGD(params, momentum=0.9, rows="exact")
        for step in range(5):
            if place.is_gpu and step in (2, 4):
                give(machine, params, step)
                refused(machine, opt, params, 'rows="exact"')
                with pytest.raises(RuntimeError, match='rows="exact"'), machine.capturing():
                    opt.flush()
            give_rows(machine, params, step)
            opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


# ---- tables that grow ----------------------------------------------------------------------------


def growing_steps(place: Place, rule: Rule, dtype: Any, rows: str, has_anchor: bool) -> Any:
    """By a row, by many, by none, before the first step and with a gradient at hand."""
    machine = place.machine
    params = leaves(place, (40, 3), (17,), (9, 2, 33), (0, 4), (33,), dtype=dtype)
    tables = params[:-1]
    opt = make(rule, params, rows=rows)
    generator = torch.Generator().manual_seed(7)
    for step in range(8):
        if step == 2 and has_anchor:
            anchor(opt, params[:3])
        give(machine, params, step)
        give_rows(machine, tables, step, skipped=[step == 4])
        if step in (0, 3, 4, 6):
            for p in tables:
                more = (step + len(p)) % 4
                values = numbers((more, *p.shape[1:]), torch.float32, generator)
                if dtype.is_complex or step == 6:
                    opt.resize(p, len(p) + more, 0.5)
                else:
                    opt.resize(p, len(p) + more, place.put(values))
                assert place.has(p)
                assert place.has(p.grad)
        opt.step()
    behind = machine.to_cpu(standing(opt, params))
    opt.flush()
    return {"behind": behind, **standing(opt, params)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize("has_anchor", [False, True])
def test_tables_that_grow(
    machine: Machine, rule: Rule, dtype: Any, rows: str, has_anchor: bool
) -> None:
    if has_anchor and dtype.is_complex:
        pytest.skip("complex parameters have no anchors")
    assert_same_course(machine, growing_steps, rule, dtype, rows, has_anchor)


def growing_in_mode(place: Place, name: str, mode: str) -> Any:
    """Wherever steps are counted; some of them are left out."""
    machine = place.machine
    params = leaves(place, (40, 3), (17,), (33,))
    opt = new(name, params, **mode_options(place, name, mode))
    for step in range(8):
        if step in (0, 2, 5):
            opt.resize(params[0], len(params[0]) + 3, init=1.0)
        give(machine, params, step)
        give_rows(machine, params[:2], step)
        if step in (0, 3) and opt.skip_nonfinite:
            params[0].grad._values().view(-1)[2] = float("nan")
        opt.step(zero_grad=step % 2 == 0)
    return {**standing(opt, params), "skipped": opt.skipped_steps}


@each_class_and_mode()
def test_tables_that_grow_in_every_mode(machine: Machine, name: str, mode: str) -> None:
    assert_same_course(machine, growing_in_mode, name, mode)


def test_an_embedding_that_grows(machine: Machine) -> None:
    """The parameter is the same object: its module and autograd go on with it."""

    def course(place: Place) -> Any:
        words = torch.nn.Embedding(10, 3, sparse=True)
        (weight,) = leaves(place, (10, 3))
        words.weight = weight = torch.nn.Parameter(weight.detach())
        opt = fst.Adam([weight], lr=0.1)
        for count in (10, 12, 30):
            opt.resize(weight, count, lambda shape: place.put(torch.full(shape, 0.5)))
            assert words.weight is weight
            asked = place.put(torch.tensor([[0, count - 1], [3, 3]]))
            words(asked).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return standing(opt, [weight])

    assert_same_course(machine, course)


def test_what_cannot_grow_changes_nothing(machine: Machine) -> None:
    (p,) = leaves(machine.gpu, (5, 3))
    opt = fst.Adam([p])
    give(machine, [p], 0)
    opt.step()
    before, gradient = machine.to_cpu(standing(opt, [p])), p.grad
    for count, init, error, words in [
        (4, 0.0, ValueError, "has 5 rows; it cannot be resized to 4"),
        (7, machine.gpu.put(torch.ones(3, 3)), ValueError, r"init has shape \(3, 3\)"),
        (7, "x", TypeError, "init is 'x'"),
        (7.0, 0.0, TypeError, "float"),
    ]:
        with pytest.raises(error, match=words):
            opt.resize(p, count, init)
        assert_same(machine.to_cpu(standing(opt, [p])), before)
        assert p.grad is gradient


# ---- anchors -------------------------------------------------------------------------------------


def anchor(opt: Any, params: list[Tensor], strength: float = 3.0, seed: int = 0) -> None:
    """Tie parameters to values of their own, the second of them with an importance."""
    generator = torch.Generator().manual_seed(3000 + seed)
    reference = [numbers(p.shape, torch.float32, generator) for p in params]
    importance = numbers(params[1].shape, torch.float32, generator).square()
    opt.anchor(strength, dict(zip(params, reference, strict=True)))
    opt.anchor(strength, importance={params[1]: importance})


def anchored_steps(place: Place, rule: Rule, dtype: Any) -> Any:
    """Two tasks, and steps after both are forgotten."""
    machine = place.machine
    params = leaves(place, *SHAPES, dtype=dtype)
    opt = make(rule, params)
    found = []
    for step in range(10):
        if step in (0, 3):
            anchor(opt, params[1:], seed=step)
        if step == 7:
            opt.release_anchor()
        give(machine, params, step, missing=[step % len(params)])
        opt.step()
        found.append([dict(each) for each in opt.anchors.values()])
        for each in opt.anchors.values():
            assert place.has(each["reference"])
            assert each["importance"] is None or place.has(each["importance"])
    assert list(map(len, found)) == [5] * 7 + [0] * 3
    return {**standing(opt, params), "anchors": found}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_anchors(machine: Machine, rule: Rule, dtype: Any) -> None:
    assert_same_course(machine, anchored_steps, rule, dtype)


def anchored_in_mode(place: Place, name: str, mode: str, start: int) -> Any:
    """Dense gradients and sparse ones; one that is not finite; other learning rates."""
    machine = place.machine
    params = leaves(place, (33, 65), (40, 3), ())
    opt = new(name, params, **mode_options(place, name, mode))
    for step in range(8):
        if step == start:
            anchor(opt, params)
        if step == 5:
            lr = opt.param_groups[0]["lr"]
            opt.param_groups[0]["lr"] = lr / 4
        give(machine, params, step)
        give_rows(machine, params[1:2], step, skipped=[step % 3 == 0])
        if step in (0, 3) and opt.skip_nonfinite:
            params[0].grad[0, 0] = float("nan")
        opt.step(grad_scale=0.5)
    return {**standing(opt, params), "skipped": opt.skipped_steps}


@each_class_and_mode()
@pytest.mark.parametrize("start", [0, 2])
def test_anchors_in_every_mode(machine: Machine, name: str, mode: str, start: int) -> None:
    assert_same_course(machine, anchored_in_mode, name, mode, start)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("change", [None, copy.deepcopy, through_pickle])
def test_anchors_outlast_a_first_step_that_is_skipped(
    machine: Machine, momentum: float, change: Any
) -> None:
    """Where there is no step count, state is dropped that says there has been a step."""

    def course(place: Place) -> Any:
        params = leaves(place, (33,), (7,))
        opt = fst.SGD(params, lr=0.1, momentum=momentum, dampening=0.5, skip_nonfinite=True)
        anchor(opt, params)
        give(machine, params, 0)
        params[1].grad[0] = float("nan")
        opt.step()
        saved = opt.state_dict()
        assert len(opt.anchors) == 2
        assert all("momentum_buffer" not in entry for entry in saved["state"].values())
        if change:
            opt = change(opt)
            params = opt.param_groups[0]["params"]
        train(machine, opt, params, 3, 1)
        assert len(opt.anchors) == 2
        return standing(opt, params)

    assert_same_course(machine, course)


def test_references_from_anywhere(machine: Machine) -> None:
    """On the CPU, on the GPU, part of a graph, of NumPy."""
    ways = [
        lambda x: x,
        lambda x: machine.gpu.put(x),
        lambda x: machine.gpu.put(x).requires_grad_(),
        lambda x: x.numpy(),
    ]
    results = []
    for way in ways:
        params = leaves(machine.gpu, (6, 5), (4,))
        opt = fst.Adam(params)
        given = [torch.sin(torch.arange(p.numel()).reshape(p.shape)) for p in params]
        opt.anchor(2.0, list(map(way, given)), [way(x.square()) for x in given])
        train(machine, opt, params, 2)
        results.append(machine.to_cpu(standing(opt, params)))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_a_file])
@each_class_and_mode(["SGD", "NAdam", "Adam"], ["plain", "skip_nonfinite", "capturable"])
def test_copies_go_on_anchored(
    machine: Machine, name: str, through: Callable[[Any], Any], mode: str
) -> None:
    params = leaves(machine.gpu, (6, 5), (4,))
    opt = new(name, params, **mode_options(machine.gpu, name, mode))
    train(machine, opt, params, 2)
    anchor(opt, params)
    twin = through(opt)
    twins = twin.param_groups[0]["params"]
    for p, q in zip(params, twins, strict=True):
        assert machine.gpu.has(twin.anchors[q]["reference"])
        assert twin.state[q]["anchor"].data_ptr() != opt.state[p]["anchor"].data_ptr()
    train(machine, opt, params, 2, 2)
    train(machine, twin, twins, 2, 2)
    same = standing(opt, params), standing(twin, twins)
    assert_same(*map(machine.to_cpu, same))


@pytest.mark.parametrize("direction", ["to the GPU", "to the CPU"])
@each_class_and_mode(["SGD", "NAdam", "Adam"], ["plain", "skip_nonfinite", "tensor_lr"])
def test_anchors_between_the_cpu_and_the_gpu(
    machine: Machine, name: str, direction: str, mode: str
) -> None:
    """With the course of an optimizer that stays on the CPU; sparse gradients too."""
    first, second = (machine.cpu, machine.gpu) if "GPU" in direction else (machine.gpu, machine.cpu)
    results = []
    for start, end in ((machine.cpu, machine.cpu), (first, second)):
        with nullcontext() if start.is_gpu else machine.without_gpu():
            params = leaves(start, (40, 3), (4,))
            opt = new(name, params, **mode_options(start, name, mode))
            anchor(opt, params)
            train(machine, opt, params, 2)
            saved, values = machine.to_cpu(opt.state_dict()), machine.to_cpu(params)
        with nullcontext() if end.is_gpu else machine.without_gpu():
            params = [end.put(value).requires_grad_() for value in values]
            opt = new(name, params, **mode_options(end, name, mode))
            opt.load_state_dict(saved)
            assert all(end.has(each["reference"]) for each in opt.anchors.values())
            for step in range(2, 5):
                give(machine, params, step)
                give_rows(machine, params[:1], step)
                opt.step()
            results.append(machine.to_cpu(standing(opt, params)))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda p, q: (-1.0,), ValueError, "strength for parameter 0"),
        (lambda p, q: (1.0, {p: p, q: torch.zeros(1)}), ValueError, "the anchor of parameter 1"),
        (lambda p, q: (1.0, {q: q.detach() / 0}), ValueError, "not finite"),
        (lambda p, q: (1.0, None, {p: p, q: -q.detach().abs()}), ValueError, "negative somewhere"),
        (lambda p, q: (1.0, {p.clone(): p}), ValueError, "not a parameter"),
    ],
)
@pytest.mark.parametrize("mode", ["plain", "all"])
def test_anchors_that_are_refused_change_nothing(
    machine: Machine, mode: str, arguments: Any, error: type[Exception], words: str
) -> None:
    params = leaves(machine.gpu, (6, 5), (4,))
    opt = fst.Adam(params, **mode_options(machine.gpu, "Adam", mode))
    for _ in range(2):
        before = machine.to_cpu(standing(opt, params))
        with pytest.raises(error, match=words):
            opt.anchor(*arguments(*params))
        assert_same(machine.to_cpu(standing(opt, params)), before)
        anchor(opt, params)
        train(machine, opt, params, 1)


def test_an_anchor_on_another_device(machine: Machine) -> None:
    """Put there behind the step's back."""
    params = leaves(machine.gpu, (33,), (7,))
    opt = fst.Adam(params)
    anchor(opt, params)
    train(machine, opt, params, 2)
    value = opt.state[params[1]]["anchor"]
    there = value.data
    value.data = machine.cpu.put(there.cpu())
    before = machine.to_cpu(standing(opt, params))
    with pytest.raises(ValueError, match="the anchor of parameter 1 is on cpu; expected cuda:0"):
        opt.step()
    assert_same(machine.to_cpu(standing(opt, params)), before)
    value.data = there
    opt.step()


# ---- selections ----------------------------------------------------------------------------------


def selections_for(place: Place, step: int, params: list[Tensor]) -> Any:
    """Each kind in turn, and steps of everything."""
    generator = torch.Generator().manual_seed(step)
    masks = [place.put(torch.rand(p.shape, generator=generator)) < 0.4 for p in params]
    kinds: list[Any] = [
        None,
        fs.RandomBlocks(0.5, 7),
        {p: mask for p, mask in zip(params, masks, strict=True) if p.ndim},
        fs.TopK(0.3, by="update"),
        fs.CyclicBlocks(3, frozen="track"),
        {params[0]: fs.Mask(masks[0][:, 0], frozen="track")},
    ]
    return kinds[step % len(kinds)]


def selecting(place: Place, name: str, mode: str, steps: int = 13, first: int = 0) -> Any:
    params = leaves(place, (40, 7), (1030,), (), (0,))
    opt = new(name, params, seed=3, **mode_options(place, name, mode))
    for step in range(first, steps):
        give(place.machine, params, step)
        opt.step(where=selections_for(place, step, params), zero_grad=step % 2 == 0)
    grads = [p.grad for p in params]
    skipped = opt.skipped_steps
    return {**standing(opt, params), "grads": grads, "skipped": skipped, "all": opt.state_dict()}


@each_class_and_mode(CLASSES)
@pytest.mark.parametrize("first", [0, 1])
def test_selections(machine: Machine, name: str, mode: str, first: int) -> None:
    """From the first step on, or after one of everything that the GPU may have counted."""
    if MODES[mode].get("capturable"):
        pytest.skip("blocks are counted on the host")
    assert_same_course(machine, selecting, name, mode, first=first)


def test_selections_are_counted_on_the_host(machine: Machine) -> None:
    """Where the GPU has counted before, what it has counted is brought to the host."""
    params = leaves(machine.gpu, (40,), (7,))
    opt = fst.Adam(params, skip_nonfinite=True)
    train(machine, opt, params, 2)
    assert all(machine.gpu.has(scalar) for scalar in scalars_of(opt))
    train(machine, opt, params, 2, where=fs.CyclicBlocks(2))
    assert all(machine.cpu.has(scalar) for scalar in scalars_of(opt))
    give(machine, params, 5)
    params[0].grad[3] = float("nan")
    before = machine.to_cpu(standing(opt, params))
    opt.step(where=fs.CyclicBlocks(1))
    assert_same(machine.to_cpu(standing(opt, params)), before)
    assert opt.skipped_steps == 1
    train(machine, opt, params, 1)
    assert set(opt.state_dict()["state"][0]["block_steps"].tolist()) == {4}


def scaled_selections(place: Place) -> Any:
    machine = place.machine
    params = leaves(place, (40, 7), (30,))
    opt = fst.Adam(params, lr=0.1)
    scaler = machine.scaler(place, init_scale=8.0)
    for step in range(8):
        give(machine, params, step)
        factor = scaler.scale(place.put(torch.ones(())))
        for p in params:
            p.grad.mul_(factor)
        if step in (1, 4):
            params[1].grad[3] = float("inf")
        scaler.step(opt, where=fs.RandomBlocks(0.5, 8) if step % 3 else None)
        scaler.update()
    return {**standing(opt, params), "scale": scaler.get_scale(), "all": opt.state_dict()}


def test_selections_and_a_scaler(machine: Machine) -> None:
    assert_same_course(machine, scaled_selections)


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_counts_of_blocks_go_anywhere(machine: Machine, way: str) -> None:
    """Saved on a GPU in the middle, and loaded there or on the CPU: nothing is different."""
    params = leaves(machine.gpu, (40, 7), (30,))
    opt = new("NAdam", params)
    for step in range(7):
        give(machine, params, step)
        opt.step(where=selections_for(machine.gpu, step, params))
    others: list[tuple[Any, list[Tensor]]] = []
    for place in (machine.gpu, machine.cpu):
        copies = [place.put(p.detach().cpu()).requires_grad_() for p in params]
        other = new("NAdam", copies)
        if way == "file":
            other.load_state_dict(through_a_file(opt.state_dict()))
        elif way == "state_dict":
            other.load_state_dict(opt.state_dict())
        else:
            other = through_pickle(opt) if way == "pickle" else copy.deepcopy(opt)
            copies = other.param_groups[0]["params"]
        others.append((other, copies))
    for step in range(7, 14):
        for each, tensors in [(opt, params), *others]:
            place = place_of(machine, tensors[0])
            give(machine, tensors, step)
            each.step(where=selections_for(place, step, tensors))
    for each, tensors in others:
        assert_same(
            machine.to_cpu(standing(each, tensors)["params"]),
            machine.to_cpu(standing(opt, params)["params"]),
        )


def test_a_parameter_with_blocks_moves_to_a_gpu(machine: Machine) -> None:
    with machine.without_gpu():
        peers = leaves(machine.cpu, (40, 7))
        peer = fst.Adam(peers, lr=0.1)
        for step in range(6):
            give(machine, peers, step)
            peer.step(where=selections_for(machine.cpu, step, peers))
    params = leaves(machine.cpu, (40, 7))
    opt = fst.Adam(params, lr=0.1)
    for step in range(6):
        if step == 3:
            params[0].grad = None
            params[0].data = machine.gpu.put(params[0].data)
            for key, value in opt.state[params[0]].items():
                if key not in COUNTS:
                    value.data = machine.gpu.put(value.data)
        give(machine, params, step)
        opt.step(where=selections_for(place_of(machine, params[0]), step, params))
    assert_same(machine.to_cpu(params[0].detach()), peers[0].detach())


def test_selections_are_not_for_graphs(machine: Machine) -> None:
    params = leaves(machine.gpu, (40,))
    opt = fst.Adam(params, capturable=True)
    train(machine, opt, params, 1)
    give(machine, params, 1)
    before = machine.to_cpu(standing(opt, params))
    with pytest.raises(ValueError, match="set capturable=False"):
        opt.step(where=fs.CyclicBlocks(2))
    assert_same(machine.to_cpu(standing(opt, params)), before)
    opt.param_groups[0]["capturable"] = False
    opt.step(where=fs.CyclicBlocks(2))
    with pytest.raises(RuntimeError, match="CUDA graph is being captured"), machine.capturing():
        opt.step(where=fs.CyclicBlocks(2))
    opt.param_groups[0]["capturable"] = True
    opt.step()
    with pytest.raises(RuntimeError, match="CUDA graph is being captured"), machine.capturing():
        opt.step()


# ---- samples -------------------------------------------------------------------------------------

SAMPLES: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"max_norm": 1.5},
    {"max_norm": 1.5, "noise_multiplier": 0.7, "reduction": 6},
]


def give_samples(machine: Machine, params: list[Tensor], seed: int, count: int = 5) -> Tensor:
    """New gradients of samples, each where its parameter is; returns their weights, on the CPU."""
    generator = torch.Generator().manual_seed(3000 + seed)
    for i, p in enumerate(params):
        values = numbers((count, *p.shape), p.dtype, generator)
        put = place_of(machine, p).put
        in_parts = seed % 4 == 1 and i % 2 == 0  # as Opacus keeps several batches
        p.grad_sample = [put(values[:2]), put(values[2:])] if in_parts else put(values)
    return torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.7)


def sampling(place: Place, name: str, mode: str, selects: bool, first: int = 0) -> Any:
    params = leaves(place, (40, 7), (1030,), (), (0,), (33, 65))
    with torch.no_grad():
        params[4] = params[4].t().requires_grad_()
    opt = new(name, params, seed=3, **mode_options(place, name, mode))
    train(place.machine, opt, params, first)
    for step in range(first, 11):
        weight: Any = give_samples(place.machine, params, step)
        if step == 4:
            weight[:2] = 1
            params[1].grad_sample[1, 3] = float("nan" if opt.skip_nonfinite else 0)
        if step % 3 == 0:
            weight = place.put(weight)
        options: dict[str, Any] = {"sample_options": SAMPLES[step % 4]}
        if step != 7:
            options["sample_weight"] = weight
        if selects:
            options["where"] = selections_for(place, step, params)
        opt.step(grad_scale=0.5, zero_grad=step % 2 == 0, **options)
    give_samples(place.machine, params, 11)
    opt.step(sample_weight=torch.zeros(5))
    samples = [p.grad_sample for p in params]
    skipped = opt.skipped_steps
    return {**standing(opt, params), "samples": samples, "skipped": skipped}


@each_class_and_mode(CLASSES)
@pytest.mark.parametrize("first", [0, 1])
def test_samples(machine: Machine, name: str, mode: str, first: int) -> None:
    """In steps of which the host decides, and in those of which the GPU does."""
    assert_same_course(machine, sampling, name, mode, selects=False, first=first)


@each_class_and_mode(CLASSES)
def test_samples_and_selections(machine: Machine, name: str, mode: str) -> None:
    if MODES[mode].get("capturable"):
        pytest.skip("blocks are counted on the host")
    assert_same_course(machine, sampling, name, mode, selects=True)


@pytest.mark.parametrize("fused", [False, True])
def test_samples_and_a_scaler(machine: Machine, fused: bool) -> None:
    """Bounds are for gradients that have been unscaled."""
    assert_same_course(machine, scaled_sampling, fused)


def scaled_sampling(place: Place, fused: bool) -> Any:
    machine = place.machine
    params = leaves(place, (40, 7), (30,))
    opt = fst.Adam(params, lr=0.1, fused=fused)
    scaler = machine.scaler(place, init_scale=8.0)
    for step in range(8):
        weight = give_samples(machine, params, step)
        give(machine, params, step)
        factor = scaler.scale(place.put(torch.ones(())))
        for p in params:
            p.grad.mul_(factor)
            for part in p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]:
                part.mul_(factor)
        if step in (1, 4):
            params[1].grad[3] = float("inf")
        scaler.step(opt, sample_weight=weight, sample_options=SAMPLES[step % 4])
        scaler.update()
    return {**standing(opt, params), "scale": scaler.get_scale()}


def test_samples_on_several_devices(machine: Machine) -> None:
    """A sample is bounded by its gradients on all of them."""
    with machine.without_gpu():
        expected = machine.to_cpu(mixed_sampling(machine, [machine.cpu]))
    for mixture in ("cpu", "two_gpus"):
        places = places_of(machine, mixture)
        assert_same(machine.to_cpu(mixed_sampling(machine, places)), expected)


def mixed_sampling(machine: Machine, places: list[Place]) -> Any:
    generator = torch.Generator().manual_seed(6)
    params = [
        places[i % len(places)].put(numbers(s, torch.float32, generator)).requires_grad_()
        for i, s in enumerate([(33, 65), (1030,), (), (7,), (0,), (5, 4)])
    ]
    opt = fst.AdamW(params, lr=0.1, max_norm=0.5, skip_nonfinite=True)
    for step in range(8):
        weight = give_samples(machine, params, step)
        opt.step(sample_weight=weight, sample_options=SAMPLES[step % 4], zero_grad=True)
    return standing(opt, params)


def test_a_graph_of_samples(machine: Machine) -> None:
    """It adds up what the tensors hold when it is replayed, with the weights that it was given."""
    params, peers = leaves(machine.gpu, (40, 7)), leaves(machine.gpu, (40, 7))
    opt, peer = (fst.Adam(p, lr=0.1, capturable=True) for p in (params, peers))
    weight = give_samples(machine, params, 0)
    with machine.beside():
        opt.step(sample_weight=weight)
    graph = machine.record(lambda: opt.step(sample_weight=weight))
    memory = params[0].grad_sample
    give_samples(machine, peers, 0)
    peer.step(sample_weight=weight)
    for step in (2, 3):
        give_samples(machine, peers, step)
        memory.copy_(peers[0].grad_sample)
        graph.replay()
        peer.step(sample_weight=weight)
    machine.finish()
    assert_same(machine.to_cpu(standing(opt, params)), machine.to_cpu(standing(peer, peers)))


def test_samples_that_graphs_cannot_have(machine: Machine) -> None:
    params = leaves(machine.gpu, (40, 7))
    opt = fst.Adam(params, capturable=True)
    give_samples(machine, params, 0)
    opt.step(sample_options={})
    before = machine.to_cpu(standing(opt, params))
    for options in SAMPLES[2:]:
        with pytest.raises(RuntimeError, match="graph"), machine.capturing():
            opt.step(sample_options=options)
        assert_same(machine.to_cpu(standing(opt, params)), before)
    opt.step(sample_options=SAMPLES[3])


# ---- what fused linear layers leave --------------------------------------------------------------


def with_factors(place: Place, name: str, mode: str) -> Any:
    """Sequences, single batches and batches that have been accumulated, with and without samples;
    beside a parameter that has a gradient."""
    params = leaves(place, (40, 7), (40,), (33, 65), (9,))
    opt = new(name, params, seed=3, **mode_options(place, name, mode))
    generator = torch.Generator().manual_seed(7)
    for step in range(8):
        shape = (5, 3) if step % 2 else (5,)
        for p in params[:3]:
            passes = 2 if step == 4 else 1
            p.grad_factors = [
                fst.linear.Factors(
                    place.put(numbers((*shape, p.shape[1]), p.dtype, generator))
                    if p.ndim == 2
                    else None,
                    place.put(numbers((*shape, len(p)), p.dtype, generator)),
                    5,
                )
                for _ in range(passes)
            ]
        options: dict[str, Any] = {"sample_options": SAMPLES[step % 4]} if step in (1, 3, 6) else {}
        params[3].grad = None if options else place.put(numbers((9,), torch.float32, generator))
        opt.step(grad_scale=0.5, zero_grad=True, **options)
    return standing(opt, params)


@each_class_and_mode(CLASSES)
def test_factors_of_linear_layers(
    machine: Machine, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fst.linear, "_is_used", True)
    assert_same_course(machine, with_factors, name, mode)


# ---- several devices in one optimizer ------------------------------------------------------------


def places_of(machine: Machine, mixture: str) -> list[Place]:
    other = machine.cpu if mixture == "cpu" else machine.second_gpu()
    return [machine.gpu, other]


def mixed(machine: Machine, places: list[Place], name: str, mode: str, scaler: Any = None) -> Any:
    generator = torch.Generator().manual_seed(6)
    shapes = [(33, 65), (1030,), (), (7,), (0,), (5, 4)]
    params = [
        places[i % len(places)].put(numbers(s, torch.float32, generator)).requires_grad_()
        for i, s in enumerate(shapes)
    ]
    options = mode_options(places[0], name, mode)
    if not all(place.is_gpu for place in places):
        options.pop("capturable", None)
    opt = new(name, [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}], **options)
    for step in range(8):
        give(machine, params, step, missing=[step, 2 * step])
        if step == 4:
            params[1].grad.fill_(float("nan")) if opt.skip_nonfinite else params[0].grad.mul_(0)
        opt.step(grad_scale=0.5)
    return {**standing(opt, params), "skipped": opt.skipped_steps}


@pytest.mark.parametrize("mixture", ["cpu", "two_gpus"])
@each_class_and_mode(modes=[mode for mode in MODES if mode != "capturable"])
def test_several_devices(machine: Machine, name: str, mode: str, mixture: str) -> None:
    places = places_of(machine, mixture)
    with machine.without_gpu():
        expected = machine.to_cpu(mixed(machine, [machine.cpu], name, mode))
    result = mixed(machine, places, name, mode)
    for i, entry in enumerate(result["state"]):
        place = places[i % 2]
        for key, value in entry.items():
            is_count = key in COUNTS
            expected_place = machine.cpu if is_count and mode in HOST_COUNTS else place
            assert expected_place.has(value), (i, key)
    assert_same(machine.to_cpu(result), expected)


@pytest.mark.parametrize("mixture", ["cpu", "two_gpus"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_each_device_in_turn(machine: Machine, mixture: str, max_norm: float | None) -> None:
    """Steps that each concern one device, and are skipped there, are all counted."""

    def course(places: list[Place]) -> Any:
        params = [p for i in range(2) for p in leaves(places[i % len(places)], (33,), seed=i)]
        opt = fst.Adam(params, skip_nonfinite=True, max_norm=max_norm)
        counts = []
        for step in range(10):
            give(machine, params, step, missing=[step % 2] if step % 5 else [])
            if step in (2, 3, 5, 6, 9):
                for p in params:
                    if p.grad is not None:
                        p.grad[0] = float("nan")
            opt.step()
            if step > 5:
                counts.append(opt.skipped_steps)
        return {**standing(opt, params), "counts": counts}

    with machine.without_gpu():
        expected = machine.to_cpu(course([machine.cpu]))
    assert_same(machine.to_cpu(course(places_of(machine, mixture))), expected)


@pytest.mark.parametrize("mixture", ["cpu", "two_gpus"])
def test_skips_on_each_device_alone(machine: Machine, mixture: str) -> None:
    places = places_of(machine, mixture)
    params = [p for place in places for p in leaves(place, (33,))]
    opt = fst.Adam(params, skip_nonfinite=True)
    train(machine, opt, params, 1)
    for i in (0, 1, 1):
        give(machine, params, 1, missing=[1 - i])
        params[i].grad[0] = float("nan")
        opt.step()
    assert opt.skipped_steps == 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mixture", ["cpu", "two_gpus"])
@pytest.mark.parametrize("name", FUSED)
def test_several_devices_and_a_scaler(
    machine: Machine, name: str, mixture: str, fused: bool
) -> None:
    """What overflows on either leaves out the step on both."""

    def course(places: list[Place]) -> Any:
        params = [p for i in range(4) for p in leaves(places[i % len(places)], (33, 5), seed=i)]
        opt = new(name, params, fused=fused)
        scaler = machine.scaler(places[0], init_scale=64.0, growth_interval=3)
        for step in range(8):
            give(machine, params, step)
            scale = scaler.scale(places[0].put(torch.ones(()))).item()
            for p in params:
                p.grad.mul_(scale)
            if step in (0, 3, 5):
                params[step % 4].grad[0, 0] = float("inf")
            scaler.step(opt)
            scaler.update()
        if name not in ("SGD", "NAG"):
            assert {int(opt.state[p]["step"]) for p in params} == {5}
        return standing(opt, params)

    with machine.without_gpu():
        expected = machine.to_cpu(course([machine.cpu]))
    assert_same(machine.to_cpu(course(places_of(machine, mixture))), expected)


@pytest.mark.parametrize("mixture", ["cpu", "two_gpus"])
@pytest.mark.parametrize("mode", ["plain", "max_norm,skip_nonfinite", "fused,max_norm"])
@pytest.mark.parametrize("name", FUSED)
def test_tables_on_several_devices(machine: Machine, name: str, mode: str, mixture: str) -> None:
    """With sparse gradients and anchors, beside dense gradients."""

    def course(places: list[Place]) -> Any:
        params = [p for i in range(4) for p in leaves(places[i % len(places)], (40, 3), seed=i)]
        opt = new(name, params, **MODES[mode])
        anchor(opt, params[:3])
        for step in range(8):
            give(machine, params, step)
            give_rows(machine, params[:2], step, skipped=[step == 3, step == 5])
            if step == 6:
                (params[0].grad._values() if opt.skip_nonfinite else params[0].data).mul_(
                    float("nan") if opt.skip_nonfinite else 0
                )
            opt.step(zero_grad=step == 4)
        return {**standing(opt, params), "skipped": opt.skipped_steps}

    with machine.without_gpu():
        expected = machine.to_cpu(course([machine.cpu]))
    assert_same(machine.to_cpu(course(places_of(machine, mixture))), expected)


def test_a_failing_gradient_on_another_device_changes_nothing(machine: Machine) -> None:
    params = [*leaves(machine.cpu, (33,)), *leaves(machine.gpu, (7,)), *leaves(machine.gpu, (3,))]
    opt = fst.Adam(params)
    train(machine, opt, params, 2)
    params[2].grad = params[2].detach()
    before = machine.to_cpu(standing(opt, params))
    with pytest.raises(ValueError, match="gradient of parameter 2 shares memory"):
        opt.step()
    assert_same(machine.to_cpu(standing(opt, params)), before)


# ---- errors --------------------------------------------------------------------------------------


def misplaced_gradient(machine: Machine, params: list[Tensor]) -> None:
    """torch itself refuses p.grad = ..., but not this."""
    params[1].grad.data = machine.cpu.put(params[1].grad.data.cpu())


def misplaced_sparse_gradient(machine: Machine, params: list[Tensor]) -> None:
    gradient = params[1].grad
    params[1].grad = None
    params[1].grad = sparse_of(gradient, range(7))
    params[1].grad.data = sparse_of(machine.cpu.put(gradient.cpu()), range(7))


def row_that_is_not_there(machine: Machine, params: list[Tensor]) -> None:
    gradient = params[1].grad
    params[1].grad = None
    params[1].grad = sparse_of(gradient, [0, 1, 2, 3, 3, 7, 2])


def sparse_in_two_dimensions(machine: Machine, params: list[Tensor]) -> None:
    params[0].grad = params[0].detach().to_sparse()


def own_memory(machine: Machine, params: list[Tensor]) -> None:
    params[1].grad = params[1].detach()


BAD_GRADIENTS = [
    (misplaced_gradient, ValueError, "gradient of parameter 1 is on cpu; expected cuda:0"),
    (misplaced_sparse_gradient, ValueError, "gradient of parameter 1 is on cpu; expected cuda:0"),
    (row_that_is_not_there, IndexError, "gradient of parameter 1 has .*7"),
    (sparse_in_two_dimensions, TypeError, "gradient of parameter 0 is sparse in 2 dimensions"),
    (own_memory, ValueError, "gradient of parameter 1 .*shares memory"),
]


@pytest.mark.parametrize("mode", ["plain", "all"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "error", "message"), BAD_GRADIENTS, ids=[b[0].__name__ for b in BAD_GRADIENTS]
)
@each_class
def test_a_step_that_raises_has_changed_nothing(
    machine: Machine,
    name: str,
    spoil: Callable[..., None],
    error: type[Exception],
    message: str,
    steps_before: int,
    mode: str,
) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = new(name, params, **mode_options(place, name, mode))
        train(machine, opt, params, steps_before)
        give(machine, params, 9)
        if place.is_gpu:
            good = [p.grad.clone() for p in params]
            spoil(machine, params)
            before = machine.to_cpu(standing(opt, params))
            with pytest.raises(error, match=message):
                opt.step()
            assert_same(machine.to_cpu(standing(opt, params)), before)
            assert opt.skipped_steps == 0
            for p, gradient in zip(params, good, strict=True):
                p.grad = None
                p.grad = place.put(gradient.cpu())
        opt.step()
        return standing(opt, params)

    assert_same_course(machine, course)


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_state_on_another_device(machine: Machine, mode: str) -> None:
    """Put there behind the step's back; an entry that is replaced is moved to where it belongs."""
    params = leaves(machine.gpu, (33, 65), (7,))
    opt = fst.Adam(params, **mode_options(machine.gpu, "Adam", mode))
    train(machine, opt, params, 2)
    value = opt.state[params[1]]["exp_avg"]
    there = value.data
    value.data = machine.cpu.put(there.cpu())
    before = machine.to_cpu(standing(opt, params))
    with pytest.raises(ValueError, match="the exp_avg of parameter 1 is on cpu; expected cuda:0"):
        opt.step()
    assert_same(machine.to_cpu(standing(opt, params)), before)
    value.data = there
    opt.step()
    assert int(opt.state[params[1]]["step"]) == 3


def test_parameters_that_have_left_their_state(machine: Machine) -> None:
    """model.cpu() in the middle of a training: an error, as in torch."""
    params = leaves(machine.gpu, (33,), (7,))
    opt = fst.Adam(params)
    train(machine, opt, params, 2)
    for p in params:
        p.data, p.grad = machine.cpu.put(p.data.cpu()), None
    give(machine, params, 3)
    before = machine.to_cpu(standing(opt, params))
    with pytest.raises(ValueError, match="the exp_avg of parameter 0 is on cuda:0; expected cpu"):
        opt.step()
    assert_same(machine.to_cpu(standing(opt, params)), before)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.int32), "parameter 1 has dtype torch.int32"),
        (lambda: torch.ones(3, dtype=torch.float8_e4m3fn), "parameter 1 has dtype torch.float8"),
    ],
)
def test_parameters_that_cannot_be_updated(
    machine: Machine, parameter: Callable[[], Any], message: str
) -> None:
    params = [*leaves(machine.gpu, (4,)), machine.gpu.put(parameter())]
    opt = fst.Adam(params)
    give(machine, params[:1], 0)
    params[1].grad = params[1].clone()
    before = machine.to_cpu([p.detach() for p in params])
    with pytest.raises(TypeError, match=message):
        opt.step()
    assert torch.equal(params[0].detach().cpu(), before[0])
    assert not opt.state
    params[1].grad = None
    opt.step()


def test_meta_tensors_beside_tensors_on_the_gpu(machine: Machine) -> None:
    params = [*leaves(machine.gpu, (4,)), torch.empty(3, device="meta", requires_grad=True)]
    opt = fst.Adam(params, skip_nonfinite=True)
    give(machine, params[:1], 0)
    opt.step()
    params[1].grad = torch.empty(3, device="meta")
    before = machine.to_cpu(params[0].detach())
    with pytest.raises(
        TypeError, match=r"parameter 1 is on device 'meta'.* expected the CPU or an"
    ):
        opt.step()
    assert_same(machine.to_cpu(params[0].detach()), before)
    assert int(opt.state[params[0]]["step"]) == 1


def test_capturable_is_for_the_gpu(machine: Machine) -> None:
    on_gpu, on_cpu = leaves(machine.gpu, (4,)), leaves(machine.cpu, (4,))
    for name in CAPTURABLE:
        with pytest.raises(ValueError, match=r"capturable=True.*on the CPU"):
            new(name, on_cpu, capturable=True)
        opt = new(name, on_gpu, capturable=True)
        with pytest.raises(ValueError, match=r"capturable=True.*on the CPU"):
            opt.add_param_group({"params": on_cpu})
        assert len(opt.param_groups) == 1


SCRIPT = """
import sys, threading
import pytest, torch
import fusestep.torch as fst

if sys.argv[1] == "simulated":
    import simulated_torch
    simulation = simulated_torch.Simulation(pytest.MonkeyPatch())
    put = lambda tensor, device: simulation.put(tensor, torch.device(device))
else:
    put = lambda tensor, device: tensor.detach().clone().to(device)

"""


def assert_runs(machine: Machine, script: str, *args: str) -> None:
    """In a process of its own."""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT + script, "cuda" if machine.is_real else "simulated", *args],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (0, "")


NO_KERNELS = """
sys.modules["fusestep._cuda"] = None  # importing it fails
assert not fst._tensors.has_cuda_kernels()
for options in ({}, {"max_norm": 1.0}, {"skip_nonfinite": True}, {"fused": True}):
    w = put(torch.ones(3), "cuda:0").requires_grad_()
    w.grad = put(torch.ones(3), "cuda:0")
    opt = fst.Adam([w], **options)
    with pytest.raises(TypeError, match=r"is on device .* no CUDA kernels .*docs/gpu.md"):
        opt.step()
    assert (w == 1).all()
    assert not opt.state
    v = put(torch.ones(3), "cpu").requires_grad_()
    v.grad = put(torch.ones(3), "cpu")
    fst.Adam([v], **options).step()
    assert (v < 1).all()
"""


def test_a_build_without_kernels(machine: Machine) -> None:
    """Steps on the CPU are none of its business; on a GPU it says what is missing."""
    assert_runs(machine, NO_KERNELS)


def test_messages_about_builds_and_makers(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (p,) = leaves(machine.gpu, (4,))
    assert "memory cannot be read" in fst._tensors.refusal(p)
    with monkeypatch.context() as patch:
        patch.setattr(fst._tensors, "has_cuda_kernels", lambda: False)
        assert "docs/gpu.md" in fst._tensors.refusal(p)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert "of AMD; expected the CPU or an NVIDIA GPU" in fst._tensors.refusal(p)


def test_a_gpu_of_amd(simulated: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls its device "cuda", too. (Read as before torch 2.10, which has no table.)"""
    params = leaves(simulated.gpu, (4,))
    opt = fst.Adam(params)
    give(simulated, params, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(TypeError, match=r"parameter 0 is on device .*of AMD"):
        opt.step()
    assert not opt.state


def test_no_driver(simulated: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = leaves(simulated.gpu, (4,))
    opt = fst.Adam(params)
    give(simulated, params, 0)
    before = simulated.to_cpu(params[0].detach())
    with monkeypatch.context() as patch:
        patch.setenv("FUSESTEP_SIMULATE", "no driver")
        with pytest.raises(RuntimeError, match="no NVIDIA driver"):
            opt.step()
    assert_same(simulated.to_cpu(params[0].detach()), before)
    assert not opt.state
    opt.step()
    assert int(opt.state[params[0]]["step"]) == 1


# ---- hooks, closures, autograd -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "fused", "all"])
def test_hooks_closures_and_the_profiler(machine: Machine, mode: str) -> None:
    def course(place: Place) -> Any:
        params = leaves(place, (6, 5), (4,))
        opt = fst.Adam(params, **mode_options(place, "Adam", mode))
        seen = []
        handles = [
            opt.register_step_pre_hook(lambda *_: seen.append("pre")),
            opt.register_step_post_hook(lambda *_: seen.append("post")),
            register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        ]

        def closure() -> Any:
            seen.append("closure")
            give(place.machine, params, 1)
            return 3.5

        give(place.machine, params, 0)
        opt.step()
        with torch.no_grad():
            assert opt.step(closure) == 3.5
        for handle in handles:
            handle.remove()
        with torch.autograd.profiler.profile() as profile:
            opt.step(grad_scale=0.5, zero_grad=True)
            opt.zero_grad()
        names = {event.key for event in profile.key_averages()}
        assert {"Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"} <= names
        assert all(p.grad is None for p in params)
        return {**standing(opt, params), "seen": seen}

    assert_same_course(machine, course)


@pytest.mark.parametrize("mode", ["plain", "max_norm", "skip_nonfinite", "all"])
def test_autograd_knows_that_parameters_have_changed(machine: Machine, mode: str) -> None:
    """A graph from before the step must not be used: torch says so, rather than be wrong."""
    params = leaves(machine.gpu, (3,), (4,))
    opt = fst.Adam(params, **mode_options(machine.gpu, "Adam", mode))
    second = sum((w**3).sum() for w in params)
    sum((w * w).sum() for w in params).backward()
    gradient = params[0].grad
    versions = [p._version for p in params], gradient._version
    opt.step()
    assert [p._version for p in params] == [v + 1 for v in versions[0]]
    assert gradient._version == versions[1]
    opt.step(zero_grad=True)
    assert gradient._version == versions[1] + 1
    assert not gradient.any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_a_step_for_each_parameter_inside_backward(machine: Machine) -> None:
    """In the stream in which backward works."""
    x = machine.gpu.put(numbers((16, 40), torch.float32, torch.Generator().manual_seed(1)))
    results = []
    for in_backward in (False, True):
        params = leaves(machine.gpu, (40,), (40,), (40,))
        opts = [fst.Adam([p], lr=0.1) for p in params]

        def step(p: Tensor, params: Any = params, opts: Any = opts) -> None:
            (i,) = (i for i, q in enumerate(params) if q is p)
            opts[i].step()
            p.grad = None

        if in_backward:
            for p in params:
                p.register_post_accumulate_grad_hook(step)
        for _ in range(4):
            loss_of(params, x).backward()
            if not in_backward:
                for p in params:
                    step(p)
            assert all(p.grad is None for p in params)
        results.append(machine.to_cpu([p.detach() for p in params]))
    assert_same(results[1], results[0])


# ---- streams -------------------------------------------------------------------------------------


@each_class_and_mode(["SGD", "Adam"])
def test_a_step_is_in_order_in_its_stream(real: Machine, name: str, mode: str) -> None:
    """What comes before it is waited for; what comes after it waits."""

    def course(place: Place) -> Any:
        params = leaves(place, (33, 65), (7,))
        opt = new(name, params, **mode_options(place, name, mode))
        train(real, opt, params, 2)
        fresh = []
        for step in range(3):
            give(real, params, 10 + step)
            fresh.append([p.grad for p in params])
        give(real, params, 2)
        seen = []
        if place.is_gpu:
            torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream) if place.is_gpu else nullcontext():
            for gradients in fresh:
                if place.is_gpu:
                    torch.cuda._sleep(SLEEP // 10)
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad.copy_(gradient)
                opt.step()
                seen.append([p.detach().clone() for p in params])
                for p in params:
                    p.grad.fill_(float("inf"))  # too late to matter
        stream.synchronize()
        return {**standing(opt, params), "seen": seen}

    assert_same_course(real, course)


@each_mode
def test_the_default_stream_is_not_used(real: Machine, mode: str) -> None:
    """A step in another stream is through while the default one still sleeps."""
    params = leaves(real.gpu, (33, 65), (7,))
    opt = fst.Adam(params, **mode_options(real.gpu, "Adam", mode))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(real, opt, params, 2)
        torch.cuda.synchronize()
    torch.cuda._sleep(2 * SLEEP)
    asleep = torch.cuda.Event()
    asleep.record()
    with torch.cuda.stream(stream):
        opt.step()
        opt.step(zero_grad=True)
    stream.synchronize()
    still = not asleep.query()
    torch.cuda.synchronize()
    assert still
    assert int(opt.state[params[0]]["step"]) == 4


def test_two_optimizers_in_two_streams(real: Machine) -> None:
    def course(place: Place) -> Any:
        lists = [leaves(place, (33, 65), (7,), seed=i) for i in range(2)]
        opts = [fst.Adam(lists[0], max_norm=0.5), fst.NAdam(lists[1], skip_nonfinite=True)]
        streams = [torch.cuda.Stream() for _ in opts] if place.is_gpu else [None, None]
        for i, params in enumerate(lists):
            give(real, params, i)
        if place.is_gpu:
            torch.cuda.synchronize()
        for step in range(20):
            for opt, stream in zip(opts, streams, strict=True):
                with torch.cuda.stream(stream) if stream else nullcontext():
                    if stream and step % 7 == 0:
                        torch.cuda._sleep(SLEEP // 40)
                    opt.step()
        if place.is_gpu:
            torch.cuda.synchronize()
        return [standing(opt, params) for opt, params in zip(opts, lists, strict=True)]

    assert_same_course(real, course)


def test_counts_are_read_in_order(real: Machine) -> None:
    """After steps in one stream, seen from another."""
    params = leaves(real.gpu, (33,))
    opt = fst.Adam(params, skip_nonfinite=True)
    train(real, opt, params, 2)
    params[0].grad.fill_(float("nan"))
    with beside():
        opt.step()
        torch.cuda._sleep(SLEEP)
        opt.step()
    assert opt.skipped_steps == 2
    assert int(opt.state[params[0]]["step"]) == 2


# ---- threads, forks, lifetimes -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_two_optimizers_in_two_threads(machine: Machine, mode: str) -> None:
    def course(place: Place) -> Any:
        lists = [leaves(place, (33, 65), (7,), seed=i) for i in range(2)]
        opts = [
            new(name, params, **mode_options(place, name, mode))
            for name, params in zip(("Adam", "NAdam"), lists, strict=True)
        ]
        for i, params in enumerate(lists):
            give(machine, params, i)

        def steps(i: int) -> None:
            stream = torch.cuda.Stream() if place.is_gpu and machine.is_real else None
            if stream:
                stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream) if stream else nullcontext():
                for _ in range(50):
                    opts[i].step()

        in_threads(2, steps)
        machine.finish()
        return [standing(opt, params) for opt, params in zip(opts, lists, strict=True)]

    assert_same_course(machine, course)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_two_threads_share_an_optimizer(machine: Machine, skip_nonfinite: bool) -> None:
    params = leaves(machine.gpu, (300, 30), (4,))
    opt = fst.SGD(params, lr=1.0, skip_nonfinite=skip_nonfinite)
    for p in params:
        p.data.zero_()
        p.grad = torch.ones_like(p)
    in_threads(4, lambda _: [opt.step() for _ in range(25)])
    for p in params:
        assert (p == -100).all()


REPLACING = """
sys.setswitchinterval(1e-5)
if sys.argv[2] == "norm":  # for which the host waits, where the CPU takes part
    params = [put(torch.zeros(100_000), "cuda:0"), put(torch.zeros(50), "cpu")]
    options = {"max_norm": 1.0}
else:  # progress, which is fetched where a parameter has been given other memory
    params = [put(torch.zeros(50), "cuda:0") for _ in range(300)]
    options = {"fused": True}
for p in params:
    p.requires_grad_().grad = put(torch.ones(p.shape), "cpu" if p is params[-1] else "cuda:0")
if sys.argv[2] != "norm":
    params[-1].grad = put(torch.ones(50), "cuda:0")
opt = fst.Adam(params, **options)
opt.step()
stop = threading.Event()

def replace():
    while not stop.is_set():
        opt.param_groups[0]["params"] = list(params)
        [["x"] * len(params) for _ in range(9)]  # where the old list was

thread = threading.Thread(target=replace)
thread.start()
taken = 1
try:
    for _ in range(250):
        if sys.argv[2] != "norm":
            params[0].data = put(params[0].data, "cuda:0")
        before = params[0]._version
        try:
            opt.step()
        except RuntimeError as error:
            if "changed during its own step" not in str(error):
                raise
            continue
        taken += 1
        assert params[0]._version == before + 1
finally:
    stop.set()
    thread.join()
assert {int(opt.state[p]["step"]) for p in params} == {taken}
"""


@pytest.mark.parametrize("what", ["norm", "progress"])
def test_another_thread_replaces_things(machine: Machine, what: str) -> None:
    """While the host waits for the GPU. No step that is lost or made up: an error at worst."""
    assert_runs(machine, REPLACING, what)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_step_on_the_cpu(machine: Machine) -> None:
    """A data-loader's worker: the GPU is its parent's, but the CPU is its own."""
    params, others = leaves(machine.gpu, (33, 65)), leaves(machine.cpu, (33, 65))
    opt = fst.Adam(params, skip_nonfinite=True)
    train(machine, opt, params, 2)
    with machine.without_gpu():
        other = fst.Adam(others)
        train(machine, other, others, 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with machine.without_gpu():
                train(machine, other, others, 2)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    train(machine, opt, params, 2)
    assert int(opt.state[params[0]]["step"]) == 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_step(simulated: Machine) -> None:
    params = leaves(simulated.gpu, (33, 65))
    opt = fst.Adam(params, skip_nonfinite=True)
    train(simulated, opt, params, 2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            opt.step()
            status = int(int(opt.state[params[0]]["step"]) != 3)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_nothing_stays_behind(machine: Machine, mode: str) -> None:
    params = leaves(machine.gpu, (50, 50))
    opt = fst.Adam(params, **mode_options(machine.gpu, "Adam", mode))
    train(machine, opt, params, 2)
    gone = weakref.ref(opt), weakref.ref(params[0])
    gc.disable()  # by counting references alone: there must be no cycle
    try:
        del opt, params
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_steps_allocate_nothing(real: Machine) -> None:
    """Of torch's memory, nor of the GPU's."""
    params = leaves(real.gpu, (333, 65), (7,))
    opts = [
        fst.Adam(params, max_norm=0.5, skip_nonfinite=True),
        fst.SGD(params, lr=0.1, momentum=0.9),
    ]
    for opt in opts:
        train(real, opt, params, 2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(50):
        for opt in opts:
            opt.step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]) == before


def test_optimizers_give_their_memory_back(real: Machine) -> None:
    params = [torch.ones(3_000_000, device="cuda", requires_grad=True)]
    params[0].grad = torch.ones(3_000_000, device="cuda")

    def once() -> None:
        opt = fst.Adam(params, max_norm=0.5, skip_nonfinite=True)
        opt.step()
        opt.step()

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(300):  # of 24 KB of sums each
        once()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] > before - 4 * 2**20


@pytest.mark.parametrize("strided", [False, True])
def test_one_parameter_beyond_31_bits(real: Machine, strided: bool) -> None:
    """Every element must move, and only once."""
    size = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 12 * size:
        pytest.skip("needs 26 GB of the GPU's memory")
    ends = torch.tensor([0, 2**31 - 1, 2**31, size - 1], device="cuda")
    w, g = (torch.zeros(size * (1 + strided), dtype=torch.float16, device="cuda") for _ in "wg")
    w, g = w[:: 1 + strided], g[:: 1 + strided]
    g.fill_(1)
    g[ends] = torch.tensor([2, 3, 4, 5], dtype=torch.float16, device="cuda")
    w.grad = g
    fst.SGD([w], lr=1.0, skip_nonfinite=True).step()
    assert w[ends].tolist() == [-2, -3, -4, -5]
    w[ends] = -1
    assert all((part == -1).all() for part in w.split(2**28))
    del w, g
    torch.cuda.empty_cache()


# ---- among what people train with ----------------------------------------------------------------


def network(machine: Machine) -> Any:
    torch.manual_seed(1)
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
    return torch.nn.Sequential(*layers).double().to("cuda" if machine.is_real else "cpu")


def learn(model: Any, opt: Any, step: int, max_norm: float | None = None) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    x = x.to(next(model.parameters()).device)
    opt.zero_grad()
    (model(x) - x.sum(1, keepdim=True).sin() - 2).square().mean().backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    opt.step()


@pytest.fixture
def group(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process."""
    dist = pytest.importorskip("torch.distributed")
    backend = "nccl" if machine.is_real else "gloo"
    if not (dist.is_available() and dist.is_backend_available(backend)):
        pytest.skip(f"this torch is built without {backend}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    options: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if machine.is_real else {}
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group(backend, store=store, rank=0, world_size=1, **options)
        try:
            yield
        finally:
            dist.destroy_process_group()


def wrapped(machine: Machine, wrapper: str, model: Any) -> Any:
    if wrapper == "DDP":
        ids = [0] if machine.is_real else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    if machine.is_real:
        return fsdp.fully_shard(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return fsdp.fully_shard(model, mesh=mesh)


DISTRIBUTED: list[dict[str, Any]] = [
    {},
    {"max_norm": 0.02},
    {"skip_nonfinite": True},
    {"skip_nonfinite": True, "max_norm": 0.02},
    {"fused": True, "max_norm": 0.02},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", DISTRIBUTED, ids=str)
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_distributed_training(
    machine: Machine, group: None, name: str, wrapper: str, options: dict[str, Any]
) -> None:
    """Shards on the GPU: the norm goes over all processes, here one, and back."""
    model, other = wrapped(machine, wrapper, network(machine)), network(machine)
    opt, peer = new(name, model.parameters(), **options), theirs(name, other.parameters())
    for step in range(8):
        learn(model, opt, step)
        if opt.skip_nonfinite and step in (0, 3):
            parameter = next(iter(model.parameters()))
            gradient = getattr(parameter.grad, "_local_tensor", parameter.grad)
            gradient.view(-1)[0] = float("nan")
            opt.step()
        learn(other, peer, step, options.get("max_norm"))
    assert opt.skipped_steps == 2 * opt.skip_nonfinite
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(whole, q, rtol=0, atol=1e-10)
    on_gpu = opt.skip_nonfinite or "fused" in options
    assert all((machine.gpu if on_gpu else machine.cpu).has(s) for s in scalars_of(opt))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("fused", [False, True])
def test_distributed_training_and_a_scaler(
    machine: Machine, group: None, wrapper: str, fused: bool
) -> None:
    model, other = wrapped(machine, wrapper, network(machine)), network(machine)
    opt, peer = fst.Adam(model.parameters(), fused=fused), theirs("Adam", other.parameters())
    for group_ in peer.param_groups:
        group_["lr"] = 1e-3
    scaler = machine.scaler(machine.gpu, init_scale=8.0, growth_interval=2)
    for step in range(6):
        learn(other, peer, step)
        opt.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = x.to(next(other.parameters()).device)
        loss = (model(x) - x.sum(1, keepdim=True).sin() - 2).square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(whole, q, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True, "max_norm": 1.0}])
def test_compiling_the_training_step(
    real: Machine, mode: str | None, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    models = [network(real) for _ in range(3)]
    opts = [fst.Adam(model.parameters(), lr=0.01, **options) for model in models]
    compiled = torch.compile(models[1], mode=mode)
    whole = torch.compile(learn, mode=mode)
    for step in range(6):
        learn(models[0], opts[0], step)
        learn(compiled, opts[1], step)
        whole(models[2], opts[2], step)
    for model in models[1:]:
        for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    assert {int(opt.state[next(iter(opt.state))]["step"]) for opt in opts} == {6}
    torch._dynamo.reset()
