"""The rules: how a parameter moves, given its gradient and its state.

Names, defaults and meaning of arguments are those of the class of the same name in ``torch.optim``;
the keyword arguments that every rule takes are described in :class:`fusestep.Optimizer`. The
formulas are in ``csrc/rules``, one header each.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from ._hyperparameters import (
    Hyperparameter,
    betas,
    finite,
    flag,
    learning_rate,
    non_negative,
)
from .optimizer import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from ._parameters import Params
    from .optimizer import CommonOptions

    LearningRate = float | Callable[[int], float]


class SGD(Optimizer):
    r"""Stochastic gradient descent, with momentum.

    .. math:: b ← μ b + (1 - dampening) g, \qquad w ← w - lr · b

    with :math:`b_1 = g_1`; with ``nesterov``, :math:`w ← w - lr (g + μ b)`.

    Parameters
    ----------
    params
        Arrays to update in place: one, an iterable, or a dict from names to arrays.
    lr
        Learning rate, or a callable from the number of steps taken to one.
    momentum
        μ. Zero keeps no state.
    dampening
        How much of each gradient is kept out of the momentum.
    weight_decay
        L2 penalty λ: λw is added to the gradient.
    nesterov
        Look ahead; needs ``momentum > 0`` and ``dampening == 0``.
    **common
        See :class:`Optimizer`.

    References
    ----------
    Sutskever, Martens, Dahl & Hinton (2013), "On the importance of initialization and momentum in
    deep learning", equations 1-4.
    """

    __slots__ = ()
    _rule = "sgd"

    lr = Hyperparameter(learning_rate)
    momentum = Hyperparameter(non_negative, decides_state=True)
    dampening = Hyperparameter(finite)
    weight_decay = Hyperparameter(non_negative)
    nesterov = Hyperparameter(flag)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, own, **common)

    @classmethod
    def _check_together(cls, hyperparameters: dict[str, object]) -> None:
        if hyperparameters["nesterov"] and (
            not hyperparameters["momentum"] or hyperparameters["dampening"]
        ):
            raise ValueError(
                "Nesterov momentum needs momentum > 0 and dampening == 0, got momentum="
                f"{hyperparameters['momentum']!r} and dampening={hyperparameters['dampening']!r}"
            )


class NAG(Optimizer):
    r"""Nesterov's accelerated gradient: :class:`SGD` with ``nesterov=True``.

    .. math:: b ← μ b + g, \qquad w ← w - lr (g + μ b)

    Parameters
    ----------
    params, lr, weight_decay, **common
        As in :class:`SGD`.
    momentum
        μ, greater than 0.

    References
    ----------
    Nesterov (1983); Sutskever et al. (2013), equations 3-4.
    """

    __slots__ = ()
    _rule = "sgd"
    _fixed = MappingProxyType({"dampening": 0.0, "nesterov": True})

    lr = Hyperparameter(learning_rate)
    momentum = Hyperparameter(non_negative, decides_state=True)
    weight_decay = Hyperparameter(non_negative)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, own, **common)

    @classmethod
    def _check_together(cls, hyperparameters: dict[str, object]) -> None:
        if not hyperparameters["momentum"]:
            raise ValueError("momentum is 0; NAG needs momentum > 0 (SGD takes 0)")


class Adam(Optimizer):
    r"""Adam, AdamW's decay and AMSGrad.

    .. math::

        m ← β_1 m + (1 - β_1) g, \qquad v ← β_2 v + (1 - β_2) g^2, \qquad
        w ← w - lr \frac{m / (1 - β_1^t)}{\sqrt{v / (1 - β_2^t)} + ε}

    Parameters
    ----------
    params, lr, **common
        As in :class:`SGD`.
    betas
        (β₁, β₂), both in [0, 1).
    eps
        ε, added to the denominator.
    weight_decay
        λ: added to the gradient as λw, or, with ``decoupled_weight_decay``, w ← (1 - lr·λ) w.
    amsgrad
        Divide by the root of the largest v so far.
    decoupled_weight_decay
        Decay as in :class:`AdamW`.

    References
    ----------
    Kingma & Ba (2015), "Adam: a method for stochastic optimization", Algorithm 1; Reddi, Kale &
    Kumar (2018), "On the convergence of Adam and beyond", Algorithm 2.
    """

    __slots__ = ()
    _rule = "adam"

    lr = Hyperparameter(learning_rate)
    betas = Hyperparameter(betas)
    eps = Hyperparameter(non_negative)
    weight_decay = Hyperparameter(non_negative)
    amsgrad = Hyperparameter(flag, decides_state=True)
    decoupled_weight_decay = Hyperparameter(flag)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, own, **common)


class AdamW(Optimizer):
    r"""Adam with decoupled weight decay: first :math:`w ← (1 - lr·λ) w`, then Adam's move.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, **common
        As in :class:`Adam`.
    weight_decay
        λ.

    References
    ----------
    Loshchilov & Hutter (2019), "Decoupled weight decay regularization", Algorithm 2.
    """

    __slots__ = ()
    _rule = "adam"
    _fixed = MappingProxyType({"decoupled_weight_decay": True})

    lr = Hyperparameter(learning_rate)
    betas = Hyperparameter(betas)
    eps = Hyperparameter(non_negative)
    weight_decay = Hyperparameter(non_negative)
    amsgrad = Hyperparameter(flag, decides_state=True)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        super().__init__(params, own, **common)


class NAdam(Optimizer):
    r"""Adam with Nesterov momentum.

    .. math::

        w ← w - lr \frac{\frac{1 - μ_t}{1 - \prod_{i≤t} μ_i} g
        + \frac{μ_{t+1}}{1 - \prod_{i≤t+1} μ_i} m}{\sqrt{v / (1 - β_2^t)} + ε}, \qquad
        μ_t = β_1 (1 - \tfrac{1}{2} 0.96^{tψ})

    with m and v as in :class:`Adam`.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, decoupled_weight_decay, **common
        As in :class:`Adam`.
    momentum_decay
        ψ, how fast μ grows towards β₁.

    References
    ----------
    Dozat (2016), "Incorporating Nesterov momentum into Adam", Algorithm 2.
    """

    __slots__ = ()
    _rule = "nadam"

    lr = Hyperparameter(learning_rate)
    betas = Hyperparameter(betas)
    eps = Hyperparameter(non_negative)
    weight_decay = Hyperparameter(non_negative)
    momentum_decay = Hyperparameter(non_negative)
    decoupled_weight_decay = Hyperparameter(flag)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, own, **common)


class Adagrad(Optimizer):
    r"""Adagrad.

    .. math::

        s ← s + g^2, \qquad w ← w - \frac{lr}{1 + (t - 1)\,lr\_decay} · \frac{g}{\sqrt{s} + ε}

    Parameters
    ----------
    params, lr, weight_decay, **common
        As in :class:`SGD`.
    lr_decay
        How fast the learning rate falls with the parameter's number of updates.
    initial_accumulator_value
        Where s starts.
    eps
        ε, added to the denominator.

    References
    ----------
    Duchi, Hazan & Singer (2011), "Adaptive subgradient methods for online learning and stochastic
    optimization", Figure 1 (diagonal).
    """

    __slots__ = ()
    _rule = "adagrad"

    lr = Hyperparameter(learning_rate)
    lr_decay = Hyperparameter(non_negative)
    weight_decay = Hyperparameter(non_negative)
    initial_accumulator_value = Hyperparameter(non_negative)
    eps = Hyperparameter(non_negative)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, own, **common)


class RowwiseAdagrad(Optimizer):
    r"""Adagrad with one accumulator for each row of a table: a D-th of its state.

    .. math::

        s_r ← s_r + \frac{1}{D} \sum_d g_{rd}^2, \qquad w_r ← w_r - lr \frac{g_r}{\sqrt{s_r} + ε}

    A row is what one index along the first axis picks, and D the number of its elements.

    Parameters
    ----------
    params, lr, weight_decay, **common
        As in :class:`SGD`. Parameters must have at least one dimension.
    eps
        ε, added to the denominator.

    References
    ----------
    Duchi, Hazan & Singer (2011), "Adaptive subgradient methods for online learning and stochastic
    optimization", Figure 1; Mudigere et al. (2022), "Software-hardware co-design for fast and
    scalable training of deep learning recommendation models", section 4.1.4.
    """

    __slots__ = ()
    _rule = "rowwise_adagrad"
    _has_state_per_row = True

    lr = Hyperparameter(learning_rate)
    eps = Hyperparameter(non_negative)
    weight_decay = Hyperparameter(non_negative)

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, **common)
