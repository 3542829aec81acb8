"""Test datasets of several folders and archives, with and without shares in the training images."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import infos
from hypothesis import given
from hypothesis import strategies as st
from test_folder import (
    composed,
    error_lines,
    folder_config,
    inspect,
    load_dataset,
    png,
    rejected,
    used,
    write_files,
)
from test_folder import folder as folder
from test_ways_in import zipped

from captcha_exp.config import Config, load, resolve, to_dict
from captcha_exp.data.dataset import Quota, Split
from captcha_exp.data.sources.corrections import NAME as CORRECTIONS
from captcha_exp.errors import ConfigError
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.runtime.device import detect_machine

CPU = torch.device("cpu")


def images(first: int, count: int) -> dict[str, bytes]:
    """Return files with distinct pixels and labels."""
    return {f"{n * 37 % 10_000:04}.png": png(n) for n in range(first, first + count)}


@pytest.fixture
def two(folder: Path) -> tuple[Path, Path]:
    """Return a folder of 90 images and an archive of 30."""
    write_files(folder, images(0, 90))
    return folder, zipped(folder.parent / "more.zip", images(1000, 30))


def both(paths: tuple[Path, Path], **data: Any) -> Config:
    return folder_config(paths[0], path=tuple(map(str, paths)), **data)


def test_several_folders_are_read_as_one(two: tuple[Path, Path]) -> None:
    expected = {f"1/{name}": name[:4] for name in images(0, 90)}
    expected |= {f"2/{name}": name[:4] for name in images(1000, 30)}
    assert used(both(two)) == expected
    data = load_dataset(both(two))
    assert data.manifest["folders"] == [
        {"path": str(two[0]), "images": 90},
        {"path": str(two[1]), "images": 30},
    ]
    alone = load_dataset(folder_config(two[1]))
    assert alone.manifest["folders"] == []
    rows = data.folder_numbers(np.arange(120)) == 2
    assert torch.equal(data.images[torch.from_numpy(rows)], alone.images)
    # The split of an image depends on its label alone, as in a folder of its own.
    for name, indices in alone.split_indices.items():
        in_both = {data.labels[n] for n in data.split_indices[name].tolist()}
        assert {alone.labels[n] for n in indices.tolist()} <= in_both


def test_folders_may_be_moved(two: tuple[Path, Path]) -> None:
    before = inspect(both(two)).key
    moved = two[0].parent / "moved", two[0].parent / "a.zip"
    for path, target in zip(two, moved, strict=True):
        path.rename(target)
    assert inspect(both(moved)).key == before
    assert inspect(both((moved[1], moved[0]))).key != before


def test_each_folder_may_have_its_own_labels_splits_and_corrections(two: tuple[Path, Path]) -> None:
    folder = two[0]
    rows = "".join(f"{n}.png,{n * 41 % 10_000:04},{'test' if n < 10 else 'train'}\n" for n in range(60))
    table = folder.parent / "table"
    write_files(table, {**{f"{n}.png": png(2000 + n) for n in range(60)}})
    (table / "labels.csv").write_text(f"file,label,split\n{rows}")
    name = next(iter(images(0, 90)))
    (folder / CORRECTIONS).write_text(f"file,action,label\n{name},label,9999\n")
    config = both((folder, table))
    labels = used(config)
    assert labels[f"1/{name}"] == "9999"
    assert labels["2/7.png"] == "0287"
    data = load_dataset(config)
    assert [each["file"] for each in data.manifest["corrections"]] == [f"1/{name}"]
    test = {data.image_name(n) for n in data.split_indices["test"].tolist()}
    # Images of the folder without splits are in all of them.
    assert {name for name in test if name.startswith("2/")} == {f"2/{n}.png" for n in range(10)}
    assert 2 <= sum(name.startswith("1/") for name in test) <= 20


def test_an_image_in_two_folders_is_in_one_split(two: tuple[Path, Path]) -> None:
    other = two[0].parent / "other"
    shutil.copytree(two[0], other)
    config = both((two[0], other))
    data = load_dataset(config)
    assert [group["kind"] for group in data.manifest["duplicates"]] == ["bytes"] * 90
    split_of = {data.image_name(n): s for s, rows in data.split_indices.items() for n in rows.tolist()}
    assert all(split_of[f"1/{name}"] == split_of[f"2/{name}"] for name in images(0, 90))
    assert len(used(both((two[0], other), on_duplicate="skip"))) == 90


def test_an_unusable_image_is_named_with_its_folder(two: tuple[Path, Path]) -> None:
    (two[0] / "12x4.png").write_bytes(png(5000))
    assert rejected(both(two)) == {"1/12x4.png": "label '12x4' has 'x', not in captcha.alphabet"}
    lines = error_lines(both(two))
    assert lines.startswith(f"data.path=[{two[0]},{two[1]}]: 1 of 121 images cannot be used")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("a", "a"), "a: is there twice; leave out one of them"),
        (("a", "a/../a"), "a: is there twice; leave out one of them"),
        (("a/b", "a"), "of which subfolders are read, too; leave out one of them"),
    ],
)
def test_a_folder_is_not_read_twice(folder: Path, paths: tuple[str, str], message: str) -> None:
    config = folder_config(folder, path=tuple(str(folder / path) for path in paths))
    with pytest.raises(ConfigError, match=r"data\.path=") as error:
        resolve(config, detect_machine())
    assert error.value.lines[0].endswith(message)


# -- shares --------------------------------------------------------------------------------------------------


def test_shares_decide_what_an_epoch_shows(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    data = load_dataset(both(two, shares=(1, 3)))
    training = data.split("train", CPU, 512)
    folders = data.folder_numbers(training.indices.numpy())
    shown = Counter[int]()
    first, second = (set(training.epoch_order(0, epoch).tolist()) for epoch in (1, 2))
    assert first != second
    for epoch in range(1, 5):
        drawn = folders[training.epoch_order(0, epoch).numpy()]
        assert len(drawn) == len(training)
        assert Counter(drawn.tolist())[1] == round(len(training) / 4)
        assert 1 in drawn[: len(drawn) // 2]  # shuffled
        shown.update(drawn.tolist())
    assert abs(shown[2] / shown[1] - 3) < 0.2
    assert any("folder 2" in text and "; an epoch shows " in text for text in infos(caplog))
    for name in ("validation", "test"):
        assert data.split(name, CPU, 512).quotas == ()
    assert load_dataset(both(two)).split("train", CPU, 512).quotas == ()
    # The images are the same, so is their cache.
    assert inspect(both(two)).key == inspect(both(two, shares=(1, 3))).key


@pytest.mark.parametrize(
    ("paths", "shares", "message"),
    [
        ("a", (1.0,), "is for several folders in path, and there is one"),
        (("a", "b"), (1.0,), "must have a number for each folder in path, 2"),
        (("a", "b"), (1.0, 0.0), "must be a list, each a number"),
        (("a", "b"), (1.0, 1e308), "must be a list, each a number"),
    ],
)
def test_impossible_shares_are_an_error(paths: Any, shares: tuple[float, ...], message: str) -> None:
    values = to_dict(composed())
    values["data"] |= {"path": paths, "shares": shares}
    with pytest.raises(ConfigError, match=message):
        load(values)


def test_a_folder_that_no_epoch_would_show_is_an_error(two: tuple[Path, Path]) -> None:
    lines = error_lines(both(two, shares=(1, 500)))
    assert "images of an epoch would be from" in lines
    assert lines.endswith("give it a larger share, or leave it out of data.path")


def test_an_image_is_in_the_split_that_is_given_to_its_equal(two: tuple[Path, Path]) -> None:
    """One folder gives splits, the other has copies of its test images."""
    given, tested = two[0].parent / "given", list(images(0, 90))[:9]
    rows = "".join(f"{n},{n[:4]},{'test' if n in tested else 'train'}\n" for n in images(0, 90))
    write_files(given, images(0, 90))
    (given / "labels.csv").write_text(f"file,label,split\n{rows}")
    config = both((two[0], given))
    data = load_dataset(config)
    split_of = {data.image_name(n): s for s, rows in data.split_indices.items() for n in rows.tolist()}
    assert all(split_of[f"{folder}/{name}"] == "test" for folder in (1, 2) for name in tested)


def test_a_share_needs_training_images(two: tuple[Path, Path]) -> None:
    rows = "".join(f"{name},{name[:4]},test\n" for name in images(0, 90))
    (two[0] / "labels.csv").write_text(f"file,label,split\n{rows}")
    lines = error_lines(both(two, shares=(1, 1)))
    assert "has no images in the training split to draw from; leave it out of data.path" in lines
    assert inspect(both(two))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    seed=st.integers(0, 5),
)
def test_images_of_a_folder_are_drawn_equally_often(sizes: list[int], shares: list[float], seed: int) -> None:
    total = sum(sizes)
    ends = np.rint(np.cumsum(shares[: len(sizes)]) / sum(shares[: len(sizes)]) * total).astype(int)
    counts = np.diff(ends, prepend=0).tolist()
    rows = torch.split(torch.arange(total), sizes)
    quotas = tuple(Quota(part, count) for part, count in zip(rows, counts, strict=True))
    split = Split(torch.zeros(total, 1, 1, 1), torch.zeros(total, 1), torch.arange(total), CPU, quotas)
    order = split.epoch_order(seed, 1)
    assert torch.equal(order, split.epoch_order(seed, 1))
    drawn = torch.bincount(order, minlength=total)
    for part, count in zip(rows, counts, strict=True):
        assert int(drawn[part].sum()) == count
        assert int(drawn[part].max() - drawn[part].min()) <= 1


def test_accuracy_is_reported_by_folder(two: tuple[Path, Path]) -> None:
    data = load_dataset(both(two))
    indices = data.split_indices["test"].numpy()
    targets = data.targets[data.split_indices["test"]].numpy()
    in_second = data.folder_numbers(indices) == 2
    predicted = np.where(in_second[:, None], (targets + 1) % 10, targets)
    ones = np.ones(targets.shape, np.float32)
    result = Evaluation(0.0, predicted, targets, ones, ones[:, 0], indices)
    counts = int((~in_second).sum()), int(in_second.sum())
    assert min(counts) > 0
    assert result.accuracy_by_folder(data) == {str(two[0]): (counts[0], 1.0), str(two[1]): (counts[1], 0.0)}
    assert result.to_json(data)["by_folder"][str(two[1])] == {"images": counts[1], "accuracy": 0.0}
    plain = load_dataset(folder_config(two[0]))
    assert replace(result, indices=np.arange(len(indices))).accuracy_by_folder(plain) == {}
