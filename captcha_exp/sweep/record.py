"""The jobs of a sweep and its directory.

sweep.json           status, times, process, the jobs and their predicted memory
jobs/N.yaml          the config of job N as requested
N-key=value/         its run directory; a second attempt is N-key=value-2; the last finished one counts
N-key=value.log      the output of the worker process
summary.*            the summary as JSON, CSV, Markdown and PNG
metrics.jsonl        the metrics of the groups of jobs, as in MLflow
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, load, to_yaml
from captcha_exp.config.documents import MAX_YAML_CHARS, read_document
from captcha_exp.errors import DamagedFile, UserError
from captcha_exp.runs import RecordedDir, SweepInfo, code_sha256, config_sha256, make_run_dir, resolve_dir
from captcha_exp.runs.content import PlannedMemory
from captcha_exp.runs.info import JobInfo, TimeLimit, now, running_fields
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import root_dir

DONE = ("finished", "oom", "skipped")  # outcomes of jobs that are not run again


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of a sweep, before it runs."""

    number: int
    """from 1, in the order of the grid"""
    swept: Mapping[str, str]
    """full key -> value as typed"""
    choices: Mapping[str, str]
    """config group -> chosen option"""
    requested: Config

    @property
    def name(self) -> str:
        """The swept overrides, as in "batch_size=64 seed=1", with each key shortened if that is unique."""
        short = shorten_keys(self.swept)
        return " ".join(f"{short[key]}={value}" for key, value in self.swept.items()) or self.requested.name


def shorten_keys(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to its last part, or to itself if two keys share that part."""
    last = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(last.values())
    return {key: part if counts[part] == 1 else key for key, part in last.items()}


class Sweep(RecordedDir[SweepInfo]):
    """A sweep directory, opened from any process that runs one of its jobs."""

    def __init__(self, sweep_dir: Path) -> None:
        """Load the sweep in this directory.

        Raises:
            UserError: sweep.json, or the config of a job, is missing or damaged.
        """
        super().__init__(sweep_dir, SweepInfo.load(sweep_dir))
        self.jobs = [
            Job(
                number=each.number,
                swept=each.swept,
                choices=each.choices,
                requested=_load_requested(sweep_dir, each),
            )
            for each in self.info.jobs
        ]

    def set_deadline(self, max_minutes: float | None) -> None:
        """Limit the whole sweep to this time from now; None removes the limit."""
        if max_minutes is None:
            self.update(time_limit=None)
        else:
            deadline = now() + timedelta(minutes=max_minutes)
            self.update(time_limit=TimeLimit(max_minutes=max_minutes, deadline=deadline))

    @property
    def deadline(self) -> float | None:
        """Unix time at which the time limit is reached; None without a limit."""
        limit = self.info.time_limit
        return None if limit is None else limit.deadline.timestamp()

    def attempts(self, job: Job) -> list[Path]:
        """Return the run directories of the job so far, the latest last."""
        numbers = itertools.count(1)
        return list(itertools.takewhile(Path.is_dir, (self._run_dir(job, number) for number in numbers)))

    def new_attempt(self, job: Job) -> Path:
        """Create the run directory of the job's next attempt."""
        next_dir = self._run_dir(job, len(self.attempts(job)) + 1)
        next_dir.mkdir()
        return next_dir

    def _run_dir(self, job: Job, attempt: int) -> Path:
        stem = f"{job.number}-{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', job.name)[:80]}"
        return self.run_dir / (stem if attempt == 1 else f"{stem}-{attempt}")


def create_sweep(
    name: str, jobs: Sequence[Job], predicted: Sequence[dict[str, Any] | None], parallelism: int
) -> Sweep:
    """Create a sweep in a new directory, outputs/<date>/<time>-<name>."""
    sweep_dir = make_run_dir(name)
    (sweep_dir / "jobs").mkdir()
    contents = {job.number: to_yaml(job.requested).encode() for job in jobs}
    for number, content in contents.items():
        write_atomically(sweep_dir / _config_name(number), content)
    info = SweepInfo(
        **running_fields(),
        name=name,
        started=now(),
        code_sha256=code_sha256(),
        predicted=[None if plan is None else PlannedMemory.model_validate(plan) for plan in predicted],
        parallelism=parallelism,
        jobs=[
            JobInfo(
                number=job.number,
                name=job.name,
                swept=dict(job.swept),
                choices=dict(job.choices),
                sha256=hashlib.sha256(contents[job.number]).hexdigest(),
            )
            for job in jobs
        ],
    )
    RecordedDir(sweep_dir, info).save()
    return Sweep(sweep_dir)


def _config_name(number: int) -> str:
    return f"jobs/{number}.yaml"


def _load_requested(sweep_dir: Path, job: JobInfo) -> Config:
    """Return the requested config of a job.

    Raises:
        DamagedFile: The file is missing, or does not have the recorded SHA-256.
        ConfigError: The config is not valid for this version.
    """
    path = sweep_dir / _config_name(job.number)
    try:
        content = read_document(path, MAX_YAML_CHARS)
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    else:
        if hashlib.sha256(content).hexdigest() == job.sha256:
            return load(path)
        problem = f"was edited, or is damaged (its SHA-256 is not that in {SweepInfo.filename})"
    raise DamagedFile(f"{path}: {problem}; restore it, or start a new sweep with --resume=never")


def find_sweep(name: str) -> Sweep:
    """Find a sweep by its directory or by a prefix of its MLflow run ID.

    Raises:
        UserError: no sweep matches, or more than one.
    """
    if sweep_dir := resolve_dir(name, SweepInfo.filename):
        return Sweep(sweep_dir)
    matches = [sweep for sweep in list_sweeps() if name and (sweep.info.run_id or "").startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"--resume={name}: matches {len(matches)} sweeps; give more of the run ID")
    raise UserError(
        f"--resume={name}: not a sweep; give a directory in outputs/, a prefix of an MLflow run ID, or auto"
    )


def list_sweeps() -> list[Sweep]:
    """Return all sweeps in outputs/ with a valid record, the oldest first."""
    sweeps = []
    for path in (root_dir() / "outputs").glob(f"*/*/{SweepInfo.filename}"):
        try:
            sweeps.append(Sweep(path.parent))
        except UserError:
            continue  # a damaged record cannot be resumed; naming it with --resume reports why
    return sorted(sweeps, key=lambda sweep: sweep.info.started)


def has_same_jobs(sweep: Sweep, jobs: Sequence[Job]) -> bool:
    """Return whether the sweep has exactly these jobs, their time limits aside."""

    def identity(job: Job) -> tuple[int, dict[str, str], dict[str, str], str]:
        return job.number, dict(job.swept), dict(job.choices), config_sha256(job.requested)

    return [identity(job) for job in sweep.jobs] == [identity(job) for job in jobs]
