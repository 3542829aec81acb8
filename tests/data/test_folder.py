"""Folders as people have them: what is used, what is refused and why, and that nothing is lost in silence."""

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
from conftest import TINY, Heard
from PIL import Image
from support.image_files import Bytes, bomb, noise, page, saved

from captcha_exp import compose, load
from captcha_exp.cli import main
from captcha_exp.config import Config, resolve
from captcha_exp.data import dataset, sources
from captcha_exp.data.dataset import Dataset, DatasetSpec
from captcha_exp.data.images import resize
from captcha_exp.data.sources import ScanResult
from captcha_exp.data.sources.folder import IMAGE_SUFFIXES
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.model.evaluate import evaluate_run
from captcha_exp.runtime.console import NullDisplay, escape_unprintable
from captcha_exp.runtime.device import detect_machine
from captcha_exp.training.train import train

OF_FOLDERS = (
    *(text for text in TINY if text.split("=")[0] not in ("data.count", "data.workers", "captcha.alphabet")),
    "captcha.alphabet='0123456789'",
    "captcha.length=4",
    "captcha.channels=1",
    "device.threads=1",
    "tracking=none",
    "data=folder",
)


@cache
def composed() -> Config:
    return load(compose(*OF_FOLDERS, "data.path=."))


def of(folder: Path, captcha: dict[str, Any] | None = None, **data: Any) -> Config:
    """The tiny config with the pictures of this folder, and a cache beside it."""
    here = {"path": str(folder), "cache": str(folder.parent / "cache"), **data}
    config = replace(composed(), data=replace(composed().data, **here))
    return replace(config, captcha=replace(config.captcha, **(captcha or {})))


def verdict(config: Config) -> ScanResult:
    """What became of each file, as it is found now."""
    return sources.make_source(config.data, config.captcha, NullDisplay()).scan(NullDisplay())


def used(config: Config) -> dict[str, str]:
    """File -> label."""
    said = verdict(config)
    return {name: label for (name, _), label in zip(said.files, said.labels, strict=True)}


def refused(config: Config) -> dict[str, str]:
    """File -> reason; each once."""
    said = verdict(config).refused
    assert len({name for name, _ in said}) == len(said)
    return dict(said)


def others(config: Config) -> list[str]:
    return sources.make_source(config.data, config.captcha, NullDisplay()).ignored


def outline(config: Config, display: NullDisplay | None = None) -> DatasetSpec:
    return dataset.inspect_dataset(config, display or NullDisplay())


def prepare(config: Config, display: NullDisplay | None = None) -> Dataset:
    return dataset.load_or_build(outline(config), config, display or NullDisplay())


def mistake(config: Config) -> str:
    """The lines that a config is refused with."""
    with pytest.raises(UserError) as error:
        outline(config)
    return "\n".join(error.value.lines)


def png(seed: int = 0) -> bytes:
    return saved(page(seed), "PNG")


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fill(folder: Path, count: int = 60) -> Path:
    """Pictures, each with pixels and a label of its own."""
    return put(folder, {f"{n:05}-{n * 37 % 10_000:04}.png": png(n) for n in range(count)})


@pytest.fixture
def folder(root: Path) -> Path:
    made = root / "images"
    made.mkdir()
    return made


# -- pictures ------------------------------------------------------------------------------------------------


def test_the_kind_is_told_by_the_content_whatever_the_ending(folder: Path) -> None:
    usual = {
        "PNG": {".png", ".apng"},
        "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
        "GIF": {".gif"},
        "BMP": {".bmp"},
        "WebP": {".webp"},
    }
    told: dict[str, list[str]] = {}
    for n, (kind, ending) in enumerate((kind, ending) for kind in usual for ending in sorted(IMAGE_SUFFIXES)):
        name = f"{n:04}{ending if n % 2 else ending.upper()}"
        put(folder, {name: saved(page(n), kind.upper())})
        if ending not in usual[kind]:
            told.setdefault(f"is a {kind}, whatever its name says", []).append(name)
    said = verdict(of(folder))
    assert (len(said.labels), said.refused) == (5 * len(IMAGE_SUFFIXES), [])
    assert said.notes == told
    assert others(of(folder)) == []


def test_pictures_of_the_size_asked_for_keep_their_bytes(folder: Path) -> None:
    pixels = [noise(16, 32, seed=n) for n in range(60)]
    put(folder, {f"{n:04}.png": saved(Image.fromarray(array), "PNG") for n, array in enumerate(pixels)})
    assert (prepare(of(folder)).images.numpy()[..., 0] == np.stack(pixels)).all()


