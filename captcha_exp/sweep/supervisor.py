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
from captcha_exp.config import Config, load, to_dict, with_tracking_uri
from captcha_exp.errors import RunFailed
from captcha_exp.runs import resume
from captcha_exp.runtime import process
from captcha_exp.runtime.console import RichDisplay
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.shutdown import defer_signals
from captcha_exp.sweep.record import Job, Sweep
from captcha_exp.sweep.worker import STOP
from captcha_exp.tracking import finalize_run, make_tracker

STOP_TIMEOUT_SECONDS = 15.0  # for the step at hand, the files' hashes and the last words to MLflow
CRASH_MARKERS = (
    "Traceback (most recent call last)",
    "Fatal Python error",
)  # what follows is for the log alone
MAX_ERROR_LENGTH = 1000  # characters, in the record of a run and in a table
POLL_SECONDS = 0.5  # at whether the sweep's own process is there


@dataclass(frozen=True)
class TrainJob:
    """One training, and how it is to be known."""

    requested: Config
    choices: Mapping[str, str]
    name: str | None = None
    """in MLflow; None: that of its folder"""
    parent_run_id: str | None = None
    """id of the sweep's run in MLflow"""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """the run that it belongs to, as in run.json"""
    extend_from: Path | None = None
    """the finished run whose state a new run starts from"""
    deadline: float | None = None
    """seconds since 1970; None: it may take as long as it needs"""


def run_job(sweep_dir: Path, number: int) -> None:
    """A point of the sweep in this folder, trained in a process of its own; its folder has all that came of
    it. Where the sweep's time is up it is not begun."""
    sweep = Sweep(sweep_dir)
    point = sweep.jobs[number - 1]
    _exit_with_parent(sweep.state)
    leave_at = _job_deadline(sweep)
    if leave_at is not None and leave_at <= time.time():
        return
    terminal, of_all = RichDisplay(), len(sweep.jobs)

    def listen(line: str) -> None:
        terminal.info(f"[{number}/{of_all} {point.name}] {line}")

    parent = (sweep.state["mlflow"] or {}).get("run_id")
    order = TrainJob(point.requested, point.choices, point.name, parent, deadline=leave_at)
    for attempt in sweep.attempts(point):  # what has run out of memory would do so again
        left = runs.read_stale_run(attempt / "run.json")
        if left is not None and left.state.get("config_sha256") == runs.config_sha256(order.requested):
            order = replace(order, requested=_halve_micro_batch(order.requested, attempt) or order.requested)

    @contextlib.contextmanager
    def place(requested: Config) -> Iterator[Path]:
        with resume.claim(lambda: _find_resumable(sweep, point, requested)) as found:
            if found is not None:
                listen(f"goes on {resume.describe_progress(found.run_dir)}")
            yield sweep.new_attempt(point) if found is None else found.run_dir

    try:
        train_with_oom_retry(order, place, listen)
    except OSError as error:  # a full disk; the points after it may find room
        terminal.warn(f"{point.name}: its record cannot be written: {error}")


def _job_deadline(sweep: Sweep) -> float | None:
    """When a point that starts now has to end: with the sweep, where its machine is the sweep's; elsewhere it
    may have waited for that machine, and has a time of its own."""
    if sweep.deadline is not None and process.is_remote(sweep.state):
        return time.time() + 60 * float(sweep.state["limit"]["minutes"])
    return sweep.deadline


def _find_resumable(sweep: Sweep, point: Job, requested: Config) -> runs.StaleRun | None:
    """The last run of the point, if it is one of this config that can be gone on with."""
    attempts = sweep.attempts(point)
    return resume.find_resumable_job(attempts[-1], requested) if attempts else None


