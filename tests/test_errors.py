"""A table of wrong calls: each raises the right class, names what is wrong, and changes nothing."""

from __future__ import annotations

import array
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs
from rules import PLAIN, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

f32 = np.float32


def zeros(*shape: int, dtype: Any = f32) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


BASE = np.zeros(100, f32)

BAD_PARAMS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("nothing", list, ValueError, "empty"),
    ("empty dict", dict, ValueError, "empty"),
    ("None", lambda: None, TypeError, "NoneType"),
    ("a string", lambda: "weights", TypeError, "str"),
    ("a number", lambda: 3.0, TypeError, "float"),
    ("list of numbers", lambda: [1.0, 2.0], TypeError, "parameter 0 is a float"),
    ("nested list", lambda: [[zeros(2)]], TypeError, "parameter 0 is a list"),
    ("None in the list", lambda: [zeros(2), None], TypeError, "parameter 1 is a NoneType"),
    ("parameter groups", lambda: [{"params": [zeros(2)]}], TypeError, "group"),
    ("names that are not str", lambda: {1: zeros(2)}, TypeError, "key 1"),
    ("bytes object", lambda: [b"1234"], TypeError, "bytes"),
    ("array.array", lambda: [array.array("f", [1.0])], TypeError, "array"),
    ("integers", lambda: [zeros(2, dtype=np.int32)], TypeError, "int32"),
    ("booleans", lambda: {"W": zeros(2, dtype=bool)}, TypeError, "'W' has dtype bool"),
    ("complex", lambda: [zeros(2, dtype=np.complex64)], TypeError, "complex64"),
    ("objects", lambda: [zeros(2, dtype=object)], TypeError, "object"),
    ("strings", lambda: [np.array(["a"])], TypeError, "dtype <U1"),
    ("long double", lambda: [zeros(2, dtype=np.longdouble)], TypeError, "float128"),
    ("big endian", lambda: [zeros(2, dtype=">f4")], TypeError, ">f4"),
    ("a record", lambda: [zeros(2, dtype=[("x", "f4")])], TypeError, "parameter 0"),
    ("masked", lambda: [np.ma.masked_array(zeros(2), [0, 1])], TypeError, "mask"),
    ("read-only", lambda: {"W": read_only(zeros(2))}, ValueError, "'W' is read-only"),
    ("twice the same", lambda: [BASE, BASE], ValueError, "parameter 0 and parameter 1 share"),
    ("overlapping views", lambda: [BASE[:60], BASE[50:]], ValueError, "share memory"),
    ("crossing views", lambda: [BASE[::2], BASE[::3]], ValueError, "share memory"),
    (
        "contained view",
        lambda: {"a": BASE[10:20], "b": zeros(3), "c": BASE[:90]},
        ValueError,
        "share memory",
    ),
    (
        "overlapping itself",
        lambda: [np.lib.stride_tricks.sliding_window_view(BASE, 5, writeable=True)],
        ValueError,
        "overlaps itself",
    ),
    (
        "broadcast",
        lambda: [np.lib.stride_tricks.as_strided(zeros(1), (5,), (0,))],
        ValueError,
        "overlaps itself",
    ),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), [p[1:] for p in BAD_PARAMS], ids=[p[0] for p in BAD_PARAMS]
)
def test_bad_params(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        fs.Adam(make())
    assert message in str(caught.value)


def test_disjoint_views_of_one_array_are_fine() -> None:
    base = np.zeros((10, 10), f32)
    params = [base[::2, ::2], base[1::2, ::2], base[:, 1::2], np.zeros(3, f32)]
    opt = fs.SGD(params, lr=1.0)
    opt.step([np.ones_like(p) for p in params])
    assert (base == -1).all()


BAD_GRADIENTS: list[tuple[str, Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    ("None", lambda k: None, TypeError, "NoneType"),
    ("one array for two", lambda k: zeros(2, 3), TypeError, "ndarray"),
    ("a generator", lambda k: (g for g in k["grads"]), TypeError, "generator"),
    ("a dict for a list", lambda k: {"W": zeros(2, 3)}, TypeError, "dict"),
    ("too few", lambda k: k["grads"][:1], ValueError, "1 gradients for 2 parameters"),
    ("too many", lambda k: [*k["grads"], zeros(4)], ValueError, "3 gradients for 2 parameters"),
    ("empty", lambda k: [], ValueError, "0 gradients"),
    ("wrong shape", lambda k: [zeros(2, 3), zeros(5)], ValueError, "parameter 1 has shape (5,)"),
    ("transposed shape", lambda k: [zeros(3, 2), zeros(4)], ValueError, "expected (2, 3)"),
    ("broadcastable", lambda k: [zeros(3), zeros(4)], ValueError, "expected (2, 3)"),
    ("one more axis", lambda k: [zeros(2, 3), zeros(4, 1)], ValueError, "expected (4,)"),
    ("0-d", lambda k: [zeros(2, 3), zeros()], ValueError, "shape ()"),
    ("list of numbers", lambda k: [zeros(2, 3), [1.0] * 4], TypeError, "parameter 1 is a list"),
    ("integers", lambda k: [zeros(2, 3), zeros(4, dtype=int)], TypeError, "int64"),
    ("objects", lambda k: [zeros(2, 3), zeros(4, dtype=object)], TypeError, "object"),
    ("big endian", lambda k: [zeros(2, 3), zeros(4, dtype=">f8")], TypeError, ">f8"),
    ("a parameter", lambda k: [zeros(2, 3), k["params"][1]], ValueError, "shares memory with"),
    ("another parameter", lambda k: [k["params"][0][::1], zeros(4)], ValueError, "parameter 0"),
    (
        "part of a parameter",
        lambda k: [zeros(2, 3), k["params"][0].reshape(-1)[1:5]],
        ValueError,
        "the gradient of parameter 1 shares memory with parameter 0",
    ),
    (
        "a state",
        lambda k: [k["opt"].state[0]["exp_avg"], zeros(4)],
        ValueError,
        "the gradient of parameter 0 shares memory with the exp_avg of parameter 0",
    ),
    (
        "another's state",
        lambda k: [zeros(2, 3), k["opt"].state[0]["exp_avg_sq"].reshape(-1)[:4]],
        ValueError,
        "exp_avg_sq of parameter 0",
    ),
]


def assert_untouched(opt: fs.Optimizer, params: list[np.ndarray], call: Callable[[], Any]) -> None:
    before = [p.copy() for p in params], opt.state_dict()
    try:
        call()
    finally:
        for p, old in zip(params, before[0], strict=True):
            np.testing.assert_array_equal(p, old)
        np.testing.assert_equal(opt.state_dict(), before[1])


@pytest.mark.parametrize(
    ("make", "error", "message"), [g[1:] for g in BAD_GRADIENTS], ids=[g[0] for g in BAD_GRADIENTS]
)
@pytest.mark.parametrize("common", [{}, {"max_norm": 1.0, "skip_nonfinite": True}])
def test_bad_gradients_change_nothing(
    make: Callable[[dict[str, Any]], Any], error: type[Exception], message: str, common: Any
) -> None:
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(s).astype(f32) for s in ((2, 3), (4,))]
    grads = [np.ones_like(p) for p in params]
    opt = fs.Adam(params, **common)
    opt.step(grads)
    known = {"params": params, "grads": grads, "opt": opt}
    for _ in range(2):
        with pytest.raises(error) as caught:
            assert_untouched(opt, params, lambda: opt.step(make(known)))
        assert message in str(caught.value)
    opt.step(grads)  # and it still works


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is -1"),
        ({"lr": math.nan}, ValueError, "lr is nan"),
        ({"lr": math.inf}, ValueError, "lr is inf"),
        ({"lr": "fast"}, TypeError, "lr is a str"),
        ({"grad_scale": math.nan}, ValueError, "grad_scale is nan"),
        ({"grad_scale": -math.inf}, ValueError, "grad_scale is -inf"),
        ({"grad_scale": None}, TypeError, "grad_scale is a NoneType"),
        ({"zero_grad": 3}, TypeError, "zero_grad is a int"),
        ({"scale": 2.0}, TypeError, "scale"),
    ],
)
def test_bad_step_arguments(kwargs: Any, error: type[Exception], message: str) -> None:
    w = np.ones(3, f32)
    opt = fs.SGD([w], momentum=0.9)
    with pytest.raises(error) as caught:
        assert_untouched(opt, [w], lambda: opt.step([np.ones(3, f32)], **kwargs))
    assert message in str(caught.value)


