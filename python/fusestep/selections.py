"""Which part of the parameters a step may touch: what ``where=`` takes.

Elements are counted in C order, whatever the strides of a parameter. What is not selected is frozen
(``frozen="freeze"``): its value and its state keep their bits, and only updates that it has had
count for its bias correction. Or its moments see the gradient all the same (``"track"``), and only
its value stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _arrays, _cpu
from ._hyperparameters import check_seed, number, one_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from ._parameters import Array, Parameters

Frozen = Literal["freeze", "track"]


class Selection(ABC):
    """Base class of what ``where=`` takes."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = one_of("frozen", frozen, ("freeze", "track"))

    @property
    def _tracks(self) -> bool:
        return self.frozen == "track"

    @abstractmethod
    def _native(self, step: int) -> _cpu.Where:
        """Return it as the kernels take it, for the step that comes after `step` steps."""


class Mask(Selection):
    """What a boolean array says; the array by itself means the same, with ``frozen="freeze"``.

    Parameters
    ----------
    selected
        Booleans of the parameter's shape, or of the shape [rows], one for each row of its first
        axis. An array of NumPy or of another library; kept, not copied, where that is possible. One
        on a GPU is brought to the host in each step, which waits for it.
    frozen
        What becomes of what is not selected: ``"freeze"`` or ``"track"``.

    Raises
    ------
    TypeError
        It is not an array of booleans.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> w = np.zeros(4, np.float32)
    >>> fs.SGD(w, lr=1.0).step(np.ones(4), where=np.array([True, False, False, True]))
    >>> w
    array([-1.,  0.,  0., -1.], dtype=float32)
    """

    def __init__(self, selected: Array, *, frozen: Frozen = "freeze") -> None:
        super().__init__(frozen)
        self.selected: Any = selected
        self._booleans()

    def __repr__(self) -> str:
        return f"Mask(shape {np.shape(self.selected)}, frozen={self.frozen!r})"

    def _booleans(self) -> npt.NDArray[np.bool_]:
        array = _arrays.on_host(self.selected)
        if array.dtype != np.bool_:
            raise TypeError(
                f"a mask (where=) is a {type(self.selected).__name__} of dtype {array.dtype}; "
                "expected an array of booleans"
            )
        return array

    def _native(self, step: int) -> _cpu.Where:  # noqa: ARG002
        return _cpu.Where.mask(self._booleans(), self._tracks)


