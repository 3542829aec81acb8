"""Test the other ways into a dataset: archives, folders named by labels or splits, tables with splits."""

import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
from conftest import warnings
from test_folder import (
    error_lines,
    fill,
    folder_config,
    ignored,
    inspect,
    load_dataset,
    png,
    rejected,
    used,
    write_files,
)
from test_folder import folder as folder

from captcha_exp.data.sources import archive as archives
from captcha_exp.data.sources.corrections import NAME as CORRECTIONS


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


TarMode: TypeAlias = Literal["w", "w:gz", "w:bz2", "w:xz"]


def tarred(mode: TarMode) -> Callable[[Path, dict[str, bytes]], Path]:
    def make(path: Path, files: dict[str, bytes]) -> Path:
        with tarfile.open(path, mode) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return make


MAKERS = {
    "a.zip": zipped,
    "a.tar": tarred("w"),
    "a.tar.gz": tarred("w:gz"),
    "a.tar.bz2": tarred("w:bz2"),
    "a.tar.xz": tarred("w:xz"),
}
IMAGES = {f"{n:05}-{n * 37 % 10_000:04}.png": png(n) for n in range(60)}


@pytest.mark.parametrize("name", MAKERS)
def test_an_archive_gives_the_dataset_of_its_folder(folder: Path, name: str) -> None:
    files = {f"./in/{file}": content for file, content in reversed(IMAGES.items())}
    files |= {"in/readme.txt": b"hello", "__MACOSX/in/._00000-0000.png": b"junk"}
    write_files(folder, {name.removeprefix("./"): content for name, content in files.items()})
    path = MAKERS[name](folder.parent / name, files)
    packed, plain = load_dataset(folder_config(path)), load_dataset(folder_config(folder))
    assert packed.manifest["key"] == plain.manifest["key"]
    assert packed.manifest["images_sha256"] == plain.manifest["images_sha256"]
    assert ignored(folder_config(path)) == ["__MACOSX/in/._00000-0000.png", "in/readme.txt"]
    # Once more without the cache file: the pixels are those of the archive.
    again = load_dataset(folder_config(path, cache=str(folder.parent / "other")))
    assert again.manifest["images_sha256"] == plain.manifest["images_sha256"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_an_archive_may_have_a_table(folder: Path, name: str) -> None:
    rows = "".join(f"{n:02}.png,{n * 37:04}\n" for n in range(60))
    files = {"sub/labels.csv": f"file,label\n{rows}".encode()}
    files |= {f"sub/{n:02}.png": png(n) for n in range(60)}
    path = MAKERS[name](folder.parent / name, files)
    found = used(folder_config(path, labels="sub/labels.csv"))
    assert found == {f"sub/{n:02}.png": f"{n * 37:04}" for n in range(60)}
    assert "sub/labels.csv" not in ignored(folder_config(path, labels="sub/labels.csv"))


def test_members_that_are_not_read_are_named(folder: Path) -> None:
    path = folder.parent / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in IMAGES.items():
            archive.writestr(name, content)
        archive.writestr("../00000-1111.png", png(100))
        archive.writestr("/etc/00000-2222.png", png(101))
        archive.writestr("c:\\00000-3333.png", png(102))
        link = zipfile.ZipInfo("00000-4444.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert rejected(folder_config(path)) == {
        "../00000-1111.png": "has a path outside the archive",
        "/etc/00000-2222.png": "has a path outside the archive",
        "c:/00000-3333.png": "has a path outside the archive",
        "00000-4444.png": "is a link in the archive, which is not followed",
    }
    path = folder.parent / "a.tar"
    tarred("w")(path, {**IMAGES, "../00000-1111.png": png(100)})
    with tarfile.open(path, "a") as archive:
        for name, kind in {"00000-5555.png": tarfile.SYMTYPE, "00000-6666.png": tarfile.FIFOTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert rejected(folder_config(path)) == {
        "../00000-1111.png": "has a path outside the archive",
        "00000-5555.png": "is a link in the archive, which is not followed",
        "00000-6666.png": "is not a regular file",
    }
    assert not (folder.parent.parent / "00000-1111.png").exists()


def test_an_archive_that_unpacks_to_far_more_than_itself_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 10_000_000)
    path = zipped(folder.parent / "a.zip", {f"{n:04}.png": bytes(1_000_000) for n in range(30)})
    assert "a.zip: unpacks to more than 0 GiB or 5,000,000 files; unpack what you" in error_lines(
        folder_config(path)
    )
    path = tarred("w:gz")(folder.parent / "a.tgz", {f"{n:04}.png": bytes(1_000_000) for n in range(30)})
    assert "a.tgz: unpacks to more than 0 GiB" in error_lines(folder_config(path))
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_MEMBERS", 20)
    assert "or 20 files" in error_lines(folder_config(path))


def test_a_member_that_is_too_large_is_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 5_000_000)
    path = zipped(folder.parent / "a.zip", {**IMAGES, "00000-1111.png": bytes(5_000_001)})
    assert set(rejected(folder_config(path))) == {"00000-1111.png"}