def test_zero_grad_needs_gradients_it_can_clear() -> None:
    params = [np.ones(4, f32), np.ones(4, f32)]
    opt = fs.SGD(params)
    shared = np.ones(5, f32)
    bad = [
        ([read_only(np.ones(4, f32)), None], "read-only"),
        ([shared[:4], shared[1:]], "two gradients share memory"),
        ([np.lib.stride_tricks.as_strided(np.ones(1, f32), (4,), (0,)), None], "overlaps itself"),
    ]
    for grads, message in bad:
        with pytest.raises(ValueError, match=message):
            assert_untouched(opt, params, lambda g=grads: opt.step(g, zero_grad=True))
    assert (shared == 1).all()
    opt.step([shared[:4], shared[1:]])  # without clearing they may overlap


# torch takes any finite dampening, and so do we; everything else must not be negative.
NUMBERS = [
    (rule, name, value)
    for rule in PLAIN
    for name in rule.cls._fields()
    for value in (-1e-9, math.nan, math.inf, -math.inf)
    if type(getattr(rule.cls([np.ones(1)], **rule.options), name)) is float
    and not (name == "dampening" and math.isfinite(value))
]


@pytest.mark.parametrize(("rule", "name", "value"), NUMBERS, ids=str)
def test_hyperparameters_out_of_range(rule: Rule, name: str, value: float) -> None:
    w = np.ones(3, f32)
    with pytest.raises(ValueError, match=name):
        rule.cls([w], **{**rule.options, name: value})
    opt = rule.cls([w], **rule.options)
    shown = repr(opt)
    with pytest.raises(ValueError, match=name):
        setattr(opt, name, value)
    assert repr(opt) == shown


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"betas": (-0.1, 0.9)}, ValueError),
        ({"betas": (math.nan, 0.9)}, ValueError),
        ({"betas": (0.9,)}, ValueError),
        ({"betas": (0.9, 0.99, 0.999)}, ValueError),
        ({"betas": 0.9}, TypeError),
        ({"betas": ("0.9", 0.9)}, TypeError),
        ({"lr": "0.1"}, TypeError),
        ({"lr": True}, TypeError),
        ({"lr": None}, TypeError),
        ({"lr": 1j}, TypeError),
        ({"lr": np.ones(2)}, TypeError),
        ({"lr": np.array("0.1")}, TypeError),
        ({"lr": np.array(True)}, TypeError),
        ({"lr": np.True_}, TypeError),
        ({"amsgrad": 1}, TypeError),
        ({"amsgrad": None}, TypeError),
        ({"maximize": "yes"}, TypeError),
        ({"skip_nonfinite": 0}, TypeError),
        ({"max_norm": 0.0}, ValueError),
        ({"max_norm": -1.0}, ValueError),
        ({"max_norm": math.nan}, ValueError),
        ({"max_norm": "1"}, TypeError),
        ({"state_dtype": "float16"}, ValueError),
        ({"state_dtype": "int4"}, ValueError),
        ({"state_dtype": "nonsense"}, ValueError),
        ({"state_dtype": np.int32}, ValueError),
        ({"fused": True}, TypeError),
    ],
    ids=str,
)
def test_constructor_arguments(kwargs: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(kwargs))):
        fs.Adam([np.ones(3, f32)], **kwargs)


