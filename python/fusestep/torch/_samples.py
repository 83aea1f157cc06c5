"""Gradients that are not ``p.grad``: those of samples, and those of fused linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..gradients import Outer, Samples, as_weights
from . import _selections, _tensors, linear

if TYPE_CHECKING:
    from torch import Tensor

    from .optimizer import Optimizer

_LABEL = "a parameter of this optimizer"
_OPTIONS = ("max_norm", "noise_multiplier", "reduction")


def of_layers(optimizer: Optimizer) -> list[tuple[Tensor, Outer]]:
    """Return the gradients of parameters with which a fused layer has left the factors.

    Raises
    ------
    RuntimeError
        Somebody has written to them.
    """
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not linear.factors_of(parameter):
                continue
            if parameter.grad is not None:
                linear.add_to_gradient(parameter, _LABEL)
            else:
                factors = linear.in_all(parameter, _LABEL)
                linear.mark_taken(parameter)
                found.append((parameter, Outer(*factors, reduction="sum")))
    return found


def taken(optimizer: Optimizer, weight: Any, options: Any) -> list[tuple[Tensor, Samples | Outer]]:
    """Return the samples of each parameter that has ``grad_sample``, or of a fused layer.

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
    found: list[tuple[Tensor, Samples | Outer]] = []
    without = []
    for parameter, label in optimizer._parameters():
        values = _of(parameter)
        if values is not None:
            if _tensors.is_sharded(parameter):
                raise ValueError(
                    f"{label} is a DTensor and has grad_sample; samples are for parameters that "
                    "every process holds all of"
                )
            found.append((parameter, Samples(values, weight, **options)))
        elif linear.factors_of(parameter) and parameter.grad is None:
            factors = linear.of_samples(parameter, label)
            linear.mark_taken(parameter)
            found.append((parameter, Outer(*factors, weight, **options)))
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
    if not optimizer._takes_samples and not linear.is_used():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            linear.forget(parameter)
            # Somebody else's, until a step has taken them.
            if optimizer._takes_samples and getattr(parameter, "grad_sample", None) is not None:
                parameter.grad_sample = None
