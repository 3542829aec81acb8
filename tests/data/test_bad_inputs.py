"""Bad folders, images and label tables: each is named with its reason and a remedy, in one pass.

A case is a folder that was good before one thing in it went wrong. Settings are inferred, as for a user who
writes nothing but data.path.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import fuzz
import numpy as np
import pytest
from PIL import Image
from support.image_files import bomb, noise, page, saved

from captcha_exp import compose, load
from captcha_exp.config import Config, resolve
from captcha_exp.data import dataset
from captcha_exp.errors import UserError
from captcha_exp.runtime.device import detect_machine

GOOD = {f"{n * 37 % 10_000:04}.png": saved(page(n), "PNG") for n in range(60)}
PNG = saved(page(1000), "PNG")
JPEG = saved(page(1001), "JPEG")


@dataclass(frozen=True)
class Case:
    """A bad folder: what is written besides the good images, and the lines that name it."""

    name: str
    files: dict[str, bytes]
    expected: tuple[str, ...]  # texts that the error has
    overrides: tuple[str, ...] = ()
    has_good: bool = True
    prepare: Callable[[Path], object] = lambda _: None


def named(name: str, content: bytes, reason: str) -> Case:
    """Return a case of one bad file."""
    return Case(name, {name: content}, (name, reason, "data.on_invalid=skip"))


def table(name: str, content: str | bytes, *expected: str, **options: object) -> Case:
    """Return a case of a label table beside the good images."""
    raw = content if isinstance(content, bytes) else content.encode()
    return Case(name, {"labels.csv": raw}, expected, **options)  # type: ignore[arg-type]


def rows(*extra: str, header: str = "file,label", separator: str = ",") -> str:
    """Return a table of the good images with more rows."""
    good = [f"{name}{separator}{name[:4]}" for name in GOOD]
    return "\n".join([header, *good, *extra]) + "\n"


def jsonl(*extra: str) -> bytes:
    good = [f'{{"file": "{name}", "label": "{name[:4]}"}}' for name in GOOD]
    return "\n".join([*good, *extra]).encode()


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    page(65).save(file, kind, save_all=True, append_images=[page(68)])
    return file.getvalue()


NOT_SUPPORTED = "is not an image in a supported format"
DAMAGED = "is damaged or truncated"
IMAGES = [
    named("8001.png", b"", "is empty (0 bytes)"),
    named("8002.png", PNG[:100], DAMAGED),
    named("8003.jpg", JPEG[:100], DAMAGED),
    named("8004.png", PNG[:8], NOT_SUPPORTED),
    named("8005.png", b"hello, I am a text\n", NOT_SUPPORTED),
    named("8006.jpg", b"<html><body>403 Forbidden</body></html>", NOT_SUPPORTED),
    named("8007.png", saved(page(), "TIFF"), NOT_SUPPORTED),
    named("8008.tif", saved(page(), "TIFF"), NOT_SUPPORTED),
    named("8009.png", bomb(14_000, 10_000), "pixels; the maximum is 4,000,000"),
    named("8010.png", bomb(4_000, 1_001), "has 4000x1001 pixels; the maximum is 4,000,000"),
    named("8011.png", saved(Image.new("L", (32, 16), 255), "PNG"), "is blank: all pixels are equal"),
    named("8012.png", saved(Image.new("L", (1, 1), 0), "PNG"), "is blank: all pixels are equal"),
    named("8013.png", PNG[:-12], "is truncated: a PNG without its IEND chunk"),
    named("8014.png", flipped(PNG, 60), DAMAGED),
    named("8016.gif", saved(page(), "GIF")[:40], NOT_SUPPORTED),
    named("8017.bmp", saved(page(), "BMP")[:60], DAMAGED),
    named("8018.webp", saved(page(), "WEBP", lossless=True)[:40], DAMAGED),
    named("8019.png", saved(Image.new("RGBA", (32, 16), (9, 9, 9, 0)), "PNG"), "is blank"),
    named("8021.ico", saved(page(0, 32, 32), "ICO"), NOT_SUPPORTED),
    named("8022.png", b"\x89PNG\r\n\x1a\n" + bytes(50), NOT_SUPPORTED),
    named("8023.png", b"\xff\xd8\xff" + bytes(100), NOT_SUPPORTED),
    named("8024.png", b"PK\x03\x04" + bytes(60), NOT_SUPPORTED),
    named("8025.png", PNG.replace(b"IDAT", b"IDAX"), "is"),
]
NAMES = [
    named("80 1.png", PNG, "has ' '"),
    named("8_a_1.png", PNG, "has '_'"),
    Case("80\t1.png", {"80\t1.png": PNG}, (r"80\t1.png", r"has '\t'")),
    Case("8\u200b12.png", {"8\u200b12.png": PNG}, (r"8\u200b12.png", r"has '\u200b'")),
    named("81234567.png", PNG, "label '81234567' has 8 characters; captcha.length is 4"),
    named("8.png", PNG, "label '8' has 1 characters; captcha.length is 4"),
    named("8" * 33 + ".png", PNG, "has 33 characters; captcha.length is 4"),
    Case(
        "a character outside the alphabet",
        {"80x1.png": PNG},
        ("80x1.png", "has 'x', not in captcha.alphabet"),
        ("captcha.alphabet=0123456789",),
    ),
    Case(
        "labels of another length than is given",
        {},
        ("60 of 60 labels have 4 characters, not 5; to accept them, add captcha.length=4",),
        ("captcha.length=5",),
    ),
    Case(
        "two labels for one image",
        {"8031.png": PNG, "8032.png": PNG},
        ("8031.png", "is the same image as 8032.png, which is labeled '8032'", "data.on_conflict=skip"),
    ),
    Case(
        "two labels for equal pixels",
        {"8033.png": PNG, "8034.bmp": saved(page(1000), "BMP")},
        ("8034.bmp", "is the same image as 8033.png, which is labeled '8033'", "data.on_conflict=skip"),
    ),
    Case(
        "a repeated image",
        {"0000_2.png": GOOD["0000.png"]},
        ("0000_2.png", "is the same image as 0000.png", "data.on_duplicate=skip"),
        ("data.on_duplicate=error",),
    ),
    Case(
        "a pattern that fits no name",
        {},
        ("has no label in its name (data.filename_pattern is captcha_(?P<label>.+))",),
        ("data.filename_pattern='captcha_(?P<label>.+)'",),
    ),
    named("_1.png", PNG, "has '_'"),
]
TABLES = [
    table("a row without a file", rows("9999.png,9999"), "labels.csv, row 62", "names '9999.png'"),
    table(
        "most rows without a file",
        rows(*(f"x{n}.png,{n:04}" for n in range(70))),
        "70 of the 130 rows of labels.csv name no file in the folder",
    ),
    Case(
        "a file without a row",
        {"labels.csv": rows().encode(), "8040.png": PNG},
        ("8040.png", "has no label in labels.csv"),
    ),
    table(
        "a file with two labels",
        rows("0000.png,1111"),
        "0000.png",
        "has several labels in labels.csv: '0000' and '1111'",
    ),
    table("an empty label", rows().replace("0000.png,0000", "0000.png,"), "0000.png", "has no label"),
    table("an empty table", b"", "has no label in labels.csv"),
    table("a header alone", "file,label\n", "has no label in labels.csv"),
    table("no column of files", rows(header="bild,label"), "has no column file (or file_name, filename"),
    table("no column of labels", rows(header="file,wort"), "has no column label (or text, code)"),
    table("an unknown encoding", rows().encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
    table("a broken quote", rows('"0001.png,1'), "labels.csv, row"),
    table("a NUL", rows().replace("0000.png,0000", "0000.png,00\0 0"), "0000.png", r"has '\x00'"),
    Case(
        "a row of JSON that is cut",
        {"labels.jsonl": jsonl('{"file": "0000.png", "label"')},
        ("labels.jsonl, row 61",),
    ),
    Case(
        "a label that JSON has as a number",
        {"labels.jsonl": jsonl('{"file": "8041.png", "label": 12}')},
        ("labels.jsonl, row 61", 'label is 12, not text; put it in quotes, as in "0012"'),
    ),
    Case(
        "a row of JSON that is a list",
        {"labels.jsonl": jsonl('["0000.png", "0000"]')},
        ("labels.jsonl, row 61", "not a JSON object with the keys file and label"),
    ),
    Case(
        "JSON that is nested too deep",
        {"labels.jsonl": jsonl("[" * 100_000)},
        ("labels.jsonl, row 61",),
    ),
    Case(
        "two tables",
        {"labels.csv": rows().encode(), "labels.jsonl": jsonl()},
        ("has labels.csv and labels.jsonl; choose one with data.labels=NAME",),
    ),
    Case(
        "a table that does not exist",
        {},
        ("data.labels=texts.csv: no such file",),
        ("data.labels=texts.csv",),
    ),
    table("a path outside the folder", rows("../../etc/passwd,1234"), "names '../../etc/passwd'"),
    table("an absolute path outside the folder", rows("/etc/passwd,1234"), "names '/etc/passwd'"),
    table("a label of 33 characters", rows().replace("png,0000", "png," + "7" * 33), "has 33 characters"),
    table("a label of one character", rows().replace("png,0000", "png,7"), "has 1 characters"),
    table("NA", rows().replace("png,0000", "png,NA"), "label 'NA' has 'A', 'N', not in captcha.alphabet"),
    table("null", rows().replace("png,0000", "png,null!"), "label 'null!' has '!', 'l', 'n', 'u', not in"),
    table(
        "a label in scientific notation", rows().replace("png,0000", "png,1e5"), "label '1e5' has 'e', not in"
    ),
    table("a label with a space", rows().replace("png,0000", "png,00 0"), "has ' '"),
]


def make_pipe(folder: Path) -> None:
    os.mkfifo(folder / "8050.png")


def make_loop(folder: Path) -> None:
    (folder / "8051.png").symlink_to("8052.png")
    (folder / "8052.png").symlink_to("8051.png")


def make_sparse(folder: Path) -> None:
    with (folder / "8053.png").open("wb") as file:
        file.truncate(65 * 2**20)


FOLDERS = [
    Case("no folder", {}, ("no such file or directory",), ("data.path={}/missing",)),
    Case(
        "a file instead of a folder",
        {},
        ("is neither a folder nor an archive",),
        ("data.path={}/0000.png",),
    ),
    Case("an empty folder", {}, ("has no images",), has_good=False),
    Case("texts alone", {"a.txt": b"x", "b.md": b"y"}, ("has no images", "only a.txt, b.md"), has_good=False),
    Case("hidden files alone", {".a.png": PNG}, ("has no images",), has_good=False),
    Case(
        "too few labels", {"10.png": PNG}, ("1 distinct labels leave the", "use more images"), has_good=False
    ),
    Case("a pipe", {}, ("8050.png", "is not a regular file"), prepare=make_pipe),
    Case("links in a circle", {}, ("8051.png", "Too many levels of symbolic links"), prepare=make_loop),
    Case("a huge file", {}, ("8053.png", "has 65 MiB; the maximum is 64 MiB"), prepare=make_sparse),
    Case(
        "a link to nothing",
        {},
        ("8054.png", "No such file or directory"),
        prepare=lambda folder: (folder / "8054.png").symlink_to("nowhere"),
    ),
    Case(
        "a link to the folder itself",
        {},
        ("again", "is a symbolic link to a folder, which is not followed"),
        prepare=lambda folder: (folder / "again").symlink_to(folder),
    ),
    Case(
        "a folder with the name of an image",
        {},
        ("has no images",),
        has_good=False,
        prepare=lambda folder: (folder / "8055.png").mkdir(),
    ),
]
CASES = [*IMAGES, *NAMES, *TABLES, *FOLDERS]


@cache
def composed(*overrides: str) -> Config:
    return resolve(
        load(compose("data=folder", "tracking=none", "device.name=cpu", *overrides)), detect_machine()
    )


def test_there_are_at_least_70_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 70


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name))
def test_bad_input_is_named_with_its_reason(case: Case, root: Path) -> None:
    folder = root / "images"
    folder.mkdir()
    for name, content in ({**GOOD, **case.files} if case.has_good else case.files).items():
        (folder / name).write_bytes(content)
    case.prepare(folder)
    overrides = [word.format(folder) if "{}" in word else word for word in case.overrides]
    path = [] if any(word.startswith("data.path=") for word in overrides) else [f"data.path={folder}"]
    before = sorted(root.rglob("*"))
    config = composed(*path, *overrides)
    with pytest.raises(UserError) as error:
        dataset.inspect_dataset(replace(config, data=replace(config.data, cache=str(root / "cache"))))
    text = "\n".join(error.value.lines)
    for expected in case.expected:
        assert expected.casefold() in text.casefold(), text
    assert sorted(root.rglob("*")) == before  # nothing was created


GOOD_VARIANTS = {
    "a byte order mark": {"labels.csv": b"\xef\xbb\xbf" + rows().encode()},
    "semicolons and CRLF": {
        "labels.csv": rows(header="file;label", separator=";").replace("\n", "\r\n").encode()
    },
    "quoted commas": {"labels.csv": rows(header="file,label,note").replace("\n", ',"a, b"\n').encode()},
    "more columns": {"labels.csv": rows(header="file,label,width").replace("\n", ",32\n").encode()},
    "blank lines": {"labels.csv": rows().replace("\n", "\n\n").encode()},
    "JSON lines": {"labels.jsonl": jsonl()},
    "16 bits": {"8061.png": saved(Image.fromarray(noise(16, 32, seed=61).astype(np.uint16) * 256), "PNG")},
    "CMYK": {"8062.jpg": saved(page(62).convert("CMYK"), "JPEG")},
    "a palette": {"8063.gif": saved(page(63).convert("P"), "GIF")},
    "transparency": {"8064.png": saved(page(64).convert("LA"), "PNG")},
    "an animation": {"8065.gif": animated("GIF")},
    "another shape": {"8066.png": saved(page(66, 400, 10), "PNG")},
    "no suffix": {"8067": PNG},
}


@pytest.mark.parametrize("name", GOOD_VARIANTS)
def test_odd_input_is_used(name: str, root: Path) -> None:
    folder = root / "images"
    folder.mkdir()
    files = {**GOOD, **GOOD_VARIANTS[name]}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    config = composed(f"data.path={folder}")
    spec = dataset.inspect_dataset(replace(config, data=replace(config.data, cache=str(root / "cache"))))
    images = [file for file in files if not file.startswith("labels.")]
    assert len(spec.scan.labels) == len(images)
    assert spec.scan.labels[:2] == ["0000", "0037"]  # 0000 is not 0
    assert spec.config.captcha.alphabet == "0123456789"
    assert spec.config.captcha.length == 4


def test_mutated_files_are_read_or_refused() -> None:
    """A short form of benchmarks/fuzz.py; a busy machine may be slower than two seconds."""
    found = fuzz.read_cases(first=20_000, count=600, seconds=20, mib=200)
    assert found["faults"] == []
    assert min(found["outcomes"].values()) > 100