def test_numbers_of_every_kind_are_numbers() -> None:
    from fractions import Fraction

    with pytest.raises(ValueError, match="lr is too large"):
        fs.SGD([np.ones(1)], lr=10**400)
    w = np.ones(1)
    fs.SGD([w]).step([np.ones(1)], lr=np.float32(0.5), zero_grad=np.bool_(True))
    assert w[0] == 0.5
    for lr in (1, np.float32(0.5), np.int64(1), np.array(0.5), Fraction(1, 2)):
        opt = fs.SGD([np.ones(1)], lr=lr)
        assert opt.lr == float(lr)
        assert type(opt.lr) is float


@pytest.mark.parametrize(
    "make",
    [
        lambda w: fs.SGD([w], momentum=0.0, nesterov=True),
        lambda w: fs.SGD([w], momentum=0.9, dampening=0.1, nesterov=True),
        lambda w: fs.NAG([w], momentum=0.0),
    ],
)
def test_nesterov_needs_momentum(make: Callable[[np.ndarray], Any]) -> None:
    with pytest.raises(ValueError, match="momentum"):
        make(np.ones(3, f32))


def test_what_decides_the_state_cannot_change() -> None:
    opt = fs.SGD([np.ones(3, f32)])
    with pytest.raises(ValueError, match="create a new optimizer"):
        opt.momentum = 0.9
    assert opt.momentum == 0
    adam = fs.Adam([np.ones(3, f32)])
    with pytest.raises(ValueError, match="create a new optimizer"):
        adam.amsgrad = True
    moving = fs.SGD([np.ones(3, f32)], momentum=0.9)
    moving.momentum = 0.95
    assert moving.momentum == 0.95


def test_columns_as_parameters_are_told_apart_quickly() -> None:
    """A thousand models side by side: half a million pairs, none of which needs a search."""
    models = np.zeros((20, 1000), f32)
    opt = fs.SGD([models[:, i] for i in range(1000)], lr=1.0)
    gradients = np.ones_like(models)
    opt.step([gradients[:, i] for i in range(1000)], zero_grad=True)
    assert (models == -1).all()
    assert not gradients.any()


