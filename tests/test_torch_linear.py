"""Linear layers whose weights have no gradient, beside ordinary training."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
fst = pytest.importorskip("fusestep.torch")

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

F = torch.nn.functional


def mlp(*, bias: bool = True, dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 9, bias=bias),
        torch.nn.ReLU(inplace=True),
        torch.nn.Linear(9, 9, bias=bias),
        torch.nn.LayerNorm(9),
        torch.nn.Linear(9, 3),
    ).to(dtype)


class Attention(torch.nn.Module):
    """Sequences, a layer that is used twice, and one whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 8)
        self.encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.twice = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens))
        return self.head(self.twice(torch.tanh(self.twice(hidden))))


def vectors(step: int, count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn((count, 6), generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def tokens(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(11, (4, 6), generator=generator)
    return drawn[:, :-1], drawn[:, 1:].reshape(-1)


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), batch[1])


def assert_close(ours: Any, theirs: Any) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad"])
@pytest.mark.parametrize(("make", "batch"), [(mlp, vectors), (Attention, tokens)])
def test_the_losses_of_ordinary_training(name: str, make: Callable[[], Any], batch: Any) -> None:
    options: dict[str, Any] = {"lr": 0.05} if name in ("SGD", "NAG") else {}
    if name == "Adagrad":  # else it magnifies what rounding makes of a gradient of 0
        options = {"initial_accumulator_value": 0.1}
    models = [make(), make()]
    assert fst.fuse_linear(models[0]) is models[0]
    ours, theirs = (getattr(fst, name)(m.parameters(), **options) for m in models)
    for step in range(6):
        losses = []
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.zero_grad()
            loss = loss_of(model, batch(step))
            loss.backward()
            opt.step()
            losses.append(loss.item())
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    assert_close(*models)


def test_there_is_no_gradient() -> None:
    model = fst.fuse_linear(mlp())
    opt = fst.Adam(model.parameters())
    loss_of(model, vectors(0)).backward()
    for name, p in model.named_parameters():
        is_of_layer = not name.startswith("3")
        assert (p.grad is None) == is_of_layer, name
        assert bool(getattr(p, "grad_factors", None)) == is_of_layer
    before = copy.deepcopy(model)
    opt.step(zero_grad=True)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)
        assert not getattr(p, "grad_factors", None)
    before = copy.deepcopy(model)
    opt.step()
    for p, q in zip(list(model.parameters())[:2], before.parameters(), strict=False):
        assert torch.equal(p, q)  # nothing was left for it


def test_batches_are_accumulated() -> None:
    """Also of different sizes; and zero_grad() drops what there is, before any step, too."""
    models = [fst.fuse_linear(mlp()), mlp()]
    opts = [fst.Adam(m.parameters()) for m in models]
    for model, opt in zip(models, opts, strict=True):
        loss_of(model, vectors(9)).backward()
        opt.zero_grad()
        for step in range(3):
            loss_of(model, vectors(step, 3 + step)).backward()
        opt.step(grad_scale=0.5, zero_grad=True)
    assert_close(*models)


@pytest.mark.parametrize("options", [{"max_norm": 0.01}, {"skip_nonfinite": True}])
def test_clipping_and_what_is_not_finite(options: dict[str, Any]) -> None:
    models = [fst.fuse_linear(mlp()), mlp()]
    opts = [fst.SGD(m.parameters(), lr=0.1, **options) for m in models]
    for step in range(4):
        for model, opt in zip(models, opts, strict=True):
            loss = loss_of(model, vectors(step))
            (loss * (torch.inf if step == 2 and "skip_nonfinite" in options else 1)).backward()
            opt.step(zero_grad=True)
    assert_close(*models)
    assert opts[0].skipped_steps == opts[1].skipped_steps == ("skip_nonfinite" in options)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2", ""])
def test_what_is_frozen_stays(frozen: str) -> None:
    models = [fst.fuse_linear(mlp()), mlp()]
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(frozen or "none"))
        opt = fst.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            loss_of(model, vectors(step)).backward()
            opt.step(zero_grad=True)
    assert_close(*models)
    with torch.no_grad():
        models[0](vectors(0)[0])
    assert not any(getattr(p, "grad_factors", None) for p in models[0].parameters())


