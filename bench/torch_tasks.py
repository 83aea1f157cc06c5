"""What is measured of ``fusestep.torch``: steps, and whole iterations of which a step is a part.

A task is done by `STEPPERS`: our optimizer and each implementation of torch's, all as constructed
but for the learning rate, 1e-3 (and SGD's momentum, 0.9). Iterations are also done with no step at
all: the time that an optimizer which costs nothing would need. That all steppers compute the same
is tested (`test_torch.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

import fusestep.torch
from laboratory import _available
from memory import gradients
from peers import Run
from shapes import WORKLOADS, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

OURS = "fusestep"
NO_STEP = "no step"

# What chooses torch's implementation; none of it for torch's own choice.
_THEIRS: dict[str, dict[str, bool]] = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch": {},
}
STEPPERS = (OURS, *_THEIRS, NO_STEP)

# Name of the class, and what it does not have by default.
_RULES: dict[str, tuple[str, dict[str, float]]] = {
    "adam": ("Adam", {}),
    "sgd": ("SGD", {"momentum": 0.9}),
    "adamw": ("AdamW", {}),
    "nadam": ("NAdam", {}),
    "adagrad": ("Adagrad", {}),
}

_LR = 1e-3
_MAX_NORM = 1.0  # the gradients' is 7 and 10: they are clipped
_ARRAYS = 8  # of the parameters' size: a parameter, its state, and what foreach makes for a while


class Task(ABC):
    """Something an optimizer does, alone or as a part.

    Parameters
    ----------
    name
        Stands in test ids, in the results and in the tables.
    rule
        Which optimizer.
    full
        Whether it is done with ``--full`` only.
    """

    elements: int
    tensors: int
    is_iteration = False
    """Whether there is more to it than the step."""

    def __init__(self, name: str, rule: str = "adam", *, full: bool = False) -> None:
        self.name, self.rule, self.full = name, rule, full

    def why_not(self, stepper: str) -> str | None:
        """Return None if a stepper can do it, else the reason."""
        if stepper == NO_STEP and not self.is_iteration:
            return "there is nothing but the step"
        if stepper == "torch fused" and self.rule == "nadam":
            return "torch has no fused NAdam"
        needed, available = 4 * _ARRAYS * self.elements, _available()
        if available is not None and needed > available:
            return f"not enough memory: needs {needed / 1e9:.1f} of {available / 1e9:.1f} GB"
        return None

    @abstractmethod
    def start(self, stepper: str) -> Run:
        """Return what is to be timed, with parameters of its own."""

    def before(self) -> Callable[[], object] | None:
        """Return what is to be done, untimed, before every call; usually nothing."""
        return None

    def _optimizer(self, stepper: str, params: Sequence[Tensor], **extras: Any) -> Any:
        name, options = _RULES[self.rule]
        if stepper in (OURS, NO_STEP):
            return getattr(fusestep.torch, name)(params, lr=_LR, **options, **extras)
        return getattr(torch.optim, name)(params, lr=_LR, **options, **_THEIRS[stepper])


@lru_cache(maxsize=1)
def gradients_of(workload: Workload) -> list[Tensor]:
    """Return gradients which all steppers share, kept until others are asked for."""
    return [torch.from_numpy(gradient) for gradient in gradients(workload)]


class _OverTensors(Task):
    """A task over given shapes and gradients that stay; parameters start as copies of these."""

    def __init__(self, name: str, workload: Workload, rule: str = "adam", **options: bool) -> None:
        super().__init__(f"{name} {workload.name}".strip(), rule, **options)
        self._workload = workload
        self.elements, self.tensors = workload.elements, len(workload.shapes)

    def _parameters(self) -> list[torch.nn.Parameter]:
        grads = gradients_of(self._workload)
        params = [torch.nn.Parameter(gradient.clone()) for gradient in grads]
        for param, gradient in zip(params, grads, strict=True):
            param.grad = gradient
        return params


class Step(_OverTensors):
    """The step alone."""

    def start(self, stepper: str) -> Run:
        """As the base class says."""
        params = self._parameters()
        return Run(self._optimizer(stepper, params).step, lambda: _values(params))


class StepAfterMatmul(Step):
    """The step alone, each directly after a matmul, whose threads are still awake then."""

    _SIZE = 700

    def before(self) -> Callable[[], object]:
        """As the base class says."""
        a, b = torch.randn(2, self._SIZE, self._SIZE)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)


class ClippedStep(_OverTensors):
    """The step with the norm of all gradients clipped: our `max_norm`, torch's function before."""

    def start(self, stepper: str) -> Run:
        """As the base class says."""
        params = self._parameters()
        if stepper == OURS:
            step = self._optimizer(stepper, params, max_norm=_MAX_NORM).step
            return Run(step, lambda: _values(params))
        for param in params:
            param.grad = param.detach().clone()  # not everybody's: torch clips in place
        optimizer = self._optimizer(stepper, params)
        foreach = _THEIRS[stepper].get("foreach")

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=foreach)
            optimizer.step()

        return Run(clip_and_step, lambda: _values(params))


