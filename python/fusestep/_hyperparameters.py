"""Hyper-parameters: what values they may take, and how they reach the kernels.

An optimizer class declares its hyper-parameters as class attributes, in the order of
``torch.optim``'s constructor. Each checks what it is given, when the optimizer is created, when a
user assigns to it and when a state dict is loaded, so that a wrong value never reaches a kernel.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable

    from .optimizer import Optimizer

T = TypeVar("T")


def number(name: str, value: Any) -> float:
    """Return `value` as a float; TypeError for anything that is not a real number."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is too large: {value!r}") from None
    if getattr(value, "shape", None) in ((), (1,)) and hasattr(value, "item"):
        element = value.item()  # an array or tensor of one element, as a scheduler may leave behind
        if isinstance(element, (int, float)) and not isinstance(element, bool):
            return float(element)
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected a number")


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; TypeError for anything but True and False."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected True or False")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of the choices."""
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return str(value)


def whole(name: str, value: Any, *, least: int = 0, most: int = 2**62 - 1) -> int:
    """Return `value` as an int in a range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected an int")
    if not least <= int(value) <= most:
        raise ValueError(f"{name} is {value!r}; expected an int from {least} to {most}")
    return int(value)


def check_seed(value: Any) -> int:
    """Return `value` as an int that 64 bits hold."""
    return whole("seed", value, most=2**64 - 1)


def non_negative(name: str, value: Any) -> float:
    """Return `value` as a finite float >= 0."""
    result = number(name, value)
    if not 0 <= result < math.inf:
        raise ValueError(f"{name} is {value!r}; expected a finite number that is not negative")
    return result


def finite(name: str, value: Any) -> float:
    """Return `value` as a finite float."""
    result = number(name, value)
    if not math.isfinite(result):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    return result


def max_norm(name: str, value: Any) -> float | None:
    """Return `value` as a float > 0 (infinity clips nothing), or None."""
    if value is None:
        return None
    result = number(name, value)
    if not result > 0:
        raise ValueError(f"{name} is {value!r}; expected a number greater than 0, or None")
    return result


def clip_value(name: str, value: Any) -> float | None:
    """Return `value` as a float >= 0 (infinity clips nothing), or None."""
    if value is None:
        return None
    result = number(name, value)
    if not result >= 0:
        raise ValueError(f"{name} is {value!r}; expected a number that is not negative, or None")
    return result


def learning_rate(name: str, value: Any) -> float | Callable[[int], float]:
    """Return a finite float >= 0, or a callable from the number of past steps to one."""
    if callable(value):
        return value  # type: ignore[no-any-return]
    return non_negative(name, value)


def betas(name: str, value: Any) -> tuple[float, float]:
    """Return a pair of floats in [0, 1)."""
    try:
        pair = tuple(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected a pair of numbers") from None
    if len(pair) != 2:
        raise ValueError(f"{name} is {value!r}; expected two numbers, got {len(pair)}")
    first, second = (number(f"{name}[{i}]", beta) for i, beta in enumerate(pair))
    for i, beta in enumerate((first, second)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}[{i}] is {beta!r}; expected a number in [0, 1)")
    return first, second


class Hyperparameter(Generic[T]):
    """A checked attribute of an optimizer.

    Parameters
    ----------
    check
        ``check(name, value)`` returns the value to keep, or raises.
    decides_state
        The value decides which state arrays exist (``amsgrad``), so that it is fixed for the life
        of the optimizer, up to its truth value (``momentum`` may change from 0.9 to 0.95).
    """

    name: str

    def __init__(self, check: Callable[[str, Any], T], *, decides_state: bool = False) -> None:
        self.check = check
        self.decides_state = decides_state

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> Hyperparameter[T]: ...
    @overload
    def __get__(self, optimizer: Optimizer, owner: type) -> T: ...
    def __get__(self, optimizer: Optimizer | None, owner: type) -> Hyperparameter[T] | T:
        if optimizer is None:
            return self
        return optimizer._hyperparameters[self.name]  # type: ignore[no-any-return]

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        optimizer._set_hyperparameters({self.name: value})

    def checked(self, value: Any, current: Any = None) -> T:
        """Check `value` for an optimizer whose present value is `current` (None: a new one)."""
        result = self.check(self.name, value)
        if self.decides_state and current is not None and bool(result) != bool(current):
            raise ValueError(
                f"{self.name} is {value!r} where this optimizer was created with {current!r}; it "
                "decides which state is kept: create a new optimizer instead"
            )
        return result


def as_native_options(name: str, value: Any) -> dict[str, float]:
    """Spell a checked hyper-parameter as the kernels' options."""
    if name == "betas":
        return {"beta1": value[0], "beta2": value[1]}
    if callable(value):
        return {}  # a schedule: the rate is handed over with each step
    return {name: float(value)}