def test_one_vector_and_no_bias() -> None:
    models = [fst.fuse_linear(mlp(bias=False)), mlp(bias=False)]
    for model in models:
        opt = fst.SGD(model.parameters(), lr=0.1)
        model(vectors(0)[0][0]).square().sum().backward()
        opt.step()
    assert_close(*models)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpoints(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    models = [fst.fuse_linear(mlp()), mlp()]
    for model in models:
        opt = fst.SGD(model.parameters(), lr=0.1)
        x, y = vectors(0)
        hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
        F.cross_entropy(model[3:](hidden), y).backward()
        opt.step()
    assert_close(*models)


def test_under_autocast() -> None:
    models = [fst.fuse_linear(mlp(dtype=torch.float32)), mlp(dtype=torch.float32)]
    for model in models:
        opt = fst.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x, y = vectors(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x.float()), y)
            loss.backward()
            opt.step(zero_grad=True)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3)


def stepped(fused: bool, course: Callable[..., None], make: Callable[[], Any] = mlp) -> Any:
    """A model after a course of its own, fused or not."""
    model = make()
    if fused:
        fst.fuse_linear(model)
    course(model, fst.SGD(model.parameters(), lr=0.1, momentum=0.5))
    return model


def assert_same_course(course: Callable[..., None], make: Callable[[], Any] = mlp) -> None:
    assert_close(stepped(True, course, make), stepped(False, course, make))


def test_gradients_that_are_not_for_parameters() -> None:
    """An attack on the input, and a backward pass for some parameters only."""

    def course(model: Any, opt: Any) -> None:
        x, y = vectors(0)
        x.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        F.cross_entropy(model(x + 0.1 * g.sign()), y).backward()
        F.cross_entropy(model(x), y).backward(inputs=[model[4].bias])
        opt.step()

    assert_same_course(course)
    model = fst.fuse_linear(mlp())
    with pytest.raises(RuntimeError, match="unfuse_linear"):
        torch.autograd.grad(model(vectors(0)[0]).sum(), model[0].weight)


def computed() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4)).double()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(4, 3).double())


def hooked() -> Any:
    model = mlp()
    model[0].weight.register_hook(lambda g: g * 0.5)
    return model


@pytest.mark.parametrize("make", [computed, hooked])
def test_parameters_whose_gradient_somebody_wants(make: Callable[[], Any]) -> None:
    def course(model: Any, opt: Any) -> None:
        if make is computed:
            torch.nn.utils.parametrizations.weight_norm(model[1])
            opt.add_param_group({"params": [*model[1].parametrizations.parameters()]})
        for step in range(3):
            loss_of(model, vectors(step)).backward()
            opt.step(zero_grad=True)

    assert_same_course(course, make)


def test_what_is_changed_before_the_step_is_refused() -> None:
    model = fst.fuse_linear(mlp())
    opt = fst.SGD(model.parameters(), lr=0.1)
    x, y = vectors(0)
    for options in ({}, {"sample_weight": torch.ones(7)}):
        opt.zero_grad()
        loss_of(model, (x, y)).backward()
        if options:
            model[3].weight.grad = model[3].bias.grad = None
        x.zero_()
        before = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="has been changed in place since backward"):
            opt.step(**options)
        assert_close(model, before)


def test_inputs_that_are_parameters() -> None:
    class Queries(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q = torch.nn.Parameter(torch.randn(4, 6))
            self.layer = torch.nn.Linear(6, 6)

        def forward(self) -> Tensor:
            return self.layer(self.q).tanh() @ self.layer(self.q[:2]).T

    def course(model: Any, opt: Any) -> None:
        for _ in range(3):
            model().sum().backward()
            opt.step(zero_grad=True)

    assert_same_course(course, lambda: Queries().double())


def test_empty_batches_and_small_layers() -> None:
    """State ages; and many passes of a small layer are kept as a gradient."""

    def course(model: Any, opt: Any) -> None:
        for step in range(3):
            x, _ = vectors(step, 5 if step != 1 else 0)
            model(x).square().sum().backward()
            opt.step(zero_grad=True)
        for step in range(30):
            model(vectors(step, 50)[0]).square().mean().backward()
        kept = sum(f.elements for f in getattr(model[0].weight, "grad_factors", []))
        assert kept <= 50 * 15
        opt.step()

    assert_same_course(course)


def test_the_models_zero_grad_is_warned_of() -> None:
    model = fst.fuse_linear(torch.nn.Sequential(torch.nn.Linear(60, 60)))
    opt = fst.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 60)).sum().backward()
    opt.step()
    model.zero_grad()
    model(torch.ones(2, 60)).sum().backward()
    with pytest.warns(RuntimeWarning, match="the optimizer's zero_grad"):
        opt.step()