class RandomBlocks(Selection):
    """Blocks of consecutive elements, drawn at random for every step and parameter.

    A step costs as much as the blocks that are drawn. Each block of a parameter has the same
    chance; their number is `fraction` of them all, rounded up or down at random where that is not a
    whole number. So the one block of a short bias has its turn in a `fraction` of the steps.

    Parameters
    ----------
    fraction
        From 0 to 1, or a callable from the number of past steps (``opt.steps``) to such a number.
    block
        Elements of a block, which lie together in C order; the last one may be shorter. The larger
        blocks are, the nearer is their share of the time to their share of the elements.
    frozen
        What becomes of the other blocks: ``"freeze"`` or ``"track"``.

    Raises
    ------
    TypeError, ValueError
        An argument is not what it should be.

    Notes
    -----
    The draw depends on the optimizer's ``seed``, its ``steps`` and the position of the parameter,
    and on nothing else. :meth:`mask` says beforehand which elements it will be.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> w = np.zeros(100_000, np.float32)
    >>> opt = fs.SGD(w, lr=1.0, seed=7)
    >>> opt.step(np.ones_like(w), where=fs.RandomBlocks(0.25, block=1000))
    >>> int((w != 0).sum())
    25000
    """

    def __init__(
        self,
        fraction: float | Callable[[int], float],
        block: int = 1024,
        *,
        frozen: Frozen = "freeze",
    ) -> None:
        super().__init__(frozen)
        self.fraction = _check_fraction(fraction)
        self.block = whole("block", block, least=1)

    def __repr__(self) -> str:
        return f"RandomBlocks({self.fraction!r}, block={self.block}, frozen={self.frozen!r})"

    def mask(
        self, shape: int | tuple[int, ...], *, step: int, seed: int = 0, parameter: int = 0
    ) -> npt.NDArray[np.bool_]:
        """Return what is drawn for a parameter of this shape.

        Parameters
        ----------
        shape
            The parameter's.
        step
            Steps before this one: ``opt.steps``.
        seed
            The optimizer's.
        parameter
            The parameter's position among the optimizer's, from 0 on.

        Returns
        -------
        numpy.ndarray
            Booleans of this shape.
        """
        size = int(np.prod(shape, dtype=np.int64))
        blocks = -(-size // self.block)
        fraction = _fraction_at(self.fraction, whole("step", step))
        drawn = _cpu.draw_blocks(
            blocks, fraction, check_seed(seed), step, whole("parameter", parameter)
        )
        return _mask_of_blocks(shape, self.block, drawn)

    def _native(self, step: int) -> _cpu.Where:
        return _cpu.Where.random_blocks(_fraction_at(self.fraction, step), self.block, self._tracks)


class CyclicBlocks(Selection):
    """One of `n_blocks` parts of each parameter in each step, in turn.

    Parameters
    ----------
    n_blocks
        Into how many blocks each parameter is divided: ceil(size / n_blocks) elements each, which
        lie together in C order; the last ones may be shorter, or empty.
    frozen
        What becomes of the other blocks: ``"freeze"`` or ``"track"``.

    Raises
    ------
    TypeError, ValueError
        An argument is not what it should be.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> w = np.zeros(4, np.float32)
    >>> opt = fs.SGD(w, lr=1.0)
    >>> for _ in range(3):
    ...     opt.step(np.ones(4), where=fs.CyclicBlocks(2))
    >>> w
    array([-2., -2., -1., -1.], dtype=float32)
    """

    def __init__(self, n_blocks: int, *, frozen: Frozen = "freeze") -> None:
        super().__init__(frozen)
        self.n_blocks = whole("n_blocks", n_blocks, least=1)

    def __repr__(self) -> str:
        return f"CyclicBlocks({self.n_blocks}, frozen={self.frozen!r})"

    def mask(self, shape: int | tuple[int, ...], *, step: int) -> npt.NDArray[np.bool_]:
        """Return what is selected of a parameter of this shape after `step` steps.

        Parameters
        ----------
        shape
            The parameter's.
        step
            Steps before this one: ``opt.steps``.

        Returns
        -------
        numpy.ndarray
            Booleans of this shape.
        """
        size = int(np.prod(shape, dtype=np.int64))
        block = max(1, -(-size // self.n_blocks))
        return _mask_of_blocks(shape, block, [whole("step", step) % self.n_blocks])

    def _native(self, step: int) -> _cpu.Where:  # noqa: ARG002
        return _cpu.Where.cyclic_blocks(self.n_blocks, self._tracks)


class TopK(Selection):
    """The elements of each parameter with the largest gradients, or the largest updates.

    Parameters
    ----------
    fraction
        How many: ceil(fraction * size) elements of each parameter. From 0 to 1, or a callable from
        the number of past steps (``opt.steps``) to such a number.
    by
        ``"gradient"``: by the absolute value of the gradient. ``"update"``: by how far an element
        would move, with decay and anchor, which means working it out for all of them.
    frozen
        What becomes of the other elements: ``"freeze"`` or ``"track"``.

    Raises
    ------
    TypeError, ValueError
        An argument is not what it should be.

    Notes
    -----
    Of elements that are equally large the first ones are selected; NaN is larger than any number.
    ``max_norm`` and ``skip_nonfinite`` look at all of the gradients, of which these are chosen.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> w = np.zeros(4, np.float32)
    >>> fs.SGD(w, lr=1.0).step(np.array([1.0, -5.0, 2.0, 0.0]), where=fs.TopK(0.5))
    >>> w
    array([ 0.,  5., -2.,  0.], dtype=float32)
    """

    def __init__(
        self,
        fraction: float | Callable[[int], float],
        by: Literal["gradient", "update"] = "gradient",
        *,
        frozen: Frozen = "freeze",
    ) -> None:
        super().__init__(frozen)
        self.fraction = _check_fraction(fraction)
        self.by = one_of("by", by, ("gradient", "update"))

    def __repr__(self) -> str:
        return f"TopK({self.fraction!r}, by={self.by!r}, frozen={self.frozen!r})"

    def _native(self, step: int) -> _cpu.Where:
        return _cpu.Where.top(_fraction_at(self.fraction, step), self.by == "update", self._tracks)


def for_each(where: Any, parameters: Parameters, step: int) -> list[_cpu.Where | None]:
    """Return what ``where=`` means for each parameter; None: all of it."""
    if isinstance(where, Selection):
        return [where._native(step)] * len(parameters.arrays)
    given = parameters.given
    if isinstance(given, dict):
        one_by_one = parameters.from_mapping(where, "selections (where=)")
    elif isinstance(given, list):
        if not isinstance(where, (list, tuple)):
            raise TypeError(
                f"where is a {type(where).__name__}; expected a selection for all parameters, or a "
                "list with one (or a boolean array, or None) for each, as params was"
            )
        if len(where) != len(given):
            raise ValueError(f"where has {len(where)} entries for {len(given)} parameters")
        one_by_one = where
    else:
        one_by_one = [where]
    return [None if one is None else as_selection(one)._native(step) for one in one_by_one]


def as_selection(where: Any) -> Selection:
    """Return a selection, or the mask that an array of booleans is."""
    return where if isinstance(where, Selection) else Mask(where)


def _check_fraction(fraction: float | Callable[[int], float]) -> float | Callable[[int], float]:
    return fraction if callable(fraction) else _in_unit_interval("fraction", fraction)


def _fraction_at(fraction: float | Callable[[int], float], step: int) -> float:
    if not callable(fraction):
        return fraction
    return _in_unit_interval("fraction(step)", fraction(step))


def _in_unit_interval(name: str, value: Any) -> float:
    result = number(name, value)
    if not 0 <= result <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number from 0 to 1")
    return result


def _mask_of_blocks(
    shape: int | tuple[int, ...], block: int, numbers: list[int]
) -> npt.NDArray[np.bool_]:
    mask = np.zeros(shape, np.bool_)
    flat = mask.reshape(-1)
    for i in numbers:
        flat[i * block : (i + 1) * block] = True
    return mask