def test_a_typo_in_an_attribute_is_an_error() -> None:
    opt = fs.Adam([np.ones(3, f32)])
    with pytest.raises(AttributeError):
        opt.learning_rate = 0.1


def test_parameter_changed_behind_our_back() -> None:
    w = np.ones(6, f32)
    opt = fs.Adam({"W": w})
    w.flags.writeable = False
    with pytest.raises(ValueError, match="'W' has been"):
        opt.step({"W": np.ones(6, f32)})
    w.flags.writeable = True
    opt.step({"W": np.ones(6, f32)})
    w.resize(600_000, refcheck=False)  # the old memory is gone
    for shape in (6, 600_000):
        with pytest.raises(ValueError, match="other memory"):
            opt.step({"W": np.ones(shape, f32)})


def test_dtype_or_state_changed_behind_our_back() -> None:
    w = np.ones(6, f32)
    opt = fs.Adam({"W": w})
    state = opt.state["W"]["exp_avg"]
    state.flags.writeable = False
    with pytest.raises(ValueError, match="the exp_avg of parameter 'W' has been"):
        opt.step({"W": np.ones(6, f32)})
    state.flags.writeable = True
    opt.step({"W": np.ones(6, f32)})
    with np.errstate(all="ignore"):
        try:
            w.dtype = np.int32
        except (AttributeError, DeprecationWarning):
            pytest.skip("this NumPy does not let a dtype be assigned")
    with pytest.raises(ValueError, match="other memory, shape or dtype"):
        opt.step({"W": np.ones(6, f32)})


def test_optimizer_itself_has_no_rule() -> None:
    with pytest.raises(TypeError, match="subclasses"):
        fs.Optimizer([np.ones(3)], {})


def test_gradients_that_change_between_steps_are_checked_again() -> None:
    """What was found disjoint once is remembered, by memory and strides."""
    params = [np.zeros(4), np.zeros(4)]
    opt = fs.SGD(params)
    base = np.ones((4, 4))
    separate = [base[:, 0], base[:, 1]]
    opt.step(separate, zero_grad=True)
    opt.step(separate, zero_grad=True)
    opt.step([base[:, 0], base[:, 0]])
    with pytest.raises(ValueError, match="two gradients share memory"):
        opt.step([base[:, 0], base[:, 0]], zero_grad=True)
    crossing = np.ones(7)
    opt.step([crossing[::2], base[0]], zero_grad=True)
    with pytest.raises(ValueError, match="two gradients share memory"):
        opt.step([crossing[:4], crossing[::2]], zero_grad=True)


def test_gradients_between_the_elements_of_a_parameter_are_checked_again() -> None:
    """Another one over the same stretch of memory may touch what the first one left out."""
    base = np.zeros((5, 6))
    param, beside = base[:, :3], base[:, 3:]
    across = base.reshape(-1)[3:].reshape(9, 3)[:5]
    opt = fs.SGD(param)
    opt.step(beside)
    opt.step(beside)
    with pytest.raises(ValueError, match="gradient of the parameter shares memory"):
        assert_untouched(opt, [base], lambda: opt.step(across))


def test_callable_lr_that_misbehaves() -> None:
    w = np.ones(3, f32)
    for value, error in [(-1.0, ValueError), (math.nan, ValueError), ("x", TypeError)]:
        opt = fs.Adam([w], lr=lambda step, value=value: value)
        with pytest.raises(error, match="lr"):
            assert_untouched(opt, [w], lambda opt=opt: opt.step([np.ones(3, f32)]))

    def broken(step: int) -> float:
        raise KeyError(step)

    opt = fs.Adam([w], lr=broken)
    with pytest.raises(KeyError):
        assert_untouched(opt, [w], lambda: opt.step([np.ones(3, f32)]))


def test_no_memory_is_leaked_by_errors() -> None:
    """References to gradients are given back, whatever happens."""
    import sys

    w, good, bad = np.ones(3, f32), np.ones(3, f32), np.ones(4, f32)
    opt = fs.Adam([w, np.ones(3, f32)])
    counts = sys.getrefcount(good), sys.getrefcount(bad), sys.getrefcount(None)
    for _ in range(1000):
        with pytest.raises(ValueError, match="shape"):
            opt.step([good, bad])
        opt.step([good, None])
    assert (sys.getrefcount(good), sys.getrefcount(bad)) == counts[:2]
    assert abs(sys.getrefcount(None) - counts[2]) < 100
