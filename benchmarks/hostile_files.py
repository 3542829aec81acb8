"""Contents of hostile files, and what writes them with right hashes."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from captcha_exp.model.weights import with_sha256
from captcha_exp.runs.info import CHECKSUM_KEY
from captcha_exp.runtime.files import sha256_of_json

CANARY = "hostile_canary"  # a module and a program that no honest command touches
RECORDS = ("run.json", "sweep.json")
Edit = Callable[[dict[str, Any], dict[str, Any]], object]
"""changes the tensors or the values of a weights file or checkpoint"""

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


def yaml_contents() -> dict[str, bytes]:
    """Return the contents of YAML files."""
    return {name: text.encode() for name, text in YAML_TEXTS.items()} | YAML_BYTES


def json_contents() -> dict[str, bytes]:
    """Return the contents of JSON files."""
    return {name: text.encode() for name, text in JSON_TEXTS.items()} | YAML_BYTES


# -- edits of tensors ----------------------------------------------------------------------------------------


def set_in(*path: str, value: Any) -> Edit:
    """Return an edit that sets a value."""
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
    "a large network": set_in("config", "model", "channels", value=[4096, 4096, 4096]),
    "an alphabet of control characters": set_in("config", "captcha", "alphabet", value="\x1b[31m"),
    "a long label": set_in("config", "captcha", "length", value=10**6),
    "a config that is a list": set_in("config", value=[1]),
    "code": set_in("config", "model", value={"_target_": "os.system", "command": CANARY}),
    "a format that is a text": set_in("format", value="2"),
}
PROGRESS = {"num_batches": 1, "num_images": 16, "seconds": 0.1}
CHUNKS: tuple[Any, ...] = ([1], [[1]], [["1"] * 7], [[1, 0, 0, 0, 0, 0, 0]], {"a": 1}, [[]], [[-1] * 7])
CHECKPOINT_EDITS: dict[str, Edit] = {
    "an RNG state of another size": _put(**{"rng/cpu": torch.zeros(3)}),
    "no RNG state": lambda tensors, _: tensors.pop("rng/cpu"),
    "one best weight": _put(**{"best/x": torch.zeros(3)}),
    **{f"chunks={chunks}": set_in("progress", value=PROGRESS | {"chunks": chunks}) for chunks in CHUNKS},
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


# -- writing -------------------------------------------------------------------------------------------------


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


def change_tensors(root: Path, file: str, change: Edit) -> None:
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
