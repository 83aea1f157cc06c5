"""Who is compared: the same three rules, over the same gradients, by everybody's best means.

A peer gets the gradients and returns a :class:`Run`. Parameters start as copies of the gradients;
hyper-parameters are each rule's defaults in ``torch.optim`` but for the learning rate, 1e-3 for
all. That the peers compute the same is tested (`test_optimizers.py`).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import fusestep
import limit
from memory import aligned_like, copies, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memory import FloatArray

RULES = ("adam", "nag", "adagrad")

_LR, _BETA1, _BETA2, _MOMENTUM = 1e-3, 0.9, 0.999, 0.9
_EPS = {"adam": 1e-8, "adagrad": 1e-10}


@dataclass(frozen=True)
class Run:
    """An optimizer over its own parameters.

    Parameters
    ----------
    step
        Moves the parameters, in place or not, and returns when it is done.
    params
        Returns the parameters as they are now.
    """

    step: Callable[[], object]
    params: Callable[[], list[Any]]


class Peer(ABC):
    """Somebody who can step."""

    name: str
    copies_gradients: ClassVar[bool] = False

    def why_not(self, rule: str) -> str | None:  # noqa: ARG002
        """Return None if this peer has the rule and is installed, else the reason."""
        return None

    def changes_gradients(self, rule: str) -> bool:  # noqa: ARG002
        """Return whether a step writes to the gradients, so that they cannot be shared."""
        return False

    @abstractmethod
    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """Return an optimizer over parameters of the gradients' shapes."""

    def nbytes(self, rule: str, elements: int) -> int:
        """Return the memory a run takes at most, beside the gradients that all share."""
        own_gradients = self.copies_gradients or self.changes_gradients(rule)
        arrays = 1 + limit.STATES[rule] + own_gradients
        return 4 * arrays * elements


# ---- fusestep ------------------------------------------------------------------------------------


class Fusestep(Peer):
    """What the others are compared with; over NumPy arrays."""

    name = "fusestep"

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """As the base class says."""
        make = {"adam": fusestep.Adam, "nag": fusestep.NAG, "adagrad": fusestep.Adagrad}[rule]
        params = copies(gradients)
        optimizer = make(params, lr=_LR)
        return Run(partial(optimizer.step, gradients), lambda: params)


# ---- NumPy, by hand ------------------------------------------------------------------------------


class PlainNumPy(Peer):
    """The formula as the paper prints it: every operation makes an array."""

    name = "numpy"

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """As the base class says."""
        steps = {"adam": _plain_adam, "nag": _plain_nag, "adagrad": _plain_adagrad}
        params = copies(gradients)
        return Run(partial(next, steps[rule](params, gradients)), lambda: params)


# The steps are generators: next() does one step, and the state is local variables, as in a script.


def _plain_adam(params: list[FloatArray], grads: list[FloatArray]) -> Iterator[None]:
    ms: list[Any] = zeros(params)
    vs: list[Any] = zeros(params)
    t = 0
    while True:
        t += 1
        for i, g in enumerate(grads):
            ms[i] = _BETA1 * ms[i] + (1 - _BETA1) * g
            vs[i] = _BETA2 * vs[i] + (1 - _BETA2) * g**2
            m_hat = ms[i] / (1 - _BETA1**t)
            v_hat = vs[i] / (1 - _BETA2**t)
            params[i] -= _LR * m_hat / (np.sqrt(v_hat) + _EPS["adam"])
        yield


def _plain_nag(params: list[FloatArray], grads: list[FloatArray]) -> Iterator[None]:
    bs: list[Any] = zeros(params)
    while True:
        for i, g in enumerate(grads):
            bs[i] = _MOMENTUM * bs[i] + g
            params[i] -= _LR * (g + _MOMENTUM * bs[i])
        yield


def _plain_adagrad(params: list[FloatArray], grads: list[FloatArray]) -> Iterator[None]:
    sums: list[Any] = zeros(params)
    while True:
        for i, g in enumerate(grads):
            sums[i] = sums[i] + g**2
            params[i] -= _LR * g / (np.sqrt(sums[i]) + _EPS["adagrad"])
        yield


class InPlaceNumPy(Peer):
    """The same with ``out=`` and one scratch array: no operation makes an array."""

    name = "numpy in-place"

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """As the base class says."""
        steps = {"adam": _in_place_adam, "nag": _in_place_nag, "adagrad": _in_place_adagrad}
        params = copies(gradients)
        scratch = aligned_like(max(gradients, key=np.size).reshape(-1))
        views = [scratch[: g.size].reshape(g.shape) for g in gradients]
        return Run(partial(next, steps[rule](params, gradients, views)), lambda: params)


def _in_place_adam(
    params: list[FloatArray], grads: list[FloatArray], scratch: list[FloatArray]
) -> Iterator[None]:
    ms, vs = zeros(params), zeros(params)
    t = 0
    while True:
        t += 1
        correction = (1 - _BETA2**t) ** 0.5
        step_size = _LR * correction / (1 - _BETA1**t)
        for p, g, m, v, s in zip(params, grads, ms, vs, scratch, strict=True):
            m *= _BETA1
            m += np.multiply(g, 1 - _BETA1, out=s)
            v *= _BETA2
            np.multiply(g, g, out=s)
            s *= 1 - _BETA2
            v += s
            np.sqrt(v, out=s)
            s += _EPS["adam"] * correction
            np.divide(m, s, out=s)
            s *= step_size
            p -= s
        yield


def _in_place_nag(
    params: list[FloatArray], grads: list[FloatArray], scratch: list[FloatArray]
) -> Iterator[None]:
    bs = zeros(params)
    while True:
        for p, g, b, s in zip(params, grads, bs, scratch, strict=True):
            b *= _MOMENTUM
            b += g
            np.multiply(b, _MOMENTUM, out=s)
            s += g
            s *= _LR
            p -= s
        yield


