"""Test folders of images: used, rejected and ignored files, labels, and the cache."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY, infos, warnings
from PIL import Image
from support.image_files import Bytes, bomb, noise, page, saved

from captcha_exp import compose, load
from captcha_exp.cli import main
from captcha_exp.config import Config, resolve
from captcha_exp.data import dataset, sources
from captcha_exp.data.dataset import Dataset, DatasetSpec
from captcha_exp.data.images import SUFFIXES
from captcha_exp.data.resize import resize
from captcha_exp.data.sources import ScanResult
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model.saved import evaluate_run
from captcha_exp.runtime.device import detect_machine
from captcha_exp.runtime.text import escape_unprintable
from captcha_exp.training.train import train

FOLDER_OVERRIDES = (
    *(text for text in TINY if text.split("=")[0] not in ("data.count", "data.workers", "captcha.alphabet")),
    "captcha=digits",
    "captcha.alphabet='0123456789'",
    "captcha.length=4",
    "captcha.channels=1",
    "device.threads=1",
    "tracking=none",
    "data=folder",
)


@cache
def composed() -> Config:
    return load(compose(*FOLDER_OVERRIDES, "data.path=."))


def folder_config(folder: Path, captcha: dict[str, Any] | None = None, **data: Any) -> Config:
    """Return the tiny config with a folder of images, and a cache next to it."""
    options = {"path": str(folder), "cache": str(folder.parent / "cache"), **data}
    config = replace(composed(), data=replace(composed().data, **options))
    return replace(config, captcha=replace(config.captcha, **(captcha or {})))


def scan(config: Config) -> ScanResult:
    """Scan the folder of a config."""
    return sources.make_source(config.data, config.captcha).scan()


def used(config: Config) -> dict[str, str]:
    """Return the label of each used file."""
    result = scan(config)
    return {name: label for (name, _), label in zip(result.files, result.labels, strict=True)}


def rejected(config: Config) -> dict[str, str]:
    """Return the reason of each rejected file."""
    result = scan(config).rejected
    assert len({name for name, _ in result}) == len(result)
    return dict(result)


def ignored(config: Config) -> list[str]:
    return sources.make_source(config.data, config.captcha).ignored


def inspect(config: Config) -> DatasetSpec:
    return dataset.inspect_dataset(config)


def load_dataset(config: Config) -> Dataset:
    return dataset.load_or_build(inspect(config))


def error_lines(config: Config) -> str:
    """Return the error message of a config."""
    with pytest.raises(UserError) as error:
        inspect(config)
    return "\n".join(error.value.lines)


def png(seed: int = 0) -> bytes:
    return saved(page(seed), "PNG")


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fill(folder: Path, count: int = 60) -> Path:
    """Write images with distinct pixels and labels."""
    return write_files(folder, {f"{n:05}-{n * 37 % 10_000:04}.png": png(n) for n in range(count)})


@pytest.fixture
def folder(root: Path) -> Path:
    made = root / "images"
    made.mkdir()
    return made


# -- images --------------------------------------------------------------------------------------------------


def test_the_format_is_detected_from_the_content(folder: Path) -> None:
    suffixes = {
        "PNG": {".png", ".apng"},
        "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
        "GIF": {".gif"},
        "BMP": {".bmp"},
        "WebP": {".webp"},
    }
    for n, (kind, suffix) in enumerate((kind, suffix) for kind in suffixes for suffix in sorted(SUFFIXES)):
        name = f"{n:04}{suffix if n % 2 else suffix.upper()}"
        write_files(folder, {name: saved(page(n), kind.upper())})
    result = scan(folder_config(folder))
    assert (len(result.labels), result.rejected) == (5 * len(SUFFIXES), [])
    assert result.remarks == {}
    assert ignored(folder_config(folder)) == []


def test_images_of_the_configured_size_are_not_resized(folder: Path) -> None:
    pixels = [noise(16, 32, seed=n) for n in range(60)]
    write_files(
        folder, {f"{n:04}.png": saved(Image.fromarray(array), "PNG") for n, array in enumerate(pixels)}
    )
    assert (load_dataset(folder_config(folder)).images.numpy()[..., 0] == np.stack(pixels)).all()


def test_images_of_other_sizes_are_resized(folder: Path) -> None:
    def pixels(n: int) -> Bytes:
        return noise(20 + n % 3, 50, 3, seed=n)

    write_files(folder, {f"{n:04}.png": saved(Image.fromarray(pixels(n)), "PNG") for n in range(60)})
    data = load_dataset(folder_config(folder, {"channels": 3}))
    for n, image in enumerate(data.images.numpy()):
        assert (image == resize(pixels(n)[None], 16, 32)[0]).all()
    assert data.manifest["sizes"] == {"50x20": 20, "50x21": 20, "50x22": 20}


def test_a_palette_gif_named_png_is_used(folder: Path) -> None:
    image = page().convert("P")
    write_files(folder, {"00000-R865.png": saved(image, "GIF")})
    config = folder_config(folder, {"alphabet": "0123456789R"})
    assert used(config) == {"00000-R865.png": "R865"}
    assert scan(config).remarks == {}


def test_a_blank_image_is_rejected(folder: Path) -> None:
    write_files(
        folder,
        {
            "0001.png": saved(Image.new("L", (32, 16), 255), "PNG"),
            "0002.png": saved(Image.new("RGBA", (32, 16), (9, 9, 9, 0)), "PNG"),
            "0003.png": png(),
        },
    )
    blank = "is blank: all pixels are equal"
    assert rejected(folder_config(folder)) == {"0001.png": blank, "0002.png": blank}


# -- labels in file names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("00000-R865.png", "R865"),
        ("R865.png", "R865"),
        ("r865_3.png", "R865"),
        ("7-r865_12.jpeg", "R865"),
        ("0444_1.jpg", "0444"),
        ("0012.gif", "0012"),
        ("deep/er/00001-0444_2.BMP", "0444"),
        ("1234-5678/0444.png", "0444"),
    ],
)
def test_the_label_is_in_the_file_name(folder: Path, name: str, label: str) -> None:
    write_files(folder, {name: png()})
    assert used(folder_config(folder, {"alphabet": "0123456789R"})) == {name: label}


def test_filename_pattern_finds_the_label(folder: Path) -> None:
    write_files(folder, {"captcha.0444.7.png": png(1), "captcha.0555.8.png": png(2), "cover.png": png(3)})
    config = folder_config(folder, filename_pattern=r"captcha\.(?P<label>\d+)\.\d")
    assert used(config) == {"captcha.0444.7.png": "0444", "captcha.0555.8.png": "0555"}
    assert rejected(config) == {
        "cover.png": r"has no label in its name (data.filename_pattern is captcha\.(?P<label>\d+)\.\d)"
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?P<label>[", "invalid regular expression: "),
        ("(?P<label>a{99999999999999999999})", "invalid regular expression: "),
        ("(.+)", "must have a group named label, as in (?P<label>.+)"),
    ],
)
def test_an_invalid_filename_pattern_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(compose("data=folder", "data.path=.", f"data.filename_pattern='{pattern}'"))
    (line,) = error.value.lines
    assert line.startswith(f'data.filename_pattern="{pattern}": {message}')


def test_filename_pattern_can_be_quoted_on_the_command_line() -> None:
    pattern = r"(\d+-)?(?P<label>.+?)(_\d+)?"
    config = load(compose("data=folder", "data.path=.", f"data.filename_pattern='{pattern}'"))
    assert config == load(compose("data=folder", "data.path=."))


def test_labels_are_converted_to_the_case_of_the_alphabet(folder: Path) -> None:
    write_files(folder, {"aB12.png": png(1), "AB34.png": png(2), "1234.png": png(3)})
    folded, kept = ({"alphabet": "0123456789ab", "case": case} for case in ("fold", "keep"))
    assert used(folder_config(folder, folded)) == {"aB12.png": "ab12", "AB34.png": "ab34", "1234.png": "1234"}
    assert used(folder_config(folder, kept)) == {"1234.png": "1234"}
    assert rejected(folder_config(folder, kept)) == {
        "aB12.png": "label 'aB12' has 'B', not in captcha.alphabet",
        "AB34.png": "label 'AB34' has 'A', 'B', not in captcha.alphabet",
    }


@pytest.mark.parametrize("case", ["fold", "keep"])
def test_case_is_kept_if_the_alphabet_has_both(folder: Path, case: str) -> None:
    write_files(folder, {"aB12.png": png(1), "Ab12.png": png(2)})
    config = folder_config(folder, {"alphabet": "0123456789abAB", "case": case})
    assert used(config) == {"aB12.png": "aB12", "Ab12.png": "Ab12"}


def test_decomposed_file_names_of_macos_are_normalized(folder: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "äöü1")
    assert len(decomposed) == 7
    write_files(folder, {f"{decomposed}.png": png()})
    assert used(folder_config(folder, {"alphabet": "äöü1"})) == {f"{decomposed}.png": "äöü1"}


# -- labels in a table ---------------------------------------------------------------------------------------

ONE, TWO = "a.png", "sub folder/bü.png"
ROWS = {ONE: "0012", TWO: "3456"}


def csv(separator: str = ",", end: str = "\n", header: tuple[str, str] = ("file", "label")) -> str:
    return "".join(separator.join(row) + end for row in (header, *ROWS.items()))


JSONL = "\n".join(json.dumps({"file": file, "label": label}) for file, label in ROWS.items())
TABLES = {
    "commas": ("labels.csv", csv()),
    "UTF-8 with a byte order mark": ("labels.csv", "\ufeff" + csv()),
    "Excel in Germany": ("labels.csv", "\ufeff" + csv(";", "\r\n")),
    "tabs under another name": ("labels.csv", csv("\t")),
    "column names in any case": ("labels.csv", csv(header=(" File_Name ", "TEXT"))),
    "quotes, spaces and empty lines": (
        "labels.csv",
        'label,"file"\r\n"0012","a.png"\r\n\r\n 3456 , sub folder/bü.png ',
    ),
    "additional columns": (
        "labels.csv",
        "id,path,file,text,label,note\n1,x,a.png,x,0012,\n2,x,sub folder/bü.png,y,3456,z,zz\n",
    ),
    "a duplicate row, Windows paths": (
        "labels.csv",
        "file,label\n./a.png,0012\na.png,0012\nsub folder\\bü.png,3456\n",
    ),
    "decomposed characters": ("labels.csv", unicodedata.normalize("NFD", csv())),
    "a name in capitals": ("Labels.CSV", csv()),
    "tabs": ("labels.tsv", csv("\t")),
    "tabs from Windows": ("labels.tsv", "\ufeff" + csv("\t", "\r\n")),
    "JSON": ("labels.jsonl", JSONL),
    "JSON with additional keys": (
        "labels.jsonl",
        '\ufeff{"image": "a.png", "code": "0012", "size": [9, 9]}\r\n\r\n'
        '{"code": "3456", "image": "sub folder/bü.png"}\r\n',
    ),
}


@pytest.mark.parametrize(("name", "content"), TABLES.values(), ids=TABLES)
def test_labels_are_read_from_a_table(folder: Path, name: str, content: str) -> None:
    write_files(folder, {ONE: png(1), TWO: png(2), name: content.encode()})
    assert used(folder_config(folder)) == ROWS
    assert rejected(folder_config(folder)) == {}
    assert ignored(folder_config(folder)) == []


def test_a_table_finds_decomposed_file_names(folder: Path) -> None:
    decomposed = unicodedata.normalize("NFD", TWO)
    assert decomposed != TWO
    write_files(folder, {ONE: png(1), decomposed: png(2), "labels.csv": csv().encode()})
    assert used(folder_config(folder)) == {ONE: "0012", decomposed: "3456"}
    assert rejected(folder_config(folder)) == {}


@pytest.mark.parametrize("label", ["00123", "NA", "null", "None", "nan", "1e5", "true", "007"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_labels_of_a_table_are_not_converted(folder: Path, label: str, kind: str) -> None:
    rows = {"csv": f"file,label\na.png,{label}\n", "tsv": f"file\tlabel\na.png\t{label}\n"}
    rows["jsonl"] = json.dumps({"file": "a.png", "label": label})
    write_files(folder, {"a.png": png(), f"labels.{kind}": rows[kind].encode()})
    config = folder_config(
        folder, {"alphabet": "".join(sorted({*label, "x", "y"})), "length": len(label), "case": "keep"}
    )
    assert used(config) == {"a.png": label}


def test_files_of_a_table_may_have_any_suffix(folder: Path) -> None:
    write_files(
        folder, {"one.dat": png(1), "two": png(2), "labels.csv": b"file,label\none.dat,0001\ntwo,0002\n"}
    )
    assert used(folder_config(folder)) == {"one.dat": "0001", "two": "0002"}
    assert ignored(folder_config(folder)) == []


def test_data_labels_selects_the_table_or_the_file_names(folder: Path) -> None:
    files = {
        "0001.png": png(),
        "labels.csv": b"file,label\n0001.png,0002\n",
        "mine/More.TSV": b"file\tlabel\n0001.png\t0003\n",
    }
    write_files(folder, files)
    assert used(folder_config(folder)) == {"0001.png": "0002"}
    assert used(folder_config(folder, labels="mine/More.TSV")) == {"0001.png": "0003"}
    assert used(folder_config(folder, labels="names")) == {"0001.png": "0001"}
    assert ignored(folder_config(folder, labels="mine/More.TSV")) == ["labels.csv"]
    assert ignored(folder_config(folder, labels="names")) == ["labels.csv", "mine/More.TSV"]


def test_rows_without_a_file_and_files_without_a_row_are_rejected(folder: Path) -> None:
    table = (
        "file,label\n"
        "a.png,0001\n"
        "b.png,0002\nb.png,0003\n"
        "c.png,\n"
        "gone.png,0004\n"
        "../outside.png,0005\n"
        "/etc/passwd,0006\n"
        ",0007\n"
        "d.png\n"
        "sub,0008\n"
        "nul\0.png,0009\n"
    )
    write_files(folder, {**{f"{name}.png": png(n) for n, name in enumerate("abcde")}, "sub/0001.png": png(9)})
    write_files(folder, {"labels.csv": table.encode(), "../outside.png": png()})
    (folder / "links.png").symlink_to(folder / "sub")
    assert used(folder_config(folder)) == {"a.png": "0001"}
    assert rejected(folder_config(folder)) == {
        "b.png": "has several labels in labels.csv: '0002' and '0003'",
        "c.png": "has no label in labels.csv",
        "d.png": "has no label in labels.csv",
        "e.png": "has no label in labels.csv",
        "links.png": "is a symbolic link to a folder, which is not followed",
        "sub": "is a folder",
        "sub/0001.png": "has no label in labels.csv",
        "labels.csv, row 6": "names 'gone.png', which is not a file in the folder",
        "labels.csv, row 7": "names '../outside.png', which is not a file in the folder",
        "labels.csv, row 8": "names '/etc/passwd', which is not a file in the folder",
        "labels.csv, row 9": "names '.', which is not a file in the folder",
        "labels.csv, row 12": r"names 'nul\\x00.png', which is not a file in the folder",
    }


def test_a_row_with_a_link_to_a_folder_is_rejected_once(folder: Path) -> None:
    write_files(folder, {"a.png": png(), "sub/x": b"", "labels.csv": b"file,label\na.png,0001\nlink,0002\n"})
    (folder / "link").symlink_to(folder / "sub")
    assert rejected(folder_config(folder)) == {"link": "is a folder"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "labels.csv",
            b"name,label\na.png,0001\n",
            "row 2: has no column file (or file_name, ",
        ),
        (
            "labels.csv",
            b"file,solution\na.png,0001\n",
            "row 2: has no column label (or text, code); its",
        ),
        (
            "labels.csv",
            b"a.png,0001\nb.png,0002\n",
            "row 2: has no column file (or file_name, filename, ",
        ),
        ("labels.csv", b"file|label\na.png|0001\n", "columns are file|label"),
        ("labels.csv", b"file,label\nb\xfc.png,0001\n", "is not UTF-8 text; save it as UTF-8"),
        ("labels.csv", csv().encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
        ("labels.csv", b'file,label\n"a.png,0001\nb.png,0002\n', "unexpected end of data"),
        ("labels.csv", b"file,label\n" + b"a" * 200_000 + b",0001\n", "field larger than field limit"),
        ("labels.tsv", b"file\tsolution\na.png\t0001\n", "row 2: has no column label"),
        (
            "labels.jsonl",
            b'{"file": "a.png", "label": 123}',
            "row 1: label is 123, not text; put it in quotes",
        ),
        ("labels.jsonl", b'\n{"file": 7, "label": "0001"}', "row 2: file is 7, not text"),
        (
            "labels.jsonl",
            b'{"file": "a.png"}',
            "row 1: has no column label (or text, code); its columns are file",
        ),
        ("labels.jsonl", b'{"file": "a.png", "label"', "row 1: "),
        ("labels.jsonl", b"[" * 100_000, "row 1: "),
        (
            "labels.jsonl",
            b'["a.png", "0001"]',
            "row 1: not a JSON object with the keys file and label",
        ),
    ],
)
def test_an_invalid_table_is_an_error_in_one_line(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    write_files(folder, {"a.png": png(), name: content})
    line = error_lines(folder_config(folder))
    assert line.startswith(str(folder / name))
    assert message in line
    assert "\n" not in line
    assert len(line) < 500


def test_lone_surrogates_in_json_are_rejected(folder: Path) -> None:
    rows = rb'{"file": "a.png", "label": "\ud800"}' + b"\n" + rb'{"file": "\udbff.png", "label": "0001"}'
    write_files(folder, {"a.png": png(), "labels.jsonl": rows})
    assert rejected(folder_config(folder)) == {
        "a.png": r"label '\ud800' has '\ud800', not in captcha.alphabet",
        "labels.jsonl, row 2": r"names '\\udbff.png', which is not a file in the folder",
    }
    assert "4 characters" not in error_lines(folder_config(folder))


def test_several_tables_are_an_error(folder: Path) -> None:
    write_files(folder, {"a.png": png(), "labels.csv": b"file,label\n", "Labels.jsonl": b""})
    assert error_lines(folder_config(folder)) == (
        f"data.labels=null: {folder} has Labels.jsonl and labels.csv; choose one with data.labels=NAME"
    )


def test_a_missing_table_is_an_error(folder: Path) -> None:
    fill(folder)
    assert (
        error_lines(folder_config(folder, labels="my.csv")) == f"data.labels=my.csv: no such file in {folder}"
    )
    with pytest.raises(
        ConfigError, match=r"^data\.labels=.labels\.xlsx.: must be null, names, folders, or a file in "
    ):
        load(compose("data=folder", "data.path=.", "data.labels=labels.xlsx"))


# -- invalid folders -----------------------------------------------------------------------------------------


def test_data_path_is_required() -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.path: is missing; write text or a list, .*\(path of the folder, or of"
    ):
        load(compose("data=folder"))


def test_an_invalid_data_path_is_an_error(folder: Path) -> None:
    write_files(folder, {"empty/.keep": b"", "only/readme.txt": b"", "only/.hidden.png": png(), "file": b""})
    empty = "has no images (PNG, JPEG, GIF, BMP, WEBP)"
    for name, message in {
        "nowhere": "cannot be read as a folder: No such file or directory",
        "file/in/a/file": "cannot be read as a folder: Not a directory",
        "file": "is neither a folder nor an archive (.zip, .tar, .tar.gz, .tar.bz2, .tar.xz)",
        "empty": empty,
        "only": f"{empty}; only readme.txt",
        "a" * 300: "cannot be read as a folder: File name too long",
    }.items():
        assert error_lines(folder_config(folder / name)) == f"data.path={folder / name}: {message}"


def test_a_path_that_cannot_be_resolved_is_an_error(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    path = str(folder / "circle")
    try:
        config = resolve(folder_config(folder, path=path), detect_machine())
    except ConfigError as error:  # from Python 3.13 on, a circular link fails only when it is read
        lines = error.lines
    else:
        lines = (error_lines(config),)
    assert re.match(re.escape(f"data.path={path}: ") + "[^\n]+$", "\n".join(lines))


def test_a_folder_without_read_permission_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because root can read everything."""
    deny_access(monkeypatch, folder)
    assert (
        error_lines(folder_config(folder))
        == f"data.path={folder}: cannot be read as a folder: Permission denied"
    )


