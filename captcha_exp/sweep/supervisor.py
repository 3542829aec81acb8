"""A training in a fresh process: started, listened to, ended with its parent, and closed if it could not.

A crash, a segmentation fault, the kernel's killer end that process alone. Memory figures are its own, and no
chance, thread count or CUDA context is carried over from one to the next.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from captcha_exp import runs
from captcha_exp.config import Config, load, to_dict, with_store
from captcha_exp.errors import RunFailed
from captcha_exp.runs import resume
from captcha_exp.runtime import process
from captcha_exp.runtime.console import Terminal
from captcha_exp.runtime.paths import root
from captcha_exp.runtime.shutdown import undisturbed
from captcha_exp.sweep.record import Point, Sweep
from captcha_exp.sweep.worker import STOP
from captcha_exp.tracking import close_left, tracker_of

SECONDS_TO_STOP = 15.0  # for the step at hand, the files' hashes and the last words to MLflow
LAST_WORDS = ("Traceback (most recent call last)", "Fatal Python error")  # what follows is for the log alone
LONGEST_LAST_WORDS = 1000  # characters, in the record of a run and in a table
SECONDS_BETWEEN_LOOKS = 0.5  # at whether the sweep's own process is there


@dataclass(frozen=True)
class Order:
    """One training, and how it is to be known."""

    requested: Config
    choices: Mapping[str, str]
    name: str | None = None
    """in MLflow; None: that of its folder"""
    parent: str | None = None
    """id of the sweep's run in MLflow"""
    links: Mapping[str, Any] = field(default_factory=dict)
    """the run that it belongs to, as in run.json"""
    start_from: Path | None = None
    """the finished run whose state a new run starts from"""
    leave_at: float | None = None
    """seconds since 1970; None: it may take as long as it needs"""


def run_point(folder: Path, number: int) -> None:
    """A point of the sweep in this folder, trained in a process of its own; its folder has all that came of
    it. Where the sweep's time is up it is not begun."""
    sweep = Sweep(folder)
    point = sweep.points[number - 1]
    _end_with(sweep.state)
    leave_at = _leave_at(sweep)
    if leave_at is not None and leave_at <= time.time():
        return
    terminal, of_all = Terminal(), len(sweep.points)

    def listen(line: str) -> None:
        terminal.line(f"[{number}/{of_all} {point.name}] {line}")

    parent = (sweep.state["mlflow"] or {}).get("run_id")
    order = Order(point.requested, point.choices, point.name, parent, leave_at=leave_at)
    for attempt in sweep.attempts(point):  # what has run out of memory would do so again
        left = runs.read_left(attempt / "run.json")
        if left is not None and left.state.get("config_sha256") == runs.config_sha256(order.requested):
            order = replace(order, requested=_in_smaller_parts(order.requested, attempt) or order.requested)

    @contextlib.contextmanager
    def place(requested: Config) -> Iterator[Path]:
        with resume.held(lambda: _last_of(sweep, point, requested)) as found:
            if found is not None:
                listen(f"goes on {resume.reached(found.folder)}")
            yield sweep.new_attempt(point) if found is None else found.folder

    try:
        train_until_it_fits(order, place, listen)
    except OSError as error:  # a full disk; the points after it may find room
        terminal.warn(f"{point.name}: its record cannot be written: {error}")


def _leave_at(sweep: Sweep) -> float | None:
    """When a point that starts now has to end: with the sweep, where its machine is the sweep's; elsewhere it
    may have waited for that machine, and has a time of its own."""
    if sweep.until is not None and process.is_elsewhere(sweep.state):
        return time.time() + 60 * float(sweep.state["limit"]["minutes"])
    return sweep.until


def _last_of(sweep: Sweep, point: Point, requested: Config) -> runs.Left | None:
    """The last run of the point, if it is one of this config that can be gone on with."""
    attempts = sweep.attempts(point)
    return resume.of_point(attempts[-1], requested) if attempts else None


def train_until_it_fits(
    order: Order,
    place: Callable[[Config], AbstractContextManager[Path]],
    listen: Callable[[str], None] | None = None,
) -> Path:
    """The folder of the run; of the last one, where train.on_oom=split has made several.

    `place` gives the folder for a training of a config: an empty one, or that of an unfinished run.

    `listen` gets each line that the process says, and a log beside the folder keeps them; without it they go
    to the terminal as they are.
    """
    while True:
        with place(order.requested) as folder:
            _train(order, folder, listen)
        smaller = _in_smaller_parts(order.requested, folder)
        if smaller is None:
            return folder
        order = replace(order, requested=smaller)


def _train(order: Order, folder: Path, listen: Callable[[str], None] | None) -> None:
    """One process; whatever becomes of it, the record in its folder says so."""
    process = _Process(folder, listen)
    try:
        with process:
            process.tell(
                {
                    "config": to_dict(order.requested),
                    "choices": dict(order.choices),
                    "name": order.name,
                    "parent": order.parent,
                    "folder": str(folder),
                    "links": dict(order.links),
                    "start_from": order.start_from and str(order.start_from),
                    "leave_at": order.leave_at,
                }
            )
            process.wait()
    except BaseException:
        _close(order, folder, "KILLED", "interrupted")
        raise
    _close(order, folder, "FAILED", process.how_it_ended())


