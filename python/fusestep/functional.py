"""The bare kernels, for who keeps their own state.

Each function makes one update in place and returns None. The arguments are those of the class of
that name; `step` is the number of this update, counted from 1, and the state arrays are float32 or
float64 arrays of the parameter's shape that the caller allocates and keeps. `grad` may be
:class:`fusestep.Rows` (the rows that it does not list stay as they are), or
:class:`fusestep.Samples` or :class:`fusestep.Outer` without noise, which takes an optimizer's seed
and steps.

>>> import numpy as np
>>> from fusestep import functional as F
>>> w, g = np.zeros(3, np.float32), np.ones(3, np.float32)
>>> m, v = np.zeros_like(w), np.zeros_like(w)
>>> for t in range(1, 11):
...     F.adam_(w, g, m, v, step=t, lr=0.1)

All raise TypeError and ValueError as :meth:`fusestep.Optimizer.step` does, and change nothing then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _cpu, rules
from ._hyperparameters import finite, flag
from ._state_dict import count
from .gradients import OfSamples

if TYPE_CHECKING:
    import numpy.typing as npt

    from .optimizer import Optimizer

__all__ = ["adagrad_", "adam_", "adamw_", "nadam_", "nag_", "rowwise_adagrad_", "sgd_"]

Array = Any


def sgd_(
    param: Array,
    grad: Array,
    momentum_buffer: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.SGD`; with ``momentum``, `momentum_buffer` is needed."""
    own = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
    }
    states = {"momentum_buffer": momentum_buffer}
    _apply(rules.SGD, own, param, grad, states, step, maximize, grad_scale)


def nag_(
    param: Array,
    grad: Array,
    momentum_buffer: Array,
    *,
    step: int,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.NAG`."""
    own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    states = {"momentum_buffer": momentum_buffer}
    _apply(rules.NAG, own, param, grad, states, step, maximize, grad_scale)


def adam_(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.Adam`; with `max_exp_avg_sq`, of AMSGrad."""
    own = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": max_exp_avg_sq is not None,
        "decoupled_weight_decay": decoupled_weight_decay,
    }
    states = {
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
    }
    _apply(rules.Adam, own, param, grad, states, step, maximize, grad_scale)


def adamw_(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    max_exp_avg_sq: Array | None = None,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.AdamW`; with `max_exp_avg_sq`, of its AMSGrad form."""
    adam_(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        maximize=maximize,
        grad_scale=grad_scale,
    )


def nadam_(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    mu_product: Array,
    *,
    step: int,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.NAdam`.

    `mu_product`, the product of the momenta so far, is a float64 array of one element that starts
    at 1 and is updated, too.
    """
    own = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": momentum_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
    }
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    product = _one_float64(mu_product)
    product[...] = _apply(
        rules.NAdam, own, param, grad, states, step, maximize, grad_scale, float(product.flat[0])
    )


def adagrad_(
    param: Array,
    grad: Array,
    sum: Array,  # noqa: A002 - torch's name of the state
    *,
    step: int,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.Adagrad`; `sum` starts at the initial accumulator value."""
    own = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
    _apply(rules.Adagrad, own, param, grad, {"sum": sum}, step, maximize, grad_scale)


def rowwise_adagrad_(
    param: Array,
    grad: Array,
    sum: Array,  # noqa: A002 - torch's name of the state
    *,
    step: int,
    lr: float = 1e-2,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> None:
    """One update of :class:`fusestep.RowwiseAdagrad`; `sum` has one element for each row."""
    own = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    _apply(rules.RowwiseAdagrad, own, param, grad, {"sum": sum}, step, maximize, grad_scale)


def _apply(
    cls: type[Optimizer],
    own: dict[str, Any],
    param: Array,
    grad: Array,
    states: dict[str, Array | None],
    step: int,
    maximize: bool,
    grad_scale: float,
    momentum_product: float = 1.0,
) -> float:
    fields = cls._fields()
    checked = {name: fields[name].checked(value) for name, value in own.items()}
    cls._check_together(checked)
    if callable(checked["lr"]):
        raise TypeError("lr is a callable; a single update needs a number")
    options = cls._native_options(checked)
    if isinstance(grad, OfSamples) and grad.noise_multiplier:
        raise ValueError(
            "the samples have noise_multiplier, which takes an optimizer's seed and steps: use one"
        )
    needed, *_ = _cpu.describe_rule(cls._rule, options)
    for name, array in states.items():
        if (array is not None) != (name in needed):
            raise ValueError(
                f"{name} is needed here" if array is None else f"{name} has no use here"
            )
    return _cpu.apply(
        cls._rule,
        options,
        param,
        grad,
        [states[name] for name in needed],
        count("step", step),
        momentum_product,
        checked["lr"],
        finite("grad_scale", grad_scale),
        flag("maximize", maximize),
    )


def _one_float64(array: Any) -> npt.NDArray[np.float64]:
    if not isinstance(array, np.ndarray) or array.dtype != np.float64 or array.size != 1:
        raise TypeError("mu_product must be a float64 NumPy array of one element")
    if not array.flags.writeable:
        raise ValueError("mu_product is read-only")
    return array
