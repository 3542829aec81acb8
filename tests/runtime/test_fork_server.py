"""A child of a fork server equals a new process, and ends as its supervisor expects."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from captcha_exp.runtime.fork_server import ForkedProcess, ForkServer

# Not as it is later: pytest writes the name of the test to it.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
SERVER = """
import os, sys
from captcha_exp.runtime.fork_server import serve
serve(lambda: __import__("numpy.random"))
exec(sys.stdin.read())
"""


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer([sys.executable, "-c", SERVER], ENVIRONMENT)
    yield server
    server.close()


def start(server: ForkServer, code: str) -> ForkedProcess:
    """Start a child that runs this code."""
    process = server.fork(captures_output=True)
    process.stdin.write(code.encode())
    process.stdin.close()
    return process


def output(process: ForkedProcess) -> str:
    """Return the output of a child, after its end."""
    assert process.stdout is not None
    with process:
        text = process.stdout.read().decode()
    return text.strip()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        ("raise ValueError", 1),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("os.kill(os.getpid(), 2)", -signal.SIGINT),
    ],
)
def test_the_exit_code_is_that_of_the_child(server: ForkServer, code: str, expected: int) -> None:
    process = start(server, code)
    output(process)
    assert process.returncode == process.poll() == process.wait() == expected


def test_children_run_at_the_same_time_and_a_killed_one_ends_alone(server: ForkServer) -> None:
    one, other = (server.fork(captures_output=True) for _ in range(2))
    assert one.poll() is other.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.01)
    one.kill()
    assert one.wait() == -signal.SIGKILL
    assert other.poll() is None
    other.stdin.write(b"print(6 * 7)")
    other.stdin.close()
    assert output(other) == "42"
    assert output(one) == ""
    one.kill()  # the PID may belong to another process


def test_a_child_has_no_descriptor_of_the_server_or_of_another_child(server: ForkServer) -> None:
    with server.fork(captures_output=True) as other:
        listed = output(start(server, "print(sorted(os.listdir('/proc/self/fd')))"))
        other.stdin.close()
    assert listed == str(["0", "1", "2", "3"]), "3 is the listing itself"


STATE = """
import faulthandler, gc, json, locale, os, random, resource, signal, sys, threading
import numpy
values = {
    "argv": sys.argv,
    "flags": list(sys.flags),
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "signals": {int(n): str(signal.getsignal(n)) for n in signal.valid_signals()},
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": [each.name for each in threading.enumerate()],
    "tasks": len(os.listdir("/proc/self/task")),
    "limits": [resource.getrlimit(n) for n in range(10)],
    "priority": os.getpriority(os.PRIO_PROCESS, 0),
    "group": [os.getpgid(0), os.getsid(0)],
    "cores": sorted(os.sched_getaffinity(0)),
    "streams": [[s.encoding, s.errors, s.line_buffering] for s in (sys.stdin, sys.stdout, sys.stderr)],
    "locale": locale.setlocale(locale.LC_ALL),
    "collector": [gc.isenabled(), gc.get_threshold()],
    "recursion": sys.getrecursionlimit(),
    "hook": sys.excepthook is sys.__excepthook__,
}
print(json.dumps(values, default=str))
"""


def test_a_child_has_the_state_of_a_new_process(server: ForkServer) -> None:
    new = subprocess.run(
        [sys.executable, "-c", "import captcha_exp, sys; exec(sys.stdin.read())"],
        input=STATE.encode(),
        env=ENVIRONMENT | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    expected, found = json.loads(new.stdout), json.loads(output(start(server, STATE)))
    for each in (expected, found):  # its threads start with the first large product
        each["environment"].pop("OPENBLAS_NUM_THREADS", None)
    assert found == expected


def test_each_child_draws_other_numbers(server: ForkServer) -> None:
    code = "import random, numpy, uuid; print(random.random(), numpy.random.random(), uuid.uuid4())"
    drawn = [output(start(server, code)).split() for _ in range(2)]
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_the_end_of_the_server_ends_its_child_and_is_its_exit_code(server: ForkServer) -> None:
    process = server.fork(captures_output=True)
    child = psutil.Process(process.pid)
    server._process.kill()
    assert process.wait() == -signal.SIGKILL
    assert psutil.wait_procs([child], timeout=10)[1] == []
    output(process)
    assert server.has_exited()
    with server.fork(captures_output=True) as late:
        assert late.wait() == -signal.SIGKILL


def test_a_server_that_fails_has_its_own_exit_code() -> None:
    server = ForkServer([sys.executable, "-c", "raise SystemExit(5)"], os.environ)
    with server.fork(captures_output=True) as process:
        assert process.wait() == 5
    server.close()


def test_a_server_that_cannot_fork_says_why_and_lives_on() -> None:
    code = f"""
import os
fork = os.fork
def fail():
    os.fork = fork
    raise OSError(12, "no memory")
os.fork = fail
{SERVER}"""
    server = ForkServer([sys.executable, "-c", code], ENVIRONMENT)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        server.fork(captures_output=True)
    assert output(start(server, "print('next')")) == "next"
    server.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_survives_signals_to_its_group(server: ForkServer, number: int) -> None:
    assert output(start(server, "pass")) == ""
    os.kill(server._process.pid, number)
    assert output(start(server, "print('alive')")) == "alive"


CLIENT = """
import os, sys, time
from captcha_exp.runtime.fork_server import ForkServer
server = ForkServer([sys.executable, "-c", sys.argv[1]], os.environ)
{act}
print(server._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("program", "act"),
    [(SERVER, "process = server.fork(captures_output=True)"), ("import time\n" + SERVER, "")],
    ids=["idle", "importing"],
)
def test_the_server_ends_with_its_client(program: str, act: str) -> None:
    """Also while it imports, which takes seconds."""
    program = program.replace('__import__("numpy.random")', "time.sleep(600)") if not act else program
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT.format(act=act), program],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None
        server = psutil.Process(int(client.stdout.readline()))
        if not act:
            time.sleep(1)  # until it imports
        processes = [server, *server.children()]
        client.kill()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
