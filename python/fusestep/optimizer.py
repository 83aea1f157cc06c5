"""What every optimizer can do, whatever its rule."""

from __future__ import annotations

from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, TypeVar

import numpy as np

from . import (
    _anchors,
    _arrays,
    _averages,
    _cpu,
    _parameters,
    _state,
    _state_dict,
    _tables,
    checkpoint,
    selections,
)
from ._hyperparameters import (
    Hyperparameter,
    as_native_options,
    check_seed,
    clip_value,
    flag,
    max_norm,
    non_negative,
    one_of,
)
from ._parameters import Gradients, Parameters, Params
from .gradients import as_indices

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from ._penalties import Anchor


_T = TypeVar("_T")


class CommonOptions(TypedDict, total=False):
    """The keyword arguments that every rule takes; see :class:`Optimizer`."""

    maximize: bool
    max_norm: float | None
    clip_value: float | None
    skip_nonfinite: bool
    ema_decay: float | Callable[[int], float] | None
    copies: Any
    decay_mask: Any
    state_dtype: Any
    stochastic_rounding: bool
    capturable: bool
    rows: Literal["lazy", "exact"]
    seed: int


class Optimizer:
    """Base class of all optimizers; create one of its subclasses.

    Parameters
    ----------
    params
        Float arrays (float64, float32, float16 or bfloat16) to update in place, of any shape and
        strides: one array, an iterable of arrays, or a dict from names to arrays. They must be
        writable and must not overlap.
    maximize
        Move up the gradient instead of down.
    max_norm
        Clip the L2 norm of all gradients of a step together, as
        ``torch.nn.utils.clip_grad_norm_`` does: gradients are multiplied by
        ``min(1, max_norm / (norm + 1e-6))``. The arrays that hold the gradients are not changed.
    clip_value
        Bring each element of the gradients to within [-clip_value, clip_value], as
        ``torch.nn.utils.clip_grad_value_`` does: after `grad_scale` and `max_norm`. The arrays that
        hold the gradients are not changed.
    skip_nonfinite
        Leave out a step in which any gradient holds a NaN or an infinity: no parameter, no state
        and no counter changes but :attr:`skipped_steps`.
    ema_decay
        Keep an exponential moving average of the parameters, :attr:`averages`, in the same pass:
        ``average = ema_decay * average + (1 - ema_decay) * parameter`` after each step. A number in
        [0, 1], or a callable from the number of steps taken to one: :class:`fusestep.EmaWarmup`.
        Averages begin as the parameters' values. An element that does not move (no gradient, not
        selected, a row that is not listed) leaves its average as it is.
    copies
        Arrays that are kept equal to the parameters, in the form that `params` has (None, or not in
        the dict: no copy): the bfloat16 or float16 weights of a model whose float32 masters are
        `params`. Each step writes them in the same pass, rounded to nearest. They are made equal
        when the optimizer is created.
    decay_mask
        Which parameters ``weight_decay`` applies to: booleans in the form that `params` has, or a
        callable from a parameter to one: ``lambda p: p.ndim > 1`` leaves out biases and norms.
        None: all.
    state_dtype
        Dtype of the state: None (float64 for float64 parameters, float32 for all others),
        "float32", "float64", "bfloat16" or "int8": 8 bits, of which 64 neighbours share a power of
        two. A parameter is computed in float64 if it or its state is float64, in float32 otherwise.
        State in bfloat16 and 8 bits is rounded at random, up or down, so that its mean is what
        float32 would have: moments move in steps far below its precision. 8 bits are for steps that
        move whole blocks of 64 elements. A rule with state of rows keeps it in float32 then.
    stochastic_rounding
        Round parameters in bfloat16 and float16 at random, too, so that updates count which are
        less than half of the last place.
    seed
        Of every random choice, from 0 to 2**64 - 1: which blocks :class:`fusestep.RandomBlocks`
        draws, and how numbers are rounded at random. The same seed gives the same choices, step by
        step, on every device.
    capturable
        For steps that a CUDA graph captures and replays: step counts and the learning rate are kept
        on the GPU, where all parameters must be. Assigning :attr:`lr` changes, in the order of the
        current stream, what replays use; other hyper-parameters stay what they were when the graph
        was captured. Take one step before the capture, and keep the optimizer as long as the graph.

    rows
        What a step with :class:`fusestep.Rows` means for the rows that are not listed. ``"lazy"``:
        nothing, they and their state stay as they are, as in ``torch.optim.SparseAdam``.
        ``"exact"``: a gradient of zero, as if the whole table had been given. They are brought up
        to date when they are next listed; before reading rows, call :meth:`catch_up`, before
        reading the whole table, :meth:`flush`. What rows have missed is noted on the host, which
        a CUDA graph does not reach; with ``skip_nonfinite`` it waits for a GPU in every step.

    Raises
    ------
    TypeError
        Something is not an array, not of a supported dtype, or a hyper-parameter is not a number.
    ValueError
        A hyper-parameter is out of range; an array is read-only, overlaps itself or another one;
        there are no parameters; a copy does not have its parameter's shape and device; with
        ``capturable``, a parameter is not on the GPU of the others, ``lr`` or ``ema_decay`` is a
        callable, or ``rows`` is "exact"; with ``ema_decay`` or state in 8 bits, ``rows`` is
        "exact".
    RuntimeError
        A parameter is on a GPU that cannot be used; the message says why.

    Notes
    -----
    Every hyper-parameter is an attribute that may be read and, where it does not decide which
    state is kept, assigned: ``opt.lr = 0.01``. An assignment is checked like an argument.

    An optimizer may be used from several threads: steps of one optimizer wait for each other, steps
    of different optimizers run side by side. Its result does not depend on the number of threads
    nor on the instruction set, nor on whether a parameter is on the CPU or on a GPU.

    Parameters may be on several devices; each has its gradient and its state where it is. A step on
    a GPU is put into the current stream of the parameters' library and not waited for. With
    ``skip_nonfinite`` it is the GPU that decides whether to leave it out; :attr:`steps`,
    :attr:`skipped_steps` and the steps in :attr:`state` wait for it then. ``max_norm`` and
    ``skip_nonfinite`` over several devices make the host wait in every step.
    """

    __slots__ = (
        "__weakref__",
        "_anchors",
        "_arrays",
        "_averages",
        "_capturable",
        "_copies",
        "_decay_mask",
        "_decay_schedule",
        "_growing",
        "_hyperparameters",
        "_native",
        "_parameters",
        "_rows",
        "_scalar_names",
        "_state_dtype",
        "_state_names",
        "_state_signs",
    )

    _rule: ClassVar[str]
    _fixed: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Options of the rule that this class has settled."""
    _has_state_per_row: ClassVar[bool] = False
    """Whether state has one element for each row of a parameter, rather than the same shape."""

    maximize = Hyperparameter(flag)
    max_norm = Hyperparameter(max_norm)
    clip_value = Hyperparameter(clip_value)
    skip_nonfinite = Hyperparameter(flag)
    stochastic_rounding = Hyperparameter(flag)
    ema_decay = Hyperparameter(_averages.check_decay)

    def __init__(
        self,
        params: Params,
        own: dict[str, Any],
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        clip_value: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | Callable[[int], float] | None = None,
        copies: Any = None,
        decay_mask: Any = None,
        state_dtype: Any = None,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        rows: Literal["lazy", "exact"] = "lazy",
        seed: int = 0,
    ) -> None:
        if type(self) is Optimizer:
            raise TypeError("Optimizer has no rule; create one of its subclasses: Adam, SGD, ...")
        common = {
            "maximize": maximize,
            "max_norm": max_norm,
            "clip_value": clip_value,
            "skip_nonfinite": skip_nonfinite,
            "stochastic_rounding": stochastic_rounding,
            "ema_decay": ema_decay,
        }
        fields = self._fields()
        self._hyperparameters: dict[str, Any] = {
            name: fields[name].checked(value) for name, value in {**own, **common}.items()
        }
        self._check_together(self._hyperparameters)
        self._state_dtype = _state.check_state_dtype(state_dtype)
        self._capturable = flag("capturable", capturable)
        self._check_rate(self._hyperparameters)
        self._rows = one_of("rows", rows, ("lazy", "exact"))
        if self._capturable and self._rows == "exact":
            raise ValueError(
                "capturable=True is for CUDA graphs, and rows='exact' notes on the host, which "
                "they do not reach, what rows have missed: leave out one of them"
            )

        _state.check_rows(self._state_dtype, self._rows)
        if ema_decay is not None and self._rows == "exact":
            raise ValueError(
                "rows='exact' makes up for missed steps in one move, of which an average would "
                "have to see each: leave out ema_decay, or use rows='lazy'"
            )

        self._parameters = Parameters(params)
        copied = [] if copies is None else self._parameters.spread(copies, "copies")
        self._decay_mask = _parameters.mask(self._parameters, decay_mask, "decay_mask")
        options = self._native_options(self._hyperparameters)
        self._state_names, self._scalar_names, fill = _cpu.describe_rule(self._rule, options)
        self._state_signs = dict(
            zip(self._state_names, _cpu.state_signs(self._rule, options), strict=True)
        )
        self._arrays: list[dict[str, Any]] = [
            self._new_state(array, label, fill)
            for array, label in zip(self._parameters.arrays, self._parameters.labels, strict=True)
        ]
        self._anchors: dict[int, Anchor] = {}
        self._growing: dict[tuple[int, str | None], tuple[Any, Any]] = {}
        self._averages: list[Any] = []
        self._copies: dict[int, Any] = {}
        self._native = _cpu.Optimizer(
            self._rule,
            options,
            self._parameters.labels,
            self._parameters.arrays,
            [list(state.values()) for state in self._arrays],
        )
        for i, decays in enumerate(self._decay_mask or ()):
            if not decays:
                self._native.exempt_from_decay(i)
        if self._rows == "exact":
            self._native.keep_history()
        if self._capturable:
            self._native.make_capturable()
            self._native.set_rate(self._hyperparameters["lr"])
        self._push_common()
        self.seed = seed
        if ema_decay is not None:
            _averages.start(self)
        _averages.attach_copies(self, copied)  # last, since it writes

    # ---- stepping -------------------------------------------------------------------------------

    def step(
        self,
        grads: Gradients,
        *,
        lr: float | None = None,
        grad_scale: float = 1.0,
        where: Any = None,
        zero_grad: bool = False,
    ) -> None:
        """Update the parameters, and the state, in place.

        Parameters
        ----------
        grads
            A float array of the parameter's shape for each parameter, in the form that `params`
            had: a list or tuple, a dict with any subset of the names, or one array. The dtype
            (float64, float32, float16, bfloat16) and the strides may differ from the parameter's.
            In place of an array, :class:`fusestep.Rows` with the gradients of some rows, or
            :class:`fusestep.Samples` with one gradient for each sample, or :class:`fusestep.Outer`
            with the vectors that it is the outer products of. A parameter whose gradient is None,
            or not in the dict, does not move, and its state does not age.
        lr
            Learning rate of this step, in place of :attr:`lr`.
        grad_scale
            Multiplies all gradients before anything else: 1 / loss scale to unscale.
        where
            Which part of the parameters may move; None: all. A selection
            (:class:`fusestep.RandomBlocks`, :class:`fusestep.CyclicBlocks`,
            :class:`fusestep.TopK`) for all of them; or in the form that `params` had: for each
            parameter a selection, a boolean array (of its shape or of its first axis:
            :class:`fusestep.Mask`) or None. What is not selected keeps its value and, unless the
            selection says ``frozen="track"``, its state, and its gradient does not count for
            ``max_norm`` and ``skip_nonfinite`` then.
        zero_grad
            Set the gradients to zero in the same pass, all of them, also when ``skip_nonfinite``
            leaves the step out.

        Raises
        ------
        TypeError
            A gradient is not an array of a supported dtype, or `grads` or `where` has the wrong
            form.
        ValueError
            A gradient has the wrong shape, or shares memory with a parameter or its state; there
            are too few or too many; a name is unknown; with `zero_grad`, a gradient is read-only
            or shares memory with another; a mask has the wrong shape; `where` is given for a table
            with ``rows="exact"``, does not select whole rows for a rule with state of rows, or
            comes with ``capturable=True``; a part of a block of 64 elements would move whose state
            is in 8 bits.
        IndexError
            :class:`fusestep.Rows` lists a row that the parameter does not have.

        Notes
        -----
        All arguments are checked before anything is written: a step that raises has changed
        nothing.
        """
        rate = self._hyperparameters["lr"] if lr is None and not self._capturable else lr
        if callable(rate):
            rate = non_negative("lr(step)", rate(self._native.steps))
        chosen = None
        if where is not None:
            chosen = selections.for_each(where, self._parameters, self._native.steps)
        gradients = self._parameters.in_order(grads)
        if self._decay_schedule is None:
            self._native.step(gradients, rate, grad_scale, zero_grad, chosen)
            return
        decay = _averages.decay_of(self._decay_schedule, self._native.steps)
        self._native.step(gradients, rate, grad_scale, zero_grad, chosen, decay)

    def catch_up(self, indices: Any) -> None:
        """Bring rows up to date that have missed steps, so that they may be read.

        Does nothing unless the optimizer was created with ``rows="exact"``.

        Parameters
        ----------
        indices
            Rows of the parameter: an array of int32 or int64 of shape [N], or a list of int, in any
            order. Where `params` was a list or dict: such an array (or None) for each parameter, in
            that form.

        Raises
        ------
        TypeError
            Indices are not an array of int32 or int64.
        ValueError
            They are not one-dimensional.
        IndexError
            There is no such row. Nothing has been changed then.
        """
        given: Any = (indices,)
        if isinstance(self._parameters.given, dict):
            given = self._parameters.from_mapping(indices, "indices")
        elif isinstance(self._parameters.given, list):
            given = indices
        self._native.catch_up([None if rows is None else as_indices(rows) for rows in given])

    def flush(self) -> None:
        """Bring all rows up to date that have missed steps, so that the parameters may be read.

        Does nothing unless the optimizer was created with ``rows="exact"``. Costs about as much as
        a dense step.
        """
        self._native.flush()

    def anchor(self, strength: Any, reference: Any = None, importance: Any = None) -> None:
        r"""Keep parameters near where they have been: L2-SP, or with `importance` EWC.

        From now on each step that moves a parameter pulls it, after the rule and in the same pass,

        .. math:: w ← \frac{w + κ w^*}{1 + κ}, \qquad κ = lr · λ · F

        the proximal step of the penalty :math:`\frac{λ}{2} \sum F (w - w^*)^2`, stable for every
        strength. Anchors add up: after another task, call it again, and both pull, in the memory
        and time of one.

        Parameters
        ----------
        strength
            λ >= 0: one number, or one for each parameter in the form that `params` had (None:
            that parameter is left as it is).
        reference
            :math:`w^*`, in the form that `params` had: arrays of the parameters' shapes; a
            parameter that is None, or not in the dict, is left as it is: a new head, say. Without
            it, the parameters' present values. Copied.
        importance
            F >= 0, likewise: the diagonal of the Fisher information (:class:`fusestep.Fisher`).
            Without it, 1. Copied.

        Raises
        ------
        TypeError
            Something is not an array of floats, or not in the form that `params` had.
        ValueError
            A shape differs; a number is negative or not finite. Nothing has been changed then.

        References
        ----------
        Li, Grandvalet & Davoine (2018), "Explicit inductive bias for transfer learning with
        convolutional networks", equation 2 (L2-SP); Kirkpatrick et al. (2017), "Overcoming
        catastrophic forgetting in neural networks", equation 3 (EWC); Huszár (2018), "Note on the
        quadratic penalties in elastic weight consolidation" (one anchor for all tasks).
        """
        self._between_steps(lambda: _anchors.add(self, strength, reference, importance))

    def release_anchor(self) -> None:
        """Let all parameters go where their gradients lead."""
        self._native.exclusively(lambda: _anchors.release_all(self))

    @property
    def anchors(self) -> dict[Any, dict[str, Any]]:
        """The anchors, by name or position: ``strength``, ``reference`` and ``importance``."""
        keys = self._parameters.keys
        return {keys[i]: anchor._asdict() for i, anchor in self._anchors.items()}

    def resize(self, name: str | int, n_rows: int, *, init: Any = 0.0) -> Any:
        """Give a table more rows: there are new users, or new items.

        Old rows and their state keep their bits; new ones start fresh. The table moves to other
        memory on its device, which has room to spare: resizing again and again, one row at a time,
        copies each row a few times in all. CUDA graphs go on with the memory before.

        Parameters
        ----------
        name
            Which parameter: its name, or its position (0 where there is but one).
        n_rows
            Its new extent along the first axis; not less than the present one.
        init
            What new rows are filled with: a number, an array of shape [new rows, *rest], or a
            callable that returns such an array, given the shape.

        Returns
        -------
        array
            The parameter from now on, also to be found in :attr:`params`: an array of the same
            library, in C order; a torch tensor requires no gradient. Use it in place of the one
            before, which steps do not update, or only sometimes.

        Raises
        ------
        KeyError
            There is no such parameter.
        TypeError
            `n_rows` is not an int; the parameter is not an array of NumPy, CuPy or PyTorch.
        ValueError
            It has more rows already, or no dimensions; `init` does not have the shape of the new
            rows. Nothing has been changed then.

        Examples
        --------
        >>> import numpy as np, fusestep as fs
        >>> opt = fs.Adam({"users": np.zeros((10, 4), np.float32)})
        >>> users = opt.resize("users", 12, init=lambda shape: np.full(shape, 0.1))
        >>> users.shape
        (12, 4)
        """
        return self._between_steps(lambda: _tables.resize(self, name, n_rows, init))

    @property
    def averages(self) -> Any:
        """The averages of the parameters (``ema_decay``), in the form that `params` had.

        Arrays of the parameters' shapes: float64 of float64 parameters, float32 of all others. They
        are the ones that the next step updates, not copies.
        """
        self._check_has_averages()
        return self._parameters.in_form(self._averages)

    @contextmanager
    def swap_averages(self) -> Iterator[None]:
        """Put the averages in the parameters' place, to evaluate with them; and put them back.

        Within the ``with`` block the parameters, and their copies, hold the values of the averages,
        rounded where their dtype is narrower. Takes as much memory as the parameters meanwhile.

        Raises
        ------
        AttributeError
            There are no averages.
        RuntimeError
            They are in the parameters' place already; or, within the block, a step is taken, or
            state is saved or loaded.
        TypeError
            A parameter is not an array of NumPy, CuPy or PyTorch.

        Examples
        --------
        >>> import numpy as np, fusestep as fs
        >>> w = np.zeros(2, np.float32)
        >>> opt = fs.SGD(w, lr=1.0, ema_decay=0.5)
        >>> opt.step(np.full(2, -4.0, np.float32))
        >>> with opt.swap_averages():
        ...     print(w)
        [2. 2.]
        >>> w
        array([4., 4.], dtype=float32)
        """
        self._check_has_averages()
        kept = self._between_steps(lambda: _averages.swap_in(self))
        try:
            yield
        finally:
            self._native.exclusively(lambda: _averages.swap_out(self, kept))

    @property
    def copies(self) -> Any:
        """The copies that are kept equal to the parameters, by name or position."""
        keys = self._parameters.keys
        return {keys[i]: copy for i, copy in self._copies.items()}

    @property
    def decay_mask(self) -> Any:
        """Which parameters weight decay applies to, in the form that `params` had; None: all."""
        return None if self._decay_mask is None else self._parameters.in_form(self._decay_mask)

    @property
    def rows(self) -> str:
        """What a step with :class:`fusestep.Rows` means for the rows that are not listed."""
        return self._rows

    @property
    def seed(self) -> int:
        """Of every random choice; may be assigned."""
        return self._native.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._native.seed = check_seed(value)

    @property
    def capturable(self) -> bool:
        """Whether steps may be captured in a CUDA graph."""
        return self._capturable

    @property
    def steps(self) -> int:
        """Steps that moved at least one parameter; what a callable ``lr`` is given."""
        return self._native.steps

    @property
    def skipped_steps(self) -> int:
        """Steps left out because ``skip_nonfinite`` found a NaN or an infinity."""
        return self._native.skipped_steps

    # ---- state ----------------------------------------------------------------------------------

    @property
    def params(self) -> Any:
        """The parameters: the array, or a list or dict of them, as they were given."""
        return self._parameters.given

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """The state of each parameter, by name or position: ``step`` and the arrays themselves.

        The arrays are the ones the next step updates, not copies; :meth:`state_dict` copies.
        """
        return {
            key: {**self._scalars(i), **self._state_entries(i)}
            for i, key in enumerate(self._parameters.keys)
        }

    def _state_entries(self, i: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in self._arrays[i].items():
            entries.update(_state.entries(name, value))
        return entries

    def state_dict(self, *, state_dtype: Any = None) -> dict[str, Any]:
        """Return a copy of everything but the parameters, in the form of ``torch.optim``.

        Parameters
        ----------
        state_dtype
            Convert state of less than 32 bits to "float32" or "float64", which is exact:
            ``torch.optim`` does not know 8 bits. None: state as it is, from which a step goes on
            with the same bits.

        Returns
        -------
        dict
            ``"state"``: for each parameter, by name or position, ``step`` (the updates it has had)
            and its state arrays under torch's names; ``"param_groups"``: a list of one dict with
            the hyper-parameters and the keys of the parameters; ``"fusestep"``: the rule and the
            counters. A callable ``lr`` is stored as None.

        Notes
        -----
        Where rows have missed steps (``rows="exact"``), the state says which and what: it belongs
        to the parameters as they are now, not up to date. After :meth:`flush` there is no such
        entry, and the state is what ``torch.optim`` would have.
        """
        dtype = _state.check_wide_dtype(state_dtype)
        return self._between_steps(lambda: _state_dict.export(self, copy=True, dtype=dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict`, or the torch class of this name, returned.

        Hyper-parameters are taken over, too; an ``lr`` of None leaves the present one (a callable)
        in place. Parameters are matched by name if both have names, by position otherwise. State
        is converted to the optimizer's dtype: to bfloat16 and 8 bits rounded to nearest, with a
        UserWarning, but never from float64 to float32. Anchors are those of the dictionary
        afterwards: none, where it has none.

        Parameters
        ----------
        state_dict
            The dictionary; it is copied.

        Raises
        ------
        TypeError
            An entry is not what it should be, or float64 would have to be rounded to float32.
        ValueError
            Keys are missing or unknown, shapes differ, it belongs to another rule, or elements that
            share a block of state in 8 bits have had different numbers of updates. Nothing has been
            changed then.
        """
        self._between_steps(lambda: _state_dict.apply(self, _state_dict.check(self, state_dict)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Parameters
        ----------
        path
            Replaced if it exists. Until the new file is complete and on disk, the old one stays.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        self._between_steps(lambda: checkpoint.write(path, _state_dict.export(self, copy=False)))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file that :meth:`save` wrote.

        Parameters
        ----------
        path
            The file.

        Raises
        ------
        OSError
            The file cannot be read (FileNotFoundError: there is none).
        ValueError
            The file is truncated, damaged, or not one of ours; or as :meth:`load_state_dict`.
        """
        self.load_state_dict(checkpoint.read(path))

    # ---- Python's own protocols -----------------------------------------------------------------

    def __repr__(self) -> str:
        values = {**self._hyperparameters, **self._fixed, "state_dtype": self._state_dtype}
        for name in ("clip_value", "ema_decay", "stochastic_rounding"):
            if values[name] is None or values[name] is False:
                del values[name]
        if self._capturable:
            values["capturable"] = True
        if self._rows != "lazy":
            values["rows"] = self._rows
        if self.seed:
            values["seed"] = self.seed
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        count = len(self._parameters.arrays)
        elements = sum(int(np.prod(np.shape(array))) for array in self._parameters.arrays)
        plural = "" if count == 1 else "s"
        return (
            f"{type(self).__name__}({count} parameter{plural}, {elements:,} elements; {arguments})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "params": self._parameters.given,
            "hyperparameters": dict(self._hyperparameters),
            "copies": self._parameters.in_form(
                [self._copies.get(i) for i in range(len(self._parameters.arrays))]
            ),
            "decay_mask": self.decay_mask,
            "state_dtype": self._state_dtype,
            "capturable": self._capturable,
            "rows": self._rows,
            "seed": self.seed,
            "state_dict": self.state_dict(),
            "attributes": getattr(self, "__dict__", {}),  # of a subclass
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        own = dict(pickled["hyperparameters"])
        common = {name: own.pop(name) for name in vars(Optimizer) if name in own}
        fixed = {
            name: pickled[name]
            for name in ("copies", "decay_mask", "state_dtype", "capturable", "rows", "seed")
            if name in pickled
        }
        Optimizer.__init__(self, pickled["params"], own, **common, **fixed)
        self.load_state_dict(pickled["state_dict"])
        for name, value in pickled["attributes"].items():
            setattr(self, name, value)

    # ---- for this package -----------------------------------------------------------------------

    @classmethod
    def _fields(cls) -> dict[str, Hyperparameter[Any]]:
        """Return the class's hyper-parameters by name, its own before those of every rule."""
        fields: dict[str, Hyperparameter[Any]] = {}
        for owner in cls.__mro__:
            for name, field in vars(owner).items():
                if isinstance(field, Hyperparameter):
                    fields.setdefault(name, field)  # a subclass may declare it anew
        return fields

    @classmethod
    def _check_together(cls, hyperparameters: dict[str, Any]) -> None:
        """Raise ValueError for values that are fine one by one but not together."""

    @classmethod
    def _native_options(cls, hyperparameters: dict[str, Any]) -> dict[str, float]:
        """Spell hyper-parameters, and what the class has settled, as the kernels' options."""
        options: dict[str, float] = {}
        for name, value in {**hyperparameters, **cls._fixed}.items():
            if name not in vars(Optimizer):
                options.update(as_native_options(name, value))
        return options

    def _set_hyperparameters(self, changes: dict[str, Any]) -> None:
        """Check all changes, then make all of them, between two steps."""
        self._native.exclusively(
            lambda: self._apply_hyperparameters(self._checked_hyperparameters(changes))
        )

    def _apply_hyperparameters(self, checked: dict[str, Any]) -> None:
        self._hyperparameters = checked
        if self._capturable:
            self._native.set_rate(checked["lr"])
        for option, value in self._native_options(checked).items():
            self._native.set_option(option, value)
        self._push_common()

    def _checked_hyperparameters(self, changes: dict[str, Any]) -> dict[str, Any]:
        fields = self._fields()
        present = self._hyperparameters
        checked = present | {
            name: fields[name].checked(value, present[name]) for name, value in changes.items()
        }
        if (checked["ema_decay"] is None) != (present["ema_decay"] is None):
            raise ValueError(
                f"ema_decay is {checked['ema_decay']!r} where this optimizer was created with "
                f"{present['ema_decay']!r}; it decides whether there are averages: create a new "
                "optimizer instead"
            )
        self._check_together(checked)
        self._check_rate(checked)
        return checked

    def _check_rate(self, hyperparameters: dict[str, Any]) -> None:
        for name in ("lr", "ema_decay") if self._capturable else ():
            if callable(hyperparameters[name]):
                raise ValueError(
                    f"{name} is a callable, which a CUDA graph cannot call: with capturable=True "
                    "give a number" + (", and assign to lr between replays" if name == "lr" else "")
                )

    def _push_common(self) -> None:
        self._native.maximize = self._hyperparameters["maximize"]
        self._native.max_norm = self._hyperparameters["max_norm"]
        self._native.clip_value = self._hyperparameters["clip_value"]
        decay = self._hyperparameters["ema_decay"]
        self._decay_schedule = decay if callable(decay) else None
        if decay is not None and not callable(decay):
            self._native.ema_decay = decay
        self._native.skip_nonfinite = self._hyperparameters["skip_nonfinite"]
        self._native.stochastic_rounding = self._hyperparameters["stochastic_rounding"]

    def _check_has_averages(self) -> None:
        if not self._averages:
            raise AttributeError(
                "there are no averages: create the optimizer with ema_decay=0.999, say"
            )

    def _between_steps(self, function: Callable[[], _T]) -> _T:
        """Call a function while no step is under way, with the parameters in their own place."""

        def call() -> _T:
            if self._native.is_swapped:
                raise RuntimeError(
                    "the averages are in the parameters' place: do this outside of "
                    "`with opt.swap_averages()`"
                )
            return function()

        return self._native.exclusively(call)

    def _new_state(self, array: Any, label: str, fill: float) -> dict[str, Any]:
        parameter = _arrays.ArrayDescription(*_cpu.describe_array(array, label))
        if not self._state_names:
            return {}
        if self._has_state_per_row:
            parameter = parameter.rows()
        narrow = not self._has_state_per_row
        dtype = (_state.state_dtype_for if narrow else _state.wide_dtype_for)(
            self._state_dtype, parameter
        )
        backend = _arrays.backend_for_state(array, parameter)
        return {
            name: _state.new(parameter, backend, dtype, fill, is_signed=self._state_signs[name])
            for name in self._state_names
        }

    def _initial_state(self) -> float:
        return _cpu.describe_rule(self._rule, self._native_options(self._hyperparameters))[-1]

    def _scalars(self, i: int) -> dict[str, Any]:
        step, momentum_product = self._native.progress(i)
        scalars = {"step": step, "mu_product": momentum_product}
        return {name: scalars[name] for name in {"step": None, **dict.fromkeys(self._scalar_names)}}
