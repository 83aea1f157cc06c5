"""What every optimizer for torch can do, whatever its rule."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import optimizer as torch_optimizer

from .. import _cpu
from .._averages import ENTRY as AVERAGE
from .._averages import check_decay
from .._hyperparameters import check_seed, clip_value, flag, max_norm, one_of
from .._state import NARROW, check_rows, check_state_dtype, check_wide_dtype, piece_of
from .._state_dict import OUR_SETTINGS, block_entries
from ..gradients import as_indices
from . import (
    _anchors,
    _averages,
    _distributed,
    _load,
    _masters,
    _pieces,
    _samples,
    _selections,
    _state,
    _tables,
    _tensors,
    linear,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from .. import Optimizer as ArrayOptimizer

_global_pre_hooks = torch_optimizer._global_optimizer_pre_hooks
_global_post_hooks = torch_optimizer._global_optimizer_post_hooks

_not_compiled = torch._compile._disable_dynamo  # as torch's own optimizers do

# Hyper-parameters that are not options of a rule.
_OUTSIDE_THE_RULE = frozenset({"lr", "maximize", *OUR_SETTINGS})

# What our settings are where they are not in a state dict; the others are 0, or False.
_DEFAULTS: Mapping[str, Any] = {"max_norm": None, "clip_value": None, "ema_decay": None}

# Keys of a group that matter besides the rule's options.
_WATCHED = frozenset({"maximize", "differentiable", "capturable", "fused"})

_CPU = torch.device("cpu")

# torch's words, which its users may look for.
_META_AND_FUSED = (
    "`fused=True` requires all the params to be floating point Tensors of supported devices: {} is "
    "on the meta device"
)


# A parameter, how many of its recent steps each row has missed, and what is known of these steps.
MissedSteps: TypeAlias = tuple[Tensor, Any, list[list[float]]]

# A number in [0, 1], or a callable from the number of steps taken to one; None: no averages.
EmaDecay: TypeAlias = float | Callable[[int], float] | None


class Rule(NamedTuple):
    """How the parameters of a group move, and what state that takes."""

    # The kernels' options, maximize, the keys of the group that say so, and whether a value may
    # change without being replaced: what the native half is told of a group.
    told: tuple[dict[str, float], bool, set[str], bool]
    states: dict[str, bool]  # by name: whether it is signed
    scalars: list[str]


class Optimizer(torch.optim.Optimizer):
    """Base class of all optimizers for torch; create one of its subclasses.

    Keyword arguments that the subclasses take besides torch's:

    Parameters
    ----------
    max_norm
        Clip the L2 norm of all gradients of a step together, over all parameter groups and, for
        DTensor parameters, over all shards, as ``torch.nn.utils.clip_grad_norm_`` does. ``p.grad``
        is not changed.
    clip_value
        Bring each element of the gradients to within [-clip_value, clip_value], after `max_norm`,
        as ``torch.nn.utils.clip_grad_value_`` does. ``p.grad`` is not changed.
    skip_nonfinite
        Leave out a step in which any gradient holds a NaN or an infinity: no parameter and no state
        changes; :attr:`skipped_steps` counts it.
    ema_decay
        Keep an exponential moving average of each parameter, in the same pass:
        ``average = ema_decay * average + (1 - ema_decay) * parameter`` after each step. A number in
        [0, 1], or a callable from the number of steps taken to one: :class:`fusestep.EmaWarmup`.
        See :attr:`averages` and :meth:`swap_averages`. An average begins where its parameter is
        before its first step; what a step does not move leaves its average as it is.
    state_dtype
        Dtype of new state: None (float64 for float64 parameters, float32 for all others),
        ``torch.float32``, ``torch.float64``, ``torch.bfloat16``, or ``torch.int8`` or ``"int8"``:
        8 bits, of which 64 neighbours share a power of two, for parameters that are not DTensors; a
        step then moves whole blocks of 64 elements, or all of a parameter. In bfloat16 and 8 bits
        it is rounded at random, up or down, so that its mean is what float32 would have; that of
        complex parameters stays wide.
    stochastic_rounding
        Round parameters in bfloat16 and float16 at random, too, so that updates count which are
        less than half of the last place.
    master
        ``"float32"``: parameters in bfloat16 and float16 are the roundings of masters in float32,
        which a step moves and averages; it writes the parameter in the same pass. Other parameters
        have none. What others write to such a parameter becomes its master's value, as far as it is
        not its rounding anyway; but what is written through ``p.data``, of which torch takes no
        note, only after :meth:`refresh_masters`. Not for DTensors. ``"split"``: the same numbers,
        to the bit but for ties, in half the memory: each parameter in bfloat16 has the 16 bits
        besides that it lacks of a float32. Those in float16 have no master then. What others write
        to a parameter, in whatever way, counts at once, to within half of its last place.
    rows
        What a step with a sparse gradient means for the rows that it does not have. ``"lazy"``:
        nothing, they and their state stay as they are, as with ``torch.optim.SparseAdam``.
        ``"exact"``: a gradient of zero, as if it were dense. They are brought up to date when they
        next have a gradient; before a forward pass reads rows, call :meth:`catch_up`, before
        anything reads the whole table, :meth:`flush`. Step counts are on the CPU then, and with
        ``skip_nonfinite`` or a ``GradScaler`` each step waits for the GPU.
    seed
        Of every random choice, from 0 to 2**64 - 1: which blocks :class:`fusestep.RandomBlocks`
        draws, and how numbers are rounded at random, which depends on the seed, on how many updates
        the parameter has had and on its place among all parameters.

    Notes
    -----
    ``foreach`` and ``fused`` are accepted: the step is one pass over all parameters in any case.
    With ``fused=True``, as in torch, ``torch.amp.GradScaler`` leaves unscaling to the step.
    ``differentiable`` and, for parameters on the CPU, ``capturable`` are refused.

    Parameters may be on the CPU and on NVIDIA GPUs. There, steps go to torch's current stream and
    are not waited for. Step counts are on the CPU or, with ``capturable`` or ``fused`` (as in
    torch), ``skip_nonfinite`` or a learning rate on the GPU, on the parameter's device.

    Parameters may have sparse gradients, coalesced or not, of the form that
    ``torch.nn.Embedding(sparse=True)`` makes. The parameter's step is counted, whichever rows have
    a gradient. On a GPU, the step waits for the indices, which the host has to see.
    """

    _array_class: ClassVar[type[ArrayOptimizer]]
    """The class for arrays with the same rule, whose hyper-parameters these are."""

    _implied: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Hyper-parameters of groups that do not say otherwise."""

    _scalars: _state.Scalars | None
    _rules: list[Rule]
    _counts_on_gpu: bool  # of parameters that are on one
    # While torch's constructor adds the first groups:
    _rows = "lazy"
    _state_dtype: str | None = None
    _master: str | None = None
    _ema_decay: EmaDecay = None
    _native: _cpu.TorchOptimizer
    _histories: dict[Tensor, _cpu.RowHistory]
    _blocks: dict[Tensor, _cpu.BlockProgress]
    _takes_samples: bool = False  # so zero_grad() is to let go of them
    _sampled: frozenset[int] = frozenset()  # ids of those that move by samples in this step
    _has_selected: bool  # some step has had random choices, and steps are counted from there on
    _step_supports_amp_scaling = False  # torch's constructors set it where fused=True

    # ---- stepping -------------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float = 1.0,
        zero_grad: bool = False,
        where: Any = None,
        sample_weight: Any = None,
        sample_options: Any = None,
    ) -> Any:
        """Update the parameters that have a gradient, and their state, in place.

        Parameters
        ----------
        closure
            Evaluates the model again, calls ``backward`` and returns the loss.
        grad_scale
            Multiplies all gradients before anything else: 1 / loss scale to unscale.
        zero_grad
            Set the gradients to zero in the same pass, as ``zero_grad(set_to_none=False)`` does.
            Sparse ones have no rows then.
        where
            Which part of the parameters may move; None: all. A selection for all of them
            (:class:`fusestep.RandomBlocks`, :class:`fusestep.CyclicBlocks`,
            :class:`fusestep.TopK`), or a dict from parameters to selections and boolean tensors (of
            a parameter's shape or of its first axis), or such a list in the order of the parameters
            in all groups. See :meth:`fusestep.Optimizer.step`. Steps are counted, for draws and
            schedules, from the first one that has it. On a GPU the host knows from then on how far
            the blocks have come: a step waits for a loss scaler and for ``skip_nonfinite``, and
            cannot be captured in a CUDA graph.
        sample_weight, sample_options
            With either, the gradients are those of samples: ``p.grad_sample``, of shape
            [N, *shape], which Opacus' ``GradSampleModule`` makes, or you assign. They are weighed
            and added up as by :class:`fusestep.Samples`: `sample_weight` are its weights, N numbers
            or None, and `sample_options` a dict with some of ``max_norm``, ``noise_multiplier`` and
            ``reduction``. With these it is the step of Opacus' ``DPOptimizer``. ``p.grad`` is not
            looked at. With `zero_grad`, and from then on with :meth:`zero_grad`, ``p.grad_sample``
            is set to None, too. On a GPU such a step waits for a loss scaler, for weights that are
            there and, with ``max_norm``, for the norms of samples.

        Returns
        -------
        Any
            What the closure returned; None without one.

        Raises
        ------
        TypeError
            A gradient or parameter is on a device that is neither the CPU nor an NVIDIA GPU, or not
            of a supported dtype. A parameter is sparse; or a gradient is, and
            ``gradient.sparse_dim() != 1``.
        IndexError
            A sparse gradient has a row that its parameter has not.
        ValueError
            Shapes differ, two parameters share memory, a gradient shares memory with a parameter or
            state, a gradient is on another device than its parameter, or an option of a group has a
            value that is out of range; there are no samples where they are asked for, or not of all
            parameters with a gradient, or of a DTensor; `where` is given for parameters on a GPU in
            a group that is capturable; or a part of a block of 64 elements would move whose state
            is in 8 bits.
        RuntimeError
            A CUDA graph is being captured, and its replays would not be steps; or a gradient on the
            GPU is sparse, ``rows`` is "exact", or samples have weights on the GPU or ``max_norm``.
            The averages are in the parameters' place (:meth:`swap_averages`).

        Notes
        -----
        A step that raises has changed no parameter and no state.
        """
        if (
            closure is not None
            or where is not None
            or sample_weight is not None
            or sample_options is not None
            or self._step_supports_amp_scaling
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
            or profiler._is_profiler_enabled
        ):
            return self._observed_step(
                closure, grad_scale, zero_grad, where, sample_weight, sample_options
            )
        if linear.is_used():
            return self._plain_step(grad_scale=grad_scale, zero_grad=zero_grad)
        self._native.step(self, self.param_groups, self.state, grad_scale, zero_grad)
        return None

    # torch wraps the step of every class in a profiler range, which costs more than a small step
    # does. This says that it need not: we do it ourselves when somebody is looking.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters; see ``torch.optim.Optimizer.zero_grad``.

        Parameters
        ----------
        set_to_none
            Drop the gradients, rather than fill them with zeros.
        """
        if not set_to_none or profiler._is_profiler_enabled:
            super().zero_grad(set_to_none)
            _samples.forget(self)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        _samples.forget(self)

    @_not_compiled
    def _observed_step(
        self,
        closure: Callable[[], Any] | None,
        grad_scale: float,
        zero_grad: bool,
        where: Any,
        sample_weight: Any,
        sample_options: Any,
    ) -> Any:
        if type(self).step is not Optimizer.step:  # a subclass's, around which torch runs the hooks
            return self._plain_step(
                closure,
                grad_scale=grad_scale,
                zero_grad=zero_grad,
                where=where,
                sample_weight=sample_weight,
                sample_options=sample_options,
            )
        args = () if closure is None else (closure,)
        kwargs: dict[str, Any] = {}  # hooks see what the user wrote
        if grad_scale != 1.0:
            kwargs["grad_scale"] = grad_scale
        if zero_grad:
            kwargs["zero_grad"] = zero_grad
        if where is not None:
            kwargs["where"] = where
        if sample_weight is not None:
            kwargs["sample_weight"] = sample_weight
        if sample_options is not None:
            kwargs["sample_options"] = sample_options
        return self._step_with_hooks(*args, **kwargs)

    def _plain_step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float = 1.0,
        zero_grad: bool = False,
        where: Any = None,
        sample_weight: Any = None,
        sample_options: Any = None,
    ) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler sets these two around a step that unscales for itself.
        found_inf = getattr(self, "found_inf", None)
        loss_scale = getattr(self, "grad_scale", None)
        on_gpu = None
        is_scaled = loss_scale is not None or found_inf is not None
        by_sample = sample_weight is not None or sample_options is not None
        # The host counts updates of blocks, and bounds samples.
        if is_scaled and not by_sample and not _selections.are_on_gpu(self, where):
            on_gpu = self._on_the_gpu(loss_scale, found_inf)
        if on_gpu is None:
            if found_inf is not None and float(found_inf) != 0:
                return loss
            if loss_scale is not None:
                grad_scale /= float(loss_scale)
            on_gpu = None, None
        samples: Sequence[tuple[Tensor, Any]] = ()  # in place of gradients
        if by_sample:
            samples = _samples.taken(self, sample_weight, sample_options)
        elif linear.is_used():
            samples = _samples.of_layers(self)
        chosen = [] if where is None else _selections.chosen(self, where)
        scale_there, inf_there = on_gpu
        self._sampled = frozenset(id(parameter) for parameter, _ in samples)
        try:
            self._native.step(
                self,
                self.param_groups,
                self.state,
                grad_scale,
                zero_grad and not by_sample,
                scale_there,
                inf_there,
                chosen,
                samples,
            )
        finally:
            self._sampled = frozenset()
        if zero_grad and by_sample:
            self.zero_grad(set_to_none=False)
        elif zero_grad and samples:
            _samples.forget(self)
        return loss

    def _on_the_gpu(self, *numbers: Any) -> tuple[Tensor | None, ...] | None:
        """Return a scaler's numbers on the GPU of all parameters; None where there is no such."""
        if self._rows == "exact" or not any(_tensors.is_on_gpu(value) for value in numbers):
            return None  # the host has to know which steps are taken
        parameters = [p for group in self.param_groups for p in group["params"]]
        devices = {_tensors.device_of(parameter) for parameter in parameters}
        if len(devices) != 1 or any(map(_tensors.is_sharded, parameters)):
            return None  # the host decides, for all of them
        (device,) = devices
        if device.type != "cuda":
            return None
        return tuple(None if x is None else _tensors.moved(x.float(), device) for x in numbers)

    # The profiler range and the hooks, global and our own, in torch's order.
    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_plain_step)

    # ---- rows that have missed steps, anchors, tables that grow ---------------------------------

    @_not_compiled
    def catch_up(self, indices: Any) -> None:
        """Bring rows up to date that have missed steps, so that they may be read.

        To be called before a forward pass that reads these rows. Does nothing unless the optimizer
        was created with ``rows="exact"``.

        Parameters
        ----------
        indices
            A dict from parameters to rows, or the rows themselves where the optimizer has but one
            parameter. Rows are a tensor or array of int32 or int64, of any shape (what
            ``nn.Embedding`` is called with), or a list of int; in any order, and as often as you
            like.

        Raises
        ------
        TypeError
            Rows are not whole numbers; or not in a dict, where there are several parameters.
        ValueError
            The dict has something that is not a parameter; a parameter has no rows; or it has been
            given another number of rows while some had missed steps.
        IndexError
            There is no such row. Nothing has been changed then.
        """
        rows = self._checked_rows(indices)
        if self._rows == "exact":
            self._native.catch_up(self, rows)

    @_not_compiled
    def flush(self) -> None:
        """Bring all rows up to date that have missed steps, so that the parameters may be read.

        To be called before an evaluation, before the parameters are saved, and before anybody
        writes to a parameter, gives it other memory or takes it out of its group. Does nothing
        unless the optimizer was created with ``rows="exact"``. Costs about as much as a dense step.

        Raises
        ------
        TypeError, ValueError
            A parameter with rows that have missed steps is no longer where they can be made up for.
            Nothing has been changed then.
        """
        if self._rows != "exact":
            return
        self._native.catch_up(self, None)
        if any(history.has_missed_steps for history in self._histories.values()):
            warnings.warn(
                "a parameter that is in no group of this optimizer has rows that have missed "
                "steps, which can only be made up for in a group",
                RuntimeWarning,
                stacklevel=2,
            )

    @_not_compiled
    def anchor(self, strength: Any, reference: Any = None, importance: Any = None) -> None:
        r"""Keep parameters near where they have been: L2-SP, or with `importance` EWC.

        From now on each step that moves a parameter pulls it, after the rule and in the same pass,

        .. math:: w ← \frac{w + κ w^*}{1 + κ}, \qquad κ = lr · λ · F

        as :meth:`fusestep.Optimizer.anchor` describes. Anchors add up: after another task, call it
        again, and both pull, in the memory and time of one.

        Parameters
        ----------
        strength
            λ >= 0: one number, or a dict from parameters to numbers, or a list in the order of the
            parameters in all groups. A parameter that is None, or not in the dict, is left as it
            is.
        reference
            :math:`w^*`: such a dict or list of tensors or arrays of the parameters' shapes, on any
            device. A parameter that it leaves out is left as it is: a new head, say. Without it,
            the parameters' present values. Copied, to the parameter's device.
        importance
            F >= 0, likewise: the diagonal of the Fisher information (:class:`fusestep.Fisher`).
            Without it, 1. Copied, likewise.

        Raises
        ------
        TypeError
            Something is not a tensor or array of floats; a parameter is complex, a DTensor, or on a
            device that is neither the CPU nor an NVIDIA GPU.
        ValueError
            A shape differs; a number is negative or not finite; something is not a parameter.
            Nothing has been changed then.

        References
        ----------
        Li, Grandvalet & Davoine (2018), "Explicit inductive bias for transfer learning with
        convolutional networks", equation 2 (L2-SP); Kirkpatrick et al. (2017), "Overcoming
        catastrophic forgetting in neural networks", equation 3 (EWC).
        """
        self._check_not_swapped()
        self._native.exclusively(lambda: _anchors.add(self, strength, reference, importance))

    @_not_compiled
    def release_anchor(self) -> None:
        """Let all parameters go where their gradients lead."""
        self._native.exclusively(lambda: _anchors.release_all(self))

    @property
    def anchors(self) -> dict[Tensor, dict[str, Any]]:
        """The anchor of each parameter that has one: ``strength``, ``reference``, ``importance``.

        They are in :attr:`state`, too: ``anchor_strength``, ``anchor`` and ``anchor_importance``.
        """
        return {p: anchor._asdict() for p, anchor in _anchors.all_of(self).items()}

    @_not_compiled
    def resize(self, parameter: Tensor, n_rows: int, init: Any = 0.0) -> None:
        """Give a table more rows: there are new users, or new items.

        The parameter stays the same object, and its module goes on using it; what else a module
        notes of its size (``num_embeddings`` of an ``nn.Embedding``) is yours to set. Old rows and
        their state keep their bits; new ones start fresh. A gradient grows, too: new rows have
        none. Call it between a step and the next forward pass. The table moves to other memory,
        each time: ask for many rows at once.

        Parameters
        ----------
        parameter
            One of this optimizer's.
        n_rows
            Its new extent along the first axis; not less than the present one.
        init
            What new rows are filled with: a number, a tensor or array of shape [new rows, *rest],
            or a callable that returns such, given the shape.

        Raises
        ------
        KeyError
            It is not a parameter of this optimizer.
        TypeError
            `n_rows` is not an int; the parameter is not a plain tensor on the CPU or an NVIDIA GPU.
        ValueError
            It has more rows already, or no dimensions; `init` does not have the shape of the new
            rows. Nothing has been changed then.
        """
        self._check_not_swapped()
        self._native.exclusively(lambda: _tables.resize(self, parameter, n_rows, init))

    # ---- averages, and master weights -----------------------------------------------------------

    @property
    def averages(self) -> list[Tensor]:
        """The averages (``ema_decay``), in the order of the parameters in all groups.

        Tensors of the parameters' shapes, float64 of float64 parameters, float32 of all others:
        those that the next step updates, ``opt.state[p]["average"]``. Of a parameter that has not
        moved yet, a copy of itself.
        """
        self._check_has_averages()
        return [_averages.of(self, parameter) for parameter, _ in self._parameters()]

    def average_of(self, parameter: Tensor) -> Tensor:
        """Return the average of a parameter, as in :attr:`averages`.

        Parameters
        ----------
        parameter
            One of this optimizer's.

        Raises
        ------
        AttributeError
            There are no averages.
        KeyError
            It is not a parameter of this optimizer.
        """
        self._check_has_averages()
        self._label_of(parameter)
        return _averages.of(self, parameter)

    def swap_averages(self) -> AbstractContextManager[None]:
        """Put the averages in the parameters' place, to evaluate with them; and put them back.

        Within the ``with`` block the parameters, which stay the same objects in the same memory,
        hold the values of their averages, rounded where their dtype is narrower. Takes as much
        memory as the parameters meanwhile. What is written to parameters within is lost.

        Raises
        ------
        AttributeError
            There are no averages.
        RuntimeError
            They are in the parameters' place already; or, within the block, a step is taken, or
            state is saved, loaded or changed.

        Examples
        --------
        >>> import torch, fusestep.torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = fusestep.torch.SGD([w], lr=1.0, ema_decay=0.5)
        >>> w.grad = torch.full((2,), -4.0)
        >>> opt.step()
        >>> with opt.swap_averages():
        ...     print(w.tolist())
        [2.0, 2.0]
        >>> w.tolist()
        [4.0, 4.0]
        """
        self._check_has_averages()
        return _averages.in_place_of_parameters(self)

    @property
    def ema_decay(self) -> EmaDecay:
        """Decay of the averages: a number, or a callable from the number of steps taken."""
        return self._ema_decay

    @ema_decay.setter
    def ema_decay(self, value: EmaDecay) -> None:
        checked = check_decay("ema_decay", value)
        if (checked is None) != (self._ema_decay is None):
            raise ValueError(
                f"ema_decay is {value!r} where this optimizer was created with "
                f"{self._ema_decay!r}; it decides whether there are averages: create a new "
                "optimizer, and load this one's state_dict()"
            )
        self._check_schedule(checked)
        self._set_ema_decay(checked)

    def _set_ema_decay(self, checked: EmaDecay) -> None:
        self._ema_decay = checked
        if checked is not None:
            self._native.set_ema_decay(checked)
        self._count_steps_if_needed()

    def _count_steps_if_needed(self) -> None:
        """Have steps be counted, and saved, where a schedule of averages or rounding needs it."""
        if callable(self._ema_decay) or self._rounds_at_random():
            _selections.count_steps(self)

    def _rounds_at_random(self) -> bool:
        """Return whether what a step rounds depends on the seed."""
        return self.stochastic_rounding or self._state_dtype in NARROW

    def _check_schedule(self, ema_decay: EmaDecay) -> None:
        """Raise ValueError for a callable that a CUDA graph would have to call."""
        is_captured = any(group.get("capturable") for group in getattr(self, "param_groups", []))
        if callable(ema_decay) and is_captured:
            raise ValueError(
                "ema_decay is a callable, which a CUDA graph cannot call: with capturable=True "
                "give a number"
            )

    def _check_has_averages(self) -> None:
        if self._ema_decay is None:
            raise AttributeError(
                "there are no averages: create the optimizer with ema_decay=0.999, say"
            )

    def _check_not_swapped(self) -> None:
        if self._native.is_swapped:
            raise RuntimeError(
                "the averages are in the parameters' place: do this outside of "
                "`with opt.swap_averages()`"
            )

    @property
    def master(self) -> str | None:
        """How masters of narrow parameters are kept: "float32", "split", or None."""
        return self._master

    def refresh_masters(self) -> None:
        """Have masters follow parameters that somebody has written to through ``p.data``.

        Of that torch takes no note; all else that is written to parameters a step finds out by
        itself. Elements that are the rounding of their master leave it as it is; of all others the
        master becomes what they are. Does nothing unless ``master`` is "float32".

        Raises
        ------
        RuntimeError
            The averages are in the parameters' place.
        """
        self._check_not_swapped()
        self._native.exclusively(lambda: _masters.refresh(self))

    def _kept_besides(self, parameter: Tensor) -> list[str]:
        """Return the entries of a parameter's state that are neither the rule's nor an anchor's."""
        return [*_masters.wanted(self, parameter), *_averages.wanted(self)]

    @property
    def rows(self) -> str:
        """What a step with a sparse gradient means for the rows that it does not have."""
        return self._rows

    def _checked_rows(self, indices: Any) -> list[Any]:
        """Return the rows of each parameter that :meth:`catch_up` was given; None of the others."""
        parameters = self._parameters()
        if isinstance(indices, Mapping):
            given = _anchors.from_mapping(parameters, indices, "indices")
        elif len(parameters) == 1:
            given = [indices]
        else:
            raise TypeError(
                f"indices are a {type(indices).__name__}; expected a dict from parameters to "
                f"rows, since there are {len(parameters)} parameters"
            )
        rows = [None if each is None else _flat(as_indices(each)) for each in given]
        for (parameter, label), each in zip(parameters, rows, strict=True):
            if each is None or self._rows != "exact":
                continue
            if parameter.ndim == 0:
                raise ValueError(f"{label} has no dimensions, and so no rows")
            _cpu.check_row_numbers(each, len(parameter))
        return rows

    def _history_of(self, parameter: Tensor) -> _cpu.RowHistory | None:
        """Return where the steps are noted that rows of a parameter miss; None without need."""
        if self._rows != "exact" or parameter.ndim == 0:
            return None
        history = self._histories.get(parameter)
        if history is None:
            history = self._histories[parameter] = _cpu.RowHistory(len(parameter))
        return history

    def _drop_unused_histories(self, present: set[int]) -> None:
        """Drop what is known of parameters that have left their groups and owe nothing."""
        self._histories = {
            p: history
            for p, history in self._histories.items()
            if id(p) in present or history.has_missed_steps
        }
        self._blocks = {p: blocks for p, blocks in self._blocks.items() if id(p) in present}

    def _missed_steps(self) -> list[MissedSteps]:
        """Return the parameters with rows that have missed steps, and these."""
        found = ((p, self._histories.get(p)) for p, _ in self._parameters())
        missed = ((p, history.missed_steps()) for p, history in found if history is not None)
        return [(p, *steps) for p, steps in missed if steps is not None]

    def _histories_of(
        self, groups: Sequence[Mapping[str, Any]], missed: Iterable[MissedSteps]
    ) -> dict[Tensor, _cpu.RowHistory]:
        """Return the histories that say this of parameters in these groups."""
        options = {id(p): self._rule_of(group).told[0] for group in groups for p in group["params"]}
        histories: dict[Tensor, _cpu.RowHistory] = {}
        for parameter, rows, steps in missed:
            history = histories[parameter] = _cpu.RowHistory(len(rows))
            history.restore(self._array_class._rule, options[id(parameter)], rows, steps)
        return histories

    @property
    def seed(self) -> int:
        """Of every random choice; may be assigned."""
        return self._native.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._native.seed = check_seed(value)

    @property
    def skipped_steps(self) -> int:
        """Steps left out because ``skip_nonfinite`` found a NaN or an infinity."""
        return self._native.skipped_steps

    # ---- telling the native half what there is, when it asks, inside a step ---------------------

    @_not_compiled
    def _tell_everything(self, is_for_a_step: bool) -> None:
        """Describe all groups, parameters and state; for a step, making what state is missing."""
        self._drop_unused_state(for_a_step=is_for_a_step)
        self._native.forget()
        self.param_groups = _in_lists(self.param_groups)
        self._rules = [self._rule_of(group) for group in self.param_groups]
        self._counts_on_gpu = self._should_count_on_gpu()
        self._native.set_resident(self._counts_on_gpu)
        parameters = list(_labelled(self.param_groups))
        scalars = self._scalars = self._scalars_for([parameter for parameter, _ in parameters])
        self._drop_unused_histories({id(parameter) for parameter, _ in parameters})
        column = 0
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            self._native.add_group(group, self._array_class._rule, *rule.told)
            for _ in group["params"]:
                parameter, label = parameters[column]
                if parameter.is_meta and parameter.grad is not None and group.get("fused"):
                    raise RuntimeError(_META_AND_FUSED.format(label))
                has_gradient = parameter.grad is not None or id(parameter) in self._sampled
                needs_state = is_for_a_step and has_gradient
                self._tell_parameter(parameter, label, rule, scalars, column, needs_state)
                column += 1
        self._native.seal(self.state)

    def _scalars_for(self, parameters: list[Tensor]) -> _state.Scalars:
        """Return scalars in which the state of each parameter has, or can have, its place."""
        entries = [self.state.get(parameter, {}) for parameter in parameters]
        devices = self._scalar_devices(parameters)
        if self._scalars is not None and self._scalars.suit(entries, devices):
            return self._scalars
        scalars = _state.Scalars(self._rule_of({}).scalars, entries, devices)
        if self._scalars is not None:
            for column, entry in enumerate(entries):
                # On a GPU they stay: CUDA graphs go on writing there.
                if devices[column] == _CPU and self._scalars.own(entry):
                    self._change(parameters[column], scalars.moved(entry, column))
        return scalars

    def _drop_unused_state(self, *, for_a_step: bool = False) -> None:
        """Drop the state of parameters of which a GPU has left out every step so far.

        Where torch keeps no step count, it is the state that says there has been a step. What has
        been put there since is somebody else's, and stays; so do anchors, which wait for a step.
        """
        if not self._counts_on_gpu or self._rule_of({}).scalars:
            return
        unused = self._native.unused()
        for group in self.param_groups:
            for parameter in group["params"]:
                entry = self.state.get(parameter, {})
                states = unused.get(id(parameter))
                if states is None or not {*states} <= {*map(id, entry.values())}:
                    continue
                if for_a_step:
                    self._changes.append((parameter, dict(entry)))
                if anchor := _anchors.kept(entry):
                    self.state[parameter] = anchor
                else:
                    del self.state[parameter]

    def _should_count_on_gpu(self) -> bool:
        """Return whether step counts of parameters on a GPU belong there.

        Where the host cannot know whether a step happens, or how often; but it has to where it
        counts the updates of blocks, or notes which rows have missed one.
        """
        if self._rows == "exact" or _selections.are_on_gpu(self, None):
            return False
        return any(
            self.skip_nonfinite
            or group.get("capturable")
            or group.get("fused")
            or _tensors.is_on_gpu(group["lr"])
            for group in self.param_groups
        ) and any(_tensors.is_on_gpu(p) for group in self.param_groups for p in group["params"])

    def _scalar_devices(self, parameters: list[Tensor]) -> list[torch.device]:
        """Return where the scalars of each parameter belong."""
        return [
            _tensors.device_of(parameter)
            if self._counts_on_gpu and _tensors.is_on_gpu(parameter)
            else _CPU
            for parameter in parameters
        ]

    def _tell_parameter(
        self,
        parameter: Tensor,
        label: str,
        rule: Rule,
        scalars: _state.Scalars,
        column: int,
        needs_state: bool,
    ) -> None:
        entry = self.state.get(parameter, {})
        needed, besides = [*rule.scalars, *rule.states], self._kept_besides(parameter)
        is_first = not all(_state.is_there(entry.get(name)) for name in needed)
        has_besides = all(_state.is_there(entry.get(name)) for name in besides)
        # Rows that have missed steps may be asked for before there is a gradient.
        is_ready = needs_state or (not is_first and (has_besides or self._rows == "exact"))
        anchor = _anchors.of(entry) if is_ready else None
        has_master = is_ready and _masters.WIDE in besides
        version = parameter._version if has_master else 0
        if is_ready and (needed or anchor or besides):
            if parameter.layout is not torch.strided:  # there would be no such state either
                raise TypeError(f"{label} {_tensors.refusal(parameter)}")
            masters = _masters.fitted(self, entry, parameter, label)
            source = _masters.value(parameter, masters)
            complete = {
                **scalars.completed(entry, column, label),
                **self._completed_states(parameter, entry, label, rule.states),
                **_anchors.fitted(entry, parameter, label, self._state_dtype),
                **masters,
                **_averages.fitted(self, entry, parameter, label, source),
            }
            entry = self._change(parameter, {**complete, **_pieces.without(entry, complete)})
        self._native.add_parameter(
            parameter,
            label,
            [entry[name] for name in rule.states] if is_ready else None,
            self._powers_of(parameter, entry, rule) if is_ready else [],
            [entry[name] for name in rule.scalars] if is_ready else [],
            scalars.places(entry) if is_ready else [],
            is_first,
            _tensors.is_sharded(parameter),
            self._history_of(parameter),
            _anchors.of(entry) if is_ready else None,
            self._blocks.get(parameter),
            entry[AVERAGE] if is_ready and AVERAGE in besides else None,
            (entry[_masters.WIDE], version) if has_master else None,
            entry[_masters.LOWER_HALF] if is_ready and _masters.LOWER_HALF in besides else None,
        )

    def _completed_states(
        self, parameter: Tensor, entry: dict[str, Any], label: str, states: Mapping[str, bool]
    ) -> dict[str, Tensor]:
        """Return the tensors of these pieces of state: those there are, fitted, or new ones."""
        dtype = _state.dtype_for(self._state_dtype, parameter)
        fill = self._initial_state()
        return _pieces.completed(entry, parameter, label, states, dtype, fill)

    def _powers_of(self, parameter: Tensor, entry: dict[str, Any], rule: Rule) -> list[Tensor]:
        """Return the powers of a state in 8 bits; nothing of another one."""
        dtype = _state.dtype_for(self._state_dtype, parameter)
        return _pieces.powers_of(entry, rule.states, dtype)

    def _first_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return what the state of a parameter lacks, as it is before the first step.

        Nothing where the rule keeps no step count: to these, state means that there was a step.
        """
        rule, entry = self._rule_for(parameter), self.state.get(parameter, {})
        if not rule.scalars:
            return {}
        count = functools.partial(torch.tensor, dtype=_state.scalar_dtype())
        scalars = {
            name: count(_state.initial_scalar(name))
            for name in rule.scalars
            if not _state.is_there(entry.get(name))
        }
        lacking = {
            name: is_signed
            for name, is_signed in rule.states.items()
            if not _pieces.is_there(piece_of(entry, name))
        }
        label = self._label_of(parameter)
        return {**scalars, **self._completed_states(parameter, {}, label, lacking)}

    def _label_of(self, parameter: Tensor) -> str:
        """Return what error messages call a parameter; KeyError if it is not one of this one's."""
        for each, label in self._parameters():
            if each is parameter:
                return label
        raise KeyError(f"this {type(parameter).__name__} is not a parameter of this optimizer")

    def _rule_for(self, parameter: Tensor) -> Rule:
        """Return the rule by which one of the parameters moves."""
        groups = self.param_groups
        return self._rule_of(next(g for g in groups if any(p is parameter for p in g["params"])))

    def _initial_state(self) -> float:
        """Return what new state is filled with."""
        return 0.0

    def _change(self, parameter: Tensor, new: dict[str, Any]) -> dict[str, Any]:
        """Make the state of a parameter `new`, in a way that can be undone; return it."""
        old = self.state.get(parameter)
        if old is not None and [*map(id, old.values())] == [*map(id, new.values())]:
            return old  # type: ignore[no-any-return]
        self._changes.append((parameter, None if old is None else dict(old)))
        entry: dict[str, Any] = self.state[parameter]
        entry.clear()
        entry.update(new)
        return entry

    def _undo(self) -> None:
        """Take back all changes of state that were made for a step: it does not happen."""
        while self._changes:
            parameter, old = self._changes.pop()
            if old is None:
                self.state.pop(parameter, None)
            else:
                entry = self.state[parameter]
                entry.clear()
                entry.update(old)

    def _keep(self) -> None:
        """Keep the changes: the step has happened."""
        self._changes.clear()

    @_not_compiled
    def _tell_options(self) -> bool:
        """Describe the options of all groups; False where they ask for other state."""
        rules = [self._rule_of(group) for group in self.param_groups]
        if [rule.states for rule in rules] != [rule.states for rule in self._rules]:
            return False
        if not all(isinstance(group["params"], list) for group in self.param_groups):
            return False
        if self._counts_on_gpu != self._should_count_on_gpu():
            return False
        for i, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            self._native.set_options(i, group, self._array_class._rule, *rule.told)
        self._rules = rules
        return True

    def _global_norm(self, norms: list[tuple[int, float, bool]]) -> tuple[float, bool]:
        """Return norm and finiteness over all processes, from those of this process's parts."""
        parameters = [parameter for parameter, _ in self._parameters()]
        return _distributed.global_norm(
            [(parameters[i], norm, is_finite) for i, norm, is_finite in norms]
        )

    @classmethod
    def _rule_of(cls, group: Mapping[str, Any]) -> Rule:
        cls._check_group(group)
        fields = _fields_of(cls._array_class)  # type: ignore[arg-type]
        given = {name: group[name] for name in fields if name in group}
        checked = {name: fields[name].checked(value) for name, value in given.items()}
        options = cls._array_class._native_options({**cls._implied, **checked})
        _, scalars, _ = _cpu.describe_rule(cls._array_class._rule, options)
        told = (
            options,
            bool(group.get("maximize", False)),
            {*given, *cls._array_class._fixed, *_WATCHED},
            not all(map(_is_immutable, given.values())),
        )
        return Rule(told, cls._states_with(options), scalars)

    @classmethod
    def _all_states(cls) -> dict[str, bool]:
        """Return all the state that there can be, whatever the options of a group are now.

        By name: whether it is signed. A parameter keeps what its rule no longer asks for.
        """
        fields = _fields_of(cls._array_class)  # type: ignore[arg-type]
        deciding = {name: 1.0 for name, field in fields.items() if field.decides_state}
        return cls._states_with(cls._array_class._native_options({**cls._implied, **deciding}))

    @classmethod
    def _states_with(cls, options: dict[str, float]) -> dict[str, bool]:
        """Return the state of a rule with these options, by name: whether it is signed."""
        names, *_ = _cpu.describe_rule(cls._array_class._rule, options)
        signs = _cpu.state_signs(cls._array_class._rule, options)
        return dict(zip(names, signs, strict=True))

    @classmethod
    def _rules_in(cls, groups: Iterable[Mapping[str, Any]]) -> list[Rule]:
        """Return the rule of each parameter in some groups."""
        return [rule for group in groups for rule in [cls._rule_of(group)] * len(group["params"])]

    # ---- our own hyper-parameters ---------------------------------------------------------------

    @property
    def max_norm(self) -> float | None:
        """Largest L2 norm of all gradients of a step together; None does not clip."""
        return self._native.max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self._native.max_norm = max_norm("max_norm", value)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with a gradient that is not finite is left out."""
        return self._native.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._native.skip_nonfinite = flag("skip_nonfinite", value)

    @property
    def clip_value(self) -> float | None:
        """Largest magnitude of an element of the gradients; None does not clip."""
        return self._native.clip_value

    @clip_value.setter
    def clip_value(self, value: float | None) -> None:
        self._native.clip_value = clip_value("clip_value", value)

    @property
    def stochastic_rounding(self) -> bool:
        """Whether parameters of 16 bits are rounded at random."""
        return self._native.stochastic_rounding

    @stochastic_rounding.setter
    def stochastic_rounding(self, value: bool) -> None:
        self._native.stochastic_rounding = flag("stochastic_rounding", value)
        self._count_steps_if_needed()

    @property
    def state_dtype(self) -> str | None:
        """Dtype of state: "float32", "float64", "bfloat16", "int8"; None: by the parameter."""
        return self._state_dtype

    # ---- groups and state -----------------------------------------------------------------------

    @_not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see ``torch.optim.Optimizer.add_param_group``.

        Parameters
        ----------
        param_group
            The parameters under ``"params"``, and options that differ from the defaults.

        Raises
        ------
        TypeError, ValueError
            As torch; and where it asks for ``differentiable`` or, on the CPU, with
            ``rows="exact"`` or with a callable ``ema_decay``, ``capturable``; or has a DTensor that
            would need a ``master`` or state in 8 bits.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            _refuse_capturable(self.param_groups[-1])
            self._check_together()
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def state_dict(self, *, state_dtype: Any = None) -> dict[str, Any]:
        """Return the state and the groups in torch's form; see ``torch.optim.Optimizer``.

        What is ours is added under ``"fusestep"`` where it is not the default.

        Where rows have missed steps (``rows="exact"``), the state says which and what
        (``missed_steps``, ``recent_steps``): it belongs to the parameters as they are now, not up
        to date. After :meth:`flush` there is no such entry, and the state is what ``torch.optim``
        would have.

        Parameters
        ----------
        state_dtype
            ``torch.float32`` or ``torch.float64``: state that is narrower is widened to it, which
            is exact, and also what the rule no longer asks for; averages, masters and anchors stay
            as they are. ``torch.optim`` does not know 8 bits. None: state as it is, from which a
            step goes on with the same bits.

        Raises
        ------
        ValueError
            `state_dtype` is another dtype.
        RuntimeError
            The averages are in the parameters' place (:meth:`swap_averages`).
        """
        wide = check_wide_dtype(state_dtype)
        self._check_not_swapped()
        self._drop_unused_state()
        # As a hook, so that hooks of others see it.
        hook: Any = functools.partial(Optimizer._complete, state_dtype=wide)
        handle = self.register_state_dict_post_hook(hook, prepend=True)
        try:
            state_dict: dict[str, Any] = super().state_dict()
        finally:
            handle.remove()
        extras = self._extras()
        if callable(self._ema_decay):
            del extras["ema_decay"]
        if extras:
            state_dict["fusestep"] = extras
        return state_dict

    def _complete(self, state_dict: dict[str, Any], state_dtype: str | None) -> None:
        """Widen state, and add what rows have missed, and how far blocks have come."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        key_of = {id(p): key for (p, _), key in zip(self._parameters(), keys, strict=True)}
        state = state_dict["state"]
        if state_dtype is not None:
            self._widen(state, keys, getattr(torch, state_dtype))
        for parameter, rows, steps in self._missed_steps():
            key = key_of[id(parameter)]
            state[key] = {  # a copy: it is the optimizer's own
                **state.get(key, {}),
                "missed_steps": torch.from_numpy(rows),
                "recent_steps": torch.tensor(steps, dtype=torch.float64),
            }
        for parameter, *counts in _selections.counts(self):
            key = key_of[id(parameter)]
            entries = block_entries(*counts).items()
            tensors = {x: torch.from_numpy(a) if hasattr(a, "shape") else a for x, a in entries}
            state[key] = {**state.get(key, {}), **tensors}

    def _widen(self, state: dict[Any, Any], keys: Sequence[Any], dtype: torch.dtype) -> None:
        """Bring state, under the keys of all parameters, to at least a dtype."""
        states = self._all_states()
        for key, (_, label) in zip(keys, self._parameters(), strict=True):
            if key in state:  # a copy: it is the optimizer's own
                state[key] = _pieces.all_widened(state[key], label, states, dtype)

    @_not_compiled
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state dict of this class, or of the torch class of this name.

        State is copied, and moved to its parameter's device. It is rounded, to nearest, only by
        optimizers with state in bfloat16 or 8 bits: to others, bfloat16 and float16 state, which
        torch keeps for parameters of these dtypes, becomes float32, as does state in 8 bits;
        float64 state stays what it is. A ``UserWarning`` tells of state that is rounded, and of
        state in bfloat16 or 8 bits that is widened, unless the parameter is in bfloat16, too, as
        with torch's classes.

        Averages and masters that are not in the state dict, since they were not kept or it is of a
        torch class, begin anew at the parameters; those that this optimizer does not keep are left
        out. ``ema_decay`` is taken over as ``max_norm`` is, where there are averages.

        Parameters
        ----------
        state_dict
            What ``state_dict()`` returned.

        Raises
        ------
        TypeError, ValueError
            It does not belong to these parameters, or to this rule. Nothing has been changed then.
        RuntimeError
            The averages are in the parameters' place (:meth:`swap_averages`).
        """
        self._check_not_swapped()
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, loaded)
            if result is not None:
                loaded = result
        groups = _load.matched_groups(self.param_groups, loaded["param_groups"])
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        rules = self._rules_in(groups)
        places = [
            (key, parameter, label, rule)
            for key, (parameter, label), rule in zip(keys, _labelled(groups), rules, strict=True)
        ]
        state, conversions = _load.fitted_state(loaded["state"], places, self)
        rule = self._array_class._rule
        missed = _load.missed_steps(loaded["state"], places, rule, self._rows)
        histories = self._histories_of(groups, missed)
        blocks = _selections.restored(_load.block_counts(loaded["state"], places, self._rows))
        extras = _load.checked_extras(loaded)
        ema_decay = extras.pop("ema_decay", self._ema_decay)
        conversions.warn(stacklevel=5)  # before anything changes
        self.__setstate__({"state": state, "param_groups": groups})
        self._histories = histories
        self._blocks = blocks
        self._native.ask_again()  # for these, which it cannot see
        self._adopt_scalars()
        self._has_selected = "steps" in extras
        for name, value in extras.items():
            setattr(self._native, name, value)
        self._set_ema_decay(None if self._ema_decay is None else ema_decay)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # ---- Python's own protocols -----------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped()
        self._drop_unused_state()
        state: dict[str, Any] = super().__getstate__()
        kinds = {"state_dtype": self._state_dtype, "rows": self._rows, "master": self._master}
        ours = {**kinds, **self._extras()}
        return {
            **state,
            "fusestep": ours,
            "missed_steps": self._missed_steps(),
            "block_counts": _selections.counts(self),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        extras = state.pop("fusestep", None)
        missed = state.pop("missed_steps", ())
        counts = state.pop("block_counts", ())
        super().__setstate__(state)
        if extras is not None:
            self._attach(**extras)
            self._histories = self._histories_of(self.param_groups, missed)
            self._blocks = _selections.restored(counts)
            self._adopt_scalars()
            self._follow_fused()

    # ---- for this package -----------------------------------------------------------------------

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a group that asks for what the class does not do."""
        if group.get("differentiable"):
            raise ValueError(
                "differentiable=True needs a step made of operations that autograd records, which "
                "a fused step in place is not: use the torch.optim class for it"
            )

    def _attach(
        self,
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        master: str | None = None,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
        skipped_steps: int = 0,
        steps: int | None = None,
    ) -> None:
        """Create what is neither torch's nor pickled."""
        _keep_compiler_out()
        self._state_dtype = check_state_dtype(state_dtype)
        self._rows = one_of("rows", rows, ("lazy", "exact"))
        self._master = _masters.check_kind(master)
        self._ema_decay = check_decay("ema_decay", ema_decay)
        self._check_together()
        # By parameter: the native half is told anew whenever groups or state change, and what rows
        # have missed, and how far blocks have come, must outlast that.
        self._histories = {}
        self._blocks = {}
        self._has_selected = steps is not None
        self._native = _cpu.TorchOptimizer(_tensors, _tensors.USE_EXCHANGE_TABLE)
        self._native.skipped_steps = skipped_steps
        self._native.steps = steps or 0
        self.seed = seed
        self._changes: list[tuple[Tensor, dict[str, Any] | None]] = []
        self._scalars = None
        self._rules = []
        self._counts_on_gpu = False
        self.max_norm = max_norm
        self.clip_value = clip_value
        self.skip_nonfinite = skip_nonfinite
        self.stochastic_rounding = stochastic_rounding
        self._set_ema_decay(self._ema_decay)

    def _check_together(self) -> None:
        """Raise ValueError for settings that do not go together, or with the parameters."""
        parameters = self._parameters()
        _masters.check_parameters(self, parameters)
        for parameter, label in parameters:
            dtype = _state.dtype_for(self._state_dtype, parameter)
            _pieces.check_parameter(parameter, label, dtype)
        self._check_schedule(self._ema_decay)
        check_rows(self._state_dtype, self._rows)
        if self._rows == "exact" and self._ema_decay is not None:
            raise ValueError(
                "rows='exact' makes up for missed steps in one move, of which an average would "
                "have to see each: leave out ema_decay, or use rows='lazy'"
            )
        is_captured = any(group.get("capturable") for group in getattr(self, "param_groups", []))
        if self._rows == "exact" and is_captured:
            raise ValueError(
                "capturable=True is for CUDA graphs, and rows='exact' notes on the host, which "
                "they do not reach, what rows have missed: leave out one of them"
            )

    def _parameters(self) -> list[tuple[Tensor, str]]:
        """Return all parameters, each with what error messages call it."""
        return list(_labelled(getattr(self, "param_groups", [])))

    def _adopt_scalars(self) -> None:
        """Keep the scalars of the state, which nobody else has a hold on yet, all in one place."""
        parameters = [parameter for parameter, _ in self._parameters()]
        entries = [self.state.get(parameter, {}) for parameter in parameters]
        self._counts_on_gpu = self._should_count_on_gpu()
        devices = self._scalar_devices(parameters)
        self._scalars = _state.Scalars(self._rule_of({}).scalars, entries, devices)
        for column, entry in enumerate(entries):
            entry.update(self._scalars.moved(entry, column))

    def _extras(self) -> dict[str, Any]:
        """Return our own settings that are not the default."""
        extras = {
            **{name: getattr(self, name) for name in OUR_SETTINGS},
            "skipped_steps": self.skipped_steps,
            "seed": self.seed,
            "steps": self._native.steps if self._has_selected else 0,
        }
        kept = {x: value for x, value in extras.items() if value != _DEFAULTS.get(x, 0)}
        if self._rounds_at_random():
            kept["seed"] = self.seed  # 0, too, says how to go on with the same bits
        return kept

    @classmethod
    def _taking_over(cls, other: torch.optim.Optimizer, **extras: Any) -> Optimizer:
        """Return an optimizer that shares the groups and the state of `other`."""
        for group in other.param_groups:
            cls._check_group(group)
            _refuse_capturable(group)
        optimizer = cls.__new__(cls)
        optimizer._attach(**extras)
        torch.optim.Optimizer.__init__(optimizer, [{"params": []}], dict(other.defaults))
        optimizer.__setstate__({"state": other.state, "param_groups": other.param_groups})
        optimizer._check_together()
        optimizer._follow_fused()
        return optimizer

    def _follow_fused(self) -> None:
        """Leave unscaling to the step where torch's constructor would."""
        if any(group.get("fused") for group in self.param_groups):
            self._step_supports_amp_scaling = True


