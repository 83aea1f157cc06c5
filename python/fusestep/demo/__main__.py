"""``python -m fusestep.demo`` runs the demo; ``--help`` lists its options."""

from __future__ import annotations

import importlib.util
import sys

from .options import parse


def main() -> int:
    """Run the demo.

    Returns
    -------
    int
        The exit status: 0 if all went well.
    """
    options = parse()
    missing = _missing(plot=options.output is not None)
    if missing:
        sys.exit(
            f"The demo needs {' and '.join(missing)}; install what it needs with: "
            'pip install "fusestep[demo]"'
        )
    from .run import run  # not before we know that what it imports is there

    return run(options)


def _missing(*, plot: bool) -> list[str]:
    modules = {"rich": "rich", "sklearn": "scikit-learn"}
    if plot:
        modules["matplotlib"] = "matplotlib"
    return [name for module, name in modules.items() if importlib.util.find_spec(module) is None]


if __name__ == "__main__":
    sys.exit(main())