@pytest.mark.parametrize("name", MAKERS)
def test_a_damaged_archive_is_an_error(folder: Path, name: str) -> None:
    content = MAKERS[name](folder.parent / name, IMAGES).read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b""):
        (folder.parent / name).write_bytes(damaged)
        line = error_lines(folder_config(folder.parent / name)).splitlines()[0]
        assert line.startswith(f"data.path={folder.parent / name}: ")
        assert "is a damaged archive" in line or "images cannot be used" in line


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_with_one_name_the_first_counts(folder: Path) -> None:
    path = zipped(folder.parent / "a.zip", IMAGES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("00000-0000.png", png(100))
    assert len(used(folder_config(path))) == 60
    assert ignored(folder_config(path)) == ["00000-0000.png (another member of this name)"]
    write_files(folder, IMAGES)
    assert inspect(folder_config(path)).key == inspect(folder_config(folder)).key


def test_an_encrypted_member_is_rejected(folder: Path) -> None:
    path = zipped(folder.parent / "a.zip", IMAGES)
    content = bytearray(path.read_bytes())
    for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(start) + offset] |= 1  # the flag of the first member
    path.write_bytes(content)
    assert rejected(folder_config(path)) == {
        "00000-0000.png": "is encrypted; make the archive without a password"
    }


# -- folders and tables --------------------------------------------------------------------------------------


def test_labels_are_the_names_of_folders(folder: Path) -> None:
    files = {f"{n * 37 % 10_000:04}/{k}.png": png(2 * n + k) for n in range(40) for k in range(2)}
    write_files(folder, {**files, "top.png": png(1000)})
    config = folder_config(folder, labels="folders")
    assert used(config) == {name: name[:4] for name in files}
    assert rejected(config) == {"top.png": "is not in a folder whose name is its label (data.labels=folders)"}


def split_names(folder: Path, **data: Any) -> dict[str, list[str]]:
    """Return the names of the images of each split."""
    spec = inspect(folder_config(folder, **data))
    return {
        split: [spec.scan.files[n][0] for n in indices.tolist()]
        for split, indices in spec.split_indices.items()
    }


def test_folders_named_like_splits_are_the_splits(folder: Path) -> None:
    kinds = ("Train", "val", "test")
    write_files(folder, {f"{kinds[n % 3]}/{n * 37 % 10_000:04}.png": png(n) for n in range(90)})
    found = split_names(folder)
    assert {split: {name.split("/")[0] for name in names} for split, names in found.items()} == {
        "train": {"Train"},
        "validation": {"val"},
        "test": {"test"},
    }
    by_label = split_names(folder, split_by="label")
    assert {name.split("/")[0] for name in by_label["train"]} == set(kinds)
    folds = split_names(folder, folds=3, fold=0)
    assert {name.split("/")[0] for name in folds["test"]} == set(kinds)


