"""Linear layers whose weights have no gradient: the step makes it where it uses it.

The gradient of a linear layer's weight is the sum of the outer products of what came back for its
outputs and what went in. Here the layer leaves these with its weight, for the next step.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import _tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

_is_used = False  # some layer has left something with a parameter


class Factors:
    """A gradient, as what it is the outer products of: the layer's inputs, and its errors.

    Parameters
    ----------
    x
        Inputs, of shape [..., in]; None: ones, of a bias.
    error
        The derivatives of the loss by the layer's outputs, of shape [..., out].
    times
        Samples of the batch, if the loss is their mean; else 1.
    """

    __slots__ = ("_versions", "error", "is_taken", "times", "x")

    def __init__(self, x: Tensor | None, error: Tensor, times: int) -> None:
        self.x, self.error, self.times = x, error, times
        self.is_taken = False  # by a step
        self._versions = self._present_versions()

    def _present_versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in (self.x, self.error) if tensor is not None)

    @property
    def are_intact(self) -> bool:
        """Whether nobody has written to the tensors since."""
        return self._versions == self._present_versions()

    @property
    def elements(self) -> int:
        """How many numbers are kept."""
        return self.error.numel() + (0 if self.x is None else self.x.numel())


class _Passes(list[Factors]):
    """Those of one parameter. They are not for checkpoints: copies have none."""

    def __reduce__(self) -> Any:
        return (_Passes, ())


class _HandOver(torch.autograd.Function):
    """Leaves the factors with weight and bias when the gradient of `output` comes by."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, is_mean: bool
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.bias = weight, bias
        ctx.times = len(x) if is_mean and x.ndim > 1 else 1
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        _, _, *nodes = (node for node, _ in ctx.next_functions)
        parameters = ((ctx.weight, x), (ctx.bias, None))
        for (parameter, of_columns), node in zip(parameters, nodes, strict=False):
            if node is not None and _is_asked_for(node):
                _leave(parameter, Factors(_own(of_columns), error, ctx.times))
        return error, None, None, None, None


def _is_asked_for(node: Any) -> bool:
    """Return whether this backward pass is to accumulate the gradient of a node's parameter."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:
        raise RuntimeError(
            "torch.autograd.grad is asked for the gradient of a parameter of a fused linear "
            "layer, which is not made: call fusestep.torch.unfuse_linear(model) first"
        ) from error


def _own(x: Tensor | None) -> Tensor | None:
    """Return the inputs, or a copy of those that a step may move: a parameter's memory."""
    base = x if x is None or x._base is None else x._base
    is_of_parameter = base is not None and base.is_leaf and base.requires_grad
    return x.detach().clone() if x is not None and is_of_parameter else x


def _leave(parameter: Tensor, factors: Factors) -> None:
    """Leave factors with a parameter; as a gradient, where that is smaller than all of them."""
    global _is_used
    _is_used = True
    passes = factors_of(parameter)
    if not passes:
        passes = parameter.grad_factors = _Passes()  # type: ignore[attr-defined]
    passes.append(factors)
    if len(passes) > 1 and sum(one.elements for one in passes) > parameter.numel():
        add_to_gradient(parameter, "a parameter of a fused layer")


class FusedLinear(torch.nn.Linear):
    """An ``nn.Linear`` that leaves its gradient with its parameters as what it is made of."""

    loss_is_mean = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return ``input @ weight.T + bias``."""
        weight, bias = self.weight, self.bias
        if not self._hands_over(input):
            return functional.linear(input, weight, bias)
        output = functional.linear(input, weight.detach(), None if bias is None else bias.detach())
        handed: Tensor = _HandOver.apply(  # type: ignore[no-untyped-call]
            output, input, weight, bias, self.loss_is_mean
        )
        return handed

    def _hands_over(self, x: Tensor) -> bool:
        """Return whether parameters learn here, in a way that a step can make up for."""
        parameters = [p for p in (self.weight, self.bias) if p is not None]
        return (
            torch.is_grad_enabled()
            and any(p.requires_grad for p in parameters)
            and not any(_is_special(p) for p in parameters)
            and x.layout == torch.strided
            and torch._C._get_tracing_state() is None
            and torch._C._functorch.peek_interpreter_stack() is None
            and not _is_one_of_several_processes()
        )


def _is_special(parameter: Tensor) -> bool:
    """Return whether somebody wants its gradient: it is computed, hooked, complex or sharded."""
    return (
        not parameter.is_leaf
        or bool(parameter._backward_hooks)
        or bool(parameter._post_accumulate_grad_hooks)
        or parameter.is_complex()
        or _tensors.is_sharded(parameter)
    )


def _is_one_of_several_processes() -> bool:
    """Return whether gradients may have to be exchanged."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


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
    ``max_norm``), a ``GradScaler``. Call the optimizer's ``zero_grad``, not the model's. Nobody may
    write to a layer's input, or to the gradient of its output, before the step, which raises
    ``RuntimeError`` then.

    A parameter gets an ordinary gradient, in backward or when the step is taken, where it has one
    besides (a tied embedding), or where the factors of several passes take more memory than that.
    A layer is as if it were not fused where its parameters are computed (``weight_norm``), hooked,
    complex or sharded, in transforms of ``torch.func``, and where there are several processes,
    which may have to exchange gradients.

    Samples are what lies along the first axis of a layer's input.

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
            vars(layer).pop("loss_is_mean", None)
            layer.__class__ = torch.nn.Linear  # type: ignore[assignment]
    return model


