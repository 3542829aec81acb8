"""Read JSON and YAML files that may be damaged or made to do harm, with limits on their content.

Only regular files are opened, so that a pipe or a device cannot block; they are read once, up to a size.
Limits on nesting, aliases and numbers keep a small file from filling the memory or ending in a traceback.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 2**20
"""size of a file that is read as a whole; the largest lists the images of a dataset"""
CHUNK_BYTES = 2**20
"""read at a time: memory is taken for all that is asked for"""
MAX_DEPTH = 64
"""levels of nesting; configs and records have fewer than ten"""
MAX_JSON_VALUES = 4_000_000
"""values of a JSON text; the files of a dataset have four for each image"""
MAX_YAML_CHARS = 2**20
MAX_YAML_VALUES = 10_000
"""values of a YAML file with its aliases expanded"""
_MAX_DIGITS = 19
"""digits of an integer, which then fits into 64 bits"""
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_document(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: The file is missing or unreadable.
        ValueError: It is not a regular file, or larger than `max_bytes`.
    """
    with open(path, "rb", opener=_open_nonblocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        content = bytearray()
        while max(status.st_size, len(content)) <= max_bytes and (chunk := file.read(CHUNK_BYTES)):
            content += chunk
    if max(status.st_size, len(content)) > max_bytes:  # it may grow meanwhile
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return bytes(content)


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not valid JSON, nested too deeply, or has too many values or a number that does not
            fit into 64 bits.
    """
    separators: tuple[Any, ...] = (b"[", b"{", b",") if isinstance(content, bytes) else ("[", "{", ",")
    if sum(map(content.count, separators)) > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES:,} values")
    try:
        value = json.loads(content, parse_int=_parse_int, parse_float=_parse_float)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting") from None
    _check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, of plain types.

    Raises:
        ValueError: It is not valid YAML, or exceeds a limit of `check_yaml`.
    """
    check_yaml(text)
    try:
        return _YAML_LOADER(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def check_yaml(text: str) -> None:
    """Check the size of what a YAML text expands to, before anything is built from it.

    Raises:
        ValueError: It is not valid YAML, is nested too deeply, an alias is inside of its own anchor, or
            it has too many values once its aliases are expanded.
    """
    if len(text) > MAX_YAML_CHARS:
        raise ValueError(f"longer than {MAX_YAML_CHARS:,} characters")
    anchored: dict[str | None, tuple[int, int]] = {}  # anchor -> values and levels of its node
    nodes: list[tuple[str | None, int]] = []  # anchor and first value of each collection around the event
    levels = [0]  # below each of them, and below the document
    count = 0
    try:
        for event in yaml.parse(text, _YAML_LOADER):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in anchored:
                    raise ValueError(f"the alias *{event.anchor} has no complete anchor before it")
                count += anchored[event.anchor][0]
                levels[-1] = max(levels[-1], anchored[event.anchor][1])
            elif isinstance(event, yaml.ScalarEvent):
                count += 1
                anchored[event.anchor] = (1, 0)
            elif isinstance(event, yaml.CollectionStartEvent):
                nodes.append((event.anchor, count))
                levels.append(0)
                count += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, start = nodes.pop()
                height = levels.pop() + 1
                anchored[anchor] = (count - start, height)
                levels[-1] = max(levels[-1], height)
            if len(nodes) + levels[-1] > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
            if count > MAX_YAML_VALUES:
                raise ValueError(f"more than {MAX_YAML_VALUES:,} values, aliases expanded")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _check_depth(value: Any) -> None:
    nodes = [value]
    for _ in range(MAX_DEPTH):
        nodes = [
            child
            for node in nodes
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not nodes:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels of nesting")


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file; do not wait for the writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _parse_int(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, which does not fit into 64 bits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value
