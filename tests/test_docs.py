"""What the documentation says is so."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusestep as fs

ROOT = Path(__file__).parent.parent
PUBLIC = [getattr(fs, name) for name in fs.__all__ if inspect.isclass(getattr(fs, name))]


@pytest.mark.parametrize("module", ["fusestep", "fusestep.functional"])
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_every_argument_is_documented(cls: type) -> None:
    documented = inspect.getdoc(cls) or ""
    for name in inspect.signature(cls.__init__).parameters:
        if name not in ("self", "own"):
            assert re.search(rf"\b{name}\b", documented), f"{cls.__name__} does not describe {name}"


# Classes that torch has none like.
SELECTIONS = (fs.Mask, fs.RandomBlocks, fs.CyclicBlocks, fs.TopK)
GRADIENTS = (fs.Rows, fs.Samples, fs.Outer)
OURS = (fs.Optimizer, fs.RowwiseAdagrad, *GRADIENTS, fs.EmaWarmup, fs.Fisher, *SELECTIONS)

# What the torch classes take besides torch's arguments.
TORCH_EXTRAS = [
    "max_norm",
    "clip_value",
    "skip_nonfinite",
    "ema_decay",
    "state_dtype",
    "stochastic_rounding",
    "master",
    "rows",
    "seed",
]


@pytest.mark.parametrize("cls", [c for c in PUBLIC if c not in OURS])
def test_signatures_are_torchs(cls: type) -> None:
    """The same arguments in the same order with the same defaults, as far as both have them."""
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.optim, cls.__name__, None)
    if theirs is None:
        assert cls is fs.NAG
        return
    expected = inspect.signature(theirs.__init__).parameters
    positional = [
        p
        for p in expected.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.name != "foreach"
    ]
    ours = inspect.signature(cls.__init__).parameters
    assert list(ours)[: len(positional)] == [p.name for p in positional]
    for name in set(ours) & set(expected) - {"self"}:
        if ours[name].default is not inspect.Parameter.empty:
            assert ours[name].default == expected[name].default, name


@pytest.mark.parametrize("name", ["SGD", "NAG", "Adam", "AdamW", "NAdam", "Adagrad"])
def test_the_torch_classes(name: str) -> None:
    """Torch's arguments, order and defaults, then ours; all of them described."""
    torch = pytest.importorskip("torch")
    ours = inspect.signature(getattr(fs.torch, name).__init__).parameters
    test_every_argument_is_documented(getattr(fs.torch, name))
    if name == "NAG":
        return
    theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    assert list(ours) == [*theirs, *TORCH_EXTRAS]
    for argument, parameter in theirs.items():
        assert ours[argument].kind == parameter.kind
        assert ours[argument].default == parameter.default


def test_the_readmes_gradient_with_transposed_strides(capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("not in a source tree")
    pytest.importorskip("torch")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", readme, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    *_, ours = re.findall(r"tensor\((.*?)\)", capsys.readouterr().out)
    assert float(ours) < 1e-6


def test_importing_fusestep_imports_no_framework() -> None:
    code = "import sys, fusestep; assert not {'torch', 'jax', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_links_in_the_readme_lead_somewhere() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("not in a source tree")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