def train_with_oom_retry(
    job: TrainJob,
    run_dir: Callable[[Config], AbstractContextManager[Path]],
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """The folder of the run; of the last one, where train.on_oom=split has made several.

    `place` gives the folder for a training of a config: an empty one, or that of an unfinished run.

    `listen` gets each line that the process says, and a log beside the folder keeps them; without it they go
    to the terminal as they are.
    """
    while True:
        with run_dir(job.requested) as folder:
            _train_in_child(job, folder, on_line)
        smaller = _halve_micro_batch(job.requested, folder)
        if smaller is None:
            return folder
        job = replace(job, requested=smaller)


def _train_in_child(order: TrainJob, folder: Path, listen: Callable[[str], None] | None) -> None:
    """One process; whatever becomes of it, the record in its folder says so."""
    process = _ChildProcess(folder, listen)
    try:
        with process:
            process.send(
                {
                    "config": to_dict(order.requested),
                    "choices": dict(order.choices),
                    "name": order.name,
                    "parent": order.parent_run_id,
                    "run_dir": str(folder),
                    "lineage": dict(order.lineage),
                    "start_from": order.extend_from and str(order.extend_from),
                    "leave_at": order.deadline,
                }
            )
            process.wait()
    except BaseException:
        _finalize_run(order, folder, "KILLED", "interrupted")
        raise
    _finalize_run(order, folder, "FAILED", process.describe_exit())


class _ChildProcess:
    """The process of one training, seen from its parent."""

    def __init__(self, run_dir: Path, on_line: Callable[[str], None] | None) -> None:
        home = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self._last_line = ""
        self._stop_requested = self._was_killed = False
        self._on_line = on_line
        self._log_path = run_dir.with_name(f"{run_dir.name}.log")
        self._process = subprocess.Popen(
            # -P: no file of the working directory is taken for a package.
            [sys.executable, "-P", "-X", "faulthandler", "-m", "captcha_exp.sweep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if on_line else 2,  # standard output is for results alone
            stderr=subprocess.STDOUT if on_line else None,
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:replace"},
        )
        self._reader = threading.Thread(target=self._forward_output)
        self._reader.start()

    def __enter__(self) -> "_ChildProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        """If it has not ended, it is asked to, and then made to."""
        try:
            if self._process.poll() is None:
                self._stop_requested = True
                self._write_line(STOP)
                self._process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # at a second Ctrl-C, too
            self._was_killed = self._process.poll() is None
            self._process.kill()
            self._process.wait()
            self._reader.join()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def send(self, job: Any) -> None:
        """What to do."""
        self._write_line(json.dumps(job).encode())

    def wait(self) -> None:
        """Until it has ended and all that it said has been heard."""
        self._process.wait()
        self._reader.join()

    def describe_exit(self) -> str:
        """In one line."""
        code = self._process.returncode
        if self._was_killed:
            return "it did not stop when it was asked to, and was made to"
        if code >= 0:
            return self._last_line or f"its process ended with exit code {code} and said nothing"
        known = {each.value: each.name for each in signal.Signals}
        name = known.get(-code, f"signal {-code}")
        hint = " (the kernel does so to a process for which memory is short)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"

    def _write_line(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; how, is seen when it is waited for
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _forward_output(self) -> None:
        """Each line to the log and to who listens; where one can take no more, the other goes on, since the
        process would wait for its reader for ever."""
        if self._process.stdout is None or self._on_line is None:
            return
        terminal, log = _SafeWriter(self._on_line), _SafeWriter(_file_appender(self._log_path))
        log.write(b"")  # it is there even if nothing is said
        in_full = True
        for said in self._process.stdout:
            log.write(said)
            line = said.decode(errors="replace").rstrip("\r\n")
            self._last_line = line.strip()[:MAX_ERROR_LENGTH] or self._last_line
            in_full = in_full and not line.startswith(CRASH_MARKERS)
            if in_full:
                terminal.write(line)
        if self._process.wait() != 0 and (self._was_killed or not self._stop_requested):
            where = (
                f"{self._log_path} cannot be written" if log.broken else f"{self._log_path} has it in full"
            )
            terminal.write(f"{self.describe_exit()}; {where}")


class _SafeWriter:
    """Takes until it cannot: the disk is full, the terminal has gone."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        self._write = write
        self.broken = False

    def write(self, data: str | bytes) -> None:
        if not self.broken:
            try:
                self._write(data)
            except (OSError, SystemExit):  # rich ends a program whose terminal has gone
                self.broken = True


def _file_appender(path: Path) -> Callable[[bytes], object]:
    """Writes at the end of a file that is opened each time: it may not be there to be written."""

    def write(said: bytes) -> None:
        with path.open("ab") as file:
            file.write(said)

    return write


def _finalize_run(order: TrainJob, folder: Path, status: runs.Status, error: str) -> None:
    """The record of a run whose process is gone, if it has not closed it itself."""
    with defer_signals():
        _write_final_state(order, folder, status, error)


def _write_final_state(order: TrainJob, folder: Path, status: runs.Status, error: str) -> None:
    display = RichDisplay()
    if (folder / "run.json").exists():
        finalize_run(folder, status, error, display)
        return
    # It never came to make a record: a mistake that only a training meets, or it was ended at once.
    config = with_tracking_uri(order.requested, root_dir())
    run = runs.create_run(config, order.requested, folder)
    tracker = make_tracker(config, display, order.choices, order.name, order.parent_run_id)
    with contextlib.suppress(RunFailed):  # MLflow does not take it; the folder has it
        tracker.start(run, config)
    run.close(status, error)
    tracker.finish(run, status)


def _halve_micro_batch(requested: Config, folder: Path) -> Config | None:
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
        size = min(train.eval_batch_size, max(splits["validation"], splits["test"]))
        train = replace(train, eval_batch_size=-(-size // 2))
    else:  # a batch holds no more than there is; half of more would be the same again
        size = min(train.micro_batch_size or int(train.batch_size), splits["train"])
        train = replace(train, micro_batch_size=-(-size // 2))
    return None if size == 1 else replace(requested, train=train)


def _exit_with_parent(state: Mapping[str, Any]) -> None:
    """This process ends when that of the sweep does, if it is another: a launcher's worker would live on."""
    if state["pid"] == os.getpid() or any(
        thread.name == _WATCHER_THREAD_NAME for thread in threading.enumerate()
    ):
        return

    def watch() -> None:
        while process.is_alive(state):
            time.sleep(POLL_SECONDS)
        os._exit(1)  # the pipes to its own children close with it

    threading.Thread(target=watch, name=_WATCHER_THREAD_NAME, daemon=True).start()


_WATCHER_THREAD_NAME = "ends with the sweep"
