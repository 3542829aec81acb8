"""A fork server: a process that imports the modules of a task once, and forks a child for each task.

It does nothing but import: it runs no tensor operation, opens no device, draws no random number and has no
thread of its own when it forks, so a child equals a new process that has the same modules. Linux only: the
frameworks of macOS do not survive a fork, and Windows has none.

The server ignores Ctrl-C and SIGTERM, and exits with its client: their socket is its standard input. For each
child there is another socket, its channel, on which the server sends the PID and, later, the exit code.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO

from captcha_exp.runtime.resident import find_file_pages, map_pages

logger = logging.getLogger(__name__)

_FORK = b"fork"
_MAX_MESSAGE_BYTES = 64
_POLL_SECONDS = 0.2


def is_supported() -> bool:
    """Return whether this system has fork, and pidfd_open of Linux 5.3."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


# -- the client ----------------------------------------------------------------------------------------------


class ForkServer:
    """The server, seen from its client."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the server: a Python program that calls `serve`. Its children have the same environment."""
        self._control, remote = _socket_pair()
        with remote:
            # Standard output is reserved for results.
            self._process = subprocess.Popen(command, stdin=remote.fileno(), stdout=2, env=environment)
        logger.debug(f"started fork server {self._process.pid}")

    def fork(self, captures_output: bool) -> "ForkedProcess":
        """Fork a child; the first time, after the imports.

        Its output goes to `stdout` of the returned process, or to standard error of this one.

        Raises:
            OSError: The server cannot fork, for example because the memory is full.
        """
        (channel, remote), (stdin, stdin_writer) = _socket_pair(), os.pipe()
        reader, output = os.pipe() if captures_output else (None, 2)
        stdout = None if reader is None else os.fdopen(reader, "rb")
        process = ForkedProcess(self._process, channel, os.fdopen(stdin_writer, "wb"), stdout)
        try:
            with remote, contextlib.suppress(ConnectionError):  # the server has exited, which `wait` reports
                socket.send_fds(self._control, [_FORK], [remote.fileno(), stdin, output])
        finally:
            _close_all([stdin, output] if captures_output else [stdin])
        process.receive_pid()
        return process

    def has_exited(self) -> bool:
        """Return whether the server was killed, or failed."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Let the server exit after its children, and wait for it."""
        self._control.close()
        self._process.wait()


class ForkedProcess:
    """A child of the server, with the part of `subprocess.Popen` that a supervisor needs."""

    def __init__(
        self,
        server: "subprocess.Popen[bytes]",
        channel: socket.socket,
        stdin: IO[bytes],
        stdout: IO[bytes] | None,
    ) -> None:
        """Own the channel and the pipes of a child that is about to be forked."""
        self.stdin, self.stdout = stdin, stdout
        self.pid = 0
        self.returncode: int | None = None
        self._server, self._channel = server, channel
        self._pidfd: int | None = None
        self._lock = threading.Lock()  # several threads may wait for the exit code

    def __enter__(self) -> "ForkedProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        """Wait for the exit and close the pipes."""
        try:
            self._close_pipes()
        finally:
            self.wait()
            self._close_channel()

    def receive_pid(self) -> None:
        """Wait until the server has forked.

        Raises:
            OSError: It cannot fork.
        """
        try:
            message, descriptors, _, _ = socket.recv_fds(self._channel, _MAX_MESSAGE_BYTES, 1)
            if message and int(message) < 0:
                raise OSError(-int(message), os.strerror(-int(message)))
        except BaseException:  # also Ctrl-C; the child exits at the end of its input
            self._close_pipes()
            self._close_channel()
            raise
        if message:
            self.pid, (self._pidfd,) = int(message), descriptors

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process is running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; that of the server, if it has exited before the process.

        Raises:
            subprocess.TimeoutExpired: The process is still running.
        """
        if self.returncode is None and not _wait_for_any([self._channel.fileno()], timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        with self._lock:
            if self.returncode is None:
                if message := self._channel.recv(_MAX_MESSAGE_BYTES):
                    self.returncode = int(message)
                else:  # its exit would go unnoticed
                    self.kill()
                    self.returncode = self._server.wait() or 1
        return self.returncode

    def kill(self) -> None:
        """Kill the process if it is running."""
        if self._pidfd is not None and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _close_pipes(self) -> None:
        if self.stdout is not None:
            self.stdout.close()
        self.stdin.close()

    def _close_channel(self) -> None:
        self._channel.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


# -- the server ----------------------------------------------------------------------------------------------


def serve(prepare: Callable[[], None]) -> None:
    """Call `prepare`, then fork a child for each request; return in each child, and exit in the server."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole process group; the client handles them
    control = socket.socket(fileno=os.dup(0))
    with _exit_with_client(control):
        prepare()
    gc.collect()
    gc.freeze()  # a collection in a child would copy the memory that it shares with the server
    file_pages = find_file_pages()
    children: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> PID, channel
    is_closed = False
    while not is_closed or children:
        ready = _wait_for_any([*children] if is_closed else [control.fileno(), *children])
        for pidfd in children.keys() & ready:
            _report_exit(pidfd, *children.pop(pidfd))
        if control.fileno() not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(control, _MAX_MESSAGE_BYTES, 3)
        if not request:
            is_closed = True  # the children read the end of their input, if the client was killed
            continue
        channel, streams = socket.socket(fileno=descriptors[0]), descriptors[1:]
        pid = _fork(channel)
        if pid == 0:
            _close_all([control.detach(), channel.detach(), *children])
            _close_all(other.detach() for _, other in children.values())
            _begin_child(*streams)
            map_pages(file_pages)
            return
        _close_all(streams)
        if pid is not None:
            pidfd = os.pidfd_open(pid)
            children[pidfd] = pid, channel
            with contextlib.suppress(ConnectionError):
                socket.send_fds(channel, [b"%d" % pid], [pidfd])
    os._exit(0)


@contextlib.contextmanager
def _exit_with_client(control: socket.socket) -> Iterator[None]:
    """Exit when the client does, until the context ends; its thread has then ended, too."""
    has_ended = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(control, 0)  # only the end is an event
        while not has_ended.is_set():
            if poll.poll(1000 * _POLL_SECONDS):
                os._exit(1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def _fork(channel: socket.socket) -> int | None:
    """Fork; if that fails, send the negative error number and return None."""
    try:
        return os.fork()
    except OSError as error:
        with channel, contextlib.suppress(ConnectionError):
            channel.send(b"%d" % -(error.errno or 1))
        return None


def _report_exit(pidfd: int, pid: int, channel: socket.socket) -> None:
    """Reap a child, and send its exit code to the client."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with channel, contextlib.suppress(ConnectionError):
        channel.send(b"%d" % code)
    os.close(pidfd)


def _begin_child(stdin: int, output: int) -> None:
    """Give a forked child the streams, signal handlers and random state of a new process."""
    os.dup2(stdin, 0)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    _close_all([stdin, output])
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]  # a TextIOWrapper
    if "numpy.random" in sys.modules:  # Python's own generator is seeded by the fork, torch's is constant
        sys.modules["numpy.random"].seed()


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages apart


def _wait_for_any(descriptors: Sequence[int], timeout: float | None = None) -> set[int]:
    """Wait until one of the descriptors has a message or has ended; return those that do."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {ready for ready, _ in poll.poll(None if timeout is None else 1000 * timeout)}


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
