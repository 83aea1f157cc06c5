"""Arrays of other libraries: the same step, on their own memory."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import fusestep as fs
from rules import PLAIN, Rule


class Foreign:
    """An array type of our own that only speaks DLPack, old or new."""

    def __init__(self, array: np.ndarray, *, versioned: bool = True, device: int = 1) -> None:
        self.array, self.versioned, self.device = array, versioned, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device, 0)

    def __dlpack__(self, *, stream: Any = None, **kwargs: Any) -> Any:
        if kwargs and not self.versioned:
            raise TypeError(f"unexpected keyword arguments: {kwargs}")
        return self.array.__dlpack__(stream=stream, **kwargs)


# Before, NumPy's own export could not say that memory is writable.
numpy_speaks_version_1 = pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) < (2, 1), reason="needs NumPy 2.1"
)


@numpy_speaks_version_1
@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("versioned", [True, False])
def test_any_exporter(rule: Rule, versioned: bool, rng: np.random.Generator) -> None:
    start, g = rng.standard_normal((2, 6, 5)).astype(np.float32)
    plain, foreign = start.copy(), start.copy()
    opt = rule.cls([Foreign(foreign[:, ::2])], **rule.options)
    plain_opt = rule.cls([plain[:, ::2]], **rule.options)
    for _ in range(3):
        opt.step([Foreign(g.T[::2].T, versioned=versioned)], zero_grad=False)
        plain_opt.step([g[:, ::2]])
    np.testing.assert_array_equal(plain, foreign)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_torch_tensors(rule: Rule, dtype: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    start, g = (torch.tensor(x).to(getattr(torch, dtype)) for x in rng.standard_normal((2, 4, 6)))
    tensor = torch.nn.Parameter(start.clone().t())
    opt = rule.cls({"w": tensor, "b": torch.zeros(3)}, **rule.options)
    opt.step({"w": g.t()}, zero_grad=True)
    assert not g.any()
    g = torch.tensor(rng.standard_normal((2, 4, 6))[1]).to(g.dtype)
    opt.step({"w": g.t()})
    again = rule.cls([start], **rule.options)
    rng = np.random.default_rng(0)
    for x in (rng.standard_normal((2, 4, 6))[1], rng.standard_normal((2, 4, 6))[1]):
        again.step([torch.tensor(x).to(g.dtype)])
    assert torch.equal(tensor.detach(), start.t())
    assert opt.state["w"]["step"] == 2


def test_who_cannot_say_that_memory_is_writable() -> None:
    with pytest.raises(ValueError, match="parameter 0 is read-only"):
        fs.Adam([Foreign(np.ones(3), versioned=False)])


def test_jax() -> None:
    """Gradients from JAX move NumPy parameters; JAX's own arrays are immutable.

    In a process of its own: JAX starts threads and then objects to every fork.
    """
    pytest.importorskip("jaxlib")
    code = (
        "import numpy as np, jax.numpy as jnp, optax, fusestep as fs\n"
        "w, x = np.ones(5, np.float32), np.ones(5, np.float32)\n"
        "g = jnp.arange(5, dtype=jnp.float32)\n"
        "schedule = optax.linear_schedule(1.0, 0.0, 4)\n"
        "a, b = fs.Adam([w], lr=schedule), fs.Adam([x])\n"
        "for i in range(4): a.step([g]); b.step([np.asarray(g)], lr=1 - i / 4)\n"
        "assert (w == x).all() and w[1] < 0\n"
        "try: fs.Adam([g])\n"
        "except ValueError as error: assert 'parameter 0 is read-only' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_array_on_another_device() -> None:
    rocm = 10
    with pytest.raises(TypeError, match="parameter 0 is on a device of DLPack type 10; expected"):
        fs.Adam([Foreign(np.ones(3), device=rocm)])


@pytest.mark.skipif(
    importlib.util.find_spec("fusestep._cuda") is not None, reason="this build has CUDA kernels"
)
def test_an_array_on_a_gpu_in_a_build_without_kernels() -> None:
    with pytest.raises(TypeError, match=r"parameter 0 is on cuda:0; this build .* docs/gpu\.md"):
        fs.Adam([Foreign(np.ones(3), device=2)])


def test_an_array_of_another_dtype() -> None:
    with pytest.raises(TypeError, match="parameter 0 has a dtype of DLPack code 0"):
        fs.Adam([Foreign(np.ones(3, int))])


def test_an_exporter_that_fails_or_lies() -> None:
    class Broken(Foreign):
        def __dlpack__(self, **kwargs: Any) -> Any:
            raise BufferError("out of order")

    class Lying(Foreign):
        def __dlpack__(self, **kwargs: Any) -> Any:
            return "capsule"

    with pytest.raises(TypeError, match="out of order"):
        fs.Adam([Broken(np.ones(3))])
    with pytest.raises(TypeError, match="did not return a DLPack capsule"):
        fs.Adam([Lying(np.ones(3))])


def test_torch_parameters_that_get_other_memory() -> None:
    """An error like for a resized NumPy array, rather than a step on memory that is gone."""
    torch = pytest.importorskip("torch")
    g = np.ones(4, np.float32)

    def assigned(t: Any) -> None:
        t.data = torch.full((4,), 5.0)

    def widened(t: Any) -> None:
        t.data = t.data.to(torch.float64)

    def freed(t: Any) -> None:
        t.untyped_storage().resize_(0)

    def resized(t: Any) -> None:
        t.data.resize_(1 << 20)

    for change in (assigned, widened, freed, resized):
        for make in (torch.zeros, lambda n: torch.nn.Parameter(torch.zeros(n))):
            t = make(4)
            opt = fs.SGD([t], lr=1.0)
            opt.step([g])
            change(t)
            with pytest.raises(ValueError, match="other memory"):
                opt.step([g])


def test_torchs_negative_bit_is_refused() -> None:
    torch = pytest.importorskip("torch")
    g = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    w = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="resolve_neg"):
        fs.SGD([w]).step([g])
    fs.SGD([w], lr=1.0).step([g.resolve_neg()])
    assert (w == 1).all()


def test_an_exporter_that_is_interrupted() -> None:
    class Interrupted(Foreign):
        def __dlpack__(self, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fs.Adam([Interrupted(np.ones(3))])


def test_an_exporter_that_changes_a_parameter() -> None:
    w = np.zeros(3)

    class Changing(Foreign):
        def __dlpack__(self, **kwargs: Any) -> Any:
            w.flags.writeable = False
            return super().__dlpack__(**kwargs)

    opt = fs.SGD([w, np.zeros(3)])
    with pytest.raises(ValueError, match="made read-only"):
        opt.step([np.ones(3), Changing(np.ones(3))])
    assert not w.any()


def test_a_numpy_scalar_is_the_gradient_of_a_scalar() -> None:
    """A reduction returns one: x.sum(), not an array of no dimensions."""
    b = np.zeros((), np.float32)
    opt = fs.SGD({"b": b}, lr=1.0)
    opt.step({"b": np.ones(3, np.float32).sum()})
    assert b == -3
    opt.step({"b": np.float64(1.0)})
    assert b == -4
    with pytest.raises(ValueError, match="read-only"):
        opt.step({"b": np.float32(1.0)}, zero_grad=True)
    with pytest.raises(ValueError, match="read-only"):
        fs.SGD([np.float32(1.0)])
    with pytest.raises(TypeError, match="int64"):
        opt.step({"b": np.int64(1)})


def test_overlap_is_seen_across_libraries() -> None:
    torch = pytest.importorskip("torch")
    base = np.zeros(10, np.float32)
    with pytest.raises(ValueError, match="share memory"):
        fs.Adam([base[:6], torch.from_numpy(base[5:])])
    opt = fs.Adam([base])
    with pytest.raises(ValueError, match="shares memory with parameter 0"):
        opt.step([torch.from_numpy(base)])


@numpy_speaks_version_1
def test_exports_are_given_back() -> None:
    """The exporter's memory is released when the step is over, and with the optimizer."""
    w, g = np.ones(3), np.ones(3)
    counts = sys.getrefcount(w), sys.getrefcount(g)
    opt = fs.Adam([Foreign(w)])
    for _ in range(10):
        opt.step([Foreign(g)])
    assert sys.getrefcount(g) == counts[1]
    del opt
    assert sys.getrefcount(w) == counts[0]