class _Process:
    """The process of one training, seen from its parent."""

    def __init__(self, folder: Path, listen: Callable[[str], None] | None) -> None:
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self._last_words = ""
        self._asked_to_stop = self._made_to_end = False
        self._listen = listen
        self._log = folder.with_name(f"{folder.name}.log")
        self._process = subprocess.Popen(
            # -P: no file of the working directory is taken for a package.
            [sys.executable, "-P", "-X", "faulthandler", "-m", "captcha_exp.sweep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if listen else 2,  # standard output is for results alone
            stderr=subprocess.STDOUT if listen else None,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:replace"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *exc: object) -> None:
        """If it has not ended, it is asked to, and then made to."""
        try:
            if self._process.poll() is None:
                self._asked_to_stop = True
                self._say(STOP)
                self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            pass
        finally:  # at a second Ctrl-C, too
            self._made_to_end = self._process.poll() is None
            self._process.kill()
            self._process.wait()
            self._reader.join()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def tell(self, order: Any) -> None:
        """What to do."""
        self._say(json.dumps(order).encode())

    def wait(self) -> None:
        """Until it has ended and all that it said has been heard."""
        self._process.wait()
        self._reader.join()

    def how_it_ended(self) -> str:
        """In one line."""
        code = self._process.returncode
        if self._made_to_end:
            return "it did not stop when it was asked to, and was made to"
        if code >= 0:
            return self._last_words or f"its process ended with exit code {code} and said nothing"
        known = {each.value: each.name for each in signal.Signals}
        name = known.get(-code, f"signal {-code}")
        hint = " (the kernel does so to a process for which memory is short)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"

    def _say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; how, is seen when it is waited for
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        """Each line to the log and to who listens; where one can take no more, the other goes on, since the
        process would wait for its reader for ever."""
        if self._process.stdout is None or self._listen is None:
            return
        terminal, log = _Taker(self._listen), _Taker(_appending_to(self._log))
        log.take(b"")  # it is there even if nothing is said
        in_full = True
        for said in self._process.stdout:
            log.take(said)
            line = said.decode(errors="replace").rstrip("\r\n")
            self._last_words = line.strip()[:LONGEST_LAST_WORDS] or self._last_words
            in_full = in_full and not line.startswith(LAST_WORDS)
            if in_full:
                terminal.take(line)
        if self._process.wait() != 0 and (self._made_to_end or not self._asked_to_stop):
            where = f"{self._log} cannot be written" if log.broken else f"{self._log} has it in full"
            terminal.take(f"{self.how_it_ended()}; {where}")


class _Taker:
    """Takes until it cannot: the disk is full, the terminal has gone."""

    def __init__(self, take: Callable[[Any], object]) -> None:
        self._take = take
        self.broken = False

    def take(self, what: str | bytes) -> None:
        if not self.broken:
            try:
                self._take(what)
            except (OSError, SystemExit):  # rich ends a program whose terminal has gone
                self.broken = True


def _appending_to(path: Path) -> Callable[[bytes], object]:
    """Writes at the end of a file that is opened each time: it may not be there to be written."""

    def write(said: bytes) -> None:
        with path.open("ab") as file:
            file.write(said)

    return write


def _close(order: Order, folder: Path, status: runs.Status, error: str) -> None:
    """The record of a run whose process is gone, if it has not closed it itself."""
    with undisturbed():
        _close_undisturbed(order, folder, status, error)


def _close_undisturbed(order: Order, folder: Path, status: runs.Status, error: str) -> None:
    display = Terminal()
    if (folder / "run.json").exists():
        close_left(folder, status, error, display)
        return
    # It never came to make a record: a mistake that only a training meets, or it was ended at once.
    config = with_store(order.requested, root())
    run = runs.create(config, order.requested, folder)
    tracker = tracker_of(config, display, order.choices, order.name, order.parent)
    with contextlib.suppress(RunFailed):  # MLflow does not take it; the folder has it
        tracker.start(run, config)
    run.close(status, error)
    tracker.finish(run, status)


def _in_smaller_parts(requested: Config, folder: Path) -> Config | None:
    """The config with half the micro-batch, or half the evaluation batch, where that is what is to be tried
    next; None where it is not, or where it is one picture already.

    The batch of a step stays what it is.
    """
    state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    short = state.get("oom")
    if not short or requested.train.on_oom != "split":
        return None
    train = load(folder / "config.yaml").train
    splits = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["splits"]
    if short["during"] == "evaluation":
        size = min(train.evaluation_batch_size, max(splits["validation"], splits["test"]))
        train = replace(train, evaluation_batch_size=-(-size // 2))
    else:  # a batch holds no more than there is; half of more would be the same again
        size = min(train.micro_batch_size or int(train.batch_size), splits["train"])
        train = replace(train, micro_batch_size=-(-size // 2))
    return None if size == 1 else replace(requested, train=train)


def _end_with(state: Mapping[str, Any]) -> None:
    """This process ends when that of the sweep does, if it is another: a launcher's worker would live on."""
    if state["pid"] == os.getpid() or any(thread.name == _WATCHER for thread in threading.enumerate()):
        return

    def watch() -> None:
        while process.is_alive(state):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)  # the pipes to its own children close with it

    threading.Thread(target=watch, name=_WATCHER, daemon=True).start()


_WATCHER = "ends with the sweep"