def _check_is_in_one_place(model: nn.Module) -> None:
    is_sharded = any(map(_tensors.is_sharded, model.parameters()))
    replicas = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    if is_sharded or any(isinstance(module, replicas) for module in model.modules()):
        raise TypeError(
            f"the model is {'sharded' if is_sharded else 'replicated'}: processes "
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
    if hasattr(parameter, "grad_factors"):
        del parameter.grad_factors


def taken(parameter: Tensor, label: str) -> list[Factors]:
    """Return it for a step.

    Raises
    ------
    RuntimeError
        Somebody has written to a layer's inputs, or to the gradient of its output.
    """
    passes = factors_of(parameter)
    if not all(factors.are_intact for factors in passes):
        raise RuntimeError(
            f"{label}: the input of its fused layer, or the gradient of its output, has been "
            "changed in place since backward(), before a step could use it; give the layer a "
            "copy, or call fusestep.torch.unfuse_linear(model)"
        )
    return passes


def mark_taken(parameter: Tensor) -> None:
    """Note that a step has used it."""
    passes = factors_of(parameter)
    if passes and passes[0].is_taken and not passes[-1].is_taken:
        warnings.warn(
            "the gradients of fused linear layers have been accumulated over steps: call the "
            "optimizer's zero_grad(), which knows of them, rather than the model's",
            RuntimeWarning,
            stacklevel=4,
        )
    for factors in passes:
        factors.is_taken = True


def in_all(parameter: Tensor, label: str) -> tuple[Tensor | None, Tensor]:
    """Return x and error of all passes that a parameter has had a part in: [rows, ...] each."""
    passes = taken(parameter, label)
    xs = [_as_rows(factors.x) for factors in passes if factors.x is not None]
    errors = [_as_rows(factors.error) for factors in passes]
    x, error = (_joined(xs) if xs else None), _joined(errors)
    if len(error) > 0:
        return x, error
    # Of an empty batch the gradient is zero, and not none: state ages.
    return None if x is None else x.new_zeros(1, x.shape[1]), error.new_zeros(1, error.shape[1])


def of_samples(parameter: Tensor, label: str) -> tuple[Tensor | None, Tensor]:
    """Return x and error by sample, [N, positions, ...], of the losses that have been averaged.

    Raises
    ------
    ValueError
        There has been more than one pass, whose samples might be the same.
    """
    factors, *others = taken(parameter, label)
    if others:
        raise ValueError(
            f"{label}: its layer has been used {1 + len(others)} times since the last step, so it "
            "is not known which gradients belong to one sample"
        )
    error = factors.error if factors.times == 1 else factors.error * factors.times
    return (None if factors.x is None else _by_sample(factors.x)), _by_sample(error)


def add_to_gradient(parameter: Tensor, label: str) -> None:
    """Add it to the gradient that the parameter has besides, if any."""
    x, error = in_all(parameter, label)
    with torch.no_grad():
        made = error.sum(0) if x is None else error.T @ x.to(error.dtype)
        made = made.to(parameter.dtype)
        parameter.grad = made if parameter.grad is None else made + parameter.grad
    forget(parameter)


def _as_rows(tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _by_sample(tensor: Tensor) -> Tensor:
    if tensor.ndim < 3:
        return _as_rows(tensor)
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
