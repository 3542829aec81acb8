"""How a run's folder begins, all at once and by one process alone; and how one is taken up again."""

import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from captcha_exp.config import Config, flatten, load, to_yaml
from captcha_exp.errors import UserError
from captcha_exp.runs.run import Run, config_sha256, now_iso, read_metrics_rows, read_run_json
from captcha_exp.runtime.files import sha256_of, write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import process_identity

CONFIG_FILES = ("config.yaml", "requested.yaml")  # what runs, and what was asked for


def create_run(
    config: Config, requested: Config, run_dir: Path | None = None, lineage: Mapping[str, Any] | None = None
) -> Run:
    """A new run in a folder of its own: this one, made for it, or else outputs/<date>/<time>-<name>.

    `links` says which other run it belongs to, and how: {"reproduces": {"run_dir": ..., "run_id": ...}}.
    """
    state = {
        "name": config.name,
        "started": now_iso(),
        **_running_fields(),
        "mlflow": None,
        "config_sha256": config_sha256(requested),
        "links": dict(lineage or {}),
        "resumed": [],
        "tags": {},
        "warnings": [],
        "result": {},
    }
    if run_dir is not None:
        run_dir.mkdir(exist_ok=True)
        return _init_run(run_dir, config, requested, state)
    # Made apart and moved as a whole: no moment at which a kill leaves a folder that is no run.
    apart = root_dir() / "outputs" / f".{uuid4().hex}.{os.getpid()}.part"
    apart.mkdir(parents=True)
    run = _init_run(apart, config, requested, state)
    run.run_dir = make_run_dir(config.name)
    if os.name == "nt":  # which moves onto no folder, not even an empty one
        run.run_dir.rmdir()
    apart.rename(run.run_dir)
    return run


def remove_partial_runs() -> None:
    """Without what processes that are gone had begun to make in outputs/."""
    for path in (root_dir() / "outputs").glob(".*.part"):
        writer = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(path, ignore_errors=True)


def _init_run(run_dir: Path, config: Config, requested: Config, state: dict[str, Any]) -> Run:
    # Before run.json: whatever has one has its config.
    for name, values in zip(CONFIG_FILES, (config, requested), strict=True):
        write_atomically(run_dir / name, to_yaml(values).encode())
    return Run(run_dir, state | {"configs": {name: sha256_of(run_dir / name) for name in CONFIG_FILES}})


def reopen_run(run_dir: Path) -> Run:
    """An unfinished run whose process is gone, with which this one goes on.

    What a process was writing when it was ended goes: no row, and no file, was whole before. Of metrics.jsonl
    with other lines that are no rows, the rows alone stay, and the file as it was beside them.

    Raises:
        UserError: its config was changed since it began; the line names the file and the key.
    """
    state = read_run_json(run_dir / "run.json")
    _check_configs(run_dir, state.get("configs", {}))
    for path in run_dir.rglob(".*.part"):
        path.unlink()
    rows = run_dir / "metrics.jsonl"
    if rows.exists() and not (content := rows.read_bytes()).endswith(b"\n"):
        write_atomically(rows, content[: content.rfind(b"\n") + 1])
    whole, broken = read_metrics_rows(run_dir)
    if broken:
        write_atomically(run_dir / "metrics.jsonl.damaged", rows.read_bytes())
        write_atomically(rows, "".join(row.to_line() for row in whole).encode())
    if state["mlflow"] is not None:
        state["mlflow"] = {**state["mlflow"], "closed": False}
    resumed = [*state.get("resumed", ()), {"at": now_iso(), "host": state["host"]}]
    return Run(run_dir, {**state, **_running_fields(), "resumed": resumed})


def _check_configs(run_dir: Path, expected: Mapping[str, Any]) -> None:
    changed = [name for name, sha256 in expected.items() if sha256_of(run_dir / name) != sha256]
    if not changed:
        return
    asked, resolved = (flatten(load(run_dir / name)) for name in ("requested.yaml", "config.yaml"))
    # What was resolved is as it was asked for, but for every `auto` and a path, which became absolute.
    others = [
        f"{key}={resolved.get(key)}, asked for as {value}"
        for key, value in asked.items()
        if value != "auto" and key != "data.path" and resolved.get(key) != value
    ]
    where = f" ({others[0]})" if others else ""
    raise UserError(
        f"{run_dir / changed[0]}: was changed since the run began{where}; put back what "
        "stood there, or start "
        "anew with --resume=never"
    )


def _running_fields() -> dict[str, Any]:
    """What a record says while this process works on it."""
    return {"status": "RUNNING", "ended": None, **process_identity(), "error": None, "files": {}}


def make_run_dir(name: str) -> Path:
    """outputs/<date>/<time>-<name>, made now and by nobody else."""
    began = datetime.now()
    day = root_dir() / "outputs" / f"{began:%Y-%m-%d}"
    day.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = day / f"{began:%H%M%S}-{name}{'' if number == 1 else f'-{number}'}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another run began in this second
        return folder
    raise UserError(f"{day}: a thousand runs of this name began in one second; wait a second and start again")
