"""The rules: the classes of ``torch.optim`` with our step.

Constructors, defaults and state are those of the torch classes that these derive from; the
arguments that all of them take besides are described in :class:`fusestep.torch.Optimizer`. The
formulas are in ``csrc/rules``, one header each, and described in :mod:`fusestep.rules`.
"""

from __future__ import annotations

import inspect
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from .. import rules
from .._narrow import powers_name
from .optimizer import EmaDecay, Optimizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.optim.optimizer import ParamsT

    from .. import Optimizer as ArrayOptimizer


# From torch 2.6 on.
_ADAM_DECOUPLES = "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters


class SGD(Optimizer, torch.optim.SGD):
    """Stochastic gradient descent with momentum: ``torch.optim.SGD``.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused
        As in torch; shapes and dtypes of parameters are free.
    differentiable
        Refused when True.
    max_norm, clip_value, skip_nonfinite, ema_decay, state_dtype, stochastic_rounding
        See :class:`Optimizer`.
    master, rows, seed
        Likewise.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As torch.

    References
    ----------
    Sutskever, Martens, Dahl & Hinton (2013), "On the importance of initialization and momentum in
    deep learning", equations 1-4.
    """

    _array_class: ClassVar[type[ArrayOptimizer]] = rules.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: Literal["float32", "split"] | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._attach(
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master=master,
            rows=rows,
            seed=seed,
        )


class NAG(SGD):
    """Nesterov's accelerated gradient: :class:`SGD` with ``nesterov=True``.

    Parameters
    ----------
    params, lr, weight_decay, maximize, foreach, differentiable, fused
        As in :class:`SGD`.
    momentum
        Greater than 0.
    max_norm, clip_value, skip_nonfinite, ema_decay, state_dtype, stochastic_rounding
        See :class:`Optimizer`.
    master, rows, seed
        Likewise.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As ``torch.optim.SGD``.

    References
    ----------
    Nesterov (1983); Sutskever et al. (2013), equations 3-4.
    """

    _array_class = rules.NAG

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: Literal["float32", "split"] | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay=weight_decay,
            nesterov=True,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master=master,
            rows=rows,
            seed=seed,
        )

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if not group.get("nesterov", True) or group.get("dampening", 0) != 0:
            raise ValueError(
                "a parameter group has nesterov=False or a dampening, and NAG is SGD with "
                "nesterov=True and none: use fusestep.torch.SGD"
            )


class Adam(Optimizer, torch.optim.Adam):
    """Adam, and AMSGrad: ``torch.optim.Adam``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, fused, decoupled_weight_decay
        As in torch.
    capturable
        Refused when True for parameters on the CPU.
    differentiable
        Refused when True.
    max_norm, clip_value, skip_nonfinite, ema_decay, state_dtype, stochastic_rounding
        See :class:`Optimizer`.
    master, rows, seed
        Likewise.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As torch.

    References
    ----------
    Kingma & Ba (2015), "Adam: a method for stochastic optimization", Algorithm 1; Reddi, Kale &
    Kumar (2018), "On the convergence of Adam and beyond", Algorithm 2.
    """

    _array_class = rules.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: Literal["float32", "split"] | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        decoupled = {"decoupled_weight_decay": decoupled_weight_decay} if _ADAM_DECOUPLES else {}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **decoupled,
        )
        if decoupled_weight_decay and not _ADAM_DECOUPLES:
            for options in (self.defaults, *self.param_groups):
                options.setdefault("decoupled_weight_decay", True)
        self._attach(
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master=master,
            rows=rows,
            seed=seed,
        )


class AdamW(Optimizer, torch.optim.AdamW):
    """Adam with decoupled weight decay: ``torch.optim.AdamW``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, fused
        As in torch.
    capturable
        Refused when True for parameters on the CPU.
    differentiable
        Refused when True.
    max_norm, clip_value, skip_nonfinite, ema_decay, state_dtype, stochastic_rounding
        See :class:`Optimizer`.
    master, rows, seed
        Likewise.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As torch.

    References
    ----------
    Loshchilov & Hutter (2019), "Decoupled weight decay regularization", Algorithm 2.
    """

    _array_class = rules.Adam  # a group may ask for coupled decay, as in torch
    _implied = MappingProxyType({"decoupled_weight_decay": True})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: Literal["float32", "split"] | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._attach(
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master=master,
            rows=rows,
            seed=seed,
        )


class NAdam(Optimizer, torch.optim.NAdam):
    """Adam with Nesterov momentum: ``torch.optim.NAdam``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, foreach, maximize
        As in torch.
    capturable
        Refused when True for parameters on the CPU.
    differentiable
        Refused when True.
    max_norm, clip_value, skip_nonfinite, ema_decay, state_dtype, stochastic_rounding
        See :class:`Optimizer`.
    master, rows, seed
        Likewise.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As torch.

    References
    ----------
    Dozat (2016), "Incorporating Nesterov momentum into Adam", Algorithm 2.
    """

    _array_class = rules.NAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: Literal["float32", "split"] | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._attach(
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master=master,
            rows=rows,
            seed=seed,
        )


class Adagrad(Optimizer, torch.optim.Adagrad):
    """Adagrad: ``torch.optim.Adagrad``.

    Parameters
    ----------
    params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize, fused
        As in torch.
    differentiable
        Refused when True.
    max_norm, clip_value, skip_nonfinite, ema_decay, state_dtype, stochastic_rounding
        See :class:`Optimizer`.
    master, rows, seed
        Likewise.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As torch.

    References
    ----------
    Duchi, Hazan & Singer (2011), "Adaptive subgradient methods for online learning and stochastic
    optimization", Figure 1 (diagonal).
    """

    _array_class = rules.Adagrad

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: Literal["float32", "split"] | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._attach(
            max_norm=max_norm,
            clip_value=clip_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master=master,
            rows=rows,
            seed=seed,
        )
        self._make_state_ours()

    def share_memory(self) -> None:
        """Move the sums to memory that processes share; see ``torch.optim.Adagrad``."""
        super().share_memory()
        for parameter, _ in self._parameters():
            sums = self.state[parameter]
            if powers_name("sum") in sums:  # of codes, which mean nothing without them
                sums[powers_name("sum")].share_memory_()

    def _make_state_ours(self) -> None:
        """Have the state that torch's constructor has made in our dtype and places."""
        states = self._rule_of({}).states
        for parameter, label in self._parameters():
            self.state[parameter].update(self._completed_states(parameter, {}, label, states))
        self._adopt_scalars()

    def _initial_state(self) -> float:
        return float(self.defaults["initial_accumulator_value"])