def deny_access(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    scandir = os.scandir

    def deny(path: str) -> Any:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)


def test_a_subfolder_without_read_permission_is_rejected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(folder, {"0001.png": png(), "lost+found/0002.png": png(2)})
    deny_access(monkeypatch, folder / "lost+found")
    assert used(folder_config(folder)) == {"0001.png": "0001"}
    assert rejected(folder_config(folder)) == {
        "lost+found": "is a folder that cannot be read: Permission denied"
    }


def test_a_file_without_read_permission_is_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(folder, {"0001.png": png(1), "0002.png": png(2)})
    read = Path.read_bytes

    def deny(path: Path) -> bytes:
        if path.name == "0002.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert rejected(folder_config(folder)) == {"0002.png": "cannot be read: Permission denied"}


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(png(99)), lambda path: path.unlink()])
def test_a_file_that_changes_during_the_scan_is_an_error(folder: Path, change: Callable[[Path], Any]) -> None:
    """The cache file is named after the hashes and must have the same content."""
    fill(folder)
    config = folder_config(folder, on_invalid="skip")
    source = sources.make_source(config.data, config.captcha)
    change(folder / "00001-0037.png")
    with pytest.raises(UserError, match=r"00001-0037\.png changed while it was read; run the command again$"):
        source.scan()


