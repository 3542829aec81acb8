"""The worker process of a job: a stop request interrupts whatever it waits for."""

import subprocess
import sys

from captcha_exp.sweep.worker import STOP

BLOCKED = """
import signal, socket, sys, threading
from captcha_exp.sweep import worker
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
threading.Thread(target=worker._watch_stdin, args=(worker._read_lines(),), daemon=True).start()
print("ready", flush=True)
ours, theirs = socket.socketpair()
ours.recv(1)
"""


def test_a_stop_request_interrupts_a_blocking_call() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            process.stdin.write(STOP + b"\n")
            process.stdin.flush()
            assert process.wait(10) == 143
        finally:
            process.kill()
