"""How a run's folder begins, all at once and by one process alone; and how one is taken up again."""

import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from captcha_exp.config import Config, leaves, load, to_yaml
from captcha_exp.errors import UserError
from captcha_exp.runs.run import Run, config_sha256, now, read_rows, read_state
from captcha_exp.runtime.files import sha256_of, write_atomically
from captcha_exp.runtime.paths import root
from captcha_exp.runtime.process import identity

CONFIGS = ("config.yaml", "requested.yaml")  # what runs, and what was asked for


def create(
    config: Config, requested: Config, folder: Path | None = None, links: Mapping[str, Any] | None = None
) -> Run:
    """A new run in a folder of its own: this one, made for it, or else outputs/<date>/<time>-<name>.

    `links` says which other run it belongs to, and how: {"reproduces": {"folder": ..., "run_id": ...}}.
    """
    state = {
        "name": config.name,
        "started": now(),
        **_under_way(),
        "mlflow": None,
        "config_sha256": config_sha256(requested),
        "links": dict(links or {}),
        "resumed": [],
        "tags": {},
        "warnings": [],
        "result": {},
    }
    if folder is not None:
        folder.mkdir(exist_ok=True)
        return _begun(folder, config, requested, state)
    # Made apart and moved as a whole: no moment at which a kill leaves a folder that is no run.
    apart = root() / "outputs" / f".{uuid4().hex}.{os.getpid()}.part"
    apart.mkdir(parents=True)
    run = _begun(apart, config, requested, state)
    run.folder = new_folder(config.name)
    if os.name == "nt":  # which moves onto no folder, not even an empty one
        run.folder.rmdir()
    apart.rename(run.folder)
    return run


def remove_abandoned() -> None:
    """Without what processes that are gone had begun to make in outputs/."""
    for path in (root() / "outputs").glob(".*.part"):
        writer = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(path, ignore_errors=True)


def _begun(folder: Path, config: Config, requested: Config, state: dict[str, Any]) -> Run:
    # Before run.json: whatever has one has its config.
    for name, values in zip(CONFIGS, (config, requested), strict=True):
        write_atomically(folder / name, to_yaml(values).encode())
    return Run(folder, state | {"configs": {name: sha256_of(folder / name) for name in CONFIGS}})


def reopen(folder: Path) -> Run:
    """An unfinished run whose process is gone, with which this one goes on.

    What a process was writing when it was ended goes: no row, and no file, was whole before. Of metrics.jsonl
    with other lines that are no rows, the rows alone stay, and the file as it was beside them.

    Raises:
        UserError: its config was changed since it began; the line names the file and the key.
    """
    state = read_state(folder / "run.json")
    _check_configs(folder, state.get("configs", {}))
    for path in folder.rglob(".*.part"):
        path.unlink()
    rows = folder / "metrics.jsonl"
    if rows.exists() and not (content := rows.read_bytes()).endswith(b"\n"):
        write_atomically(rows, content[: content.rfind(b"\n") + 1])
    whole, broken = read_rows(folder)
    if broken:
        write_atomically(folder / "metrics.jsonl.damaged", rows.read_bytes())
        write_atomically(rows, "".join(row.to_line() for row in whole).encode())
    if state["mlflow"] is not None:
        state["mlflow"] = {**state["mlflow"], "closed": False}
    resumed = [*state.get("resumed", ()), {"at": now(), "host": state["host"]}]
    return Run(folder, {**state, **_under_way(), "resumed": resumed})


def _check_configs(folder: Path, began_with: Mapping[str, Any]) -> None:
    changed = [name for name, sha256 in began_with.items() if sha256_of(folder / name) != sha256]
    if not changed:
        return
    asked, resolved = (leaves(load(folder / name)) for name in ("requested.yaml", "config.yaml"))
    # What was resolved is as it was asked for, but for every `auto` and a path, which became absolute.
    others = [
        f"{key}={resolved.get(key)}, asked for as {value}"
        for key, value in asked.items()
        if value != "auto" and key != "data.path" and resolved.get(key) != value
    ]
    where = f" ({others[0]})" if others else ""
    raise UserError(
        f"{folder / changed[0]}: was changed since the run began{where}; put back what stood there, or start "
        "anew with --resume=never"
    )


def _under_way() -> dict[str, Any]:
    """What a record says while this process works on it."""
    return {"status": "RUNNING", "ended": None, **identity(), "error": None, "files": {}}


def new_folder(name: str) -> Path:
    """outputs/<date>/<time>-<name>, made now and by nobody else."""
    began = datetime.now()
    day = root() / "outputs" / f"{began:%Y-%m-%d}"
    day.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = day / f"{began:%H%M%S}-{name}{'' if number == 1 else f'-{number}'}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another run began in this second
        return folder
    raise UserError(f"{day}: a thousand runs of this name began in one second; wait a second and start again")
