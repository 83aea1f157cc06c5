"""From a live ``torch.optim`` optimizer to ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import rules

if TYPE_CHECKING:
    from .optimizer import Optimizer

_CLASSES: dict[type, type[Optimizer]] = {
    torch.optim.SGD: rules.SGD,
    torch.optim.Adam: rules.Adam,
    torch.optim.AdamW: rules.AdamW,
    torch.optim.NAdam: rules.NAdam,
    torch.optim.Adagrad: rules.Adagrad,
}


def convert(optimizer: torch.optim.Optimizer, **extras: Any) -> Optimizer:
    """Return an optimizer of ours that goes on where a torch one stands.

    It takes over the parameter groups (the very dicts, with learning rates, ``initial_lr`` and
    whatever else they hold, so that a scheduler which drives the old optimizer drives this one) and
    the state (the very tensors, where their dtype is one that we keep; with ``state_dtype="int8"``
    the first step rounds it to nearest). Step only the new one from here on.

    Parameters
    ----------
    optimizer
        A ``torch.optim.SGD``, ``Adam``, ``AdamW``, ``NAdam`` or ``Adagrad``.
    **extras
        Our own arguments: ``max_norm``, ``clip_value``, ``skip_nonfinite``, ``ema_decay``,
        ``state_dtype``, ``stochastic_rounding``, ``master``, ``rows``, ``seed``.

    Returns
    -------
    Optimizer
        The class of the same name.

    Raises
    ------
    TypeError
        It is of another class, or of a subclass, whose step may do something of its own.
    ValueError
        It was created with ``differentiable=True`` or, with parameters on the CPU,
        ``capturable=True``.

    Notes
    -----
    A scheduler warns once that the optimizer it was created with has not been stepped, unless its
    ``optimizer`` attribute is set to the new one: ``scheduler.optimizer = converted``. Hooks are
    not taken over: they belong to the old optimizer.
    """
    cls = _CLASSES.get(type(optimizer))
    if cls is None:
        raise TypeError(
            f"cannot convert a {type(optimizer).__module__}.{type(optimizer).__qualname__}; "
            f"expected one of {', '.join(f'torch.optim.{kind.__name__}' for kind in _CLASSES)}"
        )
    return cls._taking_over(optimizer, **extras)
