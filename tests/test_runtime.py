"""The environment: instruction sets, threads, configuration, imports."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fusestep as fs
from conftest import AVAILABLE, TIERS
from fusestep import _cpu


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_best_tier_is_active_unless_forced() -> None:
    code = "from fusestep import _cpu; print(_cpu.active_tier())"
    assert python("-c", code, FUSESTEP_CPU="").stdout.strip() == AVAILABLE[0]
    for tier in AVAILABLE:
        assert python("-c", code, FUSESTEP_CPU=tier).stdout.strip() == tier


@pytest.mark.parametrize("name", ["avx9000", "AVX2", "sse", "neon avx2", " "])
def test_an_unknown_tier_is_an_error(name: str) -> None:
    done = python("-c", "import fusestep", FUSESTEP_CPU=name)
    assert done.returncode == 1
    assert f"unknown instruction set '{name}'" in done.stderr
    assert AVAILABLE[-1] in done.stderr
    with pytest.raises(ValueError, match="available: "):
        _cpu.use_tier(name)
    assert _cpu.active_tier() in TIERS


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FUSESTEP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"),
        ({"FUSESTEP_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5"),
        ({"FUSESTEP_NUM_THREADS": "", "OMP_NUM_THREADS": "4,2"}, "4"),
        ({"FUSESTEP_NUM_THREADS": "", "OMP_NUM_THREADS": ""}, str(len(os.sched_getaffinity(0)))),
    ],
)
def test_number_of_threads(environment: dict[str, str], expected: str) -> None:
    done = python("-c", "import fusestep as fs; print(fs.get_num_threads())", **environment)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "2 ", "99999"])
def test_a_wrong_number_of_threads_is_an_error(value: str) -> None:
    done = python("-c", "import fusestep", FUSESTEP_NUM_THREADS=value)
    assert done.returncode == 1
    assert f"FUSESTEP_NUM_THREADS='{value}'" in done.stderr


def test_set_num_threads() -> None:
    fs.set_num_threads(3)
    assert fs.get_num_threads() == 3
    fs.set_num_threads(np.int64(2))
    for value in (0, -1, 10**6):
        with pytest.raises(ValueError, match="num_threads"):
            fs.set_num_threads(value)
    for value in (1.5, "2", True, None):
        with pytest.raises(TypeError, match="num_threads"):
            fs.set_num_threads(value)  # type: ignore[arg-type]
    assert fs.get_num_threads() == 2


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert fs.show_config() is None
    shown = capsys.readouterr().out
    config = fs.show_config("dicts")
    for value in (fs.__version__, *TIERS, str(fs.get_num_threads()), config["cuda"]):
        assert value in shown
    assert config["instruction sets"]["active"] == _cpu.active_tier()
    with pytest.raises(ValueError, match="mode"):
        fs.show_config("json")  # type: ignore[call-overload]
    assert python("-m", "fusestep").stdout == shown


def test_show_config_says_what_there_is_for_gpus() -> None:
    shown = fs.show_config("dicts")["cuda"]
    assert isinstance(shown, str)
    if importlib.util.find_spec("fusestep._cuda") is None:
        assert "no CUDA kernels" in shown
        return
    from fusestep import _cuda

    toolkit = f"CUDA {_cuda.toolkit_version // 1000}.{_cuda.toolkit_version % 1000 // 10}"
    assert ("simulated" if _cuda.is_simulated else toolkit) in shown


def test_the_cuda_kernels_are_not_loaded_without_need() -> None:
    code = (
        "import sys, numpy as np, fusestep as fs\n"
        "w = np.zeros(3); opt = fs.Adam([w], max_norm=1.0, skip_nonfinite=True)\n"
        "opt.step([np.ones(3)]); opt.load_state_dict(opt.state_dict())\n"
        "print('fusestep._cuda' in sys.modules, opt.steps)"
    )
    assert python("-c", code).stdout.strip() == "False 1"


def test_the_cuda_kernels_say_which_driver_they_need() -> None:
    """They can be loaded without one. In a process of its own, which has met no GPU yet."""
    if importlib.util.find_spec("fusestep._cuda") is None:
        pytest.skip("this build has no CUDA kernels")
    code = (
        "from fusestep import _cuda\n"
        "for call in (_cuda.check_available, _cuda.device_count):\n"
        "    try: print(call())\n"
        "    except RuntimeError as error: print(error)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    if first == "None":
        pytest.skip("the kernels are simulated, or there is a GPU")
    assert re.search(r"built for CUDA \d+\.\d+ and need an NVIDIA GPU with driver \d+", first)
    assert second == first


def test_import_needs_numpy_alone() -> None:
    """No framework, no compiler, nothing that takes time."""
    code = (
        "import sys, numpy; before = set(sys.modules); import fusestep\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "standard = set(sys.stdlib_module_names)\n"
        "print(sorted(new - standard))"
    )
    assert python("-c", code).stdout.strip() == "['fusestep']"


def test_import_without_safetensors_says_what_to_do(tmp_path) -> None:
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import numpy as np, fusestep as fs\n"
        "opt = fs.Adam([np.ones(3)]); opt.step([np.ones(3)])\n"
        f"opt.save({str(tmp_path / 'x')!r})"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "safetensors" in done.stderr
    assert not list(tmp_path.iterdir())


def test_version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("fusestep") == fs.__version__
    except PackageNotFoundError:
        pytest.skip("fusestep is not installed, only on the path")