def test_one_folder_that_is_no_split_gives_none(folder: Path) -> None:
    write_files(folder, {f"{('train', 'test', 'other')[n % 3]}/{n * 37:04}.png": png(n) for n in range(90)})
    assert {name.split("/")[0] for name in split_names(folder)["train"]} == {"train", "test", "other"}


def test_a_missing_validation_split_is_taken_from_the_training_split(folder: Path) -> None:
    write_files(folder, {f"{('train', 'test')[n % 3 == 0]}/{n * 37:04}.png": png(n) for n in range(90)})
    found = split_names(folder)
    assert [len(names) for names in found.values()][2] == 30
    assert {name.split("/")[0] for name in found["validation"]} == {"train"}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_each_split_folder_may_have_a_table(folder: Path, suffix: str) -> None:
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for n in range(90):
        split = "test" if n % 3 == 0 else "train"
        write_files(folder, {f"{split}/{n}.png": png(n)})
        rows[split].append((f"{n}.png", f"{n * 37:04}"))
    for split, pairs in rows.items():
        text = "file_name,text\n" + "".join(f"{file},{label}\n" for file, label in pairs)
        if suffix == "jsonl":
            text = "".join(json.dumps({"file_name": file, "text": label}) + "\n" for file, label in pairs)
        (folder / split / f"metadata.{suffix}").write_text(text)
    assert used(folder_config(folder)) == {
        f"{split}/{file}": label for split, pairs in sorted(rows.items()) for file, label in sorted(pairs)
    }
    assert len(split_names(folder)["test"]) == 30
    assert ignored(folder_config(folder)) == []


def write_table(folder: Path, splits: dict[int, str]) -> None:
    rows = "".join(f"{n}.png,{n * 37:04},{splits.get(n, 'train')}\n" for n in range(90))
    (folder / "labels.csv").write_text(f"file,label,split\n{rows}")
    write_files(folder, {f"{n}.png": png(n) for n in range(90)})


def test_a_table_may_give_the_splits(folder: Path) -> None:
    write_table(folder, {1: "Test", 2: "test", 3: "dev", 4: "valid"})
    found = split_names(folder)
    assert (found["test"], found["validation"], len(found["train"])) == (
        ["1.png", "2.png"],
        ["3.png", "4.png"],
        86,
    )


def test_splits_that_cannot_be_used_are_named(folder: Path) -> None:
    write_table(folder, {1: "test", 3: "", 4: "holdout"})
    assert rejected(folder_config(folder)) == {
        "3.png": "has no split in labels.csv; write train, validation or test",
        "4.png": "has the split 'holdout' in labels.csv; write train, validation or test",
    }


def test_given_splits_with_equal_images_are_refused(folder: Path) -> None:
    write_table(folder, {1: "test", 2: "test", 3: "validation"})
    (folder / "1.png").write_bytes(png(50))
    table = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(table.replace("1.png,0037", "1.png,1850"))
    assert error_lines(folder_config(folder)).splitlines() == [
        f"data.path={folder}: 1 image is in more than one of the splits that it gives, so the test accuracy "
        "would be too high; leave out one of the equal images, or split by label with data.split_by=label",
        "  1.png (test) and 50.png (train): equal files",
    ]
    assert inspect(folder_config(folder, split_by="label"))


# -- corrections ---------------------------------------------------------------------------------------------