def test_pictures_of_every_size_go_through_the_one_resize(folder: Path) -> None:
    def pixels(n: int) -> Bytes:
        return noise(20 + n % 3, 50, 3, seed=n)

    put(folder, {f"{n:04}.png": saved(Image.fromarray(pixels(n)), "PNG") for n in range(60)})
    data = prepare(of(folder, {"channels": 3}))
    for n, image in enumerate(data.images.numpy()):
        assert (image == resize(pixels(n)[None], 16, 32)[0]).all()
    assert data.manifest["sizes"] == {"50x20": 20, "50x21": 20, "50x22": 20}


def test_a_gif_of_a_palette_that_is_called_png_is_used(folder: Path) -> None:
    """As the site that this was first tried on serves them."""
    image = page().convert("P")
    put(folder, {"00000-R865.png": saved(image, "GIF")})
    config = of(folder, {"alphabet": "0123456789R"})
    assert used(config) == {"00000-R865.png": "R865"}
    assert verdict(config).notes == {"is a GIF, whatever its name says": ["00000-R865.png"]}


def test_a_picture_that_shows_nothing_is_refused(folder: Path) -> None:
    put(
        folder,
        {
            "0001.png": saved(Image.new("L", (32, 16), 255), "PNG"),
            "0002.png": saved(Image.new("RGBA", (32, 16), (9, 9, 9, 0)), "PNG"),
            "0003.png": png(),
        },
    )
    nothing = "shows nothing: every pixel is the same"
    assert refused(of(folder)) == {"0001.png": nothing, "0002.png": nothing}


# -- labels in names -----------------------------------------------------------------------------------------


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
def test_the_label_stands_in_the_name(folder: Path, name: str, label: str) -> None:
    put(folder, {name: png()})
    assert used(of(folder, {"alphabet": "0123456789R"})) == {name: label}


