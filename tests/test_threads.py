"""Threads and forks: nothing is corrupted, nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fusestep as fs
from concurrency import in_threads
from rules import PLAIN, Rule

f32 = np.float32


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_one_optimizer_in_many_threads(rule: Rule, size: int) -> None:
    """Steps wait for each other: with equal gradients any order gives the same bits."""
    w, expected = np.zeros(size, f32), np.zeros(size, f32)
    g = np.linspace(-1, 1, size, dtype=f32)
    opt, alone = rule.cls([w], **rule.options), rule.cls([expected], **rule.options)
    in_threads(4, lambda i: [opt.step([g]) for _ in range(25)])
    for _ in range(100):
        alone.step([g])
    assert opt.steps == 100
    np.testing.assert_array_equal(w, expected)


def test_many_optimizers_in_many_threads() -> None:
    params = [np.zeros(100_000, f32) for _ in range(4)]
    opts = [fs.Adam([p]) for p in params]
    g = np.linspace(-1, 1, 100_000, dtype=f32)
    in_threads(4, lambda i: [opts[i].step([g]) for _ in range(25)])
    for p in params[1:]:
        np.testing.assert_array_equal(p, params[0])


def test_reading_the_state_while_another_thread_steps() -> None:
    """A state dict is of one moment: Adam's first moment of ones says which step it is."""
    w, g = np.zeros(300_000, f32), np.ones(300_000, f32)
    opt = fs.Adam([w])
    done = threading.Event()

    def step(i: int) -> None:
        if i == 0:
            for _ in range(60):
                opt.step([g])
            done.set()
            return
        while not done.is_set():
            entry = opt.state_dict()["state"][0]
            assert (entry["exp_avg"] == entry["exp_avg"][0]).all()
            np.testing.assert_allclose(entry["exp_avg"][0], 1 - 0.9 ** entry["step"], atol=1e-5)

    in_threads(2, step)


def test_the_gil_is_released() -> None:
    """While a long step runs in one thread, another one counts."""
    fs.set_num_threads(1)
    w, g = np.zeros(20_000_000, f32), np.ones(20_000_000, f32)
    opt = fs.Adam([w])
    running, counted = threading.Event(), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to give the GIL away

    def work(i: int) -> None:
        if i == 0:
            running.set()
            for _ in range(5):
                opt.step([g])
            running.clear()
        else:
            running.wait(10)
            while running.is_set() and len(counted) < 50:
                counted.append(1)
                time.sleep(0.001)

    try:
        in_threads(2, work)
    finally:
        sys.setswitchinterval(interval)
    assert len(counted) > 5


def test_a_step_inside_its_own_step_is_refused() -> None:
    w = np.ones(3)
    opt = fs.SGD([w])

    class Reentrant:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **kwargs: object) -> object:
            with pytest.raises(RuntimeError, match="inside its own step"):
                opt.step([np.ones(3)])
            return np.ones(3).__dlpack__()

    opt.step([Reentrant()])
    assert opt.steps == 1


def in_child(work) -> None:
    """Run `work` in a forked child; fail if it raises, crashes or hangs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    for _ in range(300):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_steps() -> None:
    fs.set_num_threads(2)
    w, g = np.zeros(300_000, f32), np.ones(300_000, f32)
    opt = fs.Adam([w])
    opt.step([g])  # the parent's threads exist now

    def child() -> None:
        expected = w.copy()
        again = fs.Adam([expected])
        again.load_state_dict(opt.state_dict())
        fs.set_num_threads(1)
        again.step([g])
        fs.set_num_threads(2)
        opt.step([g])
        np.testing.assert_array_equal(w, expected)
        in_child(lambda: opt.step([g]))  # and a child of the child

    in_child(child)
    opt.step([g])
    assert opt.steps == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forking_while_another_thread_steps() -> None:
    fs.set_num_threads(2)
    w, g = np.zeros(500_000, f32), np.ones(500_000, f32)
    opt = fs.Adam([w])
    stop = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            while not stop.is_set():
                opt.step([g])
            return
        try:
            for _ in range(10):
                in_child(lambda: opt.step([g]))
        finally:
            stop.set()

    in_threads(2, work)


def test_the_interpreter_ends_with_idle_helpers() -> None:
    code = (
        "import numpy as np, fusestep as fs; fs.set_num_threads(2)\n"
        "w = np.zeros(300_000, 'f4'); fs.Adam([w]).step([w + 1])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_interpreter_ends_while_a_daemon_thread_steps() -> None:
    code = (
        "import threading, time, numpy as np, fusestep as fs\n"
        "g = np.ones(2_000_000, 'f4')\n"
        "opts = [fs.Adam([np.zeros_like(g)]) for _ in range(2)]\n"
        "def work(i):\n"
        "    while True: opts[i % 2].step([g])\n"
        "for i in range(3): threading.Thread(target=work, args=(i,), daemon=True).start()\n"
        "time.sleep(0.3)\n"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_attributes_change_between_steps_not_within() -> None:
    """betas is two numbers to the kernels; a step sees both old or both new."""
    w = np.zeros(1)
    opt = fs.Adam([w], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(i: int) -> None:
        if i == 0:
            for k in range(3000):
                opt.betas = (0.0, 0.0) if k % 2 else (0.5, 0.25)
            return
        for _ in range(3000):
            opt.step([np.ones(1)])
            assert np.isfinite(w[0])

    try:
        in_threads(2, work)
    finally:
        sys.setswitchinterval(interval)


def test_a_process_pool_of_forked_workers() -> None:
    """As a data loader does it."""
    code = (
        "import multiprocessing as mp, numpy as np, fusestep as fs\n"
        "w = np.zeros(300_000, 'f4'); opt = fs.Adam([w]); opt.step([w + 1])\n"
        "def work(i): opt.step([w * 0 + i]); return float(w[0])\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('fork').Pool(2) as pool: print(len(pool.map(work, range(8))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "8"


def test_python_code_runs_between_many_small_steps() -> None:
    """Signals are delivered to the main thread, not to a helper."""
    fs.set_num_threads(2)
    w, g = np.zeros(300_000, f32), np.ones(300_000, f32)
    opt = fs.Adam([w])
    arrived: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: arrived.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        deadline = time.monotonic() + 20
        while len(arrived) < 5 and time.monotonic() < deadline:
            opt.step([g])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(arrived) >= 5
