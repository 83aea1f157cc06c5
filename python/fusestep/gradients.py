"""Gradients that are not one dense array."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _cpu
from ._arrays import on_host

if TYPE_CHECKING:
    import numpy.typing as npt

    from ._parameters import Array


class Rows:
    """A gradient that is zero but for some rows of its parameter.

    A row is what one index along the first axis picks: the embedding of one user, say. A step costs
    as much as the rows that are listed, however large the table. What becomes of the others is the
    optimizer's choice (see ``rows`` in :class:`fusestep.Optimizer`).

    Parameters
    ----------
    indices
        Which rows: int32 or int64, of shape [N], in any order; N may be 0. An array of NumPy, or of
        another library in the CPU's memory; a list of int. For a parameter on a GPU also an array
        on a GPU, which is fetched and therefore waited for. The gradients of a row that is listed
        several times are added up, in the order of the list.
    values
        Their gradients: a float array of shape [N, *rest], where the parameter's is [rows, *rest],
        on the parameter's device.

    Raises
    ------
    TypeError
        A list of indices holds something that is not an int.

    Notes
    -----
    The arrays are kept, not copied. ``step`` raises ``IndexError`` for an index that is not a row
    (negative ones are not), and has changed nothing then; and ``TypeError`` or ``ValueError`` for
    arrays of the wrong dtype or shape. With ``zero_grad=True`` it sets `values` to zero.

    While a CUDA graph is captured, indices on a GPU raise ``RuntimeError``; those on the CPU become
    part of the graph, and every replay moves these rows.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> table = np.zeros((1000, 2), np.float32)
    >>> opt = fs.SGD(table, lr=1.0)
    >>> opt.step(fs.Rows([3, 7, 3], np.ones((3, 2), np.float32)))
    >>> table[[3, 7]]
    array([[-2., -2.],
           [-1., -1.]], dtype=float32)
    """

    __slots__ = ("indices", "values")

    def __init__(self, indices: Array, values: Array) -> None:
        self.indices: Any = as_indices(indices)
        self.values: Any = values

    def __repr__(self) -> str:
        count = getattr(self.indices, "shape", "?")
        return f"Rows({count} indices, values of shape {getattr(self.values, 'shape', '?')})"


def as_indices(indices: Any) -> Any:
    """Return an array of row numbers: the one that was given, or one of the ints in a list."""
    if not isinstance(indices, (list, tuple)):
        return indices
    array = np.asarray(indices)
    if array.size and array.dtype.kind != "i":
        raise TypeError(f"indices are {indices!r}; expected a list of int")
    return array.astype(np.int64)


class OfSamples:
    """How samples are weighed, bounded and hidden in noise."""

    __slots__ = ("max_norm", "noise_multiplier", "reduction", "weight")

    def __init__(
        self,
        weight: Array | None,
        max_norm: float | None,
        noise_multiplier: float,
        reduction: Literal["mean", "sum"] | float,
    ) -> None:
        self.weight: Any = weight
        self.max_norm = None if max_norm is None else _positive("max_norm", max_norm)
        self.noise_multiplier = _number("noise_multiplier", noise_multiplier)
        if self.noise_multiplier < 0:
            raise ValueError(
                f"noise_multiplier is {noise_multiplier!r}; expected a number that is not negative"
            )
        if self.noise_multiplier > 0 and self.max_norm is None:
            raise ValueError(
                "noise_multiplier is given without max_norm, of which it is a multiple"
            )
        if isinstance(reduction, str) and reduction not in ("mean", "sum"):
            raise ValueError(
                f"reduction is {reduction!r}; expected 'mean', 'sum' or the number to divide by"
            )
        self.reduction: Any = (
            reduction if isinstance(reduction, str) else _positive("reduction", reduction)
        )


class Samples(OfSamples):
    """Gradients of several samples, one for each, which the step weighs and adds up.

    The step takes ``sum_i weight_i * clip_i * values_i``, divided as `reduction` says. On the CPU
    that is never stored: each piece of the sum is made and used while it is in the cache. On a GPU
    it is made before the step, in memory that is kept for the next one.

    With `max_norm` and `noise_multiplier` that is the step of DP-SGD [1]_: no sample moves the
    parameters by more than `max_norm` allows, and noise hides whether it was there.

    Parameters
    ----------
    values
        A float array of shape [N, *shape], where the parameter has `shape`, on its device. N may
        be 0.
    weight
        How much each sample counts: N numbers that are not negative; None: 1 each. A sample with
        weight 0 is as if it were not there. On the CPU, or on a GPU: then they are fetched.
    max_norm
        Bounds each sample's gradient: it is multiplied by ``max_norm / norm`` where its L2 norm,
        over the samples for all parameters of the step together, is larger. Weights come after
        that. All samples of a step that have a bound must have the same one, and be equally many.
    noise_multiplier
        With `max_norm`: adds normal noise, of standard deviation ``noise_multiplier * max_norm``,
        to each element of the sum. It depends on the optimizer's ``seed``, its ``steps``, the
        position of the parameter and that of the element alone. It is drawn for an empty batch,
        too.
    reduction
        ``"mean"``: the sum is divided by the number of samples that are there; ``"sum"``: it is
        not; or a number by which it is divided, such as the expected size of a batch that is
        drawn at random.

    Raises
    ------
    TypeError
        `max_norm`, `noise_multiplier` or `reduction` is not a number.
    ValueError
        One of them is out of range, or there is noise without a bound.

    Notes
    -----
    Arrays are kept, not copied. If no sample is there, and no noise, the parameter does not move
    and its state does not age. ``grad_scale`` multiplies the gradients before they are bounded, and
    does not multiply the noise; ``zero_grad=True`` sets `values` to zero. On a GPU a step with
    `max_norm` waits for the norms, and cannot be captured in a CUDA graph (`RuntimeError`).

    The generator is not a cryptographic one: whoever knows the seed can subtract the noise. How
    much privacy a training run has spent is for an accountant to say, such as Opacus' or
    dp-accounting's; it has to assume weights of at most 1.

    References
    ----------
    .. [1] Abadi et al., "Deep learning with differential privacy", 2016, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> w = np.zeros(2)
    >>> opt = fs.SGD(w, lr=1.0)
    >>> gradients = np.array([[1.0, 0.0], [0.0, 3.0]])
    >>> opt.step(fs.Samples(gradients, weight=[2.0, 1.0], reduction="sum"))
    >>> w
    array([-2., -3.])
    """

    __slots__ = ("values",)

    def __init__(
        self,
        values: Array,
        weight: Array | None = None,
        *,
        max_norm: float | None = None,
        noise_multiplier: float = 0.0,
        reduction: Literal["mean", "sum"] | float = "mean",
    ) -> None:
        super().__init__(weight, max_norm, noise_multiplier, reduction)
        self.values: Any = values

    def __repr__(self) -> str:
        return f"Samples(values of shape {getattr(self.values, 'shape', '?')})"


class Outer(OfSamples):
    r"""The gradient of a linear layer's weight, as the outer products it is the sum of.

    .. math:: G = \sum_i w_i c_i \, e_i x_i^T

    where :math:`x_i` went into the layer for sample i and :math:`e_i` is the derivative of its loss
    with respect to what came out; :math:`w_i` and :math:`c_i` are weights and bounds as in
    :class:`Samples`. The step makes each piece of the sum where it uses it: the gradient never
    exists as an array.

    Parameters
    ----------
    x
        A float array of shape [N, in], where the parameter has shape [out, in], on its device: or
        [N, positions, in], where each sample has many vectors, such as one for each token, whose
        products are added up; or [in], one sample. N may be 0. None: ones, for a parameter of shape
        [out], a bias.
    error
        A float array of shape [N, out], [N, positions, out] or [out], in accordance with `x`.
    weight
        How much each sample counts: N numbers that are not negative, or the only one; None: 1 each.
        A sample with weight 0 is as if it were not there.
    max_norm, noise_multiplier, reduction
        As for :class:`Samples`. How long a sample's gradient is follows from its factors:
        ``norm(error_i) * norm(x_i)``; with positions, from their inner products, of which there are
        as many as pairs of positions.

    Raises
    ------
    TypeError
        `max_norm`, `noise_multiplier` or `reduction` is not a number.
    ValueError
        One of them is out of range, or there is noise without a bound.

    Notes
    -----
    Arrays are kept, not copied, and never changed, not by ``zero_grad=True`` either. On a GPU the
    sum is made first, in memory of the optimizer's, as for :class:`Samples`. Samples are added up
    one after another, each product rounded to the type the rule computes in: the same bits on any
    number of threads, on every instruction set and on a GPU. That takes 2 N operations for each
    element of the parameter, as a product of matrices does; on the CPU it is as quick as one.

    References
    ----------
    Goodfellow (2015), "Efficient per-example gradient computations", arXiv 1510.01799, for the
    norms; Li et al. (2022), "Large language models can be strong differentially private learners",
    section 4, with positions.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> W, b = np.zeros((2, 3)), np.zeros(2)
    >>> opt = fs.SGD([W, b], lr=1.0)
    >>> x, error = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, -1.0]])
    >>> opt.step([fs.Outer(x, error), fs.Outer(None, error)])
    >>> W
    array([[-1., -2., -3.],
           [ 1.,  2.,  3.]])
    >>> b
    array([-1.,  1.])
    """

    __slots__ = ("error", "x")

    def __init__(
        self,
        x: Array | None,
        error: Array,
        weight: Array | None = None,
        *,
        max_norm: float | None = None,
        noise_multiplier: float = 0.0,
        reduction: Literal["mean", "sum"] | float = "mean",
    ) -> None:
        super().__init__(weight, max_norm, noise_multiplier, reduction)
        self.x: Any = x
        self.error: Any = error
        if weight is not None and np.ndim(weight) == 0:  # of the only sample
            self.weight = [float(weight)]

    def __repr__(self) -> str:
        x, error = (getattr(array, "shape", None) for array in (self.x, self.error))
        return f"Outer(x of shape {x}, error of shape {error})"


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}; expected a finite number")
    return number


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0:
        raise ValueError(f"{name} is {value!r}; expected a positive number")
    return number


def as_weights(weight: Any, label: str) -> npt.NDArray[np.float64]:
    """Return weights as float64 in the CPU's memory, of whatever library they are."""
    array = np.asarray(on_host(weight))
    is_number = array.dtype.kind in "fiub" or array.dtype.name == "bfloat16"
    if not is_number and array.size:
        raise TypeError(f"{label} have dtype {array.dtype}; expected real numbers")
    return array.astype(np.float64)


_cpu.set_rows_type(Rows)
_cpu.set_samples_types(Samples, Outer)
