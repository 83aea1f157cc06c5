"""What is measured on a GPU, and who does it.

A case is done by several peers, from equal parameters and with equal gradients. Everybody has its
default settings but for the learning rate, 1e-3, and what the case is about. That all peers of a
case compute the same is checked before they are timed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import fusestep as fs
import fusestep.torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from gpu_devices import Device
    from shapes import Workload

OURS = "fusestep"
COPY = "copy"
FUSED, FOREACH, PLAIN = "torch fused", "torch foreach", "plain CuPy"

# What chooses torch's implementation.
_THEIRS: dict[str, dict[str, bool]] = {FUSED: {"fused": True}, FOREACH: {"foreach": True}}

_LR = 1e-3
_MAX_NORM = 1.0  # the gradients' is 10 and more: they are clipped
_LOSS_SCALE = 1024.0
_SAMPLES = 8

_ADAM_BYTES = 28  # an element: parameter and two states read and written, gradient read
_NORM_BYTES = 4  # the gradient read once more

_COPIED = 4 * 10**9  # bytes
_MODIFIED = (16 * 10**6, 256 * 10**6, 10**9, _COPIED)
_REHEARSAL_DIVISOR = 1_000  # of these


class Run(NamedTuple):
    """A peer that is ready to go.

    Parameters
    ----------
    step
        What is timed.
    nbytes
        Bytes which that has to read and write; 0 where it would tell nothing.
    values
        Returns the parameters; None where nothing is computed.
    """

    step: Callable[[], object]
    nbytes: int
    values: Callable[[], list[Tensor]] | None


class Case(ABC):
    """Some work that several peers do.

    Parameters
    ----------
    key
        Its name in the results.
    workload
        What is stepped.
    peers
        Who does it.
    clock
        Which of the times (`gpu_timing.py`) counts.
    """

    dtype = torch.float32
    tolerance = 1e-3
    """How much peers may differ, as a part of what the parameters have moved."""

    def __init__(
        self, key: str, workload: Workload, peers: Sequence[str], clock: str = "wall"
    ) -> None:
        self.key, self.workload, self.peers, self.clock = key, workload, tuple(peers), clock

    @property
    def bytes_per_element(self) -> int:
        """Bytes that our step moves for each element; 0 where it would tell nothing."""
        return _ADAM_BYTES if self.workload.elements >= 10**7 else 0

    def why_not(self, device: Device) -> str | None:  # noqa: ARG002
        """Return None if it can be done here, else the reason."""
        return None

    @abstractmethod
    def start(self, peer: str, device: Device) -> Run:
        """Return a peer that is ready, with parameters of its own."""

    def beginning(self, device: Device) -> list[Tensor]:
        """Return what all parameters are at the start."""
        return gradients(device, self.workload, self.dtype)

    def _parameters(
        self, device: Device, *, own_gradients: bool = False, scale: float = 1.0
    ) -> list[torch.nn.Parameter]:
        """Return parameters with gradients, which are everybody's unless somebody changes them."""
        shared = gradients(device, self.workload, self.dtype)
        params = [torch.nn.Parameter(gradient.clone()) for gradient in shared]
        for param, gradient in zip(params, shared, strict=True):
            param.grad = gradient * scale if own_gradients else gradient
        return params

    def _run(self, step: Callable[[], object], params: Sequence[Tensor]) -> Run:
        nbytes = self.bytes_per_element * self.workload.elements
        return Run(step, nbytes, lambda: [param.detach() for param in params])


@lru_cache(maxsize=1)
def gradients(device: Device, workload: Workload, dtype: torch.dtype) -> list[Tensor]:
    """Return the gradients all peers share, standard normal times 0.01; the last ones are kept."""
    generator = torch.Generator(device.name).manual_seed(0)
    return [
        torch.empty(shape, dtype=dtype, device=device.torch).normal_(0, 0.01, generator=generator)
        for shape in workload.shapes
    ]


@lru_cache(maxsize=1)
def samples(device: Device, workload: Workload, dtype: torch.dtype) -> list[Tensor]:
    """Return the gradients of samples that all peers share: more and more of those of all."""
    shared = gradients(device, workload, dtype)
    return [torch.stack([g * (k + 1) for k in range(_SAMPLES)]) for g in shared]


def forget() -> None:
    """Give back what was kept: gigabytes, before the next ones."""
    gradients.cache_clear()
    samples.cache_clear()
    gc.collect()
    if "cupy" in sys.modules:  # whose memory is not torch's
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def difference(device: Device, case: Case, ours: Run, theirs: Run) -> float | None:
    """Return how far apart two peers are, as a part of the way from the start."""
    if ours.values is None or theirs.values is None:
        return None
    mine, others = ours.values(), theirs.values()
    way = _distance(mine, case.beginning(device))
    return _distance(mine, others) / way if way > 0 else float("inf")


