"""State in 8 bits in fusestep.torch: the array classes' bits, checkpoints, and torch's habits."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs
from fusestep import _narrow

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

nn = torch.nn

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "NAG": ("NAG", {"lr": 0.05, "weight_decay": 0.01}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    "AMSGrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "NAdam": ("NAdam", {"lr": 0.01}),
    "Adagrad": ("Adagrad", {"lr": 0.05}),
    "Adagrad from 0.5": ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.5}),
}
SOME = ["SGD", "AMSGrad", "NAdam", "Adagrad"]
SHAPES = [(33, 5), (7,), (), (0, 3), (1100,), (4, 64)]
SIGNED = ("exp_avg", "momentum_buffer")


def values(seed: int, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def parameters(dtype: Any = torch.float32) -> list[Any]:
    return [nn.Parameter(value) for value in values(0, dtype)]


def copies_of(params: list[Any]) -> list[Any]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give(params: list[Any], seed: int) -> list[Any]:
    grads = values(seed, torch.bfloat16)
    for parameter, value in zip(params, grads, strict=True):
        parameter.grad = value.to(parameter.dtype)
    return [p.grad.clone() for p in params]


def make(name: str, params: Any, **options: Any) -> Any:
    cls, own = OPTIONS[name]
    return getattr(fst, cls)(params, **{"state_dtype": "int8"} | own | options)


def make_arrays(name: str, params: Any, **options: Any) -> Any:
    cls, own = OPTIONS[name]
    return getattr(fs, cls)(params, **{"state_dtype": "int8"} | own | options)


def make_torchs(name: str, params: Any) -> Any:
    cls, own = OPTIONS[name]
    extra = {"nesterov": True, "momentum": 0.9} if name == "NAG" else {}
    return getattr(torch.optim, "SGD" if name == "NAG" else cls)(params, **own | extra)


def trained(name: str = "AMSGrad", dtype: Any = torch.float32, **options: Any) -> Any:
    """Return parameters, and an optimizer that has stepped three times."""
    params = parameters(dtype)
    opt = make(name, params, **options)
    for i in range(3):
        give(params, i)
        opt.step()
    return params, opt


def bits(params: list[Any], opt: Any) -> list[Any]:
    """Return copies of parameters and all of their state."""
    state = [opt.state[p] for p in params if p in opt.state]
    found = [p.detach().clone() for p in params]
    return found + [torch.as_tensor(x).clone() for entry in state for x in entry.values()]


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_is_the_arrays(params: list[Any], opt: Any, arrays: list[Any], other: Any) -> None:
    """Parameters and state have the bits of an optimizer of arrays.

    But for NAdam's product of momenta, which torch keeps in float32, and what follows from it.
    """
    for parameter, array, expected in zip(params, arrays, other.state.values(), strict=True):
        is_exact = "mu_product" not in expected
        found, entry = parameter.detach().numpy(), opt.state[parameter]
        np.testing.assert_allclose(found, array, rtol=0, atol=0 if is_exact else 1e-6)
        for name, value in expected.items():
            if name in entry and name != "mu_product":
                np.testing.assert_array_equal(np.asarray(entry[name]), np.asarray(value), name)


def names_of(opt: Any) -> list[str]:
    """Return the names of the pieces of state."""
    return [*opt._rule_of(opt.param_groups[0]).states]


def state_of(opt: Any, parameter: Any, name: str) -> Any:
    """Return what a piece of state stands for."""
    entry = opt.state[parameter]
    if name + "_powers" not in entry:
        return entry[name].float()
    blocks = _narrow.Blocks(entry[name].numpy(), entry[name + "_powers"].numpy())
    return torch.from_numpy(_narrow.decode(blocks, name in SIGNED))


# ---- the array classes' bits ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_the_array_classes(name: str, dtype: Any, pointers: str) -> None:
    params = parameters(dtype)
    arrays = [p.detach().numpy().copy() for p in params]
    opt, other = make(name, params, seed=7), make_arrays(name, arrays, seed=7)
    for i in range(8):
        grads = give(params, i)
        opt.step(grad_scale=0.5)
        other.step([g.numpy() for g in grads], grad_scale=0.5)
    assert_is_the_arrays(params, opt, arrays, other)
    for parameter in params:
        entry = opt.state[parameter]
        for state in names_of(opt):
            codes, powers = entry[state], entry[state + "_powers"]
            assert codes.dtype == powers.dtype == torch.uint8
            assert codes.shape == parameter.shape
            assert powers.shape == (-(-parameter.numel() // 64),)


def test_both_names_of_the_dtype() -> None:
    found = []
    for given in ("int8", torch.int8):
        params, opt = trained(state_dtype=given)
        assert opt.state_dtype == "int8"
        found.append(bits(params, opt))
    assert_same(*found)


def test_bytes_of_the_state() -> None:
    parameter = nn.Parameter(torch.zeros(1_000_000))
    opt = fst.Adam([parameter], state_dtype="int8")
    parameter.grad = torch.zeros_like(parameter)
    opt.step()
    state = [x for x in opt.state[parameter].values() if x.ndim]
    size = sum(x.numel() * x.element_size() for x in state)
    assert size == 2 * (1_000_000 + 15_625)
    assert fs.memory([parameter], fst.Adam, state_dtype=torch.int8).state == size


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda x: x.t(),
    "every other": lambda x: x[::2, 1::2],
    "channels last": lambda x: x.reshape(4, 4, 10, 10).contiguous(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["alike", "in C order"])
def test_codes_are_in_c_order_whatever_the_layout(layout: str, gradient: str) -> None:
    """So they, and the parameters, are those of an optimizer of contiguous arrays."""
    memory = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(LAYOUTS[layout](memory))
    assert not parameter.is_contiguous()
    array = parameter.detach().numpy().copy("C")
    opt, other = make("Adam", [parameter]), make_arrays("Adam", [array])
    for i in range(4):
        grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.grad = grad if gradient == "in C order" else torch.empty_like(parameter)
        parameter.grad.copy_(grad)
        opt.step()
        other.step([grad.numpy()])
    assert opt.state[parameter]["exp_avg"].is_contiguous()
    assert_is_the_arrays([parameter], opt, [array], other)


WHERE: dict[str, Callable[[], Any]] = {
    "random": lambda: fs.RandomBlocks(0.4, block=128),
    "random, tracking": lambda: fs.RandomBlocks(0.4, block=7, frozen="track"),
    "in turn": lambda: fs.CyclicBlocks(2),
    "the largest, tracking": lambda: fs.TopK(0.3, frozen="track"),
    "rows": lambda: np.arange(40) % 3 == 0,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", SOME)
def test_selections(name: str, where: str) -> None:
    parameter = nn.Parameter(torch.randn(40, 128, generator=torch.Generator().manual_seed(0)))
    array = parameter.detach().numpy().copy()
    opt, other = make(name, [parameter], seed=3), make_arrays(name, [array], seed=3)
    for i in range(6):
        parameter.grad = torch.randn(40, 128, generator=torch.Generator().manual_seed(i))
        opt.step(where=WHERE[where]())
        selected = WHERE[where]()
        as_array = [selected] if isinstance(selected, np.ndarray) else selected
        other.step([parameter.grad.numpy()], where=as_array)
    assert_is_the_arrays([parameter], opt, [array], other)


@pytest.mark.parametrize("name", OPTIONS)
def test_sparse_gradients(name: str) -> None:
    """Rows of whole blocks; others, with their state, keep their bits."""
    parameter = nn.Parameter(torch.randn(30, 64, generator=torch.Generator().manual_seed(0)))
    array = parameter.detach().numpy().copy()
    opt, other = make(name, [parameter]), make_arrays(name, [array])
    for i in range(5):
        rows, each = torch.tensor([i, 7, 7]), torch.randn(3, 64)
        parameter.grad = torch.sparse_coo_tensor(rows[None], each, (30, 64), check_invariants=True)
        kept = bits([parameter], opt)
        opt.step()
        other.step([fs.Rows(rows.numpy(), each.numpy())])
        absent = [x for x in range(30) if x not in rows]
        for a, b in zip(bits([parameter], opt), kept, strict=False):
            if a.ndim == 2:
                assert torch.equal(a[absent], b[absent])
    assert_is_the_arrays([parameter], opt, [array], other)


def test_an_embedding_beside_dense_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64, sparse=True), nn.Linear(64, 1))
    opt = fst.Adam(model.parameters(), lr=0.02, state_dtype="int8", max_norm=1.0)
    words = torch.randint(50, (200,))
    target = (words % 2).float()
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(words)[:, 0], target)
        loss.backward()
        opt.step(zero_grad=True)
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("name", SOME)
def test_samples(name: str) -> None:
    params = parameters()
    arrays = [p.detach().numpy().copy() for p in params]
    opt, other = make(name, params, seed=5), make_arrays(name, arrays, seed=5)
    how = {"max_norm": 0.7, "noise_multiplier": 0.5}
    weight = torch.tensor([1.0, 0.5, 2.0])
    for i in range(4):
        three = (values(3 * i + k) for k in range(3))
        grads = [torch.stack(each) for each in zip(*three, strict=True)]
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad_sample = grad
        opt.step(sample_weight=weight, sample_options=how)
        other.step([fs.Samples(g.numpy(), weight.numpy(), **how) for g in grads])
    assert_is_the_arrays(params, opt, arrays, other)


def test_fused_layers() -> None:
    """Factors in place of gradients: outer products, as of arrays."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    arrays = [p.detach().numpy().copy() for p in layer.parameters()]
    fst.fuse_linear(layer)
    opt = make("Adam", layer.parameters())
    other = make_arrays("Adam", arrays)
    for i in range(5):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(i))
        opt.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        error = (2 * out.detach()).numpy()
        opt.step()
        other.step(
            [fs.Outer(x.numpy(), error, reduction="sum"), fs.Outer(None, error, reduction="sum")]
        )
    assert layer.weight.grad is None
    assert_is_the_arrays([*layer.parameters()], opt, arrays, other)