def test_a_pattern_of_ones_own_finds_the_label_elsewhere(folder: Path) -> None:
    put(folder, {"captcha.0444.7.png": png(1), "captcha.0555.8.png": png(2), "cover.png": png(3)})
    config = of(folder, pattern=r"captcha\.(?P<label>\d+)\.\d")
    assert used(config) == {"captcha.0444.7.png": "0444", "captcha.0555.8.png": "0555"}
    assert refused(config) == {
        "cover.png": r"has no label in its name (data.filename_pattern is captcha\.(?P<label>\d+)\.\d)"
    }


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?P<label>[", "is no regular expression: "),
        ("(?P<label>a{99999999999999999999})", "is no regular expression: "),
        ("(.+)", "must have a group named label, as in (?P<label>.+)"),
    ],
)
def test_a_pattern_that_finds_no_label_is_a_mistake_of_the_config(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(compose("data=folder", "data.path=.", f"data.filename_pattern='{pattern}'"))
    (line,) = error.value.lines
    assert line.startswith(f'data.filename_pattern="{pattern}": {words}')


def test_the_command_line_takes_the_pattern_in_quotes() -> None:
    pattern = r"(\d+-)?(?P<label>.+?)(_\d+)?"
    config = load(compose("data=folder", "data.path=.", f"data.filename_pattern='{pattern}'"))
    assert config == load(compose("data=folder", "data.path=."))


def test_letters_are_folded_into_the_case_that_the_alphabet_has(folder: Path) -> None:
    put(folder, {"aB12.png": png(1), "AB34.png": png(2), "1234.png": png(3)})
    folded, kept = ({"alphabet": "0123456789ab", "case": case} for case in ("fold", "keep"))
    assert used(of(folder, folded)) == {"aB12.png": "ab12", "AB34.png": "ab34", "1234.png": "1234"}
    assert used(of(folder, kept)) == {"1234.png": "1234"}
    assert refused(of(folder, kept)) == {
        "aB12.png": "label 'aB12' has 'B', not in captcha.alphabet",
        "AB34.png": "label 'AB34' has 'A', 'B', not in captcha.alphabet",
    }


@pytest.mark.parametrize("case", ["fold", "keep"])
def test_an_alphabet_with_both_cases_folds_nothing(folder: Path, case: str) -> None:
    put(folder, {"aB12.png": png(1), "Ab12.png": png(2)})
    config = of(folder, {"alphabet": "0123456789abAB", "case": case})
    assert used(config) == {"aB12.png": "aB12", "Ab12.png": "Ab12"}


def test_characters_that_macos_takes_apart_are_put_together(folder: Path) -> None:
    apart = unicodedata.normalize("NFD", "äöü1")
    assert len(apart) == 7
    put(folder, {f"{apart}.png": png()})
    assert used(of(folder, {"alphabet": "äöü1"})) == {f"{apart}.png": "äöü1"}


# -- labels in a table ---------------------------------------------------------------------------------------

ONE, TWO = "a.png", "sub folder/bü.png"
ROWS = {ONE: "0012", TWO: "3456"}


def csv(separator: str = ",", end: str = "\n", header: tuple[str, str] = ("file", "label")) -> str:
    return "".join(separator.join(row) + end for row in (header, *ROWS.items()))


JSONL = "\n".join(json.dumps({"file": file, "label": label}) for file, label in ROWS.items())
TABLES = {
    "commas": ("labels.csv", csv()),
    "UTF-8 as Excel marks it": ("labels.csv", "\ufeff" + csv()),
    "Excel in Germany": ("labels.csv", "\ufeff" + csv(";", "\r\n")),
    "tabs under another name": ("labels.csv", csv("\t")),
    "column names in any case": ("labels.csv", csv(header=(" File_Name ", "TEXT"))),
    "quotes, spaces and empty lines": (
        "labels.csv",
        'label,"file"\r\n"0012","a.png"\r\n\r\n 3456 , sub folder/bü.png ',
    ),
    "more columns than needed": (
        "labels.csv",
        "id,path,file,text,label,note\n1,x,a.png,x,0012,\n2,x,sub folder/bü.png,y,3456,z,zz\n",
    ),
    "a row twice, paths as Windows writes them": (
        "labels.csv",
        "file,label\n./a.png,0012\na.png,0012\nsub folder\\bü.png,3456\n",
    ),
    "characters taken apart": ("labels.csv", unicodedata.normalize("NFD", csv())),
    "a name in capitals": ("Labels.CSV", csv()),
    "tabs": ("labels.tsv", csv("\t")),
    "tabs from Windows": ("labels.tsv", "\ufeff" + csv("\t", "\r\n")),
    "JSON": ("labels.jsonl", JSONL),
    "JSON with more in it": (
        "labels.jsonl",
        '\ufeff{"image": "a.png", "code": "0012", "size": [9, 9]}\r\n\r\n'
        '{"code": "3456", "image": "sub folder/bü.png"}\r\n',
    ),
}


@pytest.mark.parametrize(("name", "content"), TABLES.values(), ids=TABLES)
def test_labels_stand_in_a_table(folder: Path, name: str, content: str) -> None:
    put(folder, {ONE: png(1), TWO: png(2), name: content.encode()})
    assert used(of(folder)) == ROWS
    assert refused(of(folder)) == {}
    assert others(of(folder)) == []


def test_a_name_that_macos_has_taken_apart_is_found_by_the_table(folder: Path) -> None:
    apart = unicodedata.normalize("NFD", TWO)
    assert apart != TWO
    put(folder, {ONE: png(1), apart: png(2), "labels.csv": csv().encode()})
    assert used(of(folder)) == {ONE: "0012", apart: "3456"}
    assert refused(of(folder)) == {}


@pytest.mark.parametrize("label", ["00123", "NA", "null", "None", "nan", "1e5", "true", "007"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_label_is_text_and_stays_as_it_is(folder: Path, label: str, kind: str) -> None:
    rows = {"csv": f"file,label\na.png,{label}\n", "tsv": f"file\tlabel\na.png\t{label}\n"}
    rows["jsonl"] = json.dumps({"file": "a.png", "label": label})
    put(folder, {"a.png": png(), f"labels.{kind}": rows[kind].encode()})
    config = of(
        folder, {"alphabet": "".join(sorted({*label, "x", "y"})), "length": len(label), "case": "keep"}
    )
    assert used(config) == {"a.png": label}


def test_a_table_may_name_a_file_with_any_ending(folder: Path) -> None:
    put(folder, {"one.dat": png(1), "two": png(2), "labels.csv": b"file,label\none.dat,0001\ntwo,0002\n"})
    assert used(of(folder)) == {"one.dat": "0001", "two": "0002"}
    assert others(of(folder)) == []


def test_data_labels_names_the_table_or_the_names(folder: Path) -> None:
    files = {
        "0001.png": png(),
        "labels.csv": b"file,label\n0001.png,0002\n",
        "mine/More.TSV": b"file\tlabel\n0001.png\t0003\n",
    }
    put(folder, files)
    assert used(of(folder)) == {"0001.png": "0002"}
    assert used(of(folder, labels="mine/More.TSV")) == {"0001.png": "0003"}
    assert used(of(folder, labels="names")) == {"0001.png": "0001"}
    assert others(of(folder, labels="mine/More.TSV")) == ["labels.csv"]
    assert others(of(folder, labels="names")) == ["labels.csv", "mine/More.TSV"]


def test_every_row_and_every_picture_that_do_not_belong_together_are_named(folder: Path) -> None:
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
    put(folder, {**{f"{name}.png": png(n) for n, name in enumerate("abcde")}, "sub/0001.png": png(9)})
    put(folder, {"labels.csv": table.encode(), "../outside.png": png()})
    (folder / "links.png").symlink_to(folder / "sub")
    assert used(of(folder)) == {"a.png": "0001"}
    assert refused(of(folder)) == {
        "b.png": "has two labels in labels.csv: '0002' and '0003'",
        "c.png": "has no label in labels.csv",
        "d.png": "has no label in labels.csv",
        "e.png": "has no label in labels.csv",
        "links.png": "is a link to a folder, which is not followed",
        "sub": "is a folder",
        "sub/0001.png": "has no label in labels.csv",
        "labels.csv, row 6": "names gone.png, which is not there",
        "labels.csv, row 7": "names ../outside.png, which is outside the folder",
        "labels.csv, row 8": "names /etc/passwd, which is outside the folder",
        "labels.csv, row 9": "names no file",
        "labels.csv, row 12": r"names nul\x00.png, which is not there",
    }


def test_a_row_that_names_a_link_to_a_folder_is_told_once(folder: Path) -> None:
    put(folder, {"a.png": png(), "sub/x": b"", "labels.csv": b"file,label\na.png,0001\nlink,0002\n"})
    (folder / "link").symlink_to(folder / "sub")
    assert refused(of(folder)) == {"link": "is a folder"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("labels.csv", b"name,label\na.png,0001\n", "row 2: has no column file (or file_name, "),
        ("labels.csv", b"file,solution\na.png,0001\n", "row 2: has no column label (or text, code); its"),
        ("labels.csv", b"a.png,0001\nb.png,0002\n", "row 2: has no column file (or file_name, filename, "),
        ("labels.csv", b"file|label\na.png|0001\n", "columns are file|label"),
        ("labels.csv", b"file,label\nb\xfc.png,0001\n", "cannot be read as a table of labels: 'utf-8' codec"),
        ("labels.csv", csv().encode("utf-16"), "cannot be read as a table of labels: 'utf-8' codec"),
        ("labels.csv", b'file,label\n"a.png,0001\nb.png,0002\n', "unexpected end of data"),
        ("labels.csv", b"file,label\n" + b"a" * 200_000 + b",0001\n", "field larger than field limit"),
        ("labels.tsv", b"file\tsolution\na.png\t0001\n", "row 2: has no column label"),
        (
            "labels.jsonl",
            b'{"file": "a.png", "label": 123}',
            "row 1: label is 123, which is no text; write it",
        ),
        ("labels.jsonl", b'\n{"file": 7, "label": "0001"}', "row 2: file is 7, which is no text"),
        (
            "labels.jsonl",
            b'{"file": "a.png"}',
            "row 1: has no column label (or text, code); its columns are file",
        ),
        ("labels.jsonl", b'{"file": "a.png", "label"', "row 1: is no JSON: "),
        ("labels.jsonl", b"[" * 100_000, "row 1: is no JSON: "),
        ("labels.jsonl", b'["a.png", "0001"]', "row 1: is no JSON object with the keys file and label"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(folder: Path, name: str, content: bytes, words: str) -> None:
    put(folder, {"a.png": png(), name: content})
    line = mistake(of(folder))
    assert line.startswith(str(folder / name))
    assert words in line
    assert "\n" not in line
    assert len(line) < 500


def test_half_characters_in_json_are_refused_like_any_other_strangers(folder: Path) -> None:
    rows = rb'{"file": "a.png", "label": "\ud800"}' + b"\n" + rb'{"file": "\udbff.png", "label": "0001"}'
    put(folder, {"a.png": png(), "labels.jsonl": rows})
    assert refused(of(folder)) == {
        "a.png": r"label '\ud800' has '\ud800', not in captcha.alphabet",
        "labels.jsonl, row 2": r"names \udbff.png, which is not there",
    }
    assert "4 characters" not in mistake(of(folder))


def test_two_tables_are_a_question(folder: Path) -> None:
    put(folder, {"a.png": png(), "labels.csv": b"file,label\n", "Labels.jsonl": b""})
    assert mistake(of(folder)) == (
        f"data.labels=null: Labels.jsonl and labels.csv are in {folder}; say which one, as data.labels=NAME"
    )


def test_a_table_that_is_not_there_is_one_line(folder: Path) -> None:
    fill(folder)
    assert mistake(of(folder, labels="my.csv")) == f"data.labels=my.csv: there is no such file in {folder}"
    with pytest.raises(
        ConfigError, match=r"^data\.labels=.labels\.xlsx.: must be null, names, or a file in "
    ):
        load(compose("data=folder", "data.path=.", "data.labels=labels.xlsx"))


# -- folders that cannot be used -----------------------------------------------------------------------------


def test_a_folder_has_to_be_given() -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.path: is missing; write text \(the folder; a relative one"
    ):
        load(compose("data=folder"))


def test_what_is_no_folder_of_pictures_is_one_line(folder: Path) -> None:
    put(folder, {"empty/.keep": b"", "only/readme.txt": b"", "only/.hidden.png": png(), "file": b""})
    nothing = "no picture in it (PNG, JPEG, GIF, BMP, WebP)"
    for name, words in {
        "nowhere": "there is no such folder",
        "file/in/a/file": "there is no such folder",
        "file": "is a file; give the folder that it is in",
        "empty": nothing,
        "only": nothing,
        "a" * 300: "cannot be looked at: File name too long",
    }.items():
        assert mistake(of(folder / name)) == f"data.path={folder / name}: {words}"


def test_a_path_that_leads_nowhere_is_one_line(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    for path in ("~nobody-of-this-name/pictures", str(folder / "circle")):
        try:
            config = resolve(of(folder, path=path), detect_machine())
        except ConfigError as error:  # Python 3.13 resolves a circle, and stumbles when it looks inside
            lines = error.lines
        else:
            lines = (mistake(config),)
        assert re.match(re.escape(f"data.path={path}: ") + "[^\n]+$", "\n".join(lines))


def test_a_folder_that_may_not_be_looked_at_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root may look everywhere, so the refusal is played."""
    forbidden(monkeypatch, folder)
    assert mistake(of(folder)) == f"data.path={folder}: cannot be read: Permission denied"


def forbidden(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path) == place:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_inside_that_may_not_be_looked_at_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, {"0001.png": png(), "lost+found/0002.png": png(2)})
    forbidden(monkeypatch, folder / "lost+found")
    assert used(of(folder)) == {"0001.png": "0001"}
    assert refused(of(folder)) == {"lost+found": "is a folder that cannot be read: Permission denied"}


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, {"0001.png": png(1), "0002.png": png(2)})
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "0002.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refused(of(folder)) == {"0002.png": "cannot be read: Permission denied"}


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(png(99)), lambda path: path.unlink()])
def test_a_folder_that_changes_under_the_reader_is_not_used(
    folder: Path, change: Callable[[Path], Any]
) -> None:
    """The cache is named after what was there; something else must not get into it."""
    fill(folder)
    config = of(folder, on_invalid="skip")
    source = sources.make_source(config.data, config.captcha, NullDisplay())
    change(folder / "00001-0037.png")
    with pytest.raises(UserError, match=r"00001-0037\.png has changed while it was read; start again$"):
        source.scan(NullDisplay())


def test_too_few_labels_for_the_splits_name_the_folder(folder: Path) -> None:
    fill(folder, 2)
    line = mistake(of(folder))
    assert line.startswith(f"data.path={folder}: 2 different labels leave the ")
    assert line.endswith(
        " split empty; take more pictures, or change data.validation_fraction and data.test_fraction"
    )
    assert not (folder.parent / "cache").exists()


def test_a_relative_path_is_recorded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("images", "./pictures/../pictures", "~/pictures"):
        resolved = resolve(of(folder, path=path), detect_machine())
        assert resolved.data == of(folder).data


# -- what else lies in folders -------------------------------------------------------------------------------


def test_what_is_no_picture_by_its_name_is_named_and_does_no_harm(folder: Path) -> None:
    fill(folder)
    clutter = ["Thumbs.db", ".DS_Store", "desktop.ini", "README.md", "__MACOSX/._00001-0037.png", "sub/notes"]
    put(folder, dict.fromkeys([*clutter, ".git/0001.png", ".cache/x/0002.png"], b"clutter"))
    heard = Heard()
    outline(of(folder), heard)
    assert others(of(folder)) == sorted([*clutter, ".git/", ".cache/"])
    assert heard.lines[-1] == "not pictures (8): .DS_Store, .cache/, .git/ and 5 more"
    assert heard.warnings == []


def test_what_runs_have_left_in_the_folder_is_no_picture_of_it(root: Path) -> None:
    """As with data.path=. of an installed package: the reports and the cache then lie inside."""
    config = of(fill(root), cache="outputs/cache")
    before = outline(config).key
    prepare(config)
    put(root, {"outputs/2026-01-01/1-tiny/report/curves.png": png(), "mlruns/1/confusion.png": png()})
    assert outline(config).key == before
    assert others(config) == ["mlruns/", "outputs/"]
    put(root, {"sub/outputs/9999.png": png(99)})
    assert "sub/outputs/9999.png" in used(config)


def test_a_folder_that_links_to_itself_is_walked_once(folder: Path) -> None:
    put(folder, {"sub/0001.png": png()})
    (folder / "again").symlink_to(folder)
    (folder / "sub/up.png").symlink_to(folder)
    reason = "is a link to a folder, which is not followed"
    assert used(of(folder)) == {"sub/0001.png": "0001"}
    assert refused(of(folder)) == {"again": reason, "sub/up.png": reason}


def test_a_link_to_a_picture_is_followed(folder: Path) -> None:
    put(folder.parent, {"elsewhere/x.png": png()})
    (folder / "0001.png").symlink_to(folder.parent / "elsewhere/x.png")
    (folder.parent / "link").symlink_to(folder)
    assert used(of(folder)) == used(of(folder.parent / "link")) == {"0001.png": "0001"}


def test_long_and_odd_names_are_names(folder: Path) -> None:
    names = [
        "0001_" + "1" * 240 + ".png",
        "0002 .png",
        "sp ace/0003.png",
        "ß€😀/0004.png",
        "-/0005.png",
        "'/0006.png",
    ]
    put(folder, {name: png(n) for n, name in enumerate(names)})
    assert set(used(of(folder))) == set(names) - {"0002 .png"}
    assert refused(of(folder)) == {"0002 .png": "label '0002 ' has ' ', not in captcha.alphabet"}


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
def test_a_name_is_shown_as_a_terminal_can_show_it(name: str, visible: str) -> None:
    assert escape_unprintable(name) == visible


# -- the same picture twice ----------------------------------------------------------------------------------


def test_one_picture_with_two_labels_is_refused_on_both_sides(folder: Path) -> None:
    """By its pixels: as another kind of file, too."""
    put(
        folder,
        {
            "0001.png": png(1),
            "0002.bmp": saved(page(1), "BMP"),
            "0003.png": png(3),
            "again/0003.bmp": saved(page(3), "BMP"),
        },
    )
    assert used(of(folder)) == {"0003.png": "0003", "again/0003.bmp": "0003"}
    assert refused(of(folder)) == {
        "0001.png": "is the same image as 0002.bmp, which is labeled '0002'",
        "0002.bmp": "is the same image as 0001.png, which is labeled '0001'",
    }
    assert verdict(of(folder)).sizes == {"32x16": 2}


def test_copies_with_one_label_are_kept_on_one_side(folder: Path) -> None:
    fill(folder)
    for n in range(60):
        shutil.copy(folder / f"{n:05}-{n * 37 % 10_000:04}.png", folder / f"{n * 37 % 10_000:04}_2.png")
    data = prepare(of(folder))
    sides = {name: {data.labels[n] for n in rows} for name, rows in data.split_indices.items()}
    assert len(data.labels) == 120
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 60
    for rows in data.split_indices.values():
        assert len({data.images[n].numpy().tobytes() for n in rows}) == len(rows) / 2


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each picture that is decoded."""
    names: list[str] = []
    real = sources.folder._read_unchanged

    def spy(folder: Path, candidate: Any) -> Any:
        names.append(candidate.name)
        return real(folder, candidate)

    monkeypatch.setattr(sources.folder, "_as_hashed", spy)
    return names


def spoil(folder: Path) -> Path:
    """Something for every field of a verdict."""
    put(folder, {"0001.png": b"", "00x1.png": png(), "0002.png": saved(page(77), "GIF"), "readme.txt": b""})
    return folder


def test_the_pictures_are_decoded_once(folder: Path, decoded: list[str]) -> None:
    config = of(spoil(fill(folder)), on_invalid="skip")
    first, again = prepare(config), prepare(config)
    assert len(decoded) == len(set(decoded)) == 62
    assert torch.equal(first.images, again.images)
    assert first.manifest == again.manifest


def test_the_cache_says_what_the_folder_said(folder: Path) -> None:
    config = of(spoil(fill(folder)), on_invalid="skip")
    fresh, kept = Heard(), Heard()
    first = outline(config, fresh)
    dataset.load_or_build(first, config, NullDisplay())
    again = outline(config, kept)
    assert first.scan == again.scan == verdict(config)
    assert len(first.scan.refused) == 2
    assert fresh.warnings == kept.warnings
    assert [line for line in fresh.lines if not line.startswith("read ")] == kept.lines


def test_the_same_content_in_another_folder_is_the_same_file(folder: Path, decoded: list[str]) -> None:
    fill(folder)
    config = of(folder)
    prepare(config)
    decoded.clear()
    copy = shutil.copytree(folder, folder.parent / "copy")
    table = "".join(f"{name},{label}\n" for name, label in used(config).items())
    put(copy, {"../table/labels.csv": ("file,label\n" + table).encode()})
    shutil.copytree(folder, folder.parent / "table", dirs_exist_ok=True)
    decoded.clear()
    for same in (
        of(copy),
        of(folder, on_invalid="skip"),
        of(folder, pattern=r"\d+-(?P<label>\d{4})"),
        of(folder, labels="names"),
        of(folder.parent / "table"),
        of(folder, split_seed=1, test_fraction=0.3),
    ):
        assert outline(same).key == outline(config).key
        prepare(same)
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
    ids=["content", "label", "name", "gone", "new"],
)
def test_another_content_is_another_file(folder: Path, change: Callable[[Path], Any]) -> None:
    config = of(fill(folder))
    before = outline(config).key
    change(folder)
    assert outline(config).key != before


def test_another_label_in_the_table_is_another_file(folder: Path) -> None:
    def key(label: str) -> str:
        put(folder, {"a.png": png(99), "labels.csv": f"file,label\n{rows}a.png,{label}\n".encode()})
        return outline(of(folder)).key

    fill(folder)
    rows = "".join(f"{name},{label}\n" for name, label in used(of(folder)).items())
    assert len({key("0001"), key("0002")}) == 2
    assert key("0001") == key("0001")


def test_other_settings_are_another_file(folder: Path) -> None:
    fill(folder)
    keys = {outline(of(folder)).key}
    keys |= {
        outline(of(folder, captcha)).key for captcha in ({"width": 33}, {"channels": 3}, {"case": "keep"})
    }
    assert len(keys) == 4


def test_a_damaged_cache_is_read_again_from_the_folder(folder: Path, decoded: list[str]) -> None:
    config = of(spoil(fill(folder)), on_invalid="skip")
    whole = prepare(config)
    images = whole.images.clone()
    path = Path(config.data.cache) / f"{whole.manifest['key']}.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    decoded.clear()
    heard = Heard()
    again = prepare(config, heard)
    assert len(decoded) == 62
    (warning,) = heard.warnings
    assert "is damaged" in warning
    assert torch.equal(again.images, images)
    assert again.manifest == whole.manifest


def test_what_is_no_picture_is_told_as_it_is_now(folder: Path) -> None:
    config = of(fill(folder))
    prepare(config)
    put(folder, {"notes.txt": b""})
    assert prepare(config).manifest["others"] == ["notes.txt"]


# -- the whole thing -----------------------------------------------------------------------------------------


class Spoilt(NamedTuple):
    """A folder as people have them."""

    path: Path
    good: int
    bad: dict[str, str]  # file -> pattern of the reason
    noted: dict[str, list[str]]  # note -> files that are used all the same


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Spoilt:
    path = fill(tmp_path_factory.mktemp("spoilt") / "images", 200)
    elsewhere = put(path.parent / "elsewhere", {"7001.png": png(701)})
    clear = page(702).convert("RGBA")
    clear.putalpha(page(703))
    put(
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
    (path / "8024.png").mkdir()
    os.mkfifo(path / "8025.png")
    with (path / "8026.png").open("wb") as huge:
        huge.truncate(70 * 2**30)
    return Spoilt(
        path,
        203,
        {
            "8001.png": r"is empty \(0 bytes\)",
            "8002.png": r"is damaged or cut short: .+",
            "8003.jpg": r"is damaged or cut short: .+",
            "8004.png": r"is no picture of a known kind .+, or only the beginning of one",
            "8005.png": r"is no picture of a known kind .+",
            "8006.jpg": r"is no picture of a known kind .+",
            "8007.png": r"is no picture of a known kind .+",
            "8008.tif": r"is no picture of a known kind .+",
            "8009.png": r"has over 89,478,485 pixels; at most 4,000,000 are read",
            "8010.png": r"is 3000x2000 pixels; at most 4,000,000 in all are read",
            "8011.png": r"shows nothing: every pixel is the same",
            "80120.png": r"label '80120' has 5 characters; captcha.length is 4",
            "801.png": r"label '801' has 3 characters; captcha.length is 4",
            "8a14.png": r"label '8a14' has 'a', not in captcha.alphabet",
            "8\n15.png": r"has no label in its name \(data\.pattern is .+\)",
            os.fsdecode(b"81\xff6.png"): r"label '81\\udcff6' has '\\udcff', not in captcha.alphabet",
            "8017.png": r"is the same image as 8018.gif, which is labeled '8018'",
            "8018.gif": r"is the same image as 8017.png, which is labeled '8017'",
            "8019.png": r"cannot be read: Too many levels of symbolic links",
            "8020.png": r"cannot be read: Too many levels of symbolic links",
            "8021.png": r"cannot be read: No such file or directory",
            "8022.png": r"is a link to a folder, which is not followed",
            "back": r"is a link to a folder, which is not followed",
            "8024.png": r"is a folder",
            "8025.png": r"is no regular file",
            "8026.png": r"is 71,680 MiB; at most 64 MiB are read",
        },
        {
            "is a GIF, whatever its name says": ["9001.png"],
            "has 16 bits for each pixel; the upper 8 are read": ["9002.png"],
            "is transparent in places; they become white": ["9003.png"],
        },
    )


def command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The real command; a warning of any library would end it."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "captcha_exp", *words],
        env={**os.environ, "CAPTCHA_EXP_ROOT": str(root), "PYTHONIOENCODING": "utf-8:strict"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )


def table_of(text: str, bad: dict[str, str]) -> None:
    """Every bad file stands in the text once, with its reason."""
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(rows) == len(bad)
    for name, reason in bad.items():
        row = re.compile(f"  {re.escape(escape_unprintable(name))} +{reason}")
        assert len([line for line in rows if row.fullmatch(line)]) == 1, name


def test_bad_files_are_refused_in_one_table_and_nothing_is_created(spoilt: Spoilt, root: Path) -> None:
    done = command(root, "train", *OF_FOLDERS, f"data.path={spoilt.path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert (
        f"data.path={spoilt.path}: 26 of 229 pictures cannot be used; "
        "mend them or take them out, or train on the other 203 with data.on_invalid=skip\n"
    ) in done.stderr
    table_of(done.stderr, spoilt.bad)
    for note, names in spoilt.noted.items():
        assert f"in use, 1 times: {note} ({names[0]})\n" in done.stderr
    assert list(root.iterdir()) == []


def test_without_the_bad_files_the_rest_is_trained(spoilt: Spoilt, root: Path) -> None:
    done = command(root, "train", *OF_FOLDERS, f"data.path={spoilt.path}", "data.on_invalid=skip")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (
        f"warning: data.path={spoilt.path}: 26 of 229 pictures cannot be used; "
        "the other 203 are taken (data.on_invalid=skip)\n"
    ) in done.stderr
    table_of(done.stderr, spoilt.bad)
    (record,) = root.glob("outputs/*/*-tiny/dataset.json")
    said = json.loads(record.read_text(encoding="utf-8"))
    assert {bad["file"] for bad in said["rejected"]} == set(spoilt.bad)
    assert said["notes"] == spoilt.noted
    assert said["others"] == ["Thumbs.db"]
    assert said["images"] == len(said["files"]) == sum(said["splits"].values()) == spoilt.good
    assert said["sizes"] == {"32x16": spoilt.good}
    assert said["lengths"] == {"4": spoilt.good}
    assert {"file": "00001-0037.png", "label": "0037"}.items() <= said["files"][1].items()
    assert len(said["files"][1]["sha256"]) == 64


def test_data_lists_everything_as_json(
    spoilt: Spoilt, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "--json", *OF_FOLDERS, f"data.path={spoilt.path}", "data.on_invalid=skip"]
    monkeypatch.setattr(sys, "argv", ["captcha-exp", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert {bad["file"]: bad["reason"] for bad in said["rejected"]}.keys() == spoilt.bad.keys()
    assert said["images"] == spoilt.good
    assert Path(said["preview"]).is_file()


def test_a_table_that_is_too_long_says_how_to_see_the_rest(folder: Path) -> None:
    put(folder, {f"{n:04}x.png": png() for n in range(60)})
    fill(folder)
    lines = mistake(of(folder)).splitlines()
    assert len(lines) == 52
    assert lines[-1] == "  and 10 more; captcha-exp data --json data.on_invalid=skip ... names all"


def test_a_folder_of_bad_files_alone_is_refused_even_with_skip(folder: Path) -> None:
    put(folder, {"0001.png": b"", "0002.png": b""})
    first, *table = mistake(of(folder, on_invalid="skip")).splitlines()
    assert first.endswith("2 of 2 pictures cannot be used; mend them or take them out, or there is no other")
    assert len(table) == 2


def test_bytes_of_a_name_that_are_no_utf8_come_through_the_record(folder: Path) -> None:
    odd = os.fsdecode(b"latin\xfc/0001.png")
    put(fill(folder), {odd: png(99)})
    result = train(of(folder))
    said = json.loads((result.run_dir / "dataset.json").read_bytes())
    assert odd in {file["file"] for file in said["files"]}


def test_a_run_is_evaluated_and_told_when_its_pictures_are_others(folder: Path) -> None:
    result = train(of(fill(folder)))
    heard = Heard()
    again, _ = evaluate_run(result.run_dir, "test", heard)
    assert (again.predicted == result.test.predicted).all()
    assert again.accuracy == result.test.accuracy
    assert heard.warnings == []

    put(folder, {"9999.png": png(99)})
    evaluate_run(result.run_dir, "test", heard)
    (warning,) = heard.warnings
    assert warning.startswith("the pictures are not those of the run: source.files_sha256 was ")
