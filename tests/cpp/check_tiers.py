"""Checks of what the compiler made of the innermost loops: ``check_tiers.py BUILD_DIRECTORY``.

* Every loop of every instruction set is vectorised. One that is not is several times slower and
  nothing else would say so.
* No object file leaves a weak symbol behind. The linker keeps one copy of each for everybody, and
  that might be the one that needs AVX-512.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

SOURCE = "csrc/cpu/tier_kernels.cpp"
VERDICT = re.compile(
    rf"({SOURCE}|csrc/cpu/(?:narrow_)?loops\.h):(\d+):\d+: "
    r"(optimized: loop vectorized|missed: couldn't vectorize)"
)

# Loops that may stay scalar. base: storing doubles in 16 bits, to nearest and at random, and asking
# whether a closed form suits doubles; SSE2 cannot narrow the outcome of comparing doubles to a
# choice between floats.
SCALAR = {"base": 8}


def walks_over_blocks(root: Path, file: str, line: str) -> bool:
    """Whether a loop at this line goes from block to block: those inside of it count."""
    text = (root / file).read_text(encoding="utf-8").splitlines()
    return text[int(line) - 1].lstrip().startswith("for (;")


def commands(build: Path) -> list[dict[str, str]]:
    """The compile commands of the tiers."""
    entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    return [entry for entry in entries if entry["file"].endswith(SOURCE)]


def check(entry: dict[str, str]) -> list[str]:
    """What is wrong with one tier's object file."""
    arguments = shlex.split(entry["command"])
    output = Path(entry["directory"]) / arguments[arguments.index("-o") + 1]
    tier = next(a for a in arguments if "FUSESTEP_TIER_TABLE" in a).rpartition("_")[2]

    report = subprocess.run(
        [*arguments, "-fopt-info-vec-all"],
        cwd=entry["directory"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    verdicts = VERDICT.findall(report)
    vectorised = [line for _, line, verdict in verdicts if verdict.startswith("optimized")]
    root = Path(entry["file"].removesuffix(SOURCE))
    missed = sorted(
        f"{file}:{line}"
        for file, line, verdict in verdicts
        if verdict.startswith("missed") and not walks_over_blocks(root, file, line)
    )
    problems = [f"{tier}: the loop at {where} is not vectorised" for where in missed]
    if len(missed) <= SCALAR.get(tier, 0):
        problems = []
    if not vectorised:
        problems.append(f"{tier}: nothing is vectorised, or the report is not g++'s")

    symbols = subprocess.run(["nm", "-C", output], capture_output=True, text=True, check=True)
    weak = [line for line in symbols.stdout.splitlines() if re.search(r" [WVwv] ", line)]
    problems += [f"{tier}: weak symbol {line.split(maxsplit=2)[-1]}" for line in weak]
    print(
        f"{tier}: {len(vectorised)} loops vectorised, {len(missed)} not, {len(weak)} weak symbols"
    )
    return problems


def main() -> int:
    """Check all tiers of a build."""
    found = [problem for entry in commands(Path(sys.argv[1])) for problem in check(entry)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