@pytest.mark.parametrize("name", SOME)
def test_with_all_that_follows_a_parameter(name: str) -> None:
    """Anchors, averages, bounds, the norm, steps that are left out."""
    options = {"ema_decay": 0.9, "clip_value": 0.4, "max_norm": 20.0, "skip_nonfinite": True}
    params = parameters()
    arrays = [p.detach().numpy().copy() for p in params]
    opt, other = make(name, params, **options), make_arrays(name, arrays, **options)
    opt.anchor(0.3)
    other.anchor(0.3)
    for i in range(6):
        grads = give(params, i)
        if i == 4:
            grads[0][0, 0] = params[0].grad[0, 0] = float("nan")
        opt.step()
        other.step([g.numpy() for g in grads])
    assert opt.skipped_steps == 1
    assert_is_the_arrays(params, opt, arrays, other)
    for average, theirs in zip(opt.averages, other.averages, strict=True):
        assert average.dtype == torch.float32
        atol = 1e-6 if name == "NAdam" else 0
        np.testing.assert_allclose(average.numpy(), theirs, rtol=0, atol=atol)
    assert {e["anchor"].dtype for e in opt.state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["float32", "split"])
def test_masters(kind: str) -> None:
    """As a model in float32 that is given the same gradients."""
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    opt, other = make("AMSGrad", narrow, master=kind), make("AMSGrad", wide)
    for i in range(20):
        give(narrow, i)
        give(wide, i)
        opt.step()
        other.step()
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b.detach().bfloat16())
        for name in names_of(opt):
            for part in (name, name + "_powers"):
                assert torch.equal(opt.state[a][part], other.state[b][part])


