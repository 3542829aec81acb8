"""run.json and sweep.json as typed records, each with one `load` that checks the checksum and every field.

Fields that may contain the name of a file are of type `Text`.
"""

import functools
import shlex
import threading
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeAlias, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from captcha_exp.config.documents import parse_json, read_document
from captcha_exp.errors import DamagedFile, UserError
from captcha_exp.runs.content import PlannedMemory, Text
from captcha_exp.runtime.files import sha256_of_json, write_json
from captcha_exp.runtime.process import ProcessIdentity, identify_process
from captcha_exp.runtime.shutdown import STOPPED, StopReason, stop_reason

RECORD_FORMAT = 2
"""Version of the layout of run and sweep directories, field `format`. Version 0.1 wrote no such field."""

WEIGHTS = "model.safetensors"  # relative to the run directory

CHECKSUM_KEY = "checksum"
"""key of run.json and sweep.json: the SHA-256 of all other keys"""

DAMAGED_HINT = "restore it, or move its directory out of outputs/"

Status: TypeAlias = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


Timestamp: TypeAlias = Annotated[
    AwareDatetime,
    Field(strict=False),
    PlainSerializer(lambda value: value.isoformat(timespec="microseconds")),
]


class _Model(BaseModel):
    # Fields of a later version are kept when this one writes the file.
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class MlflowRef(_Model):
    """Where MLflow has a run."""

    uri: Text
    experiment_id: str | None = None
    run_id: str | None = None
    """None until MLflow has created the run"""
    run_name: Text | None = None
    """None for the name of the directory"""
    tags: dict[str, Text] = Field(default_factory=dict)
    """tags in addition to those of the run"""
    closed: bool = False
    """whether MLflow has the end of the run"""
    owed: list[str] = Field(default_factory=list)
    """what MLflow did not have when the process ended; unknown if the process was killed"""


class RunLink(_Model):
    """Reference to another run."""

    run_dir: Text | None
    run_id: str | None
    store: Text | None = None
    """MLflow store that the run was downloaded from"""


class Lineage(_Model):
    """The runs that a run derives from."""

    extends: RunLink | None = None
    reproduces: RunLink | None = None


class Resumption(_Model):
    """One continuation of an interrupted run."""

    at: Timestamp
    host: str
    """of the process that was interrupted"""
    changed: dict[str, Annotated[tuple[Any, Any], Field(strict=False)]] = Field(default_factory=dict)
    """key of environment.json -> (before, after)"""


class OutOfMemory(_Model):
    """Where a run was out of memory, and what would help."""

    during: Literal["training", "evaluation"]
    epoch: int
    step: int
    peak_mib: float
    predicted_mib: tuple[float, float] = Field(strict=False)
    """of the whole process: minimum, maximum"""
    remedies: list[str]


class Skipped(_Model):
    """Why a job of a sweep was not trained."""

    remedies: list[str]


class ResultSummary(_Model):
    """The main results of a finished run."""

    epochs: int
    best_epoch: int
    val_accuracy: float
    test_accuracy: float
    weights_sha256: str
    seconds: float
    process_peak_mib: float
    speed_disturbed: bool = False
    """whether the process lacked cores in each epoch, as in `training_speed`"""


