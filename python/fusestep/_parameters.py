"""The arrays an optimizer was given: one, a list, or a dict from names to arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from . import _cpu
from ._hyperparameters import flag

Array: TypeAlias = Any
"""A NumPy or CuPy array, a torch tensor, or anything else with ``__dlpack__`` or
``__cuda_array_interface__`` whose memory can be written."""

Params: TypeAlias = Array | Iterable[Array] | Mapping[str, Array]
Gradients: TypeAlias = Array | Sequence[Array | None] | Mapping[str, Array | None]


def mask(parameters: Parameters, value: Any, what: str) -> list[bool] | None:
    """Return one boolean for each parameter: given in their form, or by a callable."""
    if value is None:
        return None
    if callable(value):
        return [flag(f"{what}({label})", value(array)) for array, label in parameters.labelled()]
    given = parameters.spread(value, what, one_for_all=isinstance(value, bool))
    return [
        x is None or flag(f"{what} of {label}", x)
        for x, (_, label) in zip(given, parameters.labelled(), strict=True)
    ]


class Parameters:
    """Parameters in a fixed order, with the keys by which the user knows them.

    Attributes
    ----------
    given
        What the user passed: the array, or a list or dict of our own with the same arrays.
    keys
        Names of a dict; positions otherwise.
    arrays, labels
        In the same order; labels are for error messages.
    in_order
        Turns gradients in the user's form into a list or tuple in that order.
    """

    def __init__(self, given: Params) -> None:
        self.given: Any = given
        self.in_order: Callable[[Any], Any]
        self.keys: list[str] | list[int]
        if isinstance(given, Mapping):
            for key in given:
                if not isinstance(key, str):
                    raise TypeError(
                        f"params has the key {key!r} ({type(key).__name__}); expected names (str)"
                    )
            self.given = dict(given)
            self.keys = list(given)
            self._names = dict.fromkeys(given)  # in order, and quick to look up
            self.arrays = list(given.values())
            self.labels = [f"parameter {key!r}" for key in given]
            self.in_order = self.from_mapping
        elif _cpu.is_array(given):
            self.keys = [0]
            self.arrays = [given]
            self.labels = ["the parameter"]
            self.in_order = self._from_one
        elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
            self.arrays = list(given)
            self.given = self.arrays
            self.keys = list(range(len(self.arrays)))
            self.labels = [f"parameter {key}" for key in self.keys]
            self.in_order = self._from_sequence
        else:
            raise TypeError(
                f"params is a {type(given).__name__}; expected an array, a list of arrays or a "
                "dict from names to arrays"
            )
        if not self.arrays:
            raise ValueError("params is empty; expected at least one array")
        if isinstance(self.arrays[0], Mapping):
            raise TypeError(
                "params is a list of parameter groups; create one optimizer for each group instead"
            )

    def labelled(self) -> Iterable[tuple[Array, str]]:
        """Return each array with its label."""
        return zip(self.arrays, self.labels, strict=True)

    def replace(self, i: int, array: Array) -> None:
        """Make another array the i-th parameter."""
        self.arrays[i] = array
        if isinstance(self.given, dict):
            self.given[self.keys[i]] = array
        elif isinstance(self.given, list):
            self.given[i] = array
        else:
            self.given = array

    def spread(self, value: Any, what: str, *, one_for_all: bool = False) -> list[Any]:
        """Return one value for each parameter, from the form that `params` had.

        None is one for each, and so is any other value with `one_for_all`.
        """
        if isinstance(self.given, dict) and isinstance(value, Mapping):
            if unknown := value.keys() - self.given.keys():
                raise ValueError(f"{what} has {sorted(unknown)}, which are not parameters")
            return [value.get(key) for key in self.keys]
        if isinstance(self.given, list) and isinstance(value, Sequence):
            if len(value) != len(self.arrays):
                raise ValueError(
                    f"{what} has {len(value)} entries for {len(self.arrays)} parameters"
                )
            return list(value)
        is_several = isinstance(self.given, (dict, list))
        if value is not None and not one_for_all and is_several:
            form = "dict" if isinstance(self.given, dict) else "list"
            raise TypeError(f"{what} is a {type(value).__name__}; expected a {form}, as params was")
        return [value] * len(self.arrays)

    def in_form(self, values: Sequence[Any]) -> Any:
        """Return values, one for each parameter, in the form that `params` had."""
        if isinstance(self.given, dict):
            return dict(zip(self.keys, values, strict=True))
        return list(values) if isinstance(self.given, list) else values[0]

    @staticmethod
    def _from_sequence(gradients: Any) -> Any:
        return gradients  # the kernel checks type and length

    @staticmethod
    def _from_one(gradient: Any) -> Any:
        return gradient if isinstance(gradient, (list, tuple)) else (gradient,)

    def from_mapping(self, given: Any, what: str = "gradients") -> Any:
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{what} are a {type(given).__name__}; expected a dict with the names of "
                f"the parameters, since params was one"
            )
        if unknown := given.keys() - self._names:
            raise ValueError(
                f"{what} has {', '.join(sorted(map(repr, unknown)))}, which is not a parameter; "
                f"parameters: {', '.join(map(repr, self.keys))}"
            )
        return [given.get(key) for key in self._names]
