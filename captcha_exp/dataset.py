"""The pictures of a run: one compact uint8 array, prepared once, split without leaks, handed out in batches.

The cache file is named by a hash of everything that made it, so another size, alphabet or version of the
generator is another file, and the same question finds the same one. It is written once, by one process while
others wait, checked by its SHA-256 and mapped into memory. Normalising happens on the device, per batch: a
picture is bytes here.

Which split a picture belongs to is a hash of its label: no label is on both sides, and adding pictures moves
none.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp import chance, sources
from captcha_exp.alphabet import Alphabet
from captcha_exp.config import Captcha, Config, Data, to_dict
from captcha_exp.display import Display
from captcha_exp.errors import UserError
from captcha_exp.places import root
from captcha_exp.record import sha256_of, write_atomically

FORMAT = 1  # of the cache file; raised when the same question would give other bytes

SPLITS = ("train", "validation", "test")


class Batch(NamedTuple):
    """Pictures on the device, and which they are."""

    images: Tensor  # (B, H, W, C) uint8
    targets: Tensor  # (B, T) int64, class ids
    rows: Tensor  # (B,) int64, numbers of the pictures in the dataset


@dataclass(frozen=True)
class Split:
    """One side of the split."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64
    rows: Tensor  # (N,) int64, numbers of the pictures in the dataset
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """All pictures once, in this order (N,), else as they stand; the last batch takes what is left."""
        for start in range(0, len(self), size):
            if order is None:
                images, targets, rows = (
                    x[start : start + size] for x in (self.images, self.targets, self.rows)
                )
            else:
                chosen = order[start : start + size]
                images, targets, rows = self.images[chosen], self.targets[chosen], self.rows[chosen]
            yield Batch(self._on_device(images), self._on_device(targets), rows)

    def _on_device(self, part: Tensor) -> Tensor:
        if self.device.type == "cuda" and part.device != self.device:
            part = part.pin_memory()  # from there the copy runs beside the step
        return part.to(self.device, non_blocking=True)

    def shuffled(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64, another order for each epoch, the same for the same seed."""
        generator = torch.Generator().manual_seed(chance.derive(seed, "order", epoch))
        return torch.randperm(len(self), generator=generator).to(self.rows.device)


@dataclass(frozen=True)
class Dataset:
    """All pictures of a run."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64, class ids
    labels: list[str]
    members: dict[str, Tensor]  # split -> (n,) int64, numbers of its pictures
    manifest: dict[str, Any]  # the content of dataset.json

    def split(self, name: str, device: torch.device, resident_limit_mib: int) -> Split:
        """One side; a side up to the limit lives on the device, a larger one is sent batch by batch."""
        rows = self.members[name]
        images, targets = self.images[rows], self.targets[rows]
        if images.nbytes <= resident_limit_mib * 2**20:
            images, targets, rows = images.to(device), targets.to(device), rows.to(device)
        return Split(images, targets, rows, device)


@dataclass(frozen=True)
class Outline:
    """Which pictures a run has and on which side each is, before any of them is there."""

    labels: list[str]
    members: dict[str, Tensor]  # split -> (n,) int64, numbers of its pictures
    made_from: dict[str, Any]  # everything that the bytes of the pictures depend on

    @property
    def key(self) -> str:
        """The name of the cache file, and of the dataset."""
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()[:32]


def outline(config: Config) -> Outline:
    """The labels and the split of a resolved config; cheap, and nothing is created.

    Raises:
        UserError: a split would be empty, or a font cannot draw the alphabet; the line says what to change.
    """
    sources.check_glyphs(config.data, config.captcha)
    labels = [sources.label(config.data, config.captcha, index) for index in range(config.data.count)]
    return Outline(labels, split_by_label(labels, config), _made_from(config.data, config.captcha))


def prepare(outline: Outline, config: Config, display: Display) -> Dataset:
    """The pictures of an outline, from the cache or drawn now.

    Raises:
        RunFailed: drawing failed; the line gives the drawing process's last words.
    """
    labels, alphabet = outline.labels, Alphabet(config.captcha.alphabet)
    folder = root() / config.data.cache
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{outline.key}.safetensors"
    with filelock.FileLock(path.with_suffix(".lock")):
        digest = _checked(path, display)
        if digest is None:
            digest = _build(path, config.data, config.captcha, display)
    with safetensors.safe_open(path, "pt") as file:
        images = file.get_tensor("images")
    targets = torch.tensor([alphabet.encode(label) for label in labels])
    manifest = {
        "key": outline.key,
        "made_from": outline.made_from,
        "images_sha256": digest,
        "labels_sha256": hashlib.sha256("\n".join(labels).encode()).hexdigest(),
        "pictures": len(labels),
        "distinct_labels": len(set(labels)),
        "lengths": {str(length): n for length, n in sorted(Counter(map(len, labels)).items())},
        "splits": {name: len(rows) for name, rows in outline.members.items()},
    }
    return Dataset(images, targets, labels, outline.members, manifest)


def split_by_label(labels: list[str], config: Config) -> dict[str, Tensor]:
    """Split -> numbers of its pictures (n,) int64, in order.

    Raises:
        UserError: a split is empty; the line says what to change.
    """
    data = config.data
    members: dict[str, list[int]] = {name: [] for name in SPLITS}
    for number, label in enumerate(labels):
        place = chance.fraction(data.split_seed, "split", label)
        if place < data.test_fraction:
            members["test"].append(number)
        elif place < data.test_fraction + data.validation_fraction:
            members["validation"].append(number)
        else:
            members["train"].append(number)
    for name, numbers in members.items():
        if not numbers:
            raise UserError(
                f"data.count={data.count}: {len(set(labels))} different labels leave the {name} split empty; "
                f"take more pictures, or change data.validation_fraction and data.test_fraction"
            )
    return {name: torch.tensor(numbers) for name, numbers in members.items()}


def _made_from(data: Data, captcha: Captcha) -> dict[str, Any]:
    """Everything that the bytes of the pictures depend on."""
    asked = to_dict(data)
    for indifferent in ("cache", "workers", "split_seed", "validation_fraction", "test_fraction"):
        del asked[indifferent]
    return {"format": FORMAT, "source": asked, "captcha": to_dict(captcha), "origin": sources.origin(data)}


def _build(path: Path, data: Data, captcha: Captcha, display: Display) -> str:
    """Draw, write, and return the SHA-256 of the file."""
    began = time.perf_counter()
    images = torch.from_numpy(sources.draw(data, captcha, range(data.count), display))
    seconds = time.perf_counter() - began
    write_atomically(path, to_safetensors({"images": images}))
    digest = sha256_of(path)
    write_atomically(path.with_suffix(".sha256"), digest.encode())
    display.line(f"drew {data.count:,} pictures in {seconds:.1f} s ({data.count / seconds:,.0f} pictures/s)")
    return digest


def _checked(path: Path, display: Display) -> str | None:
    """The SHA-256 of a whole cache file; None if there is none, with a warning if there is a damaged one."""
    if not path.exists():
        return None
    try:
        expected = path.with_suffix(".sha256").read_text(errors="replace")
    except FileNotFoundError:
        return None  # the process that wrote the pictures ended before it could vouch for them
    if sha256_of(path) != expected:
        display.warn(f"{path}: is damaged (its SHA-256 is another); the pictures are drawn again")
        return None
    display.line(f"pictures from {path}")
    return expected
