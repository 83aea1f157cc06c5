"""Whether the GPU computes the CPU's bits: ``python bench/gpu_checksums.py``.

Takes 20 steps with every class of ``fusestep.torch``, in several settings, on the CPU and on the
GPU, and compares the SHA-256 of all parameters and all state. `tests/cpp/checksums.txt` holds the
same for the kernels by themselves. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
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
_NOT_FINITE_AT = 7  # the step with a NaN, where such are left out
# Around the sizes of vectors and tiles, with several axes, and of many tiles.
_SHAPES = ((), (0,), (1,), (1000,), (1025,), (64, 33), (3, 5, 7), (300_001,))
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
    generator = torch.Generator().manual_seed(0)
    params = [_parameter(shape, generator, dtype, device) for shape in _SHAPES]
    optimizer = _optimizer(setting, params, device)
    for step in range(_STEPS):
        for i, param in enumerate(params):
            gradient = torch.randn(param.shape, generator=generator).to(dtype)
            if step == _NOT_FINITE_AT and i == 3 and setting.options.get("skip_nonfinite"):
                gradient.view(-1)[17] = float("nan")
            param.grad = _in_other_order(gradient.to(device)) if i == 5 else gradient.to(device)
        optimizer.step(**setting.step)
    return _everything(optimizer, params)


def _parameter(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: str
) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))


def _optimizer(setting: Setting, params: list[torch.nn.Parameter], device: str) -> Any:
    options = setting.options | (setting.on_gpu if device != "cpu" else {})
    return getattr(fst, setting.rule)(params, lr=1e-2, **options)


def _in_other_order(gradient: Tensor) -> Tensor:
    """Return the same numbers with the strides of a transposed array."""
    return gradient.t().contiguous().t()


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
        elif _bytes(mine) != _bytes(other):
            count = int((mine != other).sum())
            lines.append(f"{name}: {count} of {mine.numel()} elements")
    return lines


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
    cases = [(setting, dtype) for dtype in _DTYPES for setting in settings()]
    wrong = [line for case in cases if (line := compare(*case, device))]
    sys.stdout.write(f"{len(cases) - len(wrong)} of {len(cases)} agree, CPU and {device}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