def test_too_few_labels_for_the_splits_are_an_error(folder: Path) -> None:
    fill(folder, 2)
    line = error_lines(folder_config(folder))
    assert line.startswith(f"data.path={folder}: 2 distinct labels leave the ")
    assert line.endswith(
        " split empty; use more images, or change data.validation_fraction and data.test_fraction"
    )
    assert not (folder.parent / "cache").exists()


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("images", "./images/../images", "~/images"):
        resolved = resolve(folder_config(folder, path=path), detect_machine())
        assert resolved.data == folder_config(folder).data


# -- other files and links -----------------------------------------------------------------------------------


def test_files_without_an_image_suffix_are_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(folder)
    clutter = ["Thumbs.db", ".DS_Store", "desktop.ini", "README.md", "__MACOSX/._00001-0037.png", "sub/notes"]
    write_files(folder, dict.fromkeys([*clutter, ".git/0001.png", ".cache/x/0002.png"], b"clutter"))
    caplog.clear()
    inspect(folder_config(folder))
    assert ignored(folder_config(folder)) == sorted([*clutter, ".git/", ".cache/"])
    assert infos(caplog)[-1] == "Ignored, not images (8): .DS_Store, .cache/, .git/ and 5 more"
    assert warnings(caplog) == []


def test_output_directories_inside_the_folder_are_ignored(root: Path) -> None:
    """As with data.path=. of an installed package."""
    config = folder_config(fill(root), cache="outputs/cache")
    before = inspect(config).key
    load_dataset(config)
    write_files(root, {"outputs/2026-01-01/1-tiny/report/curves.png": png(), "mlruns/1/confusion.png": png()})
    assert inspect(config).key == before
    assert ignored(config) == ["mlruns/", "outputs/"]
    write_files(root, {"sub/outputs/9999.png": png(99)})
    assert "sub/outputs/9999.png" in used(config)


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    write_files(folder, {"sub/0001.png": png()})
    (folder / "again").symlink_to(folder)
    (folder / "sub/up.png").symlink_to(folder)
    reason = "is a symbolic link to a folder, which is not followed"
    assert used(folder_config(folder)) == {"sub/0001.png": "0001"}
    assert rejected(folder_config(folder)) == {"again": reason, "sub/up.png": reason}


