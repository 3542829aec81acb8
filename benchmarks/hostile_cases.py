"""Cases of hostile files, each with the command that reads it."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_files as files
from damage import DAY, TINY
from hostile_files import CANARY, RECORDS, json_contents, rewrite, set_value, yaml_contents

from captcha_exp.runs.info import CHECKSUM_KEY

OUTSIDE = "outside"  # next to the root directory
SWEEP = "sweep"


@dataclass(frozen=True)
class Case:
    """A hostile file, and the command that reads it."""

    name: str
    file: str
    """relative to the root directory; named in the answer"""
    command: tuple[str, ...]
    make: Callable[[Path], None]
    """writes the file, below the root directory"""
    accepts: bool = False
    """whether the command may succeed, as one that only lists"""


def run_file(run: str, name: str) -> str:
    """Return the path of a file of a run, relative to the root directory."""
    return f"outputs/{DAY}/{run}/{name}"


def content_cases(
    file: str, command: Sequence[str], texts: dict[str, bytes], accepted: Sequence[str] = ()
) -> Iterator[Case]:
    """Yield a case for each content of a file with a right hash."""
    for name, content in texts.items():
        make = functools.partial(rewrite, file=file, content=content)
        yield Case(name, file, tuple(command), make, name in accepted)


def odd_file_cases(file: str, command: Sequence[str]) -> Iterator[Case]:
    """Yield cases in which something else is in the place of a file."""

    def replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def apply(root: Path) -> None:
            (root / file).unlink(missing_ok=True)
            make(root / file)

        return apply

    def sparse(path: Path) -> None:
        path.write_bytes((2**20).to_bytes(8, "little"))
        os.truncate(path, 40 * 2**30)

    kinds: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a directory": Path.mkdir,
        "a link to itself": lambda path: path.symlink_to(path.name),
        "40 GB": sparse,
    }
    for name, make in kinds.items():
        yield Case(name, file, tuple(command), replace(make))


def value_cases(root: Path, file: str, command: Sequence[str], step: int) -> Iterator[Case]:
    """Yield cases with an odd value in the place of each value of a JSON file; only every `step`-th value."""
    values = json.loads((root / file).read_text())
    paths = [path for path in files.leaf_paths(values) if path[0] not in (CHECKSUM_KEY, "format")]
    for number, path in enumerate(paths):
        value = files.ODD_VALUES[number % len(files.ODD_VALUES)]
        if number % step:
            continue

        def make(root: Path, path: tuple[Any, ...] = path, value: Any = value) -> None:
            if Path(file).name in RECORDS:
                files.change_record(root / file, lambda values: set_value(values, path, value))
                return
            values = json.loads((root / file).read_text())
            set_value(values, path, value)
            rewrite(root, file, json.dumps(values).encode())

        yield Case(f"{'.'.join(map(str, path))}={value!r}", file, tuple(command), make, accepts=True)


def tensor_cases(file: str, command: Sequence[str]) -> Iterator[Case]:
    """Yield cases of a weights file or checkpoint with a right hash."""
    is_checkpoint = "/checkpoint/" in file
    for name, edit in (
        files.TENSOR_EDITS | (files.CHECKPOINT_EDITS if is_checkpoint else files.WEIGHTS_EDITS)
    ).items():
        yield Case(
            name, file, tuple(command), functools.partial(files.change_tensors, file=file, change=edit)
        )
    counters = (
        ("step", "epoch", "best_accuracy", "best_epoch", "seconds", "progress") if is_checkpoint else ()
    )
    for key in counters:
        for value in files.ODD_COUNTERS:
            make = functools.partial(files.change_tensors, file=file, change=files.set_in(key, value=value))
            yield Case(f"{key}={value!r}", file, tuple(command), make, accepts=True)
    past_end = {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    contents = files.TENSOR_CONTENTS | {"offsets past the end": _safetensors(past_end)}
    yield from content_cases(file, command, contents)


def _safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def link_cases(root: Path) -> Iterator[Case]:
    """Yield cases in which a directory that is written to leads outside."""

    def link(file: str, is_dir: bool) -> Callable[[Path], None]:
        def make(root: Path) -> None:
            path, target = root / file, root.parent / OUTSIDE / Path(file).name
            if path.exists():
                path.rename(target)
            elif is_dir:
                target.mkdir()
            path.symlink_to(target)

        return make

    resume = ("train", "--resume", str(root / run_file("interrupted", "")))
    for name in ("checkpoint", "report", "metrics.jsonl", "run.json"):
        file = run_file("interrupted", name)
        accepts = name == "run.json"  # is replaced, not written through
        yield Case("a link outside", file, resume, link(file, "." not in name), accepts)
    yield Case(
        "a job that is a link outside",
        run_file(SWEEP, "1-batch_size=16"),
        ("train", "-m", "--resume", str(root / run_file(SWEEP, ""))),
        link(run_file(SWEEP, "1-batch_size=16"), True),
    )


def address_cases(root: Path) -> Iterator[Case]:
    """Yield cases with addresses outside the root directory in the configs of runs and sweeps."""
    outside = str(root.parent / OUTSIDE).lstrip("/")
    resume = ("train", "--resume", str(root / run_file("interrupted", "")))
    for address in files.HOSTILE_ADDRESSES:
        value = address.format(outside=outside)
        for key in ("cache", "uri"):

            def make(root: Path, key: str = key, value: str = value) -> None:
                for name in ("config.yaml", "requested.yaml"):
                    _set_address(root, run_file("interrupted", name), key, value)

            yield Case(f"{key}={value!r}", run_file("interrupted", "config.yaml"), resume, make, accepts=True)

            def make_sweep(root: Path, key: str = key, value: str = value) -> None:
                _set_address(root, run_file(SWEEP, "jobs/1.yaml"), key, value)

            sweep = ("train", "-m", "--resume", str(root / run_file(SWEEP, "")))
            yield Case(f"{key}={value!r}", run_file(SWEEP, "jobs/1.yaml"), sweep, make_sweep, accepts=True)


def _set_address(root: Path, file: str, key: str, value: str) -> None:
    """Set data.cache, or tracking.uri of a config with MLflow, in a saved config."""
    text = json.dumps(value)
    config = (root / file).read_text()
    if key == "cache":
        config = re.sub(r"(?m)^  cache: .*$", lambda _: f"  cache: {text}", config)
    else:
        uri = json.dumps(f"sqlite:///{value}")
        tracking = f"tracking:\n  backend: mlflow\n  uri: {uri}\n  experiment: x\n  required: false\n"
        config = re.sub(r"(?ms)^tracking:\n(  .*?\n)+", lambda _: tracking, config)
    rewrite(root, file, config.encode())


def name_cases(root: Path) -> Iterator[Case]:
    """Yield cases with control characters in what commands print."""
    text = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m\r\n"
    file = run_file("finished", "run.json")
    run_dir = str(root / run_file("finished", ""))
    for key in ("name", "warnings", "tags", "error", "stop_reason"):
        value: Any = {"warnings": [text], "tags": {"a": text}}.get(key, text)
        commands: tuple[tuple[str, ...], ...] = (
            ("runs",),
            ("runs", "--json"),
            ("evaluate", run_dir),
            ("diff", run_dir, str(root / run_file("other", "")), "--all"),
        )
        for command in commands:

            def make(root: Path, key: str = key, value: Any = value) -> None:
                files.change_record(root / file, lambda values: values.update({key: value}))

            yield Case(f"{key} with control characters", file, command, make, accepts=True)


def config_dir_cases(root: Path) -> Iterator[Case]:
    """Yield cases of a file that is selected with --config-dir."""
    file = "conf/experiment/x.yaml"
    plan = ("plan", "--config-dir", str(root / "conf"), "experiment=x", *TINY[1:], "--batch-sizes", "8")
    accepted = (
        "empty",
        "interpolation",
        "resolver",
        "digits",
        "large number",
        "date",
        "control characters",
        "number",
        "text",
        "list",
    )
    yield from content_cases(file, plan, yaml_contents(), accepted)
    yield from odd_file_cases(file, plan)
    more = {
        "circular defaults": "defaults:\n  - /experiment: x\n",
        "launcher": "hydra:\n  launcher:\n    _target_: os.system\n",
        "callbacks": f"hydra:\n  callbacks:\n    a:\n      _target_: {CANARY}.run\n",
        "search path": "hydra:\n  searchpath:\n    - file:///\n",
        "target": f"model:\n  _target_: os.system\n  command: {CANARY}\n",
        "a path up": "defaults:\n  - ../../../etc/passwd\n",
    }
    header = "# @package _global_\n"
    texts = {name: (header + text).encode() for name, text in more.items()}
    yield from content_cases(
        file, plan, texts, ("callbacks", "launcher", "search path", "target", "a path up")
    )


def all_cases(root: Path) -> list[Case]:
    """Return every case for the runs below this root directory."""
    finished, interrupted, sweep = (
        str(root / run_file(name, "")) for name in ("finished", "interrupted", SWEEP)
    )
    evaluate, reproduce = ("evaluate", finished), ("reproduce", finished)
    resume, resume_sweep = ("train", "--resume", interrupted), ("train", "-m", "--resume", sweep)
    other = str(root / run_file("other", ""))
    plan = ("plan", *TINY, "--gpu", str(root / "gpu.yaml"), "--batch-sizes", "8")
    image = str(root / "0.png")
    checkpoint = next((root / run_file("interrupted", "checkpoint")).iterdir()).name
    checkpoint = run_file("interrupted", f"checkpoint/{checkpoint}")
    weights = run_file("finished", "model.safetensors")
    predict = ("predict", str(root / weights), image)
    found: list[Case] = []
    command: tuple[str, ...]
    for run, command in (("finished", evaluate), ("interrupted", resume), ("finished", ("runs",))):
        found += content_cases(run_file(run, "run.json"), command, json_contents())
        found += odd_file_cases(run_file(run, "run.json"), command)
    for run, command in (("finished", reproduce), ("interrupted", resume)):
        found += value_cases(root, run_file(run, "run.json"), command, 1)
    odd_numbers = ("digits", "large number", "date", "interpolation", "resolver")  # are texts for `diff`
    for run, name, command in (
        *(("finished", "config.yaml", each) for each in (evaluate, ("diff", finished, other))),
        ("interrupted", "requested.yaml", resume),
        (SWEEP, "jobs/1.yaml", resume_sweep),
    ):
        accepted = odd_numbers if command[0] == "diff" else ()
        found += content_cases(run_file(run, name), command, yaml_contents(), accepted)
        found += odd_file_cases(run_file(run, name), command)
    for name in ("dataset.json", "test.json", "environment.json", "code.json", "metrics.jsonl"):
        valid = ["empty object"] if name == "code.json" else []
        found += content_cases(run_file("finished", name), reproduce, json_contents(), valid)
        found += odd_file_cases(run_file("finished", name), reproduce)
    for name, command, step in (
        ("dataset.json", evaluate, 1),
        ("test.json", reproduce, 2),
        ("environment.json", reproduce, 2),
        ("environment.json", ("diff", finished, other), 4),
    ):
        found += value_cases(root, run_file("finished", name), command, step)
    found += content_cases(run_file(SWEEP, "sweep.json"), resume_sweep, json_contents())
    found += odd_file_cases(run_file(SWEEP, "sweep.json"), resume_sweep)
    found += value_cases(root, run_file(SWEEP, "sweep.json"), resume_sweep, 1)
    found += tensor_cases(weights, predict)
    found += odd_file_cases(weights, predict)
    found += tensor_cases(checkpoint, resume)
    found += odd_file_cases(checkpoint, resume)
    found += content_cases("gpu.yaml", plan, yaml_contents())
    found += odd_file_cases("gpu.yaml", plan)
    return [*found, *config_dir_cases(root), *link_cases(root), *address_cases(root), *name_cases(root)]
