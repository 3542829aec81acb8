"""Test what is said about the labels of a folder as a whole: running numbers, other parts, other tables."""

import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.image_files import page, saved
from test_folder import error_lines, folder_config, used, write_files

from captcha_exp import compose, load
from captcha_exp.config import FolderConfig
from captcha_exp.data import sources
from captcha_exp.data.sources.advice import is_running_number

RNG = random.Random(5)
LABELS = [f"{label:04}" for label in RNG.sample(range(10_000), 60)]
HEX = [f"{RNG.randrange(16**32):032x}" for _ in LABELS]


def draws(count: int, alphabet: str = "0123456789", length: int = 4) -> list[str]:
    """Return the names that remain of random labels, as each file name exists once."""
    return sorted({"".join(RNG.choices(alphabet, k=length)) for _ in range(count)})


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        draws(3_000),
        draws(24_000),
        draws(60_000),
        draws(3_000, length=3),
        draws(200, length=2),
        draws(9_000, "23456789"),
        draws(40_000, "abcdefghijklmnopqrstuvwxyz0123456789"),
        [label for label in draws(20_000) if label[0] != "0"],
        list("0123456789"),
    ],
)
def test_random_labels_are_no_running_number(labels: list[str]) -> None:
    assert not is_running_number((".", label) for label in labels)
    assert not is_running_number((label, label) for label in labels)


@pytest.mark.parametrize(
    "names",
    [
        [f"{n:04}" for n in range(12)],
        [f"{n:04}" for n in range(5_000, 5_400)],
        [f"{n:04}" for n in range(9_000)],
        [f"{n:04}" for n in range(1_000) if n % 5],
        [str(n) for n in range(1, 1_000)],
        [f"c{n:03}" for n in range(80)],
    ],
)
def test_consecutive_numbers_are_a_running_number(names: list[str]) -> None:
    assert is_running_number((".", name) for name in names)
    assert is_running_number((folder, name) for folder in "ab" for name in names)


def advice(folder: Path, names: list[str], **options: Any) -> list[str]:
    """Return the advice for images with these names."""
    write_files(folder, {f"{name}.png": saved(page(n), "PNG") for n, name in enumerate(names)})
    config = folder_config(folder, **options)
    return sources.make_source(config.data, config.captcha).advice


@pytest.fixture
def folder(root: Path) -> Path:
    (root / "set" / "images").mkdir(parents=True)
    return root / "set" / "images"


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("{n:04}_{label}", r"\d+_(?P<label>.+)"),
        ("{label}-{n:04}", r"(?P<label>.+?)-\d+"),
        ("captcha_{label}", "captcha_(?P<label>.+)"),
        ("{label}_{hash}", "(?P<label>.+?)_.*?"),
        ("{n}.{label}.{hash}", r"\d+\.(?P<label>.+?)\..*?"),
        ("{other}_{label}", r"\d+_(?P<label>.+)"),
        ("img ({n}) {label}", None),
    ],
)
def test_the_pattern_that_is_offered_finds_the_label(
    folder: Path, template: str, pattern: str | None
) -> None:
    others = random.Random(1).sample(LABELS, len(LABELS))
    names = [
        template.format(n=n, label=label, hash=HEX[n], other=others[n]) for n, label in enumerate(LABELS)
    ]
    (line,) = advice(folder, names)
    (word,) = shlex.split(line.rpartition(", add ")[2])
    assert pattern is None or word == f"data.filename_pattern='{pattern}'"
    data = load(compose("data=folder", f"data.path={folder}", word)).data
    assert isinstance(data, FolderConfig)
    config = folder_config(folder, filename_pattern=data.filename_pattern)
    assert list(used(config).values()) == [label for _, label in sorted(zip(names, LABELS, strict=True))]
    assert sources.make_source(config.data, config.captcha).advice == []


@pytest.mark.parametrize("template", ["{label}", "{n:05}-{label}", "{label}_{n}", "{label}_1{n:012}"])
def test_ordinary_names_have_no_advice(folder: Path, template: str) -> None:
    assert advice(folder, [template.format(n=n, label=label) for n, label in enumerate(LABELS)]) == []


TABLE = "file,label\n" + "".join(f"{n:04}.png,{label}\n" for n, label in enumerate(LABELS))


@pytest.mark.parametrize("name", ["annotations.csv", "train.tsv", "../truth.csv", "a/b.csv"])
def test_a_table_of_another_name_is_offered(folder: Path, name: str) -> None:
    text = TABLE.replace(",", "\t") if name.endswith("tsv") else TABLE
    write_files(folder, {name: text.encode()})
    (line,) = advice(folder, [f"{n:04}" for n in range(len(LABELS))])
    assert re.match(r"the labels are consecutive numbers, 0000 to 0059, as of a running number; ", line)
    assert line.endswith(f"add data.labels={name}, or data.labels=names for these")
    assert list(used(folder_config(folder, labels=name)).values()) == LABELS
    (line,) = advice(folder, [], labels="names")
    assert "write them to labels.csv in the folder" in line


def test_a_table_without_the_columns_is_mentioned_if_the_labels_are_odd(folder: Path) -> None:
    write_files(folder, {"annotations.csv": TABLE.replace("label", "solution").encode()})
    (line,) = advice(folder, [f"{n:04}" for n in range(len(LABELS))])
    assert "has no column label (or text, code); its columns are file, solution; correct it, and add " in line


def test_a_table_that_agrees_or_is_about_something_else_is_not_mentioned(folder: Path) -> None:
    rows = "".join(f"{label}.png,{label}\n" for label in LABELS)
    sizes = "".join(f"{label}.png,48,20\n" for label in LABELS)
    write_files(
        folder,
        {"annotations.csv": f"file,label\n{rows}".encode(), "sizes.csv": b"file,w,h\n" + sizes.encode()},
    )
    write_files(folder, {"other.csv": b"file,label\nx.png,0001\n", "notes.txt": b"0001"})
    assert advice(folder, LABELS) == []


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ([f"{label}7" for label in LABELS], "captcha.length=5"),
        ([f"x{label[1:]}" for label in LABELS], "captcha.alphabet=0123456789x"),
    ],
)
def test_another_length_or_alphabet_is_offered(folder: Path, labels: list[str], word: str) -> None:
    (line,) = advice(folder, labels)
    assert line.startswith("60 of 60 labels have ")
    assert line.endswith(f"; to accept them, add {word}")
    assert error_lines(folder_config(folder)).splitlines()[1] == line