def test_narrow_parameters_rounded_at_random() -> None:
    params, tensors = parameters(torch.bfloat16), values(0, torch.bfloat16)
    opt = make("Adam", params, stochastic_rounding=True, seed=3)
    other = make_arrays("Adam", tensors, stochastic_rounding=True, seed=3)
    for i in range(5):
        other.step(give(params, i))
        opt.step()
    assert_same([p.detach() for p in params], tensors)


def test_complex_state_stays_wide() -> None:
    """Seen as real it would have twice as many elements; as with bfloat16."""
    params = [*parameters(), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    opt = make("Adam", params)
    give(params[:-1], 0)
    params[-1].grad = torch.ones_like(params[-1])
    opt.step()
    assert opt.state[params[0]]["exp_avg"].dtype == torch.uint8
    entry = opt.state[params[-1]]
    assert entry["exp_avg"].dtype == torch.complex64
    assert "exp_avg_powers" not in entry
    other = make("Adam", copies_of(params))
    other.load_state_dict(opt.state_dict())
    assert other.state_dict(state_dtype="float32")["state"][6]["exp_avg"].dtype == torch.complex64


def test_sgd_without_momentum_has_no_state() -> None:
    params, others = parameters(), parameters()
    opt = fst.SGD(params, lr=0.1, state_dtype="int8")
    other = fst.SGD(others, lr=0.1)
    for each, one in ((params, opt), (others, other)):
        give(each, 0)
        one.step()
    assert not opt.state
    assert_same([p.detach() for p in params], [p.detach() for p in others])


# ---- what 8 bits refuse --------------------------------------------------------------------------


def test_parts_of_blocks_are_refused_and_nothing_has_changed() -> None:
    rng = np.random.default_rng(0)
    table = nn.Parameter(torch.from_numpy(rng.standard_normal((20, 60), np.float32)))
    opt = make("Adam", [table])
    for is_first in (True, False):
        table.grad = torch.ones_like(table)
        if not is_first:
            opt.step()
        before = bits([table], opt)
        for where in (
            torch.arange(1200).reshape(20, 60) % 3 == 0,
            torch.arange(20) < 3,
            fs.TopK(0.1),
            fs.RandomBlocks(0.5, block=100),
        ):
            with pytest.raises(ValueError, match="in blocks of 64 elements"):
                opt.step(where=where)
        table.grad = torch.sparse_coo_tensor(
            [[1]], torch.ones(1, 60), (20, 60), check_invariants=True
        )
        with pytest.raises(ValueError, match="rows of a multiple of 64"):
            opt.step()
        assert_same(bits([table], opt), before)
        assert bool(opt.state) != is_first


def test_exact_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="which 8 bits are too few for"):
        make("Adam", parameters(), rows="exact")


def test_dtensors_are_refused(mesh: Any) -> None:
    tensor = torch.distributed.tensor
    split = nn.Parameter(tensor.distribute_tensor(torch.ones(6), mesh, [tensor.Shard(0)]))
    with pytest.raises(ValueError, match="parameter 0 is a DTensor, which state_dtype='int8'"):
        make("Adam", [split])
    for opt in (make("Adam", parameters()), make("Adagrad", parameters())):
        with pytest.raises(ValueError, match="parameter 0 of group 1 is a DTensor"):
            opt.add_param_group({"params": [split]})
        assert len(opt.param_groups) == 1
    params = parameters()
    opt = make("Adam", params)
    give(params, 0)
    split.grad = torch.ones_like(split)
    opt.param_groups[0]["params"].append(split)  # unseen
    with pytest.raises(ValueError, match="parameter 6 is a DTensor"):
        opt.step()
    assert not opt.state


def test_a_first_step_that_fails_leaves_nothing() -> None:
    params = parameters()
    opt = make("Adam", params)
    give(params, 0)
    params[4].grad = params[4].detach()
    with pytest.raises(ValueError, match="share"):
        opt.step()
    assert not opt.state


