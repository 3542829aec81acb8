"""Create run directories atomically, and reopen them to resume a run."""

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
from captcha_exp.runs.run import RUN_FORMAT, Run, config_sha256, now_iso, read_metrics_rows, read_run_json
from captcha_exp.runtime.files import sha256_of, write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.process import process_identity

CONFIG_FILES = ("config.yaml", "requested.yaml")  # the resolved and the requested config


def create_run(
    config: Config, requested: Config, run_dir: Path | None = None, lineage: Mapping[str, Any] | None = None
) -> Run:
    """Create a run in `run_dir`, or in a new directory outputs/<date>/<time>-<name>.

    `lineage` names the run that this one derives from: {"reproduces": {"run_dir": ..., "run_id": ...}}.
    """
    state = {
        "format": RUN_FORMAT,
        "name": config.name,
        "started": now_iso(),
        **_running_fields(),
        "mlflow": None,
        "config_sha256": config_sha256(requested),
        "lineage": dict(lineage or {}),
        "resumed": [],
        "tags": {},
        "warnings": [],
        "result": {},
    }
    if run_dir is not None:
        run_dir.mkdir(exist_ok=True)
        return _init_run(run_dir, config, requested, state)
    # Written to a temporary directory and renamed, so a kill never leaves an incomplete run directory.
    temporary = root_dir() / "outputs" / f".{uuid4().hex}.{os.getpid()}.part"
    temporary.mkdir(parents=True)
    run = _init_run(temporary, config, requested, state)
    run.run_dir = make_run_dir(config.name)
    if os.name == "nt":  # Windows cannot rename onto an existing directory, even an empty one
        run.run_dir.rmdir()
    temporary.rename(run.run_dir)
    return run


def remove_partial_runs() -> None:
    """Remove the temporary directories that exited processes left in outputs/."""
    for path in (root_dir() / "outputs").glob(".*.part"):
        writer = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(path, ignore_errors=True)


def _init_run(run_dir: Path, config: Config, requested: Config, state: dict[str, Any]) -> Run:
    # Configs first: a directory with a run.json always has its configs.
    for name, values in zip(CONFIG_FILES, (config, requested), strict=True):
        write_atomically(run_dir / name, to_yaml(values).encode())
    return Run(run_dir, state | {"configs": {name: sha256_of(run_dir / name) for name in CONFIG_FILES}})


def reopen_run(run_dir: Path) -> Run:
    """Reopen an unfinished run so that this process can continue it.

    Removes partially written files and a truncated last line of metrics.jsonl. If other lines are damaged,
    only the valid rows are kept, and the original file is saved as metrics.jsonl.damaged.

    Raises:
        UserError: A config file was modified since the run started; restore the value that the message names.
    """
    state = read_run_json(run_dir / "run.json")
    _check_configs(run_dir, state.get("configs", {}))
    for part in run_dir.rglob(".*.part"):
        part.unlink()
    path = run_dir / "metrics.jsonl"
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write_atomically(path, content[: content.rfind(b"\n") + 1])
    rows, damaged_lines = read_metrics_rows(run_dir)
    if damaged_lines:
        write_atomically(run_dir / "metrics.jsonl.damaged", path.read_bytes())
        write_atomically(path, "".join(row.to_line() for row in rows).encode())
    if state["mlflow"] is not None:
        state["mlflow"] = {**state["mlflow"], "closed": False}
    resumed = [*state.get("resumed", ()), {"at": now_iso(), "host": state["host"]}]
    return Run(run_dir, {**state, **_running_fields(), "resumed": resumed})


def _check_configs(run_dir: Path, expected: Mapping[str, Any]) -> None:
    changed = [name for name, sha256 in expected.items() if sha256_of(run_dir / name) != sha256]
    if not changed:
        return
    requested, resolved = (flatten(load(run_dir / name)) for name in ("requested.yaml", "config.yaml"))
    # Resolving a config changes only `auto` values and data.path, which becomes absolute.
    differences = [
        f"{key}={resolved.get(key)}, requested {value}"
        for key, value in requested.items()
        if value != "auto" and key != "data.path" and resolved.get(key) != value
    ]
    detail = f" ({differences[0]})" if differences else ""
    raise UserError(
        f"{run_dir / changed[0]}: was modified since the run started{detail}; restore it, or start a new run "
        "with --resume=never"
    )


def _running_fields() -> dict[str, Any]:
    """Return the fields of run.json while this process works on the run."""
    return {"status": "RUNNING", "ended": None, **process_identity(), "error": None, "files": {}}


def make_run_dir(name: str) -> Path:
    """Create a new, empty directory outputs/<date>/<time>-<name> and return it."""
    now = datetime.now()
    day_dir = root_dir() / "outputs" / f"{now:%Y-%m-%d}"
    day_dir.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        run_dir = day_dir / f"{now:%H%M%S}-{name}{'' if number == 1 else f'-{number}'}"
        try:
            run_dir.mkdir()
        except FileExistsError:
            continue  # another run started in this second
        return run_dir
    raise UserError(
        f"{day_dir}: 1,000 runs named {name!r} were started in one second; wait a second and retry"
    )