def test_links_to_images_are_followed(folder: Path) -> None:
    write_files(folder.parent, {"elsewhere/x.png": png()})
    (folder / "0001.png").symlink_to(folder.parent / "elsewhere/x.png")
    (folder.parent / "link").symlink_to(folder)
    assert used(folder_config(folder)) == used(folder_config(folder.parent / "link")) == {"0001.png": "0001"}


def test_unusual_file_names_are_used(folder: Path) -> None:
    names = [
        "0001_" + "1" * 240 + ".png",
        "0002 .png",
        "sp ace/0003.png",
        "ß€😀/0004.png",
        "-/0005.png",
        "'/0006.png",
    ]
    write_files(folder, {name: png(n) for n, name in enumerate(names)})
    assert set(used(folder_config(folder))) == set(names) - {"0002 .png"}
    assert rejected(folder_config(folder)) == {"0002 .png": "label '0002 ' has ' ', not in captcha.alphabet"}


@pytest.mark.parametrize(
    ("name", "visible"),
    [
        ("plain ü.png", "plain ü.png"),
        ("line\nfeed\t\x1b[31m.png", r"line\nfeed\t\x1b[31m.png"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}gnp.png", r"\u202egnp.png"),
        (os.fsdecode(b"latin\xfc.png"), r"latin\xfc.png"),
        ("half\ud800.png", r"half\ud800.png"),
    ],
)
def test_unprintable_characters_of_names_are_escaped(name: str, visible: str) -> None:
    assert escape_unprintable(name) == visible


