"""How many bytes a training will take, before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _narrow, rules
from ._state import check_state_dtype
from .optimizer import Optimizer

if TYPE_CHECKING:
    from collections.abc import Iterable

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Memory(NamedTuple):
    """Bytes of the arrays of a training; printed as a table."""

    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.state

    def __str__(self) -> str:
        sizes = {**self._asdict(), "total": self.total}
        return "\n".join(f"{name:<12}{_text(size):>10}" for name, size in sizes.items())


def memory(
    params: Any,
    rule: type[Any] | str = rules.Adam,
    *,
    gradients: bool = True,
    state_dtype: Any = None,
    **options: Any,
) -> Memory:
    """Return how many bytes parameters, gradients and state take, without allocating them.

    Parameters
    ----------
    params
        Whatever has ``shape`` and ``dtype``: arrays, tensors (of torch's meta device, too),
        ``jax.ShapeDtypeStruct``; one, a dict, or an iterable of them, such as
        ``model.parameters()``. Of a parameter that is sharded, all shards count.
    rule
        An optimizer class, of :mod:`fusestep` or :mod:`fusestep.torch`, or its name.
    gradients
        Whether there are gradients, of the parameters' dtypes. There are none where all come as
        :class:`fusestep.Outer`; those that are :class:`fusestep.Rows` are as large as these.
    state_dtype
        As for the optimizer.
    **options
        Hyper-parameters that decide which state there is, as for the optimizer: ``momentum``,
        ``amsgrad``; and ``ema_decay``, whose averages count as state.

    Returns
    -------
    Memory
        A named tuple with ``parameters``, ``gradients`` and ``state``, and with ``total``.

    Raises
    ------
    TypeError, ValueError
        The rule is no optimizer, an option is none of its own, or a parameter has no shape or not a
        dtype that can be trained.

    Notes
    -----
    Arrays only. A few bytes for each parameter come on top, 8 for each row with ``rows="exact"``,
    and as much as the parameter, once or twice, for an anchor.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> W = np.zeros((1000, 1000), np.float32)
    >>> fs.memory([W], fs.Adam)
    Memory(parameters=4000000, gradients=4000000, state=8000000)
    >>> print(fs.memory([W], fs.SGD, momentum=0.9))
    parameters     4.00 MB
    gradients      4.00 MB
    state          4.00 MB
    total          12.0 MB
    """
    given = list(_each(params))
    wanted = check_state_dtype(state_dtype)
    # Which state a rule has, it says for the smallest table, and has checked the options by then.
    table = np.zeros((3, 2), np.float32)
    shapes = [
        array.shape
        for array in _class_of(rule)(table, **options).state[0].values()
        if isinstance(array, np.ndarray) and array.ndim > 0
    ]
    of_rows = sum(shape == (3,) for shape in shapes)
    of_elements = len(shapes) - of_rows
    averages = int(options.get("ema_decay") is not None)
    bytes_of_parameters = bytes_of_state = 0
    for shape, dtype in given:
        elements = math.prod(shape)
        default = "float64" if dtype == "float64" else "float32"
        bytes_of_parameters += elements * _BYTES[dtype]
        if wanted == _narrow.DTYPE:
            bytes_of_state += of_elements * _narrow.bytes_of(elements)
        else:
            bytes_of_state += of_elements * elements * _BYTES[wanted or default]
        wide = wanted if wanted in ("float32", "float64") else default
        rows = shape[0] if shape else 0
        bytes_of_state += of_rows * rows * _BYTES[wide] + averages * elements * _BYTES[default]
    return Memory(bytes_of_parameters, bytes_of_parameters if gradients else 0, bytes_of_state)


def _class_of(rule: Any) -> type[Optimizer]:
    """Return the class for arrays that has this rule."""
    if isinstance(rule, str):
        classes = {name.lower(): value for name, value in vars(rules).items() if _is_rule(value)}
        if rule.lower() not in classes:
            raise ValueError(f"rule is {rule!r}; expected one of {', '.join(classes)}")
        rule = classes[rule.lower()]
    found = getattr(rule, "_array_class", rule)
    if not _is_rule(found):
        raise TypeError(f"rule is {rule!r}; expected an optimizer class, such as fusestep.Adam")
    return found  # type: ignore[no-any-return]


def _is_rule(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def _each(params: Any) -> Iterable[tuple[tuple[int, ...], str]]:
    """Return the shape and the dtype of each parameter."""
    if hasattr(params, "shape"):
        params = [params]
    elif isinstance(params, Mapping):
        params = params.values()
    for i, parameter in enumerate(params):
        shape, dtype = (getattr(parameter, name, None) for name in ("shape", "dtype"))
        if shape is None or dtype is None:
            raise TypeError(
                f"parameter {i} is a {type(parameter).__name__}; expected something with shape and "
                "dtype"
            )
        name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
        if name not in _BYTES:
            raise TypeError(f"parameter {i} has dtype {name}; expected {', '.join(_BYTES)}")
        yield tuple(int(extent) for extent in shape), name


def _text(size: int) -> str:
    """Return a number of bytes with three digits."""
    number, units = float(size), ["GB", "MB", "kB", "B"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop()
    digits = 0 if number >= 100 or units[-1] == "B" else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {units[-1]}"
