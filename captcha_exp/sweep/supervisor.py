"""Train each job of a sweep in a worker process; forward its output and close its run if it could not.

A crash, a segmentation fault or the OOM killer ends that process only. Its memory figures are its own, and no
random state, thread count or CUDA context carries over to the next job: what the processes of a fork server
share is imported modules.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from captcha_exp import runs
from captcha_exp.config import Config, MlflowConfig, to_dict, with_tracking_uri
from captcha_exp.errors import RunFailed
from captcha_exp.runs import SweepInfo, claim
from captcha_exp.runtime.console import console, get_log_level
from captcha_exp.runtime.paths import root_dir, tracking_uri_variable
from captcha_exp.runtime.shutdown import defer_signals
from captcha_exp.sweep.record import Job, Sweep
from captcha_exp.sweep.worker import STOP
from captcha_exp.sweep.workers import start_worker
from captcha_exp.tracking import make_tracker
from captcha_exp.tracking.sync import finalize_run

logger = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 15.0  # for the current step, the hashes of the files and the last MLflow calls
CRASH_MARKERS = ("Traceback (most recent call last)", "Fatal Python error")
"""lines from which on the output goes to the log only"""
MAX_ERROR_LENGTH = 1000  # characters, in run.json and in a table
POLL_SECONDS = 0.5  # between checks that the parent process is alive


@dataclass(frozen=True)
class TrainJob:
    """One training to run in a worker process."""

    requested: Config
    choices: Mapping[str, str]
    name: str | None = None
    """name of the MLflow run; None for that of the run directory"""
    lineage: runs.Lineage = field(default_factory=runs.Lineage)
    extend_from: Path | None = None
    """finished run from whose final state a new run starts"""
    deadline: float | None = None
    """Unix time; None for no time limit"""


def run_job(sweep_dir: Path, number: int) -> None:
    """Train one job of the sweep in a worker process, unless the time limit has been reached.

    All results are in the job's run directories.
    """
    sweep = Sweep(sweep_dir)
    job = sweep.jobs[number - 1]
    _exit_with_parent(sweep_dir)
    deadline = _job_deadline(sweep)
    if deadline is not None and deadline <= time.time():
        return
    num_jobs = len(sweep.jobs)

    def on_line(line: str) -> None:
        console.print(f"[{number}/{num_jobs} {job.name}] {line}", markup=False)

    train_job = TrainJob(job.requested, job.choices, job.name, deadline=deadline)
    for attempt in sweep.attempts(job):  # a micro-batch that ran out of memory would do so again
        stale = runs.StaleRun.load(runs.RunInfo, attempt)
        if stale is not None and stale.info.config_sha256 == runs.config_sha256(train_job.requested):
            smaller = _halve_micro_batch(train_job.requested, attempt)
            train_job = replace(train_job, requested=smaller or train_job.requested)

    @contextlib.contextmanager
    def run_dir(requested: Config) -> Iterator[Path]:
        with claim.claim(lambda: _find_resumable(sweep, job, requested)) as found:
            if found is not None:
                on_line(f"Resuming {claim.describe_progress(found.run_dir)}")
            yield sweep.new_attempt(job) if found is None else found.run_dir

    try:
        train_with_oom_retry(train_job, run_dir, on_line)
    except OSError as error:  # a full disk; later jobs may find space
        logger.warning(f"{job.name}: cannot write its record: {error}")


def _job_deadline(sweep: Sweep) -> float | None:
    """Return the deadline of a job that starts now.

    It is that of the sweep on the same machine. On another machine the job may have waited in a queue, and
    gets the full time.
    """
    limit = sweep.info.time_limit
    if limit is not None and sweep.info.is_remote():
        return time.time() + 60 * limit.max_minutes
    return sweep.deadline


def _find_resumable(sweep: Sweep, job: Job, requested: Config) -> runs.StaleRun[runs.RunInfo] | None:
    """Return the latest run of the job if it has this config and can be resumed."""
    attempts = sweep.attempts(job)
    return claim.find_resumable_job(attempts[-1], requested) if attempts else None


def train_with_oom_retry(
    job: TrainJob,
    run_dir: Callable[[Config], AbstractContextManager[Path]],
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """Train in a worker process; with train.on_oom=split, retry with half the micro-batch after each OOM.

    `run_dir` yields the directory for a config: a new one, or that of a run to resume.

    `on_line` gets each line of the worker's output, which is also logged next to the run directory; without
    it the output goes to the terminal unchanged.

    Returns the run directory of the last attempt.
    """
    while True:
        with run_dir(job.requested) as directory:
            _train_in_child(job, directory, on_line)
        smaller = _halve_micro_batch(job.requested, directory)
        if smaller is None:
            return directory
        job = replace(job, requested=smaller)


def _train_in_child(job: TrainJob, run_dir: Path, on_line: Callable[[str], None] | None) -> None:
    """Run one worker process, and record its exit in the run directory if it has not done so itself."""
    message = {
        **vars(job),
        "requested": to_dict(job.requested),
        "lineage": job.lineage.model_dump(),
        "run_dir": run_dir,
        "log_level": get_log_level(),
    }
    error = None
    try:
        with _ChildProcess(run_dir, on_line, isinstance(job.requested.tracking, MlflowConfig)) as child:
            child.send(json.dumps(message, default=str).encode())
            child.wait()
        error = child.describe_exit()
    finally:
        _finalize_run(job, run_dir, error)


class _ChildProcess:
    """A worker process, seen from its parent."""

    def __init__(
        self, run_dir: Path, on_line: Callable[[str], None] | None, uses_mlflow: bool = False
    ) -> None:
        self._last_line = ""
        self._stop_requested = self._was_killed = False
        self._on_line = on_line
        self._log_path = run_dir.with_name(f"{run_dir.name}.log")
        self._process = start_worker(on_line is not None, uses_mlflow)
        logger.debug(f"started process {self._process.pid} for {run_dir}")
        self._reader = threading.Thread(target=self._forward_output)
        self._reader.start()

    def __enter__(self) -> "_ChildProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        """Ask the process to stop if it is still running, and kill it after a timeout."""
        try:
            if self._process.poll() is None:
                self._stop_requested = True
                self.send(STOP)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_SECONDS)
        finally:  # also on a second Ctrl-C
            self._was_killed = self._process.poll() is None
            self._process.kill()
            self._reader.join()
            with contextlib.suppress(OSError), self._process:  # closes the pipes
                pass

    def send(self, line: bytes) -> None:
        """Send one line to its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has exited; `describe_exit` says why
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def wait(self) -> None:
        """Wait until the process has exited and its output has been forwarded."""
        self._process.wait()
        self._reader.join()

    def describe_exit(self) -> str:
        """Return why the process exited, in one line."""
        code = self._process.wait()
        if self._was_killed:
            return f"did not stop within {STOP_TIMEOUT_SECONDS:g} s; killed"
        if code >= 0:
            return self._last_line or f"exited with code {code} without output"
        name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
        hint = " (possibly by the kernel's OOM killer)" if name == "SIGKILL" else ""
        return f"terminated by {name}{hint}"

    def _forward_output(self) -> None:
        """Forward each line to the log and to `on_line`.

        If one of them fails, the other still gets the output: an unread pipe would block the process.
        """
        if self._process.stdout is None:
            return
        with contextlib.suppress(OSError):
            self._log_path.touch()  # also without output
        where, has_crashed = f"full output in {self._log_path}", False
        for data in self._process.stdout:
            try:
                with self._log_path.open("ab") as log:
                    log.write(data)
            except OSError:  # such as a full disk
                where = f"cannot write {self._log_path}"
            line = data.decode(errors="replace").rstrip("\r\n")
            self._last_line = line.strip()[:MAX_ERROR_LENGTH] or self._last_line
            has_crashed = has_crashed or line.startswith(CRASH_MARKERS)
            if not has_crashed:
                self._print(line)
        if self._process.wait() != 0 and (self._was_killed or not self._stop_requested):
            self._print(f"{self.describe_exit()}; {where}")

    def _print(self, line: str) -> None:
        assert self._on_line is not None
        with contextlib.suppress(OSError, SystemExit):  # rich exits when its terminal is closed
            self._on_line(line)