# -- duplicate images ----------------------------------------------------------------------------------------


def test_an_image_with_two_labels_is_rejected(folder: Path) -> None:
    """Pixels are compared, not files."""
    write_files(
        folder,
        {
            "0001.png": png(1),
            "0002.bmp": saved(page(1), "BMP"),
            "0003.png": png(3),
            "again/0003.bmp": saved(page(3), "BMP"),
        },
    )
    assert used(folder_config(folder)) == {"0003.png": "0003", "again/0003.bmp": "0003"}
    assert rejected(folder_config(folder)) == {
        "0001.png": "is the same image as 0002.bmp, which is labeled '0002'",
        "0002.bmp": "is the same image as 0001.png, which is labeled '0001'",
    }
    assert scan(folder_config(folder)).sizes == {"32x16": 2}


@pytest.mark.parametrize("policy", ["keep", "skip", "error"])
def test_the_policy_for_repeated_images(folder: Path, policy: str) -> None:
    fill(folder)
    shutil.copy(folder / "00000-0000.png", folder / "0000_2.png")
    config = folder_config(folder, on_duplicate=policy)
    if policy == "error":
        text = error_lines(config)
        assert "0000_2.png  is the same image as 00000-0000.png" in text
        assert "or train on the other 60 with data.on_duplicate=skip" in text
        return
    manifest = load_dataset(config).manifest
    assert manifest["images"] == (61 if policy == "keep" else 60)
    assert [bad["kind"] for bad in manifest["rejected"]] == ([] if policy == "keep" else ["duplicate"])


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_the_policy_for_images_with_two_labels(folder: Path, policy: str) -> None:
    fill(folder)
    shutil.copy(folder / "00000-0000.png", folder / "0001.png")
    config = folder_config(folder, on_conflict=policy, on_invalid="skip")
    if policy == "error":
        assert "or train on the other 59 with data.on_conflict=skip" in error_lines(config)
    else:
        assert load_dataset(config).manifest["images"] == 59


