"""Gradients of samples, as Opacus and ``torch.func`` leave them with the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..gradients import Samples, as_weights
from . import _selections, _tensors

if TYPE_CHECKING:
    from torch import Tensor

    from .optimizer import Optimizer

_OPTIONS = ("max_norm", "noise_multiplier", "reduction")


def taken(optimizer: Optimizer, weight: Any, options: Any) -> list[tuple[Tensor, Samples]]:
    """Return the samples of each parameter that has ``grad_sample``.

    Raises
    ------
    TypeError
        The options are not those of :class:`fusestep.Samples`, or not in a dict.
    ValueError
        No parameter has ``grad_sample``; or one has a gradient without, or is a DTensor.
    """
    if options is None:
        options = {}
    if not isinstance(options, Mapping) or any(name not in _OPTIONS for name in options):
        raise TypeError(
            f"sample_options is {options!r}; expected a dict with some of {', '.join(_OPTIONS)}"
        )
    if _tensors.is_on_gpu(weight) and not _tensors.is_capturing():
        weight = as_weights(weight, "sample_weight")  # once for all parameters
    found, without = [], []
    for parameter, label in optimizer._parameters():
        values = _of(parameter)
        if values is not None:
            if _tensors.is_sharded(parameter):
                raise ValueError(
                    f"{label} is a DTensor and has grad_sample; samples are for parameters that "
                    "every process holds all of"
                )
            found.append((parameter, Samples(values, weight, **options)))
        elif parameter.grad is not None:
            without.append(label)
    if not found:
        raise ValueError(
            "no parameter has grad_sample: wrap the model in opacus.GradSampleModule, or assign "
            "what torch.func.vmap(torch.func.grad(...)) returns to p.grad_sample"
        )
    if without:
        raise ValueError(
            f"{', '.join(without)}: there is a gradient, but no grad_sample, as other parameters "
            "have; set the gradient to None to leave the parameter where it is"
        )
    optimizer._takes_samples = True
    if found[0][1].noise_multiplier:
        _selections.count_steps(optimizer)  # which noise depends on
    return found


def _of(parameter: Tensor) -> Tensor | None:
    """Return one tensor, also of several batches that Opacus has kept apart."""
    values = getattr(parameter, "grad_sample", None)
    if isinstance(values, (list, tuple)):
        parts = [part for part in values if part is not None]
        values = torch.cat(parts) if parts else None
    return values if values is None else torch.as_tensor(values)


def forget(optimizer: Optimizer) -> None:
    """Let go of the samples of all parameters, so that the next ones do not come on top."""
    for parameter, _ in optimizer._parameters():
        if getattr(parameter, "grad_sample", None) is not None:
            parameter.grad_sample = None  # type: ignore[attr-defined]
