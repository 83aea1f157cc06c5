"""Against torch.optim, hundreds of steps without resynchronising."""

from __future__ import annotations

import numpy as np
import pytest

from rules import RULES, Rule

torch = pytest.importorskip("torch")

# float32: torch rounds in another order, and more (see docs/numerics.md), so the bar is its error.
TOLERANCE = {"float64": 1e-11, "float32": 2e-4}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("maximize", [False, True])
def test_trajectories_agree(rule: Rule, dtype: str, maximize: bool) -> None:
    rng = np.random.default_rng(5)
    params = [rng.standard_normal(s).astype(dtype) for s in ((11, 7), (30,), ())]
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    ours = rule.cls(params, maximize=maximize, **rule.options)
    options = {**rule.options, **rule.torch_options}
    other = getattr(torch.optim, rule.torch)(theirs, maximize=maximize, foreach=False, **options)
    for step in range(300):
        grads = [np.asarray(rng.standard_normal(p.shape), dtype) for p in params]
        if step % 7 == 0:
            grads[1] = None
        for t, g in zip(theirs, grads, strict=True):
            t.grad = None if g is None else torch.tensor(g)
        if rule.options.get("lr") and step == 150:
            ours.lr = other.param_groups[0]["lr"] = rule.options["lr"] / 3
        other.step()
        ours.step(grads)
    tolerance = TOLERANCE[dtype]
    if rule.torch == "NAdam":  # torch keeps the product of momenta in float32
        tolerance = max(tolerance, 1e-8)
    for p, t in zip(params, theirs, strict=True):
        np.testing.assert_allclose(p, t.detach().numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("max_norm", [0.1, 5.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_unscale_clip_and_step(max_norm: float, scale: float) -> None:
    import fusestep as fs

    rng = np.random.default_rng(6)
    params = [rng.standard_normal(s) for s in ((50, 60), (2000,))]
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    ours = fs.AdamW(params, lr=0.01, max_norm=max_norm)
    other = torch.optim.AdamW(theirs, lr=0.01)
    for _ in range(50):
        grads = [scale * rng.standard_normal(p.shape) for p in params]
        for t, g in zip(theirs, grads, strict=True):
            t.grad = torch.tensor(g) / scale
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        other.step()
        ours.step(grads, grad_scale=1 / scale)
    for p, t in zip(params, theirs, strict=True):
        np.testing.assert_allclose(p, t.detach().numpy(), rtol=0, atol=1e-11)