class Record(ProcessIdentity):
    """The fields of both run.json and sweep.json; those of `ProcessIdentity` name the process that writes."""

    filename: ClassVar[str]

    format: int = RECORD_FORMAT
    name: str
    status: Status = "RUNNING"
    started: Timestamp
    ended: Timestamp | None = None
    error: Text | None = None
    """why the status is FAILED, in one line"""
    stop_reason: StopReason | None = None
    """why the status is KILLED"""
    mlflow: MlflowRef | None = None

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Load the record of a directory.

        Raises:
            DamagedFile: The file is unreadable, does not match its checksum, or is invalid.
            UserError: Another version of captcha_exp wrote it.
        """
        path = directory / cls.filename
        hint = DAMAGED_HINT
        if (weights := directory / WEIGHTS).is_file():
            hint += f"; captcha-exp predict {shlex.quote(str(weights))} still works"
        try:
            record: Self = _parse(cls, read_document(path))
            return record
        except _OtherVersionError as error:
            raise UserError(
                f"{directory}: was written by {error}, which this version cannot read; train again, or use "
                f"{error}"
            ) from None
        except ValidationError as error:
            located = ((".".join(map(str, each["loc"])), each["msg"]) for each in error.errors())
            mistakes = "; ".join(f"{key or 'content'}: {message}" for key, message in located)
            raise DamagedFile(f"{path}: is not a valid {cls.filename}: {mistakes}; {hint}") from None
        except (OSError, ValueError) as error:
            raise DamagedFile(f"{path}: cannot be read: {error}; {hint}") from None

    @property
    def is_running(self) -> bool:
        """Whether the recorded status is RUNNING; the process may have exited."""
        return self.status == "RUNNING"

    def has_live_process(self) -> bool:
        """Return whether a process is working on the run; True if it is remote, since that is unknown."""
        return self.is_running and self.is_alive()

    @property
    def run_id(self) -> str | None:
        """MLflow run ID."""
        return None if self.mlflow is None else self.mlflow.run_id


InfoT = TypeVar("InfoT", bound=Record)


class _OtherVersionError(Exception):
    """The record was written by the version that the message names."""


@functools.lru_cache(maxsize=2**16)  # a command reads each record up to three times
def _parse(kind: type[InfoT], content: bytes) -> InfoT:
    """Return the record in the content of a file; raises as `Record.load` describes."""
    values = parse_json(content)
    if not isinstance(values, dict):
        raise ValueError("not an object with keys and values")
    checksum, found = values.pop(CHECKSUM_KEY, None), values.get("format")
    if checksum is None and found is None and "status" in values:
        raise _OtherVersionError("captcha_exp 0.1")
    if checksum != sha256_of_json(values):
        problem = "has no checksum" if checksum is None else "does not match its checksum"
        raise ValueError(f"{problem}: it was edited, or is damaged")
    if found != RECORD_FORMAT:
        raise _OtherVersionError(f"a version with record format {found!r}")
    return kind.model_validate(values)


class RunInfo(Record):
    """The content of run.json."""

    filename = "run.json"

    config_sha256: str = ""
    """of the requested config"""
    lineage: Lineage = Lineage()
    resumed: list[Resumption] = Field(default_factory=list)
    tags: dict[str, Text] = Field(default_factory=dict)
    warnings: list[Text] = Field(default_factory=list)
    result: ResultSummary | None = None
    oom: OutOfMemory | None = None
    skipped: Skipped | None = None
    files: dict[Text, str] = Field(default_factory=dict)
    """file -> SHA-256, recorded before the file was written; the other files when the run ended"""
    num_metrics_rows: int = 0
    """lines of metrics.jsonl, at least"""


class JobInfo(_Model):
    """One job of a sweep."""

    number: int
    name: Text
    swept: dict[str, Text]
    choices: dict[str, str]
    sha256: str
    """of its requested config, jobs/N.yaml"""


class TimeLimit(_Model):
    """How long a sweep may run."""

    max_minutes: float
    deadline: Timestamp


class SweepInfo(Record):
    """The content of sweep.json."""

    filename = "sweep.json"

    time_limit: TimeLimit | None = None
    code_sha256: str
    predicted: list[PlannedMemory | None]
    """plan of each job; None if its batch size is measured at run time"""
    parallelism: int
    jobs: Annotated[list[JobInfo], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_jobs(self) -> Self:
        if [job.number for job in self.jobs] != list(range(1, len(self.jobs) + 1)):
            raise ValueError("the jobs are not numbered from 1")
        if len(self.predicted) != len(self.jobs):
            raise ValueError(f"{len(self.predicted)} plans of {len(self.jobs)} jobs")
        return self


class RecordedDir(Generic[InfoT]):
    """A run or sweep directory with the content of its run.json or sweep.json."""

    def __init__(self, run_dir: Path, info: InfoT) -> None:
        self.run_dir, self.info = run_dir, info
        self._lock = threading.RLock()  # the thread that sends to MLflow writes the reference to it

    def update(self, **fields: Any) -> None:
        """Set fields of the record and write it."""
        assert fields.keys() <= type(self.info).model_fields.keys()
        with self._lock:
            self.info = self.info.model_copy(update=fields)
            self.save()

    def update_mlflow(self, **fields: Any) -> None:
        """Set fields of the reference to MLflow, if there is one."""
        with self._lock:
            if self.info.mlflow is not None:
                self.update(mlflow=self.info.mlflow.model_copy(update=fields))

    def close(
        self,
        status: Status,
        error: str | None = None,
        stop_reason: StopReason | None = None,
        ended: datetime | None = None,
    ) -> None:
        """Write the final status and the end time (default: now)."""
        self.update(status=status, error=error, stop_reason=stop_reason, ended=ended or now())

    def save(self) -> None:
        """Write the record with its checksum."""
        values = self.info.model_dump()
        write_json(self.run_dir / self.info.filename, values | {CHECKSUM_KEY: sha256_of_json(values)})


class RunEnd(NamedTuple):
    """How a run or sweep ended: the arguments of `RecordedDir.close`."""

    status: Status
    error: str | None = None
    stop_reason: StopReason | None = None

    @staticmethod
    def of(exception: BaseException) -> "RunEnd":
        """Return the end of a run that raised this: KILLED if it was stopped, else FAILED."""
        if isinstance(exception, STOPPED):
            return RunEnd("KILLED", None, stop_reason(exception))
        return RunEnd("FAILED", f"{type(exception).__name__}: {exception}")


def list_run_files(run_dir: Path) -> list[Path]:
    """Return all files of a run or sweep, sorted; the files of the jobs of a sweep belong to the jobs."""
    job_dirs = {record.parent for record in run_dir.glob("*/run.json")}
    return sorted(p for p in run_dir.rglob("*") if p.is_file() and job_dirs.isdisjoint(p.parents))


def check_has_no_links(run_dir: Path) -> None:
    """Check that a run or sweep directory that this process will write to has no symbolic links.

    Raises:
        DamagedFile: It has one, which could name any file of the user.
    """
    for path in run_dir.rglob("*"):
        if path.is_symlink():
            raise DamagedFile(f"{path}: is a symbolic link; replace it by the file or directory itself")


def running_fields() -> dict[str, Any]:
    """Return the fields of a record while this process works on it."""
    cleared = dict.fromkeys(("ended", "error", "stop_reason"))
    return {"status": "RUNNING", **cleared, **dict(identify_process())}


def now() -> datetime:
    """Return the current time with its zone."""
    return datetime.now().astimezone()