def test_transforms_of_functions() -> None:
    model = fst.fuse_linear(linear_only())
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = vectors(0)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, params, (x[None],))
        return F.cross_entropy(output, y[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    other = linear_only()
    loss_of(other, (x, y)).backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(found[name].mean(0), p.grad)


# ---- samples -------------------------------------------------------------------------------------


def test_weighed_samples_are_the_weighed_loss() -> None:
    """As with p.grad_sample: the mean over the samples that are there."""
    for reduction in ("mean", "sum"):
        models = [fst.fuse_linear(linear_only(), loss_reduction=reduction), linear_only()]
        ours, theirs = (fst.Adam(m.parameters(), lr=0.05) for m in models)
        for step in range(5):
            x, y = vectors(step)
            weight = torch.rand(7, dtype=torch.float64)
            F.cross_entropy(models[0](x), y, reduction=reduction).backward()
            ours.step(sample_weight=weight, zero_grad=True)
            losses = F.cross_entropy(models[1](x), y, reduction="none")
            (weight * losses).mean().backward()
            theirs.step(zero_grad=True)
        assert_close(*models)


def linear_only() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)]
    return torch.nn.Sequential(*layers).double()


class OfSequences(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = linear_only()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("positions", [None, 4])
def test_bounded_samples_beside_opacus(positions: int | None) -> None:
    """The step of DP-SGD without a gradient of any sample."""
    opacus = pytest.importorskip("opacus")
    optimizers = pytest.importorskip("opacus.optimizers")
    make = linear_only if positions is None else OfSequences
    model, other = fst.fuse_linear(make()), opacus.GradSampleModule(make())
    ours = fst.Adam(model.parameters(), lr=0.05)
    theirs = optimizers.DPOptimizer(
        torch.optim.Adam(other.parameters(), lr=0.05),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=16,
    )
    for step in range(10):
        x, y = vectors(step, 5 + step)
        if positions is not None:
            x = x[:, None] * torch.linspace(-1, 2, positions, dtype=x.dtype)[:, None]
        for m, opt in ((model, ours), (other, theirs)):
            opt.zero_grad()
            F.cross_entropy(m(x), y).backward()
        ours.step(sample_options={"max_norm": 0.3, "reduction": 16})
        theirs.step()
    assert_close(model, other)


def test_samples_of_a_layer_that_is_used_twice() -> None:
    model = fst.fuse_linear(torch.nn.Sequential(torch.nn.Linear(30, 30)))
    opt = fst.SGD(model.parameters(), lr=0.1)
    model(model(torch.ones(2, 30))).sum().backward()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"parameter 0.*used 2 times since the last step"):
        opt.step(sample_weight=torch.ones(2))
    assert_close(model, before)


# ---- layers --------------------------------------------------------------------------------------


def test_only_linear_layers_themselves() -> None:
    class Other(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Other(2, 2), torch.nn.Linear(2, 2), torch.nn.Bilinear(2, 2, 2))
    state = model.state_dict()
    fst.fuse_linear(model)
    assert [type(m) for m in model] == [Other, fst.FusedLinear, torch.nn.Bilinear]
    assert isinstance(model[1], torch.nn.Linear)
    model.load_state_dict(state)
    fst.unfuse_linear(model)
    assert type(model[1]) is torch.nn.Linear
    model[1](torch.ones(1, 2)).sum().backward()
    assert model[1].weight.grad is not None


def test_copies_and_pickles() -> None:
    models = [fst.fuse_linear(linear_only(), loss_reduction="sum")]
    models.append(copy.deepcopy(models[0]))
    file = io.BytesIO()
    torch.save(models[0], file)
    file.seek(0)
    models.append(torch.load(file, weights_only=False))
    for model in models:
        opt = fst.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(model(vectors(0)[0]), vectors(0)[1], reduction="sum").backward()
        opt.step(sample_weight=torch.ones(7))
    assert_close(models[0], models[1])
    assert_close(models[0], models[2])


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        fst.fuse_linear([torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="expected 'mean' or 'sum'"):
        fst.fuse_linear(mlp(), loss_reduction="none")
    model = fst.fuse_linear(mlp())
    x = vectors(0)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    for replicas in (torch.nn.DataParallel,):
        with pytest.raises(TypeError, match="exchange gradients"):
            fst.fuse_linear(torch.nn.Sequential(replicas(torch.nn.Linear(2, 2))))


def test_the_gradients_memory_is_saved() -> None:
    """Peak memory of a process, of ordinary training and this: lower by the gradients."""
    if not sys.platform.startswith("linux"):
        pytest.skip("what a process has used at most is read from /proc")
    program = """
import sys, torch, fusestep.torch as fst
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(2000, 2000) for _ in range(6)])  # 96 MB
if sys.argv[1] == "fused":
    fst.fuse_linear(model)
opt = fst.SGD(model.parameters(), lr=1e-3)
for _ in range(3):
    model(torch.ones(4, 2000)).square().mean().backward()
    opt.step(zero_grad=True)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("plain", "fused")
    ]
    assert peaks[0] - peaks[1] > 0.8 * 96e6
