"""One rule, three ways: fusestep, plain NumPy, PyTorch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fusestep as fs

from . import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .network import Arrays


@dataclass(frozen=True)
class Rule:
    """Where to find a rule.

    Attributes
    ----------
    fusestep, plain
        From parameters and ``lr`` to an optimizer.
    lr
        Learning rate that suits the network of this demo.
    torch_name
        Its class in ``torch.optim``.
    torch_options
        Arguments that make this class the rule.
    """

    fusestep: Callable[..., fs.Optimizer]
    plain: type[plain.Plain]
    lr: float
    torch_name: str
    torch_options: dict[str, Any] = field(default_factory=dict)


RULES = {
    "SGD": Rule(fs.SGD, plain.SGD, 0.2, "SGD"),
    "NAG": Rule(fs.NAG, plain.NAG, 0.05, "SGD", {"momentum": 0.9, "nesterov": True}),
    "Adam": Rule(fs.Adam, plain.Adam, 0.01, "Adam"),
    "AdamW": Rule(fs.AdamW, plain.AdamW, 0.01, "AdamW"),
    "NAdam": Rule(fs.NAdam, plain.NAdam, 0.01, "NAdam"),
    "Adagrad": Rule(fs.Adagrad, plain.Adagrad, 0.05, "Adagrad"),
}


@dataclass(frozen=True)
class Contender:
    """Something whose step is to be timed."""

    name: str
    step: Callable[[], object]


def contenders(
    rule: Rule, parameters: Arrays, gradients: Arrays, lr: float, threads: int | None
) -> list[Contender]:
    """Return the rule in all ways that are installed, fusestep first.

    Parameters
    ----------
    rule
        One of :data:`RULES`.
    parameters
        Each contender gets a copy.
    gradients
        What every step is given; each contender reads a copy.
    lr
        Learning rate.
    threads
        Threads PyTorch may use; None leaves that to it.
    """
    return [
        _numpy_contender("fusestep", rule.fusestep, parameters, gradients, lr),
        _numpy_contender("plain NumPy", rule.plain, parameters, gradients, lr),
        *_torch_contenders(rule, parameters, gradients, lr, threads),
    ]


def copied(arrays: Arrays) -> Arrays:
    """Return a copy of each array."""
    return {name: array.copy() for name, array in arrays.items()}


def _numpy_contender(
    name: str, optimizer: Callable[..., Any], parameters: Arrays, gradients: Arrays, lr: float
) -> Contender:
    step = optimizer(copied(parameters), lr=lr).step
    own_gradients = copied(gradients)
    return Contender(name, lambda: step(own_gradients))


def _torch_contenders(
    rule: Rule, parameters: Arrays, gradients: Arrays, lr: float, threads: int | None
) -> Iterator[Contender]:
    try:
        # By name, because a type checker must not need PyTorch any more than the demo does.
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return
    if threads is not None:
        torch.set_num_threads(threads)
    optimizer = getattr(torch.optim, rule.torch_name)
    for name, how in {"torch": {}, "torch, fused": {"fused": True}}.items():
        tensors = _tensors(torch, parameters, gradients)
        try:
            yield Contender(name, optimizer(tensors, lr=lr, **rule.torch_options, **how).step)
        except (TypeError, RuntimeError):
            continue  # this rule, or this version of PyTorch, has no fused step on the CPU


def _tensors(torch: Any, parameters: Arrays, gradients: Arrays) -> list[Any]:
    """Return parameters that hold their gradients, as a backward pass leaves them."""
    tensors = []
    for name, array in parameters.items():
        tensor = torch.tensor(array, requires_grad=True)
        tensor.grad = torch.tensor(gradients[name])
        tensors.append(tensor)
    return tensors
