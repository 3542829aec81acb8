"""Give hostile files to the commands that read them, and check that each is refused and does nothing.

Files of runs and sweeps, with right hashes, GPU files and config files are made to do harm: content that
grows when it is read, other types, code, links, pipes, addresses outside. Each command runs in a process that
has its imports done, under an audit hook. It must end with an exit code other than 0 and name the file, in
a second and 100 MB; it must start no program, import nothing that a file names, and write nothing outside the
root directory. Prints one JSON line: cases, the largest seconds and MB, faults; exit code 1 if there is one.

    python benchmarks/hostile.py [--only TEXT] [--every 1] [--seconds 1] [--mb 100]
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import damage
import torch
from damage import DAY, TINY, Read, call, make_runs
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from captcha_exp.model.weights import with_sha256
from captcha_exp.runs.info import CHECKSUM_KEY
from captcha_exp.runtime.files import sha256_of_json

CANARY = "hostile_canary"  # a module and a program that no honest command touches
TIMEOUT_SECONDS = 30
OUTSIDE = "outside"  # next to the root directory
SWEEP = "sweep"
RECORDS = ("run.json", "sweep.json")

YAML_TEXTS = {
    "alias bomb": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "merge bomb": "m0: &m0 {k: v}\n"
    + "".join(f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "nesting": "a: " + "[" * 3000 + "]" * 3000,
    "nesting of blocks": "".join(" " * n + "a:\n" for n in range(400)),
    "open brackets": "[" * 200_000,
    "own anchor": "a: &a [*a]\n",
    "python tag": f"a: !!python/object/apply:os.system ['{CANARY}']\n",
    "python module": f"a: !!python/module:{CANARY}\n",
    "digits": f"seed: {'9' * 400}\n",
    "large number": "seed: 1e400\n",
    "list": "- a\n- b\n",
    "text": "just text\n",
    "number": "12\n",
    "empty": "",
    "null character": "a: 'b\0c'\n",
    "control characters": "\x1b[31mred: \x07\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "date": "seed: 2026-01-01\n",
    "interpolation": "name: ${oc.env:HOME}\n",
    "resolver": f"name: ${{oc.create:{{_target_: os.system, command: {CANARY}}}}}\n",
    "unclosed": "a: [1, 2\n",
    "many values": "a: [" + "1," * 300_000 + "]\n",
    "long": "a: " + "x" * 2**21,
}
YAML_BYTES = {"not UTF-8": b"\xff\xfe\x00a", "zeros": bytes(4096)}
JSON_TEXTS = {
    "nesting": '{"a": ' + "[" * 3000 + "]" * 3000 + "}",
    "open brackets": "[" * 2_000_000,
    "digits": '{"a": ' + "9" * 400 + "}",
    "large number": '{"a": 1e400}',
    "list": "[1, 2]",
    "text": '"text"',
    "null": "null",
    "empty": "",
    "empty object": "{}",
    "many values": '{"a": [' + "[]," * 6_000_000 + "0]}",
    "cut": '{"a": 1',
    "NaN": '{"a": NaN}',
    "null character": '{"a": "b\0c"}',
}
_RENAMES = ("os.rename", "os.link", "os.symlink")
_CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
ODD_VALUES: tuple[Any, ...] = (
    *(
        [],
        {},
        None,
        True,
        -1,
        2**63,
        1.5,
        float("nan"),
        "",
        "../../x",
        "\x1b[31m\x07",
        [[]],
        {"a": {"b": []}},
    ),
)
HOSTILE_ADDRESSES = ("../outside/new", "/{outside}/new", "a\0b", "x" * 300, "~root/x", "\x1b[2Jx")


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


@dataclass
class Watch:
    """What the audit hook has seen during a command."""

    root: Path
    events: list[str]

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note programs, imports of the canary, and writes outside the root directory."""
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class"):
            self.events.append(f"{event} {arguments!r}"[:200])
        elif event == "subprocess.Popen" and arguments[0] not in ("git", sys.executable):
            self.events.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "import" and CANARY in str(arguments[0]):
            self.events.append(f"import {arguments[0]}")
        elif event in _CHANGES or (event == "open" and _is_for_writing(arguments[2])):
            self._write(event, arguments[0])
        elif event in _RENAMES:
            self._write(event, arguments[1])
        elif event == "sqlite3.connect":
            self._write(event, str(arguments[0]).removeprefix("file:").partition("?")[0])

    def _write(self, event: str, path: Any) -> None:
        if isinstance(path, int | bytes) or str(path).startswith(("/dev/", "/proc/")):
            return
        place = Path(path)
        # A rename replaces a link; the temporary directory is opened for files without a name.
        place = place.parent.resolve() / place.name if event in _RENAMES else place.resolve()
        if not place.is_relative_to(self.root) and str(place) != tempfile.gettempdir():
            self.events.append(f"{event} {path}")