def _in_place_adagrad(
    params: list[FloatArray], grads: list[FloatArray], scratch: list[FloatArray]
) -> Iterator[None]:
    sums = zeros(params)
    while True:
        for p, g, v, s in zip(params, grads, sums, scratch, strict=True):
            v += np.multiply(g, g, out=s)
            np.sqrt(v, out=s)
            s += _EPS["adagrad"]
            np.divide(g, s, out=s)
            s *= _LR
            p -= s
        yield


# ---- PyTorch -------------------------------------------------------------------------------------


class Torch(Peer):
    """``torch.optim``, one of its three implementations.

    Parameters
    ----------
    name
        Of the peer.
    **implementation
        The arguments that choose it; none of them for torch's own choice.
    """

    def __init__(self, name: str, **implementation: bool) -> None:
        self.name = name
        self._implementation = implementation

    def why_not(self, rule: str) -> str | None:  # noqa: ARG002
        """As the base class says."""
        return _cannot_import("torch")

    def changes_gradients(self, rule: str) -> bool:
        """As the base class says: torch's foreach SGD adds the momentum to the gradients."""
        return rule == "nag" and self._implementation.get("foreach", False)

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """As the base class says."""
        import torch

        options: dict[str, Any] = {
            "adam": {},
            "nag": {"momentum": _MOMENTUM, "nesterov": True},
            "adagrad": {},
        }[rule]
        make = {"adam": torch.optim.Adam, "nag": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
        params = _torch_parameters(gradients)
        optimizer = make[rule](params, lr=_LR, **options, **self._implementation)
        return Run(optimizer.step, lambda: [param.detach().numpy() for param in params])


class DeepSpeed(Peer):
    """DeepSpeed's CPU Adam, which it compiles at first use (a minute)."""

    name = "deepspeed"

    def why_not(self, rule: str) -> str | None:
        """As the base class says."""
        if rule != "adam":
            return "its CPU Adam is Adam only"
        return _cannot_import("deepspeed") or _cannot_build_deepspeed()

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:  # noqa: ARG002
        """As the base class says."""
        params = _torch_parameters(gradients)
        optimizer = _deepspeed_adam(params)
        return Run(optimizer.step, lambda: [param.detach().numpy() for param in params])


def _torch_parameters(gradients: list[FloatArray]) -> list[Any]:
    """Return parameters whose values and gradients lie in NumPy's memory, like everybody's."""
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in copies(gradients)]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = torch.from_numpy(gradient)
    return params


def _deepspeed_adam(params: list[Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, lr=_LR, adamw_mode=False)


@cache
def _cannot_build_deepspeed() -> str | None:
    import torch

    try:
        _deepspeed_adam([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:  # a build can fail in any way; the reason is passed on
        cause = error.__cause__ or error
        return f"its CPU Adam cannot be built: {type(cause).__name__}: {cause}"
    return None


# ---- optax ---------------------------------------------------------------------------------------


class Optax(Peer):
    """optax, compiled by XLA; parameters and state are donated, so that XLA can work in place."""

    name = "optax"
    copies_gradients = True

    def why_not(self, rule: str) -> str | None:  # noqa: ARG002
        """As the base class says."""
        return _cannot_import("jax", "optax")

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """As the base class says."""
        import jax

        transformation, update = _optax_update(rule)
        grads = [jax.numpy.array(gradient) for gradient in gradients]
        params = [jax.numpy.array(gradient) for gradient in gradients]
        present = [params, transformation.init(params)]

        def step() -> None:
            present[:] = jax.block_until_ready(update(*present, grads))

        return Run(step, lambda: [np.asarray(param) for param in present[0]])


@cache
def _optax_update(rule: str) -> tuple[Any, Any]:
    """Return the transformation and the compiled step, the same for all shapes."""
    import jax
    import optax

    transformation = {
        "adam": partial(optax.adam, b1=_BETA1, b2=_BETA2, eps=_EPS["adam"]),
        "nag": partial(optax.sgd, momentum=_MOMENTUM, nesterov=True),
        # optax adds its eps under the root
        "adagrad": partial(optax.adagrad, initial_accumulator_value=0, eps=_EPS["adagrad"] ** 2),
    }[rule](_LR)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return transformation, jax.jit(update, donate_argnums=(0, 1))


# ---- the limit -----------------------------------------------------------------------------------


class Limit(Peer):
    """Not an optimizer: a loop that reads and writes the same bytes."""

    name = "limit"
    copies_gradients = True  # of a list of tensors, into one

    def why_not(self, rule: str) -> str | None:  # noqa: ARG002
        """As the base class says."""
        return limit.why_not()

    def start(self, rule: str, gradients: list[FloatArray]) -> Run:
        """As the base class says."""
        return Run(limit.Loop(rule, gradients), list)


# ---- all of them ---------------------------------------------------------------------------------


@cache
def _cannot_import(*modules: str) -> str | None:
    """Return None if the modules can be imported, else the reason.

    XLA's threads are started here, too: later the process may be bound to fewer processors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for module in modules:
                __import__(module)
            if "jax" in modules:
                __import__("jax").devices("cpu")
        except Exception as error:  # whatever keeps it from working here
            return f"{module} is not usable: {type(error).__name__}: {error}"
    return None


# Where memory is short, those at the end are left out.
_PEERS: tuple[Peer, ...] = (
    Fusestep(),
    Limit(),
    Torch("torch fused", fused=True),
    Torch("torch foreach", foreach=True),
    Torch("torch"),
    DeepSpeed(),
    Optax(),
    InPlaceNumPy(),
    PlainNumPy(),
)

PEERS = {peer.name: peer for peer in _PEERS}
