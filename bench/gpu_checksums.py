"""Whether the GPU computes the CPU's bits: ``python bench/gpu_checksums.py``.

Takes 20 steps with every class of ``fusestep.torch``, in several settings, on the CPU and on the
GPU, and compares the SHA-256 of all parameters and all state. `tests/cpp/checksums.txt` holds the
same for the kernels by themselves. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import fusestep.torch as fst

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_STEPS = 20
# Around the sizes of vectors and tiles, and with several axes; then one of many tiles.
_SHAPES = ((), (0,), (1,), (1000,), (1025,), (64, 33), (3, 5, 7))
_MANY_TILES = 65_537  # elements
_MANY_GROUPS = 1_100_001  # so many tiles that their sums are summed in several groups
_TRANSPOSED = 5  # whose gradient has other strides
_NOT_FINITE_AT = (7, 3)  # step and gradient with a NaN, where such steps are left out
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Setting:
    """How an optimizer is used.

    Parameters
    ----------
    rule
        Name of the class.
    options
        For its constructor.
    on_gpu
        More of them, on a GPU only.
    step
        For every step.
    """

    rule: str
    options: dict[str, Any] = field(default_factory=dict)
    on_gpu: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = {**self.options, **self.on_gpu, **self.step}
        return " ".join([self.rule, *(f"{name}={value}" for name, value in parts.items())])


def settings() -> Iterator[Setting]:
    """Yield what is compared."""
    for rule in ("SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad"):
        yield Setting(rule)
        yield Setting(rule, {"weight_decay": 0.1, "maximize": True})
        yield Setting(rule, {"max_norm": 1.0}, step={"grad_scale": 1 / 64})
        yield Setting(rule, {"skip_nonfinite": True})
        yield Setting(rule, {"max_norm": 1.0, "skip_nonfinite": True}, step={"zero_grad": True})
    yield Setting("SGD", {"momentum": 0.9, "dampening": 0.1})
    for rule in ("Adam", "AdamW"):
        yield Setting(rule, {"amsgrad": True})
    yield Setting("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1})
    yield Setting("Adagrad", {"lr_decay": 0.01, "initial_accumulator_value": 0.1})
    for rule in ("Adam", "AdamW", "NAdam"):
        yield Setting(rule, on_gpu={"capturable": True})
    for rule in ("SGD", "Adam", "AdamW", "Adagrad"):
        yield Setting(rule, {"fused": True})


def after_steps(setting: Setting, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return all parameters and all state after the steps, on the CPU, by name."""
    has_norm = "max_norm" in setting.options and dtype == torch.float32
    numbers = _numbers(dtype, _MANY_GROUPS if has_norm else _MANY_TILES)
    params = [torch.nn.Parameter(x.to(device, copy=True)) for x in numbers[0]]
    optimizer = _optimizer(setting, params, device)
    for step, gradients in enumerate(numbers[1:]):
        for i, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
            param.grad = gradient.to(device, copy=True)  # strides stay
            if (step, i) == _NOT_FINITE_AT and setting.options.get("skip_nonfinite"):
                param.grad.view(-1)[17] = float("nan")
        optimizer.step(**setting.step)
    return _everything(optimizer, params)


@functools.lru_cache(maxsize=2)
def _numbers(dtype: torch.dtype, largest: int) -> list[list[Tensor]]:
    """Return parameters, and then the gradients of every step; one of these is transposed."""
    generator = torch.Generator().manual_seed(0)
    lists = [
        [torch.randn(shape, generator=generator).to(dtype) for shape in (*_SHAPES, (largest,))]
        for _ in range(_STEPS + 1)
    ]
    for gradients in lists[1:]:
        gradients[_TRANSPOSED] = gradients[_TRANSPOSED].t().contiguous().t()
    return lists


def _optimizer(setting: Setting, params: list[torch.nn.Parameter], device: str) -> Any:
    options = setting.options | (setting.on_gpu if device != "cpu" else {})
    return getattr(fst, setting.rule)(params, lr=1e-2, **options)


def _everything(optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, Tensor]:
    found = {}
    for i, param in enumerate(params):
        found[f"parameter {i}"] = param.detach().cpu()
        for name, value in sorted(optimizer.state[param].items()):
            found[f"{name} of parameter {i}"] = torch.as_tensor(value).detach().cpu()
    return found


def checksum(arrays: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the bytes of all arrays, in the order of their elements."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(array: Tensor) -> bytes:
    return bytes(array.contiguous().view(-1).view(torch.uint8).numpy())


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Return the names of what differs, and in how many elements."""
    if ours.keys() != theirs.keys():
        return [f"only one has {sorted(ours.keys() ^ theirs.keys())}"]
    lines = []
    for name, mine in ours.items():
        other = theirs[name]
        if (mine.dtype, mine.shape) != (other.dtype, other.shape):
            lines.append(f"{name}: {mine.dtype} {mine.shape}, {other.dtype} {other.shape}")
        elif count := _differences(mine, other):
            lines.append(f"{name}: {count} of {mine.numel()} elements")
    return lines


def _differences(mine: Tensor, other: Tensor) -> int:
    """Return how many elements differ in a bit: zeros have signs, and a NaN equals itself."""
    if mine.numel() == 0:
        return 0
    xs, ys = (x.contiguous().view(-1, 1).view(torch.uint8) for x in (mine, other))
    return int((xs != ys).any(dim=1).sum())


def compare(setting: Setting, dtype: torch.dtype, device: str) -> str | None:
    """Print one line; return it where something differs."""
    name = f"{setting} {str(dtype).partition('.')[2]}"
    try:
        on_cpu, on_device = (after_steps(setting, dtype, where) for where in ("cpu", device))
        differences = differing(on_cpu, on_device)
    except Exception as error:  # the next one may do
        differences, on_cpu = [f"{type(error).__name__}: {error}"], {}
    line = f"ok {checksum(on_cpu)[:16]} {name}"
    if differences:
        line = f"DIFFERS {name}: {'; '.join(differences)}"
    sys.stdout.write(line + "\n")
    return line if differences else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    if device == "cpu":
        torch.set_num_threads(1)  # a rehearsal, whose threads would wait for each other by spinning
    cases = [(setting, dtype) for dtype in _DTYPES for setting in settings()]
    wrong = [line for case in cases if (line := compare(*case, device))]
    sys.stdout.write(f"{len(cases) - len(wrong)} of {len(cases)} agree, CPU and {device}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