def _finalize_run(job: TrainJob, run_dir: Path, error: str | None) -> None:
    """Close the run of a process that has exited without doing so itself: FAILED, or KILLED without error."""
    with defer_signals():
        if not (run_dir / runs.RunInfo.filename).exists():
            # It exited before it created a run: an error at its start, or it was killed immediately.
            config = with_tracking_uri(job.requested, root_dir(), tracking_uri_variable())
            run = runs.create_run(config, job.requested, run_dir)
            tracker = make_tracker(config, job.choices, job.name)
            with contextlib.suppress(RunFailed):  # MLflow is not available; run.json has the error
                tracker.start(run, config)
            run.close("FAILED" if error else "KILLED", error, None if error else "killed")
            tracker.finish()
        finalize_run(run_dir, error)


def _halve_micro_batch(requested: Config, run_dir: Path) -> Config | None:
    """Return the config with half the micro-batch or evaluation batch, whichever ran out of memory.

    The batch size of a step does not change. Returns None if the run did not run out of memory, if
    train.on_oom is not split, or if the micro-batch is a single image.
    """
    run = runs.load(run_dir)
    oom = run.info.oom
    if oom is None or requested.train.on_oom != "split":
        return None
    train = run.config().train
    splits = run.read_json("dataset.json")["splits"]
    if oom.during == "evaluation":
        size = min(train.eval_batch_size, max(splits["validation"], splits["test"]))
        train = replace(train, eval_batch_size=-(-size // 2))
    else:  # a batch is no larger than the split
        size = min(train.micro_batch_size or int(train.batch_size), splits["train"])
        train = replace(train, micro_batch_size=-(-size // 2))
    return None if size == 1 else replace(requested, train=train)


@functools.cache  # a launcher's worker may run several jobs
def _exit_with_parent(sweep_dir: Path) -> None:
    """Exit this process when that of the sweep exits; a launcher's worker would otherwise survive it."""
    parent = SweepInfo.load(sweep_dir)
    if parent.pid == os.getpid():
        return

    def watch() -> None:
        while parent.is_alive():
            time.sleep(POLL_SECONDS)
        os._exit(1)  # closes the pipes to its children, which then exit

    threading.Thread(target=watch, daemon=True).start()
