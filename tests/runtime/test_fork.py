"""Test that a value from a child process is the value of the function, whatever becomes of the child."""

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
    """Return what a new process prints, which has one thread and so may fork."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, time\nfrom captcha_exp.runtime import fork as child\n" + code,
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
def test_the_value_comes_from_a_child_that_has_ended_afterwards() -> None:
    code = """
    import psutil
    with child.started(lambda: {"pid": os.getpid(), "none": None}) as wait:
        value = wait()
    print(value["pid"] != os.getpid(), value["none"], psutil.pid_exists(value["pid"]))
    """
    assert run(textwrap.dedent(code)) == "True None False"


def test_the_error_of_a_child_is_raised_where_its_value_is_asked_for() -> None:
    code = """
    def fail():
        raise ValueError("as here")
    with child.started(fail) as wait:
        try:
            wait()
        except ValueError as error:
            print(error)
    """
    assert run(textwrap.dedent(code)) == "as here"


@two_cores
@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_value_of_a_lost_child_is_computed_again(end: str) -> None:
    code = f"""
    parent = os.getpid()
    def value():
        if os.getpid() != parent:
            {end}
        return 7
    with child.started(value) as wait:
        print(wait())
    """
    assert run(textwrap.dedent(code)) == "7"


@two_cores
@pytest.mark.parametrize("error", [False, True])
def test_a_child_whose_value_nobody_asks_for_ends_with_its_context(error: bool) -> None:
    code = f"""
    import psutil
    read, write = os.pipe()
    def forever():
        os.write(write, b"%d" % os.getpid())
        time.sleep(600)
    try:
        with child.started(forever):
            pid = int(os.read(read, 20))
            if {error}:
                raise KeyError
    except KeyError:
        pass
    print(psutil.pid_exists(pid))
    """
    assert run(textwrap.dedent(code)) == "False"


def test_a_process_with_threads_does_not_fork() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with fork.run_in_child(os.getpid) as wait:
            assert wait() == os.getpid()
    finally:
        stop.set()
        thread.join()