@functools.cache
def _keep_compiler_out() -> None:
    """Have torch.compile run the frames of short methods as they are: they have no graph in them.

    A wrapper, as torch's own ``zero_grad`` has, would cost more than they do.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # torch's constructor has imported it
    skip_code = getattr(dynamo, "skip_code", None)
    methods: list[Any] = [Optimizer.step, Optimizer.zero_grad]
    for method in methods:
        method._torchdynamo_disable = True
        method._torchdynamo_disable_msg = "there is nothing to compile"
        if skip_code is not None:
            skip_code(method.__code__)


@functools.cache
def _fields_of(array_class: type[ArrayOptimizer]) -> dict[str, Any]:
    """Return the hyper-parameters that are options of the rule."""
    fields = array_class._fields()
    return {name: field for name, field in fields.items() if name not in _OUTSIDE_THE_RULE}


def _labelled(groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, str]]:
    """Yield all parameters, each with what error messages call it."""
    for i, group in enumerate(groups):
        of_group = f" of group {i}" if len(groups) > 1 else ""
        names = group.get("param_names", ())
        for k, parameter in enumerate(group["params"]):
            name = names[k] if len(names) == len(group["params"]) else k
            yield parameter, f"parameter {name!r}{of_group}"


def _flat(rows: Any) -> Any:
    """Return row numbers of any shape as a list of them."""
    return rows.reshape(-1) if hasattr(rows, "reshape") else rows


def _in_lists(groups: Any) -> list[dict[str, Any]]:
    """Return groups, and parameters in them, as the lists that they nearly always are."""
    for group in groups:
        if not isinstance(group["params"], list):
            group["params"] = list(group["params"])
    return groups if isinstance(groups, list) else list(groups)


def _is_immutable(value: Any) -> bool:
    elements: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return all(isinstance(element, (int, float, str, type(None))) for element in elements)


def _refuse_capturable(group: dict[str, Any]) -> None:
    on_cpu = any(_tensors.device_of(p).type == "cpu" for p in group["params"])
    if group.get("capturable") and on_cpu:
        raise ValueError(
            "capturable=True is for CUDA graphs, and some of the parameters are on the CPU: leave "
            "it out"
        )
