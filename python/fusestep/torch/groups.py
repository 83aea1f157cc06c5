"""Parameter groups, as recipes for training ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor


def _is_bias_or_norm(_name: str, parameter: Tensor) -> bool:
    return parameter.ndim < 2


def decay_groups(
    model_or_named_parameters: torch.nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float,
    skip: Callable[[str, Tensor], bool] = _is_bias_or_norm,
) -> list[dict[str, Any]]:
    """Return two parameter groups: one with weight decay, and one without.

    Parameters
    ----------
    model_or_named_parameters
        A module, or what its ``named_parameters()`` returns.
    weight_decay
        Of the first group; that of the second one is 0.
    skip
        From a parameter's name and itself to whether it belongs to the second group. By default
        those with fewer than two dimensions do: biases, and the scales and shifts of norms.

    Returns
    -------
    list of dict
        The groups, in this order, also where one of them is empty. Parameters are in the model's
        order.

    Examples
    --------
    >>> import torch, fusestep.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> groups = fusestep.torch.decay_groups(model, 0.1)
    >>> opt = fusestep.torch.AdamW(groups, lr=1e-3)
    >>> [(len(group["params"]), group["weight_decay"]) for group in opt.param_groups]
    [(1, 0.1), (1, 0.0)]
    """
    given = model_or_named_parameters
    named = given.named_parameters() if isinstance(given, torch.nn.Module) else given
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in named:
        (others if skip(name, parameter) else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