def _distance(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(x.float() - y.float()) for x, y in zip(xs, ys, strict=True)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def adam(peer: str, params: Sequence[Tensor], **options: Any) -> Any:
    """Return a peer's Adam; `options` are for all of them."""
    if peer == OURS:
        return fusestep.torch.Adam(params, lr=_LR, **options)
    return torch.optim.Adam(params, lr=_LR, **_THEIRS[peer], **options)


# ---- the memory ----------------------------------------------------------------------------------


class Bandwidth(Case):
    """What the memory can do: copies, and arrays that are read and written in place."""

    def __init__(self, workload: Workload, *, is_rehearsal: bool) -> None:
        divisor = _REHEARSAL_DIVISOR if is_rehearsal else 1
        copied = min(_COPIED // divisor, 4 * workload.elements)
        self._actions = {COPY: (torch_copy, copied)}
        for nbytes in [nbytes // divisor for nbytes in _MODIFIED]:
            if nbytes <= copied:
                self._actions[f"read-modify-write, {_size(nbytes)}"] = (torch_modify, nbytes)
        super().__init__("bandwidth", workload, tuple(self._actions), clock="device")

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        action, nbytes = self._actions[peer]
        return action(device, nbytes)


def torch_copy(device: Device, nbytes: int) -> Run:
    """Return a run that copies so many bytes; each counts twice, read and written."""
    source = torch.ones(nbytes // 4, device=device.torch)
    target = torch.empty_like(source)
    return Run(lambda: target.copy_(source), 2 * 4 * source.numel(), None)


def torch_modify(device: Device, nbytes: int) -> Run:
    """Return a run that reads and writes so many bytes in place."""
    array = torch.ones(nbytes // 4, device=device.torch)
    return Run(lambda: array.mul_(1.0), 2 * 4 * array.numel(), None)


def _size(nbytes: int) -> str:
    if nbytes >= 10**9:
        return f"{nbytes / 10**9:g} GB"
    return f"{nbytes / 10**6:g} MB" if nbytes >= 10**6 else f"{nbytes / 10**3:g} kB"


# ---- the step ------------------------------------------------------------------------------------


class Step(Case):
    """The step alone; the gradients stay."""

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        params = self._parameters(device)
        return self._run(adam(peer, params).step, params)


class LargeStep(Step):
    """The step on one tensor at the limit of the memory, beside a copy in the same rounds."""

    bytes_per_element = _ADAM_BYTES  # however small it has become

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        if peer == COPY:
            return torch_copy(device, min(_COPIED, 4 * self.workload.elements))
        return super().start(peer, device)


class LowPrecisionStep(Step):
    """bfloat16 parameters and gradients. Our state is float32, torch's is bfloat16."""

    dtype = torch.bfloat16
    tolerance = 0.1  # what bfloat16 state loses

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        run = super().start(peer, device)
        return run._replace(nbytes=(22 if peer == OURS else 14) * self.workload.elements)


class CapturedStep(Step):
    """The step captured in a CUDA graph, and replayed."""

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        params = self._parameters(device)
        optimizer = adam(peer, params, capturable=not device.is_rehearsal)
        return self._run(device.captured(optimizer.step), params)


class ClippedStep(Case):
    """Gradients of a scaled loss: unscaled, clipped, stepped; ours in one call.

    torch does that in place. So that it has the same to do each time, its gradients are unscaled
    already, and multiplied by 1.
    """

    @property
    def bytes_per_element(self) -> int:
        """As the base class says."""
        return _ADAM_BYTES + _NORM_BYTES if self.workload.elements >= 10**7 else 0

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        if peer == OURS:
            return self._start_ours(device)
        params = self._parameters(device, own_gradients=True)
        grads = [param.grad for param in params]
        optimizer = adam(peer, params)

        def unscale_clip_and_step() -> None:
            torch._foreach_mul_(grads, 1.0)
            torch.nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=True)
            optimizer.step()

        return self._run(unscale_clip_and_step, params)

    def _start_ours(self, device: Device) -> Run:
        params = self._parameters(device, own_gradients=True, scale=_LOSS_SCALE)
        step = adam(OURS, params, max_norm=_MAX_NORM).step
        return self._run(lambda: step(grad_scale=1 / _LOSS_SCALE), params)


class ScaledStep(ClippedStep):
    """The same through ``torch.amp.GradScaler``, with its look for infinities."""

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        if peer == OURS:
            params = self._parameters(device)
            optimizer = adam(OURS, params, max_norm=_MAX_NORM, fused=True)
        else:
            params = self._parameters(device, own_gradients=True)
            optimizer = adam(peer, params)
        # A scale of 1 that never grows: torch's gradients, unscaled in place, stay what they are.
        scaler = torch.amp.GradScaler(device.name, init_scale=1.0, growth_interval=10**9)
        scaler.scale(torch.zeros((), device=device.torch))  # it makes its tensors now

        def step() -> None:
            if peer != OURS:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=True)
            scaler.step(optimizer)
            scaler.update()

        return self._run(step, params)


class WeighedStep(Case):
    """Gradients of samples, weighed and averaged; ours in one call."""

    @property
    def bytes_per_element(self) -> int:
        """As the base class says; our sum is written, too."""
        return _ADAM_BYTES + 4 * (_SAMPLES + 1) if self.workload.elements >= 10**7 else 0

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        params = self._parameters(device)
        values = samples(device, self.workload, self.dtype)
        weight = [1 / (k + 1) for k in range(_SAMPLES)]
        optimizer = adam(peer, params)
        if peer == OURS:
            for param, of_samples in zip(params, values, strict=True):
                param.grad_sample = of_samples  # type: ignore[attr-defined]
            return self._run(lambda: optimizer.step(sample_weight=weight), params)
        shares = torch.tensor(weight, device=device.torch) / _SAMPLES

        def weigh_and_step() -> None:
            for param, of_samples in zip(params, values, strict=True):
                param.grad = torch.tensordot(shares, of_samples, 1)
            optimizer.step()

        return self._run(weigh_and_step, params)


# ---- CuPy ----------------------------------------------------------------------------------------


class ArrayStep(Case):
    """CuPy arrays (NumPy's in a rehearsal): `fusestep.Adam`, and the formula as one writes it."""

    def why_not(self, device: Device) -> str | None:
        """As the base class says."""
        found = importlib.util.find_spec(_library(device)) is not None
        return None if found else f"{_library(device)} is not installed"

    def start(self, peer: str, device: Device) -> Run:
        """As the base class says."""
        xp = importlib.import_module(_library(device))
        grads = [xp.from_dlpack(grad) for grad in gradients(device, self.workload, self.dtype)]
        params = [xp.array(grad) for grad in grads]
        if peer == OURS:
            optimizer = fs.Adam(params, lr=_LR)
            run = self._run(lambda: optimizer.step(grads), [])
        else:
            run = self._run(_plain_adam(xp, params, grads), [])._replace(nbytes=0)
        return run._replace(values=lambda: [torch.from_dlpack(param) for param in params])


def _library(device: Device) -> str:
    return "numpy" if device.is_rehearsal else "cupy"


def _plain_adam(xp: Any, params: Sequence[Any], grads: Sequence[Any]) -> Callable[[], None]:
    """Return Adam's step as the paper prints it (Kingma & Ba 2015, Algorithm 1)."""
    first = [xp.zeros_like(param) for param in params]
    second = [xp.zeros_like(param) for param in params]
    beta1, beta2, epsilon, steps = 0.9, 0.999, 1e-8, 0

    def step() -> None:
        nonlocal steps
        steps += 1
        for param, grad, m, v in zip(params, grads, first, second, strict=True):
            m *= beta1
            m += (1 - beta1) * grad
            v *= beta2
            v += (1 - beta2) * grad * grad
            unbiased, root = m / (1 - beta1**steps), xp.sqrt(v / (1 - beta2**steps))
            param -= _LR * unbiased / (root + epsilon)

    return step


def all_cases(workloads: dict[str, Workload], *, is_rehearsal: bool) -> list[Case]:
    """Return everything that is measured, the memory first."""
    theirs = (OURS, FUSED, FOREACH)
    cases: list[Case] = [Bandwidth(workloads["large"], is_rehearsal=is_rehearsal)]
    cases.append(LargeStep("adam large", workloads["large"], (OURS, FUSED, COPY), "device"))
    lists = ("1 x 1k", "100 x 1k", "500 x 1k", "1000 x 1k", "gpt2", "resnet50")
    cases += [Step(f"adam {name}", workloads[name], theirs) for name in lists]
    for name in ("gpt2", "1000 x 1k"):
        cases.append(ClippedStep(f"clip {name}", workloads[name], theirs))
        cases.append(ScaledStep(f"scaler {name}", workloads[name], (OURS, FUSED)))
    cases.append(LowPrecisionStep("bfloat16 gpt2", workloads["gpt2"], (OURS, FUSED), "device"))
    cases.append(WeighedStep("samples gpt2", workloads["gpt2"], (OURS, FUSED)))
    for name in ("1 x 1k", "1000 x 1k"):
        cases.append(CapturedStep(f"graph {name}", workloads[name], (OURS, FUSED)))
    for name in ("1 x 1k", "100M"):
        cases.append(ArrayStep(f"cupy {name}", workloads[name], (OURS, PLAIN)))
    return cases