BAD_STATE: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "no powers": (lambda e: e.pop("exp_avg_powers"), TypeError, "has dtype torch.uint8"),
    "no powers but their name": (
        lambda e: e.update(exp_avg_powers=None),
        TypeError,
        "has dtype torch.uint8, .*; 'exp_avg_powers' is missing",
    ),
    "sparse codes": (
        lambda e: e.update(exp_avg=e["exp_avg"].to_sparse()),
        TypeError,
        "has layout torch.sparse_coo; expected torch.strided",
    ),
    "powers that are promised": (
        lambda e: e.update(exp_avg_powers=e["exp_avg_powers"].to("meta")),
        TypeError,
        "is, in part, on the meta device",
    ),
    "no codes": (lambda e: e.update(exp_avg=torch.ones(33, 5)), TypeError, "float32 and uint8"),
    "as torch casts them": (
        lambda e: e.update(exp_avg=e["exp_avg"].float(), exp_avg_powers=torch.ones(3)),
        TypeError,
        "float32 and float32; expected uint8 for state in 8 bits",
    ),
    "few powers": (
        lambda e: e.update(exp_avg_powers=torch.ones(2, dtype=torch.uint8)),
        ValueError,
        r"has shapes \(33, 5\) and \(2,\); expected \(33, 5\) and \(3,\)",
    ),
    "few codes": (
        lambda e: e.update(exp_avg=torch.ones(33, 4, dtype=torch.uint8)),
        ValueError,
        r"has shapes \(33, 4\)",
    ),
    "a number": (lambda e: e.update(exp_avg_powers=3), TypeError, "is a int; expected a tensor"),
}


@pytest.mark.parametrize("bad", BAD_STATE)
@pytest.mark.parametrize("where", ["in the state", "in a state dict"])
def test_damaged_state(bad: str, where: str) -> None:
    spoil, error, message = BAD_STATE[bad]
    params, opt = trained()
    before = bits(params, opt)
    if where == "in a state dict":
        saved = copy.deepcopy(opt.state_dict())
        spoil(saved["state"][0])
        with pytest.raises(error, match=f"the exp_avg of parameter 0 .*{message}"):
            opt.load_state_dict(saved)
    else:
        good = {**opt.state[params[0]]}
        spoil(opt.state[params[0]])
        with pytest.raises(error, match=f"the exp_avg of parameter 0 .*{message}"):
            opt.step()
        opt.state[params[0]] = good
    assert_same(bits(params, opt), before)
    opt.step()


@pytest.mark.parametrize("state_dtype", ["int8", "bfloat16", None])
def test_codes_without_powers_are_nobodys_moments(state_dtype: str | None) -> None:
    """Nor powers without codes: neither where they are loaded, nor where they are widened."""
    params, opt = trained("Adam")
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["exp_avg_powers"]
    message = "exp_avg of parameter 0 has dtype torch.uint8, .*; 'exp_avg_powers' is missing"
    with pytest.raises(TypeError, match=message):
        make("Adam", copies_of(params), state_dtype=state_dtype).load_state_dict(saved)
    arrays = [p.detach().numpy().copy() for p in params]
    other = make_arrays("Adam", arrays, state_dtype=state_dtype)
    with pytest.raises(TypeError, match=r"dtype torch.uint8, .*; 'exp_avg_powers' is missing"):
        other.load_state_dict(saved)
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["exp_avg"]
    with pytest.raises(TypeError, match="is missing; its 'exp_avg_powers' is there"):
        other.load_state_dict(saved)
    del opt.state[params[0]]["exp_avg_powers"]
    with pytest.raises(TypeError, match=message):
        opt.state_dict(state_dtype=torch.float32)


@pytest.mark.parametrize("bad", [torch.float16, torch.int8, "bfloat16", "x", 3])
def test_what_state_may_be_widened_to(bad: Any) -> None:
    params, opt = trained("Adam")
    other = make_arrays("Adam", [p.detach().numpy() for p in params])
    for one in (opt, other):
        with pytest.raises(ValueError, match=r"; expected None, 'float32', 'float64'$"):
            one.state_dict(state_dtype=bad)


# ---- checkpoints ---------------------------------------------------------------------------------