def _is_for_writing(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


_watch: list[Watch] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watch:
        watch.hook(event, arguments)


@contextlib.contextmanager
def watched(root: Path) -> Iterator[Watch]:
    """Watch what a command does until the context exits."""
    watch = Watch(root.resolve(), [])
    _watch.append(watch)
    try:
        yield watch
    finally:
        _watch.remove(watch)


# -- files with right hashes ---------------------------------------------------------------------------------


def rewrite(root: Path, file: str, content: bytes) -> None:
    """Write a file of a run or sweep, and its SHA-256 to the record of its directory."""
    path = root / file
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    if path.name in RECORDS:
        return
    digest = hashlib.sha256(content).hexdigest()
    for directory in path.parents:
        if (record := directory / "run.json").is_file():
            new = {path.relative_to(directory).as_posix(): digest}
            change_record(record, functools.partial(set_files, new=new))
            return
        if (record := directory / "sweep.json").is_file():
            place = ("jobs", int(path.stem) - 1, "sha256")
            change_record(record, functools.partial(set_value, path=place, value=digest))
            return


def change_record(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change run.json or sweep.json, and its checksum."""
    values = json.loads(path.read_text())
    values.pop(CHECKSUM_KEY)
    change(values)
    path.unlink()
    path.write_text(json.dumps(values | {CHECKSUM_KEY: sha256_of_json(values)}))


def change_tensors(root: Path, file: str, change: "Edit") -> None:
    """Change the tensors or the values of a weights file or checkpoint, and its SHA-256."""
    content = (root / file).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ((key, text),) = header["__metadata__"].items()
    tensors, values = from_safetensors(content), json.loads(text)
    values.pop("sha256")
    change(tensors, values)
    with contextlib.suppress(TypeError):  # NumPy has no bfloat16
        values = with_sha256(tensors, values)
    rewrite(root, file, to_safetensors(tensors, {key: json.dumps(values)}))


def set_files(values: dict[str, Any], new: dict[str, str]) -> None:
    """Set the SHA-256 of files in run.json."""
    values["files"] |= new


def set_value(values: Any, path: Sequence[Any], value: Any) -> None:
    """Set a value deep in JSON values."""
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value


def leaf_paths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in JSON values; of a list only its first element."""
    items = (
        values.items()
        if isinstance(values, dict)
        else enumerate(values[:1])
        if isinstance(values, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from leaf_paths(value, (*path, key))


# -- cases ---------------------------------------------------------------------------------------------------


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


def yaml_contents() -> dict[str, bytes]:
    """Return the contents of YAML files."""
    return {name: text.encode() for name, text in YAML_TEXTS.items()} | YAML_BYTES


def json_contents() -> dict[str, bytes]:
    """Return the contents of JSON files."""
    return {name: text.encode() for name, text in JSON_TEXTS.items()} | YAML_BYTES


def value_cases(root: Path, file: str, command: Sequence[str], step: int) -> Iterator[Case]:
    """Yield cases with an odd value in the place of each value of a JSON file; only every `step`-th value."""
    values = json.loads((root / file).read_text())
    paths = [path for path in leaf_paths(values) if path[0] not in (CHECKSUM_KEY, "format")]
    for number, path in enumerate(paths):
        value = ODD_VALUES[number % len(ODD_VALUES)]
        if number % step:
            continue

        def make(root: Path, path: tuple[Any, ...] = path, value: Any = value) -> None:
            if Path(file).name in RECORDS:
                change_record(root / file, lambda values: set_value(values, path, value))
                return
            values = json.loads((root / file).read_text())
            set_value(values, path, value)
            rewrite(root, file, json.dumps(values).encode())

        yield Case(f"{'.'.join(map(str, path))}={value!r}", file, tuple(command), make, accepts=True)


Edit = Callable[[dict[str, Any], dict[str, Any]], object]  # changes the tensors or the values of a file


def _set(*path: str, value: Any) -> Edit:
    return lambda _, values: set_value(values, path, value)


def _put(**new: Any) -> Edit:
    return lambda tensors, _: tensors.update(new)


def _map(function: Callable[[Any], Any]) -> Edit:
    def edit(tensors: dict[str, Any], _: dict[str, Any]) -> None:
        for name in tensors:
            if not name.startswith("rng/"):
                tensors[name] = function(tensors[name])

    return edit


TENSOR_EDITS: dict[str, Edit] = {
    "no tensors": lambda tensors, _: tensors.clear(),
    "a tensor more": _put(extra=torch.zeros(3)),
    "other shapes": _map(lambda x: x.reshape(-1)[:1].clone()),
    "other types": _map(lambda x: x.to(torch.int8)),
    "bfloat16": _map(lambda x: x.bfloat16()),
    "no values": lambda _, values: values.clear(),
}
WEIGHTS_EDITS: dict[str, Edit] = {
    "not finite": _map(lambda x: x * float("nan") if x.is_floating_point() else x),
    "a large network": _set("config", "model", "channels", value=[4096, 4096, 4096]),
    "an alphabet of control characters": _set("config", "captcha", "alphabet", value="\x1b[31m"),
    "a long label": _set("config", "captcha", "length", value=10**6),
    "a config that is a list": _set("config", value=[1]),
    "code": _set("config", "model", value={"_target_": "os.system", "command": CANARY}),
    "a format that is a text": _set("format", value="2"),
}
PROGRESS = {"num_batches": 1, "num_images": 16, "seconds": 0.1}
CHUNKS: tuple[Any, ...] = ([1], [[1]], [["1"] * 7], [[1, 0, 0, 0, 0, 0, 0]], {"a": 1}, [[]], [[-1] * 7])
CHECKPOINT_EDITS: dict[str, Edit] = {
    "an RNG state of another size": _put(**{"rng/cpu": torch.zeros(3)}),
    "no RNG state": lambda tensors, _: tensors.pop("rng/cpu"),
    "one best weight": _put(**{"best/x": torch.zeros(3)}),
    **{f"chunks={chunks}": _set("progress", value=PROGRESS | {"chunks": chunks}) for chunks in CHUNKS},
}
ODD_COUNTERS: tuple[Any, ...] = ([], {}, "1", -1, 10**18, 1.5, True, None)
TENSOR_CONTENTS = {
    "a header of 2^64 bytes": b"\xff" * 8 + b"{}",
    "a header past the end": (10**6).to_bytes(8, "little") + b"{}",
    "an empty header": (2).to_bytes(8, "little") + b"{}",
    "a nested header": (6000).to_bytes(8, "little") + b"[" * 6000,
    "a pickle": b"cposix\nsystem\n(S'" + CANARY.encode() + b"'\ntR.",
    "a zip": b"PK\x03\x04" + bytes(100),
}


def tensor_cases(file: str, command: Sequence[str]) -> Iterator[Case]:
    """Yield cases of a weights file or checkpoint with a right hash."""
    is_checkpoint = "/checkpoint/" in file
    for name, edit in (TENSOR_EDITS | (CHECKPOINT_EDITS if is_checkpoint else WEIGHTS_EDITS)).items():
        yield Case(name, file, tuple(command), functools.partial(change_tensors, file=file, change=edit))
    counters = (
        ("step", "epoch", "best_accuracy", "best_epoch", "seconds", "progress") if is_checkpoint else ()
    )
    for key in counters:
        for value in ODD_COUNTERS:
            make = functools.partial(change_tensors, file=file, change=_set(key, value=value))
            yield Case(f"{key}={value!r}", file, tuple(command), make, accepts=True)
    past_end = {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    contents = TENSOR_CONTENTS | {"offsets past the end": _safetensors(past_end)}
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
    for address in HOSTILE_ADDRESSES:
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
                change_record(root / file, lambda values: values.update({key: value}))

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


# -- running them --------------------------------------------------------------------------------------------


def build(root: Path) -> None:
    """Create the runs, a sweep, a GPU file and a config directory below the root directory."""
    make_runs(root)
    with damage.environment(root):
        from captcha_exp import compose, load
        from captcha_exp.runtime.paths import conf_dir
        from captcha_exp.sweep.record import Job, create_sweep

        configs = {str(size): load(compose(*TINY, f"train.batch_size={size}")) for size in (16, 32)}
        jobs = [
            Job(number=number, swept={"train.batch_size": size}, choices={}, requested=config)
            for number, (size, config) in enumerate(configs.items(), 1)
        ]
        sweep = create_sweep("hostile", jobs, [None] * len(jobs), 1)
        sweep.close("KILLED")
        shutil.move(sweep.run_dir, root / run_file(SWEEP, ""))
        shutil.copy(conf_dir() / "gpu" / "gtx1650.yaml", root / "gpu.yaml")
        (root / "conf" / "experiment").mkdir(parents=True)


def check(
    case: Case, root: Path, pristine: Path, seconds: float, mb: float
) -> tuple[float, float, list[str]]:
    """Return the seconds and MB that a command took, and what is wrong with its answer."""
    for entry in (*root.iterdir(), root.parent / OUTSIDE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    shutil.copytree(pristine, root, dirs_exist_ok=True, symlinks=True)
    (root.parent / OUTSIDE).mkdir(exist_ok=True)
    case.make(root)
    with watched(root) as watch:
        read, took, grown = _measure(root, case.command)
    text = f"{read.out}{read.err}"
    faults = [*watch.events]
    if "Traceback" in read.err:
        faults.append("traceback")
    if not all(c.isprintable() or c == "\n" for c in text):
        faults.append("control characters in the output")
    # These name the damage and go on, a resumed run from the checkpoint before.
    goes_on = case.command[0] in ("diff", "runs") or "/checkpoint/" in case.file
    name = f"experiment={Path(case.file).stem}" if "conf/" in case.file else Path(case.file).name
    is_refused = (read.code > 0 or goes_on) and (name in text or Path(case.file).name in text)
    if not is_refused and not case.accepts:
        faults.append(f"not refused by name (exit code {read.code})")
    if took > seconds and not case.accepts:
        faults.append(f"{took:.1f} s")
    if grown > mb:
        faults.append(f"{grown:.0f} MB")
    if any((root.parent / OUTSIDE).rglob("*.lock")) or any((root.parent / OUTSIDE).rglob("*.db")):
        faults.append("wrote outside")
    return took, grown, [f"{fault}: {read.err[-400:]}{read.out[-200:]}" for fault in faults]


def _measure(root: Path, command: Sequence[str]) -> tuple[Read, float, float]:
    """Run a command; return what it printed, its seconds, and the MB by which the process grew meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _memory_mb("VmRSS")
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS)
    began = time.perf_counter()
    with mock.patch("captcha_exp.cli.sweep.run_sweep", side_effect=damage.FirstStep):
        read = call(root, command)
    took = time.perf_counter() - began
    signal.setitimer(signal.ITIMER_REAL, 0)
    return read, took, _memory_mb("VmHWM") - before


def _memory_mb(key: str) -> float:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1000


def _raise_timeout(*_: object) -> None:
    raise TimeoutError(f"{TIMEOUT_SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name, file or command has this text")
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--mb", type=float, default=100.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _raise_timeout)
    counts, faults, slowest, largest = Counter[str](), [], (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as temporary:
        root, pristine = Path(temporary) / "root", Path(temporary) / "pristine"
        root.mkdir()
        build(root)
        shutil.copytree(root, pristine, symlinks=True)
        (root.parent / OUTSIDE).mkdir()
        cases = [
            each for each in all_cases(root) if options.only in f"{each.name} {each.file} {each.command}"
        ]
        cases = cases[:: options.every]
        for command in dict.fromkeys(each.command for each in cases):
            _measure(root, command)  # imports
        sys.addaudithook(_audit)
        for case in cases:
            took, grown, wrong = check(case, root, pristine, options.seconds, options.mb)
            label = f"{case.command[0]}: {case.name[:60]} in {case.file.removeprefix(f'outputs/{DAY}/')}"
            counts[Path(case.file).name] += 1
            slowest, largest = max(slowest, (round(took, 2), label)), max(largest, (round(grown), label))
            for fault in wrong:
                faults.append(f"{label}: {fault}")
                print(faults[-1], file=sys.stderr, flush=True)
    figures = {"cases": len(cases), "files": dict(counts), "slowest": slowest, "largest_mb": largest}
    print(json.dumps({"benchmark": "hostile", **figures, "faults": [each[:300] for each in faults]}))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