def test_corrections_are_applied_and_recorded(folder: Path) -> None:
    fill(folder)
    names = sorted(path.name for path in folder.iterdir())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = f"file,action,label\n{names[0]},label,9999\n{names[1]},drop,\n{names[2]},keep,\n{names[3]},,1234\n"
    (folder / CORRECTIONS).write_text(rows)
    config = folder_config(folder)
    labels = used(config)
    assert labels[names[0]] == "9999"
    assert names[1] not in labels
    assert (labels[names[2]], labels[names[3]]) == (names[2][6:10], names[3][6:10])
    manifest = load_dataset(config).manifest
    assert manifest["corrections"] == [
        {"file": names[0], "action": "label", "label": "9999", "was": names[0][6:10]},
        {"file": names[1], "action": "drop", "label": "", "was": names[1][6:10]},
        {"file": names[2], "action": "keep", "label": "", "was": names[2][6:10]},
    ]
    assert (manifest["ignored"], manifest["rejected"]) == ([], [])
    plain = used(folder_config(folder, apply_corrections=False))
    assert (len(plain), plain[names[0]]) == (60, names[0][6:10])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_a_correction_gives_a_label_to_an_image_without_one(folder: Path) -> None:
    fill(folder)
    write_files(folder, {"99999-.png": png(99)})
    (folder / CORRECTIONS).write_text("file,action,label\n99999-.png,label,4711\n")
    assert used(folder_config(folder))["99999-.png"] == "4711"


def test_corrections_of_an_archive_are_next_to_it(folder: Path) -> None:
    path = zipped(folder.parent / "a.zip", IMAGES)
    (folder.parent / f"a.zip.{CORRECTIONS}").write_text("file,action,label\n00000-0000.png,label,9999\n")
    assert used(folder_config(path))["00000-0000.png"] == "9999"


def test_corrections_that_cannot_be_applied_are_named(folder: Path) -> None:
    fill(folder)
    names = sorted(path.name for path in folder.iterdir())
    lines = (f"{names[0]},label,", f"{names[1]},delete,", "nowhere.png,drop,", f"{names[2]},drop,")
    (folder / CORRECTIONS).write_text("\n".join(("file,action,label", *lines, f"{names[2]},keep,")))
    assert rejected(folder_config(folder)) == {
        f"{CORRECTIONS}, row 2": f"has no label for '{names[0]}'; write it, or the action drop",
        f"{CORRECTIONS}, row 3": "has the action 'delete'; write label, drop, keep, or nothing",
        f"{CORRECTIONS}, row 4": "names 'nowhere.png', which is not an image there",
        f"{CORRECTIONS}, row 6": f"contradicts an earlier row about '{names[2]}'; remove one of them",
    }
    (folder / CORRECTIONS).write_text("file,label\n")
    assert used(folder_config(folder)) != {}
    (folder / CORRECTIONS).write_text("file,label\nx,y\n")
    assert f"{CORRECTIONS}, row 2: has no column action; its columns are file, label" in error_lines(
        folder_config(folder)
    )


def test_spaces_around_a_file_name_are_part_of_it(folder: Path) -> None:
    fill(folder)
    write_files(folder, {" 4321.png": png(4321), "1234 .png": png(1234)})
    (folder / CORRECTIONS).write_text('file,action,label\n" 4321.png",label,4323\n 1234 .png ,drop,\n')
    labels = used(folder_config(folder))
    assert labels[" 4321.png"] == "4323"
    assert "1234 .png" not in labels


def test_a_column_that_occurs_twice_is_an_error(folder: Path) -> None:
    fill(folder)
    (folder / "labels.csv").write_text("file,label,Label\n00000-0000.png,0000,9999\n")
    assert "labels.csv, row 1: has the column label twice; remove or rename one" in error_lines(
        folder_config(folder)
    )


def test_too_many_folds_are_an_error(folder: Path) -> None:
    fill(folder, 4)
    line = error_lines(folder_config(folder, folds=100))
    assert line.endswith("split empty; use more images, or fewer folds")


def test_a_running_number_in_an_archive_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = zipped(folder.parent / "a.zip", {f"{n:04}.png": png(n) for n in range(60)})
    inspect(folder_config(path))
    assert any("the labels are consecutive numbers, 0000 to 0059" in text for text in warnings(caplog))
