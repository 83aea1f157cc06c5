"""Linear layers whose weights have no gradient: the step makes it where it uses it.

The gradient of a linear layer's weight is the sum of the outer products of what came back for its
outputs and what went in. Here the layer leaves these with its weight, for the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import _tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

_is_used = False  # some layer has left something with a parameter


class Factors(NamedTuple):
    """A gradient, as what it is the outer products of: the layer's inputs, and its errors."""

    x: Tensor | None  # [..., in]; None: ones, of a bias
    error: Tensor  # [..., out]: the derivatives of the loss by the layer's outputs
    times: int  # samples of the batch, if the loss is their mean; else 1


class _HandOver(torch.autograd.Function):
    """Leaves the factors with weight and bias when the gradient of `output` comes by."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, is_mean: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.is_mean = weight, bias, is_mean
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None, None, None]:
        global _is_used
        _is_used = True
        (x,) = ctx.saved_tensors
        times = len(x) if ctx.is_mean and x.ndim > 1 else 1
        for parameter, of_columns in ((ctx.weight, x), (ctx.bias, None)):
            if parameter is not None and parameter.requires_grad:
                factors = Factors(of_columns, error, times)
                parameter.grad_factors = [*factors_of(parameter), factors]
        return error, None, None, None, None


class FusedLinear(torch.nn.Linear):
    """An ``nn.Linear`` that leaves its gradient with its parameters as what it is made of."""

    loss_is_mean = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return ``input @ weight.T + bias``."""
        weight, bias = self.weight, self.bias
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not learns or not torch.is_grad_enabled():
            return functional.linear(input, weight, bias)
        output = functional.linear(input, weight.detach(), None if bias is None else bias.detach())
        handed: Tensor = _HandOver.apply(  # type: ignore[no-untyped-call]
            output, input, weight, bias, self.loss_is_mean
        )
        return handed


def fuse_linear(model: nn.Module, *, loss_reduction: str = "mean") -> nn.Module:
    """Make each ``nn.Linear`` hand its gradient to the optimizer without making it.

    In its backward pass, a layer leaves its input and the gradient of its output with its weight
    (``p.grad_factors``), in place of ``p.grad``, which stays None. The next step of an optimizer of
    :mod:`fusestep.torch` makes the gradient piece by piece, where it uses it, as
    :class:`fusestep.Outer` does. The gradients of linear layers take no memory then, nor the time
    to write and to read them; instead, their inputs and the gradients of their outputs are kept
    until the step. That pays where a batch has fewer rows than the layer has inputs and outputs.

    Parameters
    ----------
    model
        Layers of the class ``nn.Linear`` itself, at any depth, become :class:`FusedLinear`; others
        stay what they are. Parameters and state dict are the same.
    loss_reduction
        "mean" or "sum": what the loss does over the batch. Counts where single samples do: with
        ``sample_weight`` and ``sample_options`` (see ``step``), which take these layers' gradients
        of each sample from their factors, too: no ``p.grad_sample`` is needed.

    Returns
    -------
    nn.Module
        The model, changed in place. :func:`unfuse_linear` undoes it.

    Raises
    ------
    TypeError
        It is not a module; or it is one of ``DistributedDataParallel`` or sharded, whose processes
        would have to exchange gradients that do not exist.
    ValueError
        `loss_reduction` is something else.

    Notes
    -----
    The optimizer is to be one of :mod:`fusestep.torch`; torch's would leave these parameters where
    they are. What looks at ``p.grad`` finds None: ``clip_grad_norm_`` (use the optimizer's
    ``max_norm``), a ``GradScaler``, hooks of a parameter. Call the optimizer's ``zero_grad``, not
    the model's. A parameter that has a gradient besides, such as a tied embedding, gets the sum in
    ``p.grad`` when a step is taken.

    Examples
    --------
    >>> import torch, fusestep.torch
    >>> model = fusestep.torch.fuse_linear(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    >>> optimizer = fusestep.torch.SGD(model.parameters(), lr=0.1)
    >>> model(torch.ones(5, 3)).mean().backward()
    >>> model[0].weight.grad is None
    True
    >>> optimizer.step(zero_grad=True)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction is {loss_reduction!r}; expected 'mean' or 'sum'")
    _check_is_in_one_place(model)
    for layer in model.modules():
        if type(layer) in (torch.nn.Linear, FusedLinear):
            layer.__class__ = FusedLinear
            vars(layer)["loss_is_mean"] = loss_reduction == "mean"
    return model


def unfuse_linear(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_linear`: layers are ``nn.Linear`` again, and make gradients.

    Parameters
    ----------
    model
        A module.

    Returns
    -------
    nn.Module
        The model, changed in place.
    """
    for layer in model.modules():
        if type(layer) is FusedLinear:
            vars(layer).pop("loss_is_mean")
            layer.__class__ = torch.nn.Linear  # type: ignore[assignment]
    return model


def _check_is_in_one_place(model: nn.Module) -> None:
    is_sharded = any(map(_tensors.is_sharded, model.parameters()))
    if is_sharded or isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"the model is {'sharded' if is_sharded else 'a DistributedDataParallel'}: processes "
            "would have to exchange gradients that fuse_linear does not make"
        )


# ---- for the optimizer ---------------------------------------------------------------------------


def is_used() -> bool:
    """Return whether some layer has ever left something with a parameter."""
    return _is_used


def factors_of(parameter: Tensor) -> list[Factors]:
    """Return what layers have left with a parameter."""
    return getattr(parameter, "grad_factors", None) or []


def forget(parameter: Tensor) -> None:
    """Let go of it."""
    if factors_of(parameter):
        parameter.grad_factors = None  # type: ignore[attr-defined]


def in_all(parameter: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return x and error of all passes that a parameter has had a part in: [rows, ...] each."""
    all_factors = factors_of(parameter)
    xs = [_as_rows(factors.x) for factors in all_factors if factors.x is not None]
    errors = [_as_rows(factors.error) for factors in all_factors]
    return _joined(xs) if xs else None, _joined(errors)


def of_samples(parameter: Tensor, label: str) -> tuple[Tensor | None, Tensor]:
    """Return x and error by sample, [N, positions, ...], of the losses that have been averaged.

    Raises
    ------
    ValueError
        There has been more than one pass, whose samples might be the same.
    """
    (x, error, times), *others = factors_of(parameter)
    if others:
        raise ValueError(
            f"{label}: its layer has been used {1 + len(others)} times since the last step, so it "
            "is not known which gradients belong to one sample"
        )
    if times != 1:
        error = error * times
    return (None if x is None else _by_sample(x)), _by_sample(error)


def add_to_gradient(parameter: Tensor) -> None:
    """Add it to the gradient that the parameter has besides."""
    x, error = in_all(parameter)
    made = error.sum(0) if x is None else error.T @ x.to(error.dtype)
    assert parameter.grad is not None
    with torch.no_grad():
        parameter.grad += made
    forget(parameter)


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _by_sample(tensor: Tensor) -> Tensor:
    if tensor.ndim < 3:
        return _as_rows(tensor)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