def through_a_file(name: str, params: list[Any], opt: Any, options: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = copies_of(params)
    other = make(name, others, **options | {"seed": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(torch.load(file, weights_only=True))
    return others, other


WAYS: dict[str, Callable[..., Any]] = {
    "file": through_a_file,
    "pickle": lambda _, params, opt, __: pickle.loads(pickle.dumps((params, opt))),
    "deepcopy": lambda _, params, opt, __: copy.deepcopy((params, opt)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_goes_on_bit_for_bit(name: str, way: str) -> None:
    options = {"seed": 9, "ema_decay": 0.9}
    params, opt = trained(name, **options)
    others, other = WAYS[way](name, params, opt, options)
    assert (other.state_dtype, other.seed) == ("int8", 9)
    for i in range(3, 7):
        for each, one in ((params, opt), (others, other)):
            give(each, i)
            one.step()
    assert_same(bits(others, other), bits(params, opt))
    parts = [opt.state[p][names_of(opt)[0]] for p in params]
    for a, p in zip(parts, others, strict=True):
        assert a is not other.state[p][names_of(opt)[0]]


def test_another_seed_draws_anew() -> None:
    found = [trained("Adam", seed=seed)[1] for seed in (1, 1, 2)]
    states = [[e["exp_avg"] for e in opt.state.values()] for opt in found]
    assert_same(states[0], states[1])
    assert not torch.equal(states[0][4], states[2][4])


def test_seed_0_is_saved_too() -> None:
    params, opt = trained("Adam", seed=0)
    others = copies_of(params)
    other = make("Adam", others, seed=5)
    other.load_state_dict(opt.state_dict())
    assert other.seed == 0
    for each, one in ((params, opt), (others, other)):
        give(each, 3)
        one.step()
    assert_same(bits(others, other), bits(params, opt))


@pytest.mark.parametrize("source", [None, "bfloat16", "int8", "float64"])
@pytest.mark.parametrize("target", [None, "bfloat16", "int8", "float64"])
def test_loading_other_dtypes(source: str | None, target: str | None) -> None:
    params, old = trained(state_dtype=source)
    new = make("AMSGrad", copies_of(params), state_dtype=target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new.load_state_dict(old.state_dict())
    if "int8" not in (source, target):
        return  # tests/test_torch_whole_step.py
    names = [dtype or "float32" for dtype in (source, target)]
    said = [f"state is converted from {names[0]} to {names[1]}"] * (source != target)
    assert [str(w.message) for w in caught] == said
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    tolerance = 0 if source == "int8" else 1 / 16
    for p, q in zip(params, new.param_groups[0]["params"], strict=True):
        assert new.state[q]["step"] == 3
        assert ("exp_avg_powers" in new.state[q]) == (target == "int8")
        for name in names_of(old):
            found, given_ = state_of(new, q, name), state_of(old, p, name)
            largest = float(given_.abs().max()) if given_.numel() else 0.0
            atol = tolerance * largest / 2**9
            torch.testing.assert_close(found, given_, rtol=tolerance, atol=atol)
    give(new.param_groups[0]["params"], 3)
    new.step()


@pytest.mark.parametrize("name", OPTIONS)
def test_to_torch(name: str) -> None:
    """What it is given is what 8 bits stand for, and it goes on; and back."""
    params, opt = trained(name, ema_decay=0.9)
    others = copies_of(params)
    other = make_torchs(name, others)
    for wide in ("float32", torch.float32):
        saved = opt.state_dict(state_dtype=wide)
        other.load_state_dict(copy.deepcopy(saved))
    for p, q in zip(params, others, strict=True):
        assert not any(key.endswith("_powers") for key in other.state[q])
        for state in names_of(opt):
            assert torch.equal(other.state[q][state], state_of(opt, p, state))
    wide_params = copies_of(params)
    wide = make(name, wide_params, state_dtype=None)
    with pytest.warns(UserWarning, match="from int8 to float32"):
        wide.load_state_dict(opt.state_dict())
    for i in range(3, 6):
        for each, one in ((others, other), (wide_params, wide)):
            give(each, i)
            one.step()
    for a, b in zip(others, wide_params, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="from float32 to int8") as caught:
        opt.load_state_dict(other.state_dict())
    assert len(caught) == 1
    give(params, 6)
    opt.step()


def test_widening_touches_state_only() -> None:
    """Not the optimizer's own, nor the entries of others; float64 stays what it is."""
    params, opt = trained(ema_decay=0.9)
    opt.anchor(1.0)
    before = bits(params, opt)
    exact, wide = opt.state_dict(), opt.state_dict(state_dtype=torch.float64)
    assert_same(bits(params, opt), before)
    for key, entry in wide["state"].items():
        kept = exact["state"][key]
        assert {*kept} - {*entry} == {name + "_powers" for name in names_of(opt)}
        assert entry["exp_avg"].dtype == torch.float64
        assert entry["average"] is kept["average"]
        assert entry["anchor"] is kept["anchor"]
    assert wide["fusestep"] == exact["fusestep"]
    _, double = trained(state_dtype="float64")
    saved = double.state_dict(state_dtype=torch.float32)
    assert saved["state"][0]["exp_avg"].dtype == torch.float64
    for bad in ("int8", torch.bfloat16, "half"):
        with pytest.raises(ValueError, match="state_dtype is"):
            opt.state_dict(state_dtype=bad)


def test_hooks_see_what_is_saved() -> None:
    _, opt = trained()
    seen: list[Any] = []
    opt.register_state_dict_post_hook(lambda _, saved: seen.append(saved["state"][0]["exp_avg"]))
    opt.state_dict()
    opt.state_dict(state_dtype=torch.float32)
    assert [x.dtype for x in seen] == [torch.uint8, torch.float32]


def test_array_optimizers_load_it_and_the_other_way_round() -> None:
    params, opt = trained("AMSGrad", seed=4)
    arrays = [p.detach().numpy().copy() for p in params]
    other = make_arrays("AMSGrad", arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(opt.state_dict())
    grads = give(params, 5)
    opt.step()
    other.step([g.numpy() for g in grads])
    assert_is_the_arrays(params, opt, arrays, other)
    saved = other.state_dict()
    saved["state"] = {
        key: {name: torch.as_tensor(x) for name, x in entry.items()}
        for key, entry in saved["state"].items()
    }
    opt.load_state_dict({"state": saved["state"], "param_groups": opt.state_dict()["param_groups"]})
    assert_is_the_arrays(params, opt, arrays, other)


def test_a_bad_state_dict_changes_nothing() -> None:
    params, opt = trained()
    _, wide = trained(state_dtype=None)
    saved = copy.deepcopy(wide.state_dict())
    saved["state"][4]["exp_avg_sq"] = torch.zeros(3)
    before = bits(params, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is anything said
        with pytest.raises(ValueError, match="exp_avg_sq of parameter 4"):
            opt.load_state_dict(saved)
        with pytest.raises(UserWarning, match="state is converted"):
            opt.load_state_dict(wide.state_dict())
    assert_same(bits(params, opt), before)


def test_taking_over_from_torch() -> None:
    """State that is there is rounded to nearest by the first step, if that happens."""
    params = parameters()
    torchs = torch.optim.Adam(params, lr=0.01)
    give(params, 0)
    torchs.step()
    opt = fst.convert(torchs, state_dtype="int8", seed=2)
    params[0].grad = params[0].detach()
    with pytest.raises(ValueError, match="share"):
        opt.step()
    assert opt.state[params[0]]["exp_avg"].dtype == torch.float32
    arrays = [p.detach().numpy().copy() for p in params]
    other = fs.Adam(arrays, lr=0.01, state_dtype="int8")
    with pytest.warns(UserWarning, match="from float32 to int8"):
        other.load_state_dict(torchs.state_dict())
    other.seed = 2
    grads = give(params, 1)
    opt.step()
    other.step([g.numpy() for g in grads])
    assert_is_the_arrays(params, opt, arrays, other)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.usefixtures("mesh")
def test_distributed_checkpoints(flat: bool, tmp_path: Path) -> None:
    """torch.distributed.checkpoint's state dicts, by the names of parameters, over a file."""
    dcp_state = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    dcp = torch.distributed.checkpoint
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flat)

    def begin() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
        return model, fst.AdamW(model.parameters(), lr=0.01, state_dtype="int8", seed=3)

    def go_on(model: Any, opt: Any) -> Any:
        for i in range(3):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(i))
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        return bits([*model.parameters()], opt)

    def state_dicts(model: Any, opt: Any) -> dict[str, Any]:
        weights, state = dcp_state.get_state_dict(model, opt, options=options)
        return {"weights": weights, "state": state}

    model, opt = begin()
    go_on(model, opt)
    dcp.save(state_dicts(model, opt), checkpoint_id=tmp_path)
    expected = go_on(model, opt)
    model, opt = begin()
    loaded = state_dicts(model, opt)
    dcp.load(loaded, checkpoint_id=tmp_path)
    weights, state = loaded.values()
    dcp_state.set_state_dict(
        model, opt, model_state_dict=weights, optim_state_dict=state, options=options
    )
    assert_same(go_on(model, opt), expected)


# ---- all that users do to optimizers -------------------------------------------------------------


def test_closures_hooks_and_zero_grad() -> None:
    params, others = parameters(), parameters()
    opt, other = make("Adam", params), make("Adam", others)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        give(params, len(seen))
        return 1.5

    for _ in range(3):
        give(others, len(seen) + 1)
        other.step()
        assert opt.step(closure, zero_grad=True) == 1.5
        assert all((p.grad == 0).all() for p in params)
    assert seen == ["before", "after"] * 3
    assert_same(bits(params, opt), bits(others, other))


def test_grad_scaler() -> None:
    params, others = parameters(), parameters()
    opt, other = make("Adam", params), make("Adam", others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(5):
        give(params, i)
        give(others, i)
        for p in params:
            p.grad.mul_(1024.0)
        scaler.scale(torch.zeros(()))  # makes it begin
        if i == 2:
            params[0].grad[0, 0] = float("inf")
        else:
            other.step()
        scaler.step(opt)
        scaler.update(1024.0)
    assert_same(bits(params, opt), bits(others, other))


def test_groups_that_come_later() -> None:
    params, others = parameters(), parameters()
    opt, other = make("Adam", params[:2]), make("Adam", others)
    for i in range(4):
        if i == 1:
            opt.add_param_group({"params": params[2:]})
        give(params, i)
        give(others, i)
        if i == 0:
            for p in (*params[2:], *others[2:]):
                p.grad = None
        opt.step()
        other.step()
    assert_same(bits(params, opt), bits(others, other))


def test_state_that_is_made_early() -> None:
    """By an anchor, or by the constructor; the steps are the same."""
    for name in ("Adam", "Adagrad from 0.5"):
        params, others = parameters(), parameters()
        opt, other = make(name, params), make(name, others)
        opt.anchor(0.0)
        assert opt.state[params[0]][names_of(opt)[0]].dtype == torch.uint8
        for each, one in ((params, opt), (others, other)):
            give(each, 0)
            one.step()
        assert_same([p.detach() for p in params], [p.detach() for p in others])


@pytest.mark.parametrize("name", ["Adam", "Adagrad", "AMSGrad"])
def test_an_anchor_before_the_first_step_of_what_was_taken_over(name: str) -> None:
    """It makes what state there lacks, and touches none that there is."""
    params, others = parameters(), parameters()
    for each in (params, others):
        torchs = make_torchs("Adagrad" if name == "Adagrad" else "Adam", each)
        give(each, 0)
        torchs.step()
        opt = fst.convert(torchs, state_dtype="int8", seed=2)
        if name == "AMSGrad":
            opt.param_groups[0]["amsgrad"] = True
        if each is params:
            opt.anchor(0.0)
            floats = torchs.state[each[0]]["sum" if name == "Adagrad" else "exp_avg"]
            assert floats.dtype == torch.float32
            wide = opt.state_dict(state_dtype=torch.float32)["state"][0]
            assert all(x.dtype == torch.float32 for x in wide.values() if torch.is_tensor(x))
        give(each, 1)
        opt.step()
        assert {opt.state[each[0]][x].dtype for x in names_of(opt)} == {torch.uint8}
    assert_same([p.detach() for p in params], [p.detach() for p in others])


@pytest.mark.parametrize("state_dtype", ["int8", None])
def test_sums_that_processes_share(state_dtype: str | None) -> None:
    """Each sees what the others write: the powers of codes, too."""
    params = parameters()
    opt = make("Adagrad", params, state_dtype=state_dtype)
    opt.share_memory()
    arrays = {name: x for e in opt.state.values() for name, x in e.items() if name != "step"}
    assert {*arrays} == ({"sum", "sum_powers"} if state_dtype else {"sum"})
    assert all(x.is_shared() for e in opt.state.values() for name, x in e.items() if name in arrays)


MOVES: dict[str, Callable[[Any, str], Any]] = {
    "replaced": lambda e, part: e.update({part: e[part].clone()}),
    "in another order": lambda e, part: e.update({part: e[part].clone().t().contiguous().t()}),
    "shared": lambda e, part: e[part].share_memory_(),
    "given other memory": lambda e, part: setattr(e[part], "data", e[part].data.clone()),
    "in a new dict": lambda e, part: None,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq_powers"])
def test_state_that_lies_elsewhere(move: str, part: str, pointers: str) -> None:
    params, opt = trained()
    others, other = trained()
    entry = opt.state[params[0]]
    MOVES[move](entry, part)
    if move == "in a new dict":
        opt.state[params[0]] = {**entry}
    for i in range(3, 6):
        for each, one in ((params, opt), (others, other)):
            give(each, i)
            one.step()
    assert_same(bits(params, opt), bits(others, other))
    assert opt.state[params[0]]["exp_avg"].is_contiguous()


def test_what_is_written_to_codes_and_powers_counts() -> None:
    params, opt = trained("Adam")
    entry = opt.state[params[0]]
    for name in ("exp_avg", "exp_avg_powers", "exp_avg_sq", "exp_avg_sq_powers"):
        entry[name].zero_()
    entry["step"].zero_()
    before = params[0].detach().clone()
    give(params, 5)
    opt.step()
    fresh = nn.Parameter(before)
    other = make("Adam", [fresh])
    fresh.grad = params[0].grad.clone()
    other.step()
    assert torch.equal(params[0], fresh)
    # Floats are rounded to nearest, where they come without powers.
    opt.state[params[0]]["exp_avg"] = torch.zeros(33, 5)
    del opt.state[params[0]]["exp_avg_powers"]
    opt.step()
    assert opt.state[params[0]]["exp_avg"].dtype == torch.uint8


def test_a_parameter_that_becomes_wider() -> None:
    params, opt = trained("Adam", torch.bfloat16)
    state = bits(params, opt)[len(params) :]
    for p in params:
        p.grad = None
        p.data = p.data.double()
    opt.step()
    assert_same(bits(params, opt)[len(params) :], state)
    give(params, 3)
    opt.step()
    assert opt.state[params[0]]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["Adam", "Adagrad from 0.5"])
def test_tables_that_grow(name: str) -> None:
    """As arrays do: blocks that are full keep their bits."""
    table = nn.Parameter(torch.randn(10, 20, generator=torch.Generator().manual_seed(0)))
    array = table.detach().numpy().copy()
    opt, other = make(name, [table]), make_arrays(name, {"w": array})
    for rows in (10, 25):
        table.grad = torch.randn(rows, 20, generator=torch.Generator().manual_seed(rows))
        opt.step()
        other.step({"w": table.grad.numpy()})
        if rows == 10:
            kept = state_of(opt, table, names_of(opt)[-1])
            opt.resize(table, 25, init=0.5)
            array = other.resize("w", 25, init=0.5)
            assert torch.equal(state_of(opt, table, names_of(opt)[-1])[:9], kept[:9])
    np.testing.assert_array_equal(table.detach().numpy(), array)
    for state, value in other.state["w"].items():
        np.testing.assert_array_equal(np.asarray(opt.state[table][state]), np.asarray(value))


def test_a_rule_that_asks_for_more_state() -> None:
    params, opt = trained("Adam")
    opt.param_groups[0]["amsgrad"] = True
    give(params, 3)
    opt.step()
    assert names_of(opt) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    for p in params:
        largest, last = (state_of(opt, p, name) for name in ("max_exp_avg_sq", "exp_avg_sq"))
        assert opt.state[p]["max_exp_avg_sq"].dtype == torch.uint8
        torch.testing.assert_close(largest, last, rtol=0.5, atol=1e-7)


STALE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "amsgrad": ("AMSGrad", "max_exp_avg_sq", {"amsgrad": False}, {"amsgrad": True}),
    "momentum": ("SGD", "momentum_buffer", {"momentum": 0.0}, {"momentum": 0.9}),
}


def with_stale_state(which: str, **options: Any) -> Any:
    """Return parameters, and an optimizer whose rule no longer asks for a piece of its state."""
    name, _, off, _ = STALE[which]
    params, opt = trained(name, **options)
    opt.param_groups[0].update(off)
    give(params, 3)
    opt.step()
    return params, opt


@pytest.mark.parametrize("which", STALE)
def test_state_that_a_rule_no_longer_asks_for_is_widened_like_the_rest(which: str) -> None:
    name, stale, _, on = STALE[which]
    params, opt = with_stale_state(which)
    assert stale not in names_of(opt)
    wide = opt.state_dict(state_dtype=torch.float32)
    torchs = make_torchs(name, copies_of(params))
    torchs.load_state_dict(wide)
    torchs.param_groups[0].update(on)
    floats = make(name, copies_of(params), state_dtype=None)
    with pytest.warns(UserWarning, match="from int8 to float32"):
        floats.load_state_dict(opt.state_dict())
    for other in (torchs, floats):
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            assert not any(key.endswith("_powers") for key in other.state[q])
            assert torch.equal(other.state[q][stale], state_of(opt, p, stale))
    floats.param_groups[0].update(on)
    give(floats.param_groups[0]["params"], 4)
    floats.step()
    make(name, parameters(), state_dtype=None).load_state_dict(floats.state_dict())


@pytest.mark.parametrize("which", STALE)
@pytest.mark.parametrize("state_dtype", ["int8", "float64"])
def test_state_that_a_rule_no_longer_asks_for_goes_on(which: str, state_dtype: str) -> None:
    name, stale, _, on = STALE[which]
    params, opt = with_stale_state(which, state_dtype=state_dtype)
    others = copies_of(params)
    other = make(name, others, state_dtype=state_dtype)
    other.load_state_dict(opt.state_dict())
    for each, one in ((params, opt), (others, other)):
        before = state_of(one, each[0], stale)
        one.resize(each[0], 40)
        assert one.state[each[0]][stale].shape == (40, 5)
        assert torch.equal(state_of(one, each[0], stale)[:32], before[:32])
        one.param_groups[0].update(on)
        for p in each:
            p.grad = torch.full_like(p, 0.5)
        one.step()
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(state_of(opt, p, stale), state_of(other, q, stale))


def test_powers_go_with_their_codes() -> None:
    """An optimizer with wide state widens pieces that come in 8 bits, and keeps no powers."""
    params, opt = trained("Adam")
    others, wide = trained("Adam", state_dtype=None)
    tables, grown = trained("Adam", state_dtype=None)
    for p, q, r in zip(params, others, tables, strict=True):
        for entry in (wide.state[q], grown.state[r]):
            entry.update({x: opt.state[p][x].clone() for x in ("exp_avg", "exp_avg_powers")})
    give(others, 3)
    wide.step()
    grown.resize(tables[0], 40)
    for entry in (*wide.state.values(), grown.state[tables[0]]):
        assert {*entry} == {"step", "exp_avg", "exp_avg_sq"}
    found = grown.state[tables[0]]["exp_avg"]
    assert torch.equal(found[:33], state_of(opt, params[0], "exp_avg"))
    wide.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    wide.step()
    grown.state_dict(state_dtype=torch.float32)


def test_compiled_around_it() -> None:
    params, others = parameters(), parameters()
    opt, other = make("Adam", params), make("Adam", others)
    compiled = torch.compile(lambda: opt.step(), backend="eager")
    for i in range(3):
        give(params, i)
        give(others, i)
        compiled()
        other.step()
    assert_same(bits(params, opt), bits(others, other))


def test_step_counts_of_blocks_are_saved() -> None:
    """Selections of whole blocks, over a checkpoint."""
    parameter = nn.Parameter(torch.zeros(40, 64))
    opt = make("NAdam", [parameter], seed=2)
    for i in range(8):
        if i == 4:
            saved = copy.deepcopy(opt.state_dict())
            kept = parameter.detach().clone()
        parameter.grad = torch.randn(40, 64, generator=torch.Generator().manual_seed(i))
        opt.step(where=fs.RandomBlocks(0.3, block=64))
    again = nn.Parameter(kept)
    other = make("NAdam", [again])
    other.load_state_dict(saved)
    for i in range(4, 8):
        again.grad = torch.randn(40, 64, generator=torch.Generator().manual_seed(i))
        other.step(where=fs.RandomBlocks(0.3, block=64))
    assert_same(bits([again], other), bits([parameter], opt))


def test_training_ends_where_float32_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 10, generator=generator)
    y = (x[:, :1] * x[:, 1:2]).sin()

    def train(seed: int, **options: Any) -> float:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))
        opt = fst.AdamW(model.parameters(), lr=5e-3, **options)
        for _ in range(300):
            opt.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            opt.step()
        return loss.item()

    narrow = np.mean([train(seed, state_dtype="int8") for seed in range(4)])
    wide = [train(seed) for seed in range(4)]
    assert narrow < np.mean(wide) + 2 * np.std(wide)
    assert narrow < 0.1 * float(y.var())
