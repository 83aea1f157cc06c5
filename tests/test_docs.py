"""What the documentation says is so."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
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


@pytest.mark.parametrize("cls", [c for c in PUBLIC if c is not fs.Optimizer])
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


def test_links_in_the_readme_lead_somewhere() -> None:
    if not (ROOT / "README.md").exists():
        pytest.skip("not in a source tree")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "numerics.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
