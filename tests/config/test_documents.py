"""Limits on JSON and YAML files that are read back."""

import json
import os
from pathlib import Path

import pytest
import yaml

from captcha_exp.config.documents import parse_json, parse_yaml, read_document


def alias_bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


MERGE_BOMB = "a0: &a0 {k: 1}\n" + "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], x: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (alias_bomb(), "more than 10,000 values"),
        (MERGE_BOMB, "more than 10,000 values"),
        ("a: &a [*a]", "no complete anchor"),
        ("a: &a {b: *a}", "no complete anchor"),
        ("a: *b", "no complete anchor"),
        ("[" * 200_000, "more than 64 levels"),
        ("- " * 5_000 + "x", "more than 64 levels"),
        ("? " * 5_000 + "x", "more than 64 levels"),
        ("a: {" * 65 + "}" * 65, "more than 64 levels"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100)),
            "more than 64 levels",
        ),
        ("x" * 2_000_000, "longer than 1,048,576 characters"),
        ("a: [", "did not find"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("\x00", "special characters are not allowed|control characters"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_harmful_yaml_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


def test_anchors_and_merge_keys_are_accepted() -> None:
    text = "base: &base {a: 1, b: [2, 3]}\nx: {<<: *base, c: 4}\ny: [*base, *base]\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "levels of nesting"),
        ("[" * 65 + "]" * 65, "levels of nesting"),
        ('{"a": ' * 65 + "1" + "}" * 65, "levels of nesting"),
        ("9" * 400, "integer of 400 digits"),
        ("[" + "9" * 5_000 + "]", "integer of 5000 digits"),
        ("1e400", "too large"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
    ids=lambda value: value[:20],
)
def test_harmful_json_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize("value", [{}, [], {"a": [1, -2, 0.5, 1e300, None, True, "x"]}, 2**59, "é"])
def test_json_is_read(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            read_document(path)
    with pytest.raises(IsADirectoryError):
        read_document(tmp_path)


def test_the_size_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_document(path, max_bytes=5) == b"12345"
    assert read_document(path, max_bytes=2**60) == b"12345", "no memory is taken for more than the file has"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_document(path, max_bytes=4)


def test_a_file_that_grows_while_it_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the metrics of a run that another process trains."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"a")
    fstat = os.fstat

    def append(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        path.write_bytes(b"abc")
        return status

    monkeypatch.setattr("captcha_exp.config.documents.os.fstat", append)
    assert read_document(path, max_bytes=3) == b"abc"
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        read_document(path, max_bytes=2)
