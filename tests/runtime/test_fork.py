"""Test that a function in a forked child gives its result, even if the child is killed."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from captcha_exp.runtime import fork

ROOT = Path(__file__).resolve().parents[2]
two_cores = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and a second core"
)


def run(code: str) -> str:
    """Run code in a new process with a single thread, which may fork, and return its output."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, time\nfrom captcha_exp.runtime.fork import run_in_child\n" + code,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr
    return done.stdout.strip()


@two_cores
def test_the_result_comes_from_a_child_that_ends_with_the_context() -> None:
    code = """
    import psutil
    with run_in_child(lambda: {"pid": os.getpid(), "none": None}) as wait:
        value = wait()
    print(value["pid"] != os.getpid(), value["none"], psutil.pid_exists(value["pid"]))
    """
    assert run(textwrap.dedent(code)) == "True None False"


def test_an_exception_of_the_child_is_raised_in_the_parent() -> None:
    code = """
    def fail():
        raise ValueError("expected")
    with run_in_child(fail) as wait:
        try:
            wait()
        except ValueError as error:
            print(error)
    """
    assert run(textwrap.dedent(code)) == "expected"


@two_cores
@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_result_of_a_killed_child_is_computed_in_the_parent(end: str) -> None:
    code = f"""
    parent = os.getpid()
    def value():
        if os.getpid() != parent:
            {end}
        return 7
    with run_in_child(value) as wait:
        print(wait())
    """
    assert run(textwrap.dedent(code)) == "7"


@two_cores
@pytest.mark.parametrize("error", [False, True])
def test_a_child_ends_with_the_context_if_its_result_is_not_used(error: bool) -> None:
    code = f"""
    import psutil
    read, write = os.pipe()
    def forever():
        os.write(write, b"%d" % os.getpid())
        time.sleep(600)
    try:
        with run_in_child(forever):
            pid = int(os.read(read, 20))
            if {error}:
                raise KeyError
    except KeyError:
        pass
    print(psutil.pid_exists(pid))
    """
    assert run(textwrap.dedent(code)) == "False"


def test_a_process_with_several_threads_does_not_fork() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with fork.run_in_child(os.getpid) as wait:
            assert wait() == os.getpid()
    finally:
        stop.set()
        thread.join()