class ScheduledStep(_OverTensors):
    """The step, and that of a scheduler, which changes the learning rate and the betas."""

    is_iteration = True
    _STEPS = 10_000_000  # more than anybody does

    def start(self, stepper: str) -> Run:
        """As the base class says."""
        params = self._parameters()
        optimizer = self._optimizer(stepper, params)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=self._STEPS)
        if stepper == NO_STEP:
            optimizer.step()  # a scheduler warns without
            return Run(scheduler.step, lambda: _values(params))

        def step_both() -> None:
            optimizer.step()
            scheduler.step()

        return Run(step_both, lambda: _values(params))


class Training(Task):
    """A training step of a perceptron: forward, cross-entropy, backward, step, zero_grad.

    Inputs and labels are random, and take turns in cycles of different length: there is nothing to
    be learned, so that the gradients do not vanish, however many steps there are.

    Parameters
    ----------
    name, full
        As in `Task`.
    sizes
        Of its layers: inputs, hidden, outputs.
    batch
        Samples in a step.
    cycles
        Different batches of inputs, and different ones of labels; without a common factor.
    """

    is_iteration = True

    def __init__(
        self, name: str, sizes: tuple[int, int, int], batch: int, cycles: tuple[int, int]
    ) -> None:
        super().__init__(name)
        self._sizes, self._batch, self._cycles = sizes, batch, cycles
        inputs, hidden, outputs = sizes
        self.elements, self.tensors = (inputs + 1) * hidden + (hidden + 1) * outputs, 4
        assert math.gcd(*cycles) == 1

    def start(self, stepper: str) -> Run:
        """As the base class says."""
        inputs, hidden, outputs = self._sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs)
            )
            xs = cycle(torch.randn(self._cycles[0], self._batch, inputs).unbind())
            ys = cycle(torch.randint(outputs, (self._cycles[1], self._batch)).unbind())
        params = list(model.parameters())
        optimizer = self._optimizer(stepper, params)

        def train() -> None:
            cross_entropy(model(next(xs)), next(ys)).backward()
            optimizer.step()
            optimizer.zero_grad()

        def train_nothing() -> None:
            cross_entropy(model(next(xs)), next(ys)).backward()
            optimizer.zero_grad()

        return Run(train_nothing if stepper == NO_STEP else train, lambda: _values(params))


def _values(params: Sequence[Tensor]) -> list[Any]:
    return [param.detach().numpy() for param in params]


def _all() -> list[Task]:
    one, many, million = WORKLOADS["1k"], WORKLOADS["500x1k"], WORKLOADS["1M"]
    three_million = Workload("3M", ((3_000_000,),))
    tasks: list[Task] = [Step("adam", workload) for workload in (one, many, million)]
    tasks += [Step("adam", WORKLOADS[name], full=True) for name in ("resnet18", "gpt2")]
    tasks += [
        Step(rule, workload, rule) for rule in _RULES if rule != "adam" for workload in (one, many)
    ]
    tasks.append(Training("online mlp 64-32-10", (64, 32, 10), batch=1, cycles=(997, 1009)))
    tasks.append(Training("mlp 1024-2048-1024", (1024, 2048, 1024), batch=256, cycles=(7, 11)))
    tasks += [
        StepAfterMatmul("matmul, adam", workload) for workload in (million, three_million, many)
    ]
    tasks += [ClippedStep("clipped adam", workload) for workload in (many, million)]
    tasks.append(ScheduledStep("scheduled adam", one))
    return tasks


TASKS = {task.name: task for task in _all()}
