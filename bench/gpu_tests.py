"""pytest where not everything that the tests use is installed: ``python bench/gpu_tests.py ...``.

A machine with a GPU and no network has what it has. Test files that import a module which is not
there are left out, tests that need one are skipped, each with a line that says so; the arguments
are pytest's. The exit status is pytest's, or 5 where no test has passed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

# What the tests may go without; that anything else cannot be imported is an error.
OPTIONAL = frozenset(
    [
        "accelerate",
        "cupy",
        "expecttest",
        "hypothesis",
        "jax",
        "jaxlib",
        "lightning",
        "matplotlib",
        "ml_dtypes",
        "optax",
        "rich",
        "safetensors",
        "sklearn",
        "transformers",
    ]
)

_MOST_PROCESSES = 4  # a GPU takes turns between them


def missing_modules(path: Path) -> list[str]:
    """Return the optional modules that a test file imports at its top and that are not there.

    Parameters
    ----------
    path
        Of the file; modules beside it that it imports are looked at, too.
    """
    seen: set[Path] = set()
    return sorted(name for name in _imported(path, seen) if name in OPTIONAL and _is_missing(name))


def _imported(path: Path, seen: set[Path]) -> set[str]:
    if path in seen:
        return set()
    seen.add(path)
    names = set(_names(ast.parse(path.read_text(encoding="utf-8")).body))
    for name in sorted(names):
        beside = path.with_name(f"{name}.py")
        if beside.exists():
            names |= _imported(beside, seen)
    return names


def _names(body: Iterable[ast.stmt]) -> Iterable[str]:
    """Yield the top-level packages of the imports of a module."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module.partition(".")[0]


def _is_missing(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out test files that cannot be loaded."""
    return True if _is_test(collection_path) and missing_modules(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a test that has looked for a missing module in vain be skipped."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        if name in OPTIONAL and _is_missing(name):
            report.outcome = "skipped"
            path, line, _ = item.reportinfo()
            report.longrepr = (str(path), (line or 0) + 1, f"Skipped: {name} is not installed")
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which files were left out."""
    for argument in config.args:
        path = Path(argument.partition("::")[0])
        for file in sorted(path.rglob("test_*.py")) if path.is_dir() else [path]:
            if missing := missing_modules(file):
                line = f"left out: {file.name}, which needs {', '.join(missing)}: not installed"
                terminalreporter.write_line(line)


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_") and path.suffix == ".py"


class _Passed:
    """A plugin that counts the tests that pass, in whatever process they run."""

    count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one."""
        self.count += report.when == "call" and report.passed


def main() -> int:
    """Run pytest with the hooks above, in several processes where pytest-xdist is there."""
    folder = os.fspath(Path(__file__).parent)
    # To the end, for pytest to find this file: other names in this folder are common ones.
    sys.path[:] = [*(entry for entry in sys.path if entry != folder), folder]
    processes = min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    arguments = ["-p", Path(__file__).stem, *sys.argv[1:]]
    chosen = [*sys.argv[1:], *os.environ.get("PYTEST_ADDOPTS", "").split()]
    if processes > 1 and not _is_missing("xdist") and not any(a.startswith("-n") for a in chosen):
        arguments = ["-n", str(processes), *arguments]
    passed = _Passed()
    status = int(pytest.main(arguments, plugins=[passed]))
    return 5 if status == 0 and passed.count == 0 else status


if __name__ == "__main__":
    sys.exit(main())