def test_duplicates_with_the_same_label_are_in_one_split(folder: Path) -> None:
    fill(folder)
    for n in range(60):
        shutil.copy(folder / f"{n:05}-{n * 37 % 10_000:04}.png", folder / f"{n * 37 % 10_000:04}_2.png")
    data = load_dataset(folder_config(folder))
    label_sets = {name: {data.labels[n] for n in rows} for name, rows in data.split_indices.items()}
    assert len(data.labels) == 120
    assert [group["kind"] for group in data.manifest["duplicates"]] == ["bytes"] * 60
    assert sum(map(len, label_sets.values())) == len(set.union(*label_sets.values())) == 60
    for rows in data.split_indices.values():
        assert len({data.images[n].numpy().tobytes() for n in rows}) == len(rows) / 2


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of decoded images."""
    names: list[str] = []
    original = sources.decoder._check_unchanged

    def spy(candidate: Any, content: Any) -> Any:
        names.append(candidate.name)
        return original(candidate, content)

    monkeypatch.setattr(sources.decoder, "_check_unchanged", spy)
    return names


def add_invalid_files(folder: Path) -> Path:
    """Add files that are rejected, ignored, or used with a remark."""
    write_files(
        folder, {"0001.png": b"", "00x1.png": png(), "0002.png": saved(page(77), "GIF"), "readme.txt": b""}
    )
    return folder


def test_images_are_decoded_once(folder: Path, decoded: list[str]) -> None:
    config = folder_config(add_invalid_files(fill(folder)), on_invalid="skip")
    first, again = load_dataset(config), load_dataset(config)
    assert len(decoded) == len(set(decoded)) == 62
    assert torch.equal(first.images, again.images)
    assert first.manifest == again.manifest


def test_the_cached_scan_equals_the_scan(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = folder_config(add_invalid_files(fill(folder)), on_invalid="skip")
    first = inspect(config)
    fresh = warnings(caplog), [line for line in infos(caplog) if not line.startswith("Decoded ")]
    dataset.load_or_build(first)
    caplog.clear()
    again = inspect(config)
    assert (warnings(caplog), infos(caplog)) == fresh
    assert first.scan == again.scan == scan(config)
    assert len(first.scan.rejected) == 2


def test_the_same_content_in_another_folder_uses_the_same_cache_file(
    folder: Path, decoded: list[str]
) -> None:
    fill(folder)
    config = folder_config(folder)
    load_dataset(config)
    decoded.clear()
    copy = shutil.copytree(folder, folder.parent / "copy")
    table = "".join(f"{name},{label}\n" for name, label in used(config).items())
    write_files(copy, {"../table/labels.csv": ("file,label\n" + table).encode()})
    shutil.copytree(folder, folder.parent / "table", dirs_exist_ok=True)
    decoded.clear()
    for equivalent in (
        folder_config(copy),
        folder_config(folder, on_invalid="skip"),
        folder_config(folder, filename_pattern=r"\d+-(?P<label>\d{4})"),
        folder_config(folder, labels="names"),
        folder_config(folder.parent / "table"),
        folder_config(folder, split_seed=1, test_fraction=0.3),
    ):
        assert inspect(equivalent).key == inspect(config).key
        load_dataset(equivalent)
    assert decoded == []


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "00001-0037.png").write_bytes(png(99)),
        lambda folder: (folder / "00001-0037.png").rename(folder / "00001-0038.png"),
        lambda folder: (folder / "00001-0037.png").rename(folder / "90001-0037.png"),
        lambda folder: (folder / "00001-0037.png").unlink(),
        lambda folder: (folder / "9999.png").write_bytes(png(99)),
    ],
    ids=["content", "label", "name", "deleted", "new"],
)
def test_other_content_has_another_cache_file(folder: Path, change: Callable[[Path], Any]) -> None:
    config = folder_config(fill(folder))
    before = inspect(config).key
    change(folder)
    assert inspect(config).key != before


def test_another_label_in_the_table_has_another_cache_file(folder: Path) -> None:
    def key(label: str) -> str:
        write_files(folder, {"a.png": png(99), "labels.csv": f"file,label\n{rows}a.png,{label}\n".encode()})
        return inspect(folder_config(folder)).key

    fill(folder)
    rows = "".join(f"{name},{label}\n" for name, label in used(folder_config(folder)).items())
    assert len({key("0001"), key("0002")}) == 2
    assert key("0001") == key("0001")


def test_other_captcha_options_have_another_cache_file(folder: Path) -> None:
    fill(folder)
    keys = {inspect(folder_config(folder)).key}
    keys |= {
        inspect(folder_config(folder, captcha)).key
        for captcha in ({"width": 33}, {"channels": 3}, {"case": "keep"})
    }
    assert len(keys) == 4


def test_a_damaged_cache_file_is_rebuilt(
    folder: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = folder_config(add_invalid_files(fill(folder)), on_invalid="skip")
    original = load_dataset(config)
    images = original.images.clone()
    path = Path(config.data.cache) / f"{original.manifest['key']}.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    decoded.clear()
    caplog.clear()
    again = load_dataset(config)
    assert len(decoded) == 62
    (_, warning) = warnings(caplog)  # the first one lists the rejected images
    assert "is damaged" in warning
    assert torch.equal(again.images, images)
    assert again.manifest == original.manifest


def test_ignored_files_are_not_cached(folder: Path) -> None:
    config = folder_config(fill(folder))
    load_dataset(config)
    write_files(folder, {"notes.txt": b""})
    assert load_dataset(config).manifest["ignored"] == ["notes.txt"]


# -- a folder with many invalid files ------------------------------------------------------------------------


class MixedFolder(NamedTuple):
    """A folder with valid and invalid files."""

    path: Path
    good: int
    bad: dict[str, str]  # file -> pattern of the reason
    remarks: dict[str, list[str]]  # remark -> used files


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MixedFolder:
    path = fill(tmp_path_factory.mktemp("mixed") / "images", 200)
    elsewhere = write_files(path.parent / "elsewhere", {"7001.png": png(701)})
    clear = page(702).convert("RGBA")
    clear.putalpha(page(703))
    write_files(
        path,
        {
            "9001.png": saved(page(704).convert("P"), "GIF"),
            "9002.png": saved(Image.fromarray(noise(16, 32, seed=706).astype(np.uint16) * 256), "PNG"),
            "9003.png": saved(clear, "PNG"),
            "8001.png": b"",
            "8002.png": png()[:100],
            "8003.jpg": saved(page(), "JPEG")[:-30],
            "8004.png": png()[:8],
            "8005.png": b"8005\n",
            "8006.jpg": b"<html><body>403 Forbidden</body></html>",
            "8007.png": saved(page(), "TIFF"),
            "8008.tif": saved(page(), "TIFF"),
            "8009.png": bomb(14_000, 10_000),
            "8010.png": bomb(3000, 2000),
            "8011.png": saved(Image.new("L", (32, 16), 255), "PNG"),
            "80120.png": png(),
            "801.png": png(),
            "8a14.png": png(),
            "8\n15.png": png(),
            os.fsdecode(b"81\xff6.png"): png(),
            "8017.png": png(705),
            "8018.gif": saved(page(705), "GIF"),
            "Thumbs.db": b"",
        },
    )
    (path / "8019.png").symlink_to("8020.png")
    (path / "8020.png").symlink_to("8019.png")
    (path / "8021.png").symlink_to("nowhere.png")
    (path / "8022.png").symlink_to(elsewhere)
    (path / "back").symlink_to(path)
    os.mkfifo(path / "8025.png")
    with (path / "8026.png").open("wb") as huge:
        huge.truncate(70 * 2**30)
    return MixedFolder(
        path,
        203,
        {
            "8001.png": r"is empty \(0 bytes\)",
            "8002.png": r"is damaged or truncated: .+",
            "8003.jpg": r"is damaged or truncated: .+",
            "8004.png": r"is not an image in a supported format .+, or is truncated",
            "8005.png": r"is not an image in a supported format .+",
            "8006.jpg": r"is not an image in a supported format .+",
            "8007.png": r"is not an image in a supported format .+",
            "8008.tif": r"is not an image in a supported format .+",
            "8009.png": r"has over 89,478,485 pixels; the maximum is 4,000,000",
            "8010.png": r"has 3000x2000 pixels; the maximum is 4,000,000",
            "8011.png": r"is blank: all pixels are equal",
            "80120.png": r"label '80120' has 5 characters; captcha.length is 4",
            "801.png": r"label '801' has 3 characters; captcha.length is 4",
            "8a14.png": r"label '8a14' has 'a', not in captcha.alphabet",
            "8\n15.png": r"has no label in its name \(data\.filename_pattern is .+\)",
            os.fsdecode(b"81\xff6.png"): r"label '81\\udcff6' has '\\udcff', not in captcha.alphabet",
            "8017.png": r"is the same image as 8018.gif, which is labeled '8018'",
            "8018.gif": r"is the same image as 8017.png, which is labeled '8017'",
            "8019.png": r"cannot be read: Too many levels of symbolic links",
            "8020.png": r"cannot be read: Too many levels of symbolic links",
            "8021.png": r"cannot be read: No such file or directory",
            "8022.png": r"is a symbolic link to a folder, which is not followed",
            "back": r"is a symbolic link to a folder, which is not followed",
            "8025.png": r"is not a regular file",
            "8026.png": r"has 71,680 MiB; the maximum is 64 MiB",
        },
        {
            "has 16 bits per pixel; only the upper 8 are used": ["9002.png"],
            "has transparent pixels, which become white": ["9003.png"],
        },
    )


def run_command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process in which every Python warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "captcha_exp", *arguments],
        env={**os.environ, "CAPTCHA_EXP_ROOT": str(root), "PYTHONIOENCODING": "utf-8:strict"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_table(text: str, bad: dict[str, str]) -> None:
    """Check that the output has one row per bad file, with its reason."""
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(rows) == len(bad)
    for name, reason in bad.items():
        row = re.compile(f"  {re.escape(escape_unprintable(name))} +{reason}")
        assert len([line for line in rows if row.fullmatch(line)]) == 1, name


def test_invalid_files_are_an_error_with_a_table_and_nothing_is_created(
    mixed: MixedFolder, root: Path
) -> None:
    done = run_command(root, "train", *FOLDER_OVERRIDES, f"data.path={mixed.path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert (
        f"data.path={mixed.path}: 25 of 228 images cannot be used; "
        "fix or remove them, or train on the other 203 with data.on_invalid=skip "
        "data.on_conflict=skip\n"
    ) in done.stderr
    check_table(done.stderr, mixed.bad)
    for remark, names in mixed.remarks.items():
        assert f"Used (1): {remark} ({names[0]})\n" in done.stderr
    assert list(root.iterdir()) == []


@pytest.mark.long
def test_on_invalid_skip_trains_on_the_valid_files(mixed: MixedFolder, root: Path) -> None:
    skip = ("data.on_invalid=skip", "data.on_conflict=skip")
    done = run_command(root, "train", *FOLDER_OVERRIDES, f"data.path={mixed.path}", *skip)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (
        f"warning: data.path={mixed.path}: 25 of 228 images cannot be used; "
        "training on the other 203 (data.on_invalid=skip, data.on_conflict=skip)\n"
    ) in done.stderr
    check_table(done.stderr, mixed.bad)
    (record,) = root.glob("outputs/*/*-tiny/dataset.json")
    manifest = json.loads(record.read_text(encoding="utf-8"))
    assert {bad["file"] for bad in manifest["rejected"]} == set(mixed.bad)
    assert manifest["remarks"] == mixed.remarks
    assert manifest["ignored"] == ["Thumbs.db"]
    assert manifest["images"] == len(manifest["files"]) == sum(manifest["splits"].values()) == mixed.good
    assert manifest["sizes"] == {"32x16": mixed.good}
    assert manifest["lengths"] == {"4": mixed.good}
    assert {"file": "00001-0037.png", "label": "0037"}.items() <= manifest["files"][1].items()
    assert len(manifest["files"][1]["sha256"]) == 64


def test_data_command_lists_all_files_as_json(
    mixed: MixedFolder, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip = ["data.on_invalid=skip", "data.on_conflict=skip"]
    arguments = ["data", "--json", "--preview", *FOLDER_OVERRIDES, f"data.path={mixed.path}", *skip]
    monkeypatch.setattr(sys, "argv", ["captcha-exp", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0
    manifest = json.loads(capsys.readouterr().out)
    assert {bad["file"]: bad["reason"] for bad in manifest["rejected"]}.keys() == mixed.bad.keys()
    assert manifest["images"] == mixed.good
    assert Path(manifest["preview"]).is_file()
    assert Path(manifest["page"]).is_file()
    assert {bad["file"] for bad in manifest["rejected"] if bad["kind"] == "conflict"} == {
        "8017.png",
        "8018.gif",
    }


def test_a_long_table_is_truncated_with_a_hint(folder: Path) -> None:
    write_files(folder, {f"{n:04}x.png": png() for n in range(60)})
    fill(folder)
    lines = error_lines(folder_config(folder)).splitlines()
    assert len(lines) == 52
    assert lines[-1] == "  and 10 more; captcha-exp data --json data.on_invalid=skip ... lists all"


def test_a_folder_with_only_invalid_files_is_an_error_even_with_skip(folder: Path) -> None:
    write_files(folder, {"0001.png": b"", "0002.png": b""})
    first, *table = error_lines(folder_config(folder, on_invalid="skip")).splitlines()
    assert first.endswith("2 of 2 images cannot be used; fix or remove them")
    assert len(table) == 2


def test_file_names_that_are_not_utf8_are_stored_in_the_manifest(folder: Path) -> None:
    odd = os.fsdecode(b"latin\xfc/0001.png")
    write_files(fill(folder), {odd: png(99)})
    result = train(folder_config(folder))
    manifest = json.loads((result.run_dir / "dataset.json").read_bytes())
    assert odd in {file["file"] for file in manifest["files"]}


def test_evaluating_a_run_warns_if_its_images_have_changed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(folder_config(fill(folder)))
    caplog.clear()
    again, _ = evaluate_run(result.run_dir, "test")
    assert (again.predicted == result.test.predicted).all()
    assert again.accuracy == result.test.accuracy
    assert warnings(caplog) == []

    write_files(folder, {"9999.png": png(99)})
    evaluate_run(result.run_dir, "test")
    (warning,) = warnings(caplog)
    assert warning.startswith("the images differ from those of the run: source.files_sha256 ")

    for damage in ("{", "[1]", ""):
        (result.run_dir / "dataset.json").write_text(damage)
        with pytest.raises(UserError, match=r"dataset\.json: was edited, or is damaged .+; restore it"):
            evaluate_run(result.run_dir, "test")


# -- images and rows that are named otherwise ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_an_image_without_a_suffix_is_found_by_its_content(folder: Path, kind: str) -> None:
    names = {
        "0001": 1,
        "0002.png?t=1": 2,
        "0003?t=1&x=2": 3,
        "0004.JPG@v=1": 4,
        "0005.dat": 5,
        "0006.png.1": 6,
    }
    write_files(folder, {name: saved(page(n), kind) for name, n in names.items()})
    write_files(
        folder, {"BMarks": b"BM is no image", "RIFF.txt": b"RIFF....WAVE", ".0007": png(), "empty": b""}
    )
    os.mkfifo(folder / "pipe")
    config = folder_config(folder)
    if kind == "TIFF":
        assert len(rejected(config)) == len(names)
    else:
        assert used(config) == {name: name[:4] for name in names}
    assert ignored(config) == [".0007", "BMarks", "RIFF.txt", "empty", "pipe"]
    assert [path.name for path in sources.folder.list_images(folder)] == sorted(names)


@pytest.mark.parametrize(
    "named", ["./0001.png", ".\\0001.png", "{folder}/0001.png", "../images/0001.png", "{folder}\\0001.png"]
)
def test_rows_may_name_files_in_other_ways(folder: Path, named: str) -> None:
    table = f"file,label\n{named.format(folder=folder)},1234\n"
    write_files(folder, {"0001.png": png(), "labels.csv": table.encode()})
    assert used(folder_config(folder)) == {"0001.png": "1234"}


def test_rows_may_name_files_relative_to_the_table(folder: Path) -> None:
    write_files(folder, {"0001.png": png(), "../labels.csv": b"file,label\nimages/0001.png,1234\n"})
    assert used(folder_config(folder, labels="../labels.csv")) == {"0001.png": "1234"}


@pytest.mark.parametrize(
    ("named", "file"),
    [
        ("images/{n:04}.png", "{n:04}.png"),
        ("{n:04}.png", "images/{n:04}.png"),
        ("{n:04}", "{n:04}.png"),
        ("{n:04}.PNG", "{n:04}.png"),
        ("C:\\captchas\\{n:04}.jpg", "{n:04}.png"),
        ("https://example.org/{n:04}.png?t=1", "{n:04}.png"),
    ],
)
def test_a_name_that_is_found_once_is_offered_and_not_used_unasked(
    folder: Path, named: str, file: str
) -> None:
    names = range(100, 160)
    write_files(folder, {file.format(n=n): png(n) for n in names})
    table = "file,label\n" + "".join(f"{named.format(n=n)},{n * 37 % 10_000:04}\n" for n in names)
    write_files(folder, {"labels.csv": table.encode()})
    first, cause, *others = error_lines(folder_config(folder)).splitlines()
    assert first.endswith("60 of 60 images and 60 rows of labels.csv cannot be used; fix or remove them")
    assert cause.startswith("60 of the 60 rows of labels.csv name no file in the folder: row 2 names ")
    assert cause.endswith("; to find 60 of them by the file name alone, add data.match_by=name")
    assert len(others) == 1
    assert re.match("  60 images  has no label in labels.csv ", others[0])
    matched = used(folder_config(folder, match_by="name"))
    assert matched == {file.format(n=n): f"{n * 37 % 10_000:04}" for n in names}


def test_a_name_that_several_files_have_is_not_matched(folder: Path) -> None:
    write_files(
        folder, {"a/0001.png": png(1), "b/0001.png": png(2), "labels.csv": b"file,label\n0001.png,1234\n"}
    )
    assert "match_by" not in error_lines(folder_config(folder))
    assert used(folder_config(folder, match_by="name")) == {}


def test_skipping_is_only_advised_if_it_works(folder: Path) -> None:
    write_files(folder, {"0001.png": png(1), "0002.png": png(2), "x.png": png(3)})
    assert "data.on_invalid=skip" not in error_lines(folder_config(folder))


# -- the cache directory ------------------------------------------------------------------------------------


def test_a_cache_directory_that_cannot_be_written_is_an_error_at_once(folder: Path) -> None:
    fill(folder)
    (folder.parent / "file").write_bytes(b"")
    (folder.parent / "nowhere").symlink_to("gone")
    for name, reason in {
        "file": "is not a directory",
        "file/below": "is not a directory",
        "a" * 300: "cannot be used: File name too long",
        "nul\0": "cannot be used: embedded null byte",
    }.items():
        line = error_lines(folder_config(folder, cache=str(folder.parent / name)))
        assert line.startswith("data.cache=")
        assert line.endswith(f" {reason}")
    line = error_lines(folder_config(folder, cache=str(folder.parent / "nowhere" / "below")))
    assert line.endswith(
        "nowhere: is a symbolic link to gone, which does not exist; mount its disk, or remove the link"
    )


def test_the_cache_of_a_saved_run_stays_inside_unless_it_is_one(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside.parent / "link").unlink(missing_ok=True)
    fill(folder)
    (folder.parent / "link").symlink_to(outside)
    for path in (str(outside), f"../{outside.name}/x", "link", "/nul\0"):
        config = folder_config(folder, cache=path)
        assert dataset.with_trusted_cache(config).data.cache == "outputs/cache"
    for path in ("outputs/cache", "elsewhere/cache", str(folder.parent / "cache")):
        assert dataset.with_trusted_cache(folder_config(folder, cache=path)).data.cache == path
    load_dataset(folder_config(folder, cache=str(outside)))
    assert dataset.with_trusted_cache(folder_config(folder, cache=str(outside))).data.cache == str(outside)
