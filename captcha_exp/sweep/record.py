"""The points of a sweep, and its folder.

sweep.json           status, when, where, the grid, each point with what it was foretold
points/N.yaml        the config of point N, as it was asked
N-what=value/        the folder of its run; a second attempt is N-what=value-2, and the last one counts
N-what=value.log     what the process of an attempt said
verdict.*            what it all came to
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from captcha_exp.config import Config, load, to_yaml
from captcha_exp.errors import UserError
from captcha_exp.runs import Status, code_sha256, config_sha256, make_run_dir, resolve_dir
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import is_alive, process_identity

SWEEP_FILE = "sweep.json"
DONE = ("finished", "oom", "unfit")  # what a point became that is not run again


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of a sweep, before it runs."""

    number: int
    """from 1, in the order of the grid"""
    swept: Mapping[str, str]
    """full key -> value as typed"""
    choices: Mapping[str, str]
    """conf group -> the file chosen"""
    requested: Config

    @property
    def name(self) -> str:
        """By what was swept, as in batch_size=64 seed=1; the last word of a key, where no other has it."""
        last = [key.rpartition(".")[2] for key in self.swept]
        short = {
            key: word if last.count(word) == 1 else key for key, word in zip(self.swept, last, strict=True)
        }
        return " ".join(f"{short[key]}={value}" for key, value in self.swept.items()) or self.requested.name


class Sweep:
    """A sweep's folder, seen from any process that runs a point of it."""

    def __init__(self, sweep_dir: Path) -> None:
        """The sweep in this folder.

        Raises:
            UserError: there is none, or its record is damaged.
        """
        self.sweep_dir = sweep_dir
        try:
            self.state: dict[str, Any] = json.loads((sweep_dir / SWEEP_FILE).read_text(encoding="utf-8"))
            self.jobs = [
                Job(
                    number=each["number"],
                    swept=each["swept"],
                    choices=each["choices"],
                    requested=load(sweep_dir / "points" / f"{each['number']}.yaml"),
                )
                for each in self.state["points"]
            ]
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: there is no such file; a sweep's folder has it") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{sweep_dir / SWEEP_FILE}: cannot be read as the record of a sweep: {error}"
            ) from None

    def update(self, **state: Any) -> None:
        """Facts in sweep.json."""
        self.state.update(state)
        _write_json(self.sweep_dir / SWEEP_FILE, self.state)

    def close(self, status: Status, error: str | None = None) -> None:
        """The end."""
        self.update(status=status, error=error, ended=_now())

    def reopen(self) -> None:
        """This process goes on with it."""
        self.update(**process_identity(), status="RUNNING", error=None, ended=None)

    def set_deadline(self, max_minutes: float | None) -> None:
        """All of it may take so long from now; None: as long as it needs."""
        until = None if max_minutes is None else datetime.now().astimezone() + timedelta(minutes=max_minutes)
        self.update(limit=None if until is None else {"minutes": max_minutes, "until": until.isoformat()})

    @property
    def deadline(self) -> float | None:
        """Seconds since 1970 at which its time is up; None: it has no limit."""
        limit = self.state.get("limit")
        return None if limit is None else datetime.fromisoformat(limit["until"]).timestamp()

    def attempts(self, job: Job) -> list[Path]:
        """The folders of the point's runs so far, the last one last."""
        return [folder for folder, there in self._run_dirs(job) if there]

    def new_attempt(self, job: Job) -> Path:
        """The folder for one run more of the point, made now and by nobody else."""
        for folder, there in self._run_dirs(job):
            if not there:
                folder.mkdir()
                return folder
        raise AssertionError("there is always one more")

    def _run_dirs(self, job: Job) -> list[tuple[Path, bool]]:
        """Folders of attempts, and whether each is there; the last one is not."""
        stem = self.sweep_dir / f"{job.number}-{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', job.name)[:80]}"
        places: list[tuple[Path, bool]] = []
        while not places or places[-1][1]:
            folder = stem if not places else stem.with_name(f"{stem.name}-{len(places) + 1}")
            places.append((folder, folder.is_dir()))
        return places


def create_sweep(name: str, jobs: Sequence[Job], metadata: Mapping[str, Any]) -> Sweep:
    """A new sweep in a folder of its own: outputs/<date>/<time>-<name>."""
    folder = make_run_dir(name)
    (folder / "points").mkdir()
    for point in jobs:
        write_atomically(folder / "points" / f"{point.number}.yaml", to_yaml(point.requested).encode())
    state = {
        "name": name,
        "status": "RUNNING",
        "started": _now(),
        "ended": None,
        **process_identity(),
        "mlflow": None,
        "error": None,
        "limit": None,
        "code_sha256": code_sha256(),
        **metadata,
        "points": [
            {"number": p.number, "name": p.name, "swept": dict(p.swept), "choices": dict(p.choices)}
            for p in jobs
        ],
    }
    _write_json(folder / SWEEP_FILE, state)
    return Sweep(folder)


def find_sweep(name: str) -> Sweep:
    """The sweep that is a folder, or whose parent run in MLflow has an id with this beginning.

    Raises:
        UserError: there is no such sweep, or more than one.
    """
    if folder := resolve_dir(name, SWEEP_FILE):
        return Sweep(folder)
    begin = [
        s for s in list_sweeps() if name and ((s.state["mlflow"] or {}).get("run_id") or "").startswith(name)
    ]
    if len(begin) == 1:
        return begin[0]
    if begin:
        raise UserError(f"--resume={name}: begins the ids of {len(begin)} sweeps; give more of it")
    raise UserError(
        f"--resume={name}: is no sweep: give its folder in outputs/, the start of its MLflow run id, or auto"
    )


def list_sweeps() -> list[Sweep]:
    """All sweeps in outputs/ whose records can be read, the oldest first."""
    found = []
    for path in (root_dir() / "outputs").glob(f"*/*/{SWEEP_FILE}"):
        try:
            found.append(Sweep(path.parent))
        except UserError:
            continue  # a damaged one cannot be gone on with; it is named when it is asked for
    return sorted(found, key=lambda sweep: str(sweep.state["started"]))


def is_running(sweep: Sweep) -> bool:
    """Whether a living process works on it."""
    return sweep.state["status"] == "RUNNING" and is_alive(sweep.state)


def has_same_jobs(sweep: Sweep, jobs: Sequence[Job]) -> bool:
    """Whether it has these points and no others; how long they may take is not of them."""

    def told(each: Job) -> tuple[int, dict[str, str], dict[str, str], str]:
        return each.number, dict(each.swept), dict(each.choices), config_sha256(each.requested)

    return [told(point) for point in sweep.jobs] == [told(point) for point in jobs]


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="microseconds")


def _write_json(path: Path, state: Mapping[str, Any]) -> None:
    text = json.dumps(state, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
