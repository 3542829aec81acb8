"""The pictures of a run: one compact uint8 array, prepared once, split without leaks, handed out in batches.

The cache file is named by a hash of everything that made it, so another size, alphabet or version of the
generator is another file, and the same question finds the same one. It is written once, by one process while
others wait, checked by its SHA-256 and mapped into memory. Normalising happens on the device, per batch: a
picture is bytes here.

Which split a picture belongs to is decided in `splits`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import Config, Data, Folder, to_dict
from captcha_exp.data import sources
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.sources import Verdict
from captcha_exp.data.splits import split_by_label
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding
from captcha_exp.runtime.console import Display, shown
from captcha_exp.runtime.files import sha256_of, write_atomically
from captcha_exp.runtime.paths import root

FORMAT = 3  # of the cache file; raised when it would hold something else for the same question
REFUSED_SHOWN = 50  # rows of the table of pictures that cannot be used


class Batch(NamedTuple):
    """Pictures on the device, and which they are."""

    images: Tensor  # (B, H, W, C) uint8
    targets: Tensor  # (B, T) int64, class ids
    rows: Tensor  # (B,) int64, numbers of the pictures in the dataset

    def parts(self, size: int) -> "Iterator[Batch]":
        """The batch in parts of this size; the last one takes what is left."""
        for start in range(0, self.rows.shape[0], size):
            yield Batch(*(part[start : start + size] for part in self))


def noise(config: Config, size: int, device: torch.device) -> Batch:
    """Pictures of noise with labels of noise: for what does not depend on what they show."""
    captcha = config.captcha
    generator = torch.Generator().manual_seed(seeding.derive(config.seed, "probe"))
    shape = (size, captcha.height, captcha.width, captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, len(captcha.alphabet), (size, captcha.length), generator=generator)
    return Batch(images.to(device), targets.to(device), torch.arange(size))


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
        """The pictures of this order (n,), else all as they stand; the last batch takes what is left."""
        for start in range(0, len(self) if order is None else len(order), size):
            if order is None:
                images, targets, rows = (
                    x[start : start + size] for x in (self.images, self.targets, self.rows)
                )
            else:
                chosen = order[start : start + size]
                images, targets, rows = self.images[chosen], self.targets[chosen], self.rows[chosen]
            yield Batch(*map(self._on_device, (images, targets, rows)))

    def _on_device(self, part: Tensor) -> Tensor:
        if (
            self.device.type == "cuda" and part.is_cpu
        ):  # "cuda" is not equal to "cuda:0", where resident parts are
            part = part.pin_memory()  # from there the copy runs beside the step
        return part.to(self.device, non_blocking=True)

    def shuffled(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64, another order for each epoch, the same for the same seed."""
        generator = torch.Generator().manual_seed(seeding.derive(seed, "order", epoch))
        return torch.randperm(len(self), generator=generator).to(self.rows.device)


@dataclass(frozen=True)
class Dataset:
    """All pictures of a run."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64, class ids
    labels: list[str]
    members: dict[str, Tensor]  # split -> (n,) int64, numbers of its pictures
    manifest: dict[str, Any]  # the content of dataset.json

    @property
    def alphabet(self) -> Alphabet:
        """What the class ids stand for."""
        return Alphabet(self.manifest["made_from"]["captcha"]["alphabet"])

    def name(self, row: int) -> str:
        """The file of a picture, or the number of a drawn one."""
        files = self.manifest["files"]
        return str(files[row]["file"]) if files else str(row)

    def split(self, name: str, device: torch.device, resident_limit_mib: int) -> Split:
        """One side; a side up to the limit lives on the device, a larger one is sent batch by batch."""
        rows = self.members[name]
        images, targets = self.images[rows], self.targets[rows]
        if images.nbytes <= resident_limit_mib * 2**20:
            images, targets, rows = images.to(device), targets.to(device), rows.to(device)
        return Split(images, targets, rows, device)


@dataclass(frozen=True)
class Outline:
    """Which pictures a run has and on which side each is, before they are drawn or written to the cache."""

    source: sources.Source
    verdict: Verdict
    members: dict[str, Tensor]  # split -> (n,) int64, numbers of its pictures
    made_from: dict[str, Any]  # everything that the bytes of the pictures depend on

    @property
    def counts(self) -> dict[str, int]:
        """Split -> its pictures."""
        return {name: len(rows) for name, rows in self.members.items()}

    @property
    def key(self) -> str:
        """The name of the cache file, and of the dataset."""
        return _key(self.made_from)


def outline(config: Config, display: Display) -> Outline:
    """The labels and the split of a resolved config; nothing is created.

    Raises:
        UserError: a split would be empty, a font cannot draw the alphabet, or pictures of a folder cannot be
            used; the lines say which, and what to change.
    """
    source = sources.source(config.data, config.captcha, display)
    made_from = {"format": FORMAT, "captcha": to_dict(config.captcha), **source.made_from}
    path = _cache_file(config, _key(made_from))
    # A generator says what it will draw faster than a cache file is checked.
    known = _known_verdict(path) if isinstance(config.data, Folder) else None
    verdict = known or source.verdict(display)
    _tell(verdict, source.others, config.data, display)
    members = {
        name: torch.tensor(numbers) for name, numbers in split_by_label(verdict.labels, config).items()
    }
    return Outline(source, verdict, members, made_from)


def prepare(outline: Outline, config: Config, display: Display) -> Dataset:
    """The pictures of an outline, from the cache or drawn now.

    Raises:
        RunFailed: drawing failed; the line gives the drawing process's last words.
    """
    verdict, alphabet = outline.verdict, Alphabet(config.captcha.alphabet)
    labels = verdict.labels
    path = _cache_file(config, outline.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        for part in path.parent.glob(f".{path.stem}.*.part"):  # of a process that was killed while it wrote
            part.unlink()
        digest = _checked(path, display)
        if digest is None:
            digest = _build(path, outline, display)
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
        "splits": outline.counts,
        "files": [
            {"file": name, "sha256": sha256, "label": label}
            for (name, sha256), label in zip(verdict.files, labels, strict=False)
        ],
        "sizes": verdict.sizes,
        "refused": [{"file": name, "reason": reason} for name, reason in verdict.refused],
        "notes": verdict.notes,
        "others": outline.source.others,
    }
    return Dataset(images, targets, labels, outline.members, manifest)


def _key(made_from: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def _cache_file(config: Config, key: str) -> Path:
    return root() / config.data.cache / f"{key}.safetensors"


def _tell(verdict: Verdict, others: list[str], data: Data, display: Display) -> None:
    """Say what became of every file that is not simply in use.

    Raises:
        UserError: pictures cannot be used, and data.on_bad=refuse.
    """
    if not isinstance(data, Folder):
        return
    for note, names in verdict.notes.items():
        display.line(f"in use, {len(names):,} times: {note} ({_some(names)})")
    if others:
        display.line(f"not pictures ({len(others):,}): {_some(others)}")
    if not verdict.refused:
        return
    bad, good = len(verdict.refused), len(verdict.labels)
    which = f"data.path={data.path}: {bad:,} of {bad + good:,} pictures cannot be used"
    width = min(40, max(len(shown(name)) for name, _ in verdict.refused))
    table = [f"  {shown(name):<{width}}  {reason}" for name, reason in verdict.refused[:REFUSED_SHOWN]]
    if bad > REFUSED_SHOWN:
        table.append(
            f"  and {bad - REFUSED_SHOWN:,} more; captcha-exp data --json data.on_bad=skip ... names all"
        )
    if data.on_bad == "refuse" or not good:
        what = f"train on the other {good:,} with data.on_bad=skip" if good else "there is no other"
        raise UserError(f"{which}; mend them or take them out, or {what}", *table)
    display.warn("\n".join([f"{which}; the other {good:,} are taken (data.on_bad=skip)", *table]))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


def _build(path: Path, outline: Outline, display: Display) -> str:
    """Draw or read, write, and return the SHA-256 of the file."""
    images = torch.from_numpy(outline.source.pictures(display))
    # One key alone: safetensors orders several by chance, and the same pictures are to be the same file.
    write_atomically(
        path, to_safetensors({"images": images}, {"verdict": json.dumps(asdict(outline.verdict))})
    )
    digest = sha256_of(path)
    write_atomically(path.with_suffix(".sha256"), digest.encode())
    return digest


def _known_verdict(path: Path) -> Verdict | None:
    """What a whole cache file says of its source; None where there is none to be believed."""
    try:
        if sha256_of(path) != path.with_suffix(".sha256").read_text(errors="replace"):
            return None
        with safetensors.safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["verdict"])
    except FileNotFoundError:
        return None
    return Verdict(**{**values, **{k: [tuple(pair) for pair in values[k]] for k in ("files", "refused")}})


def _checked(path: Path, display: Display) -> str | None:
    """The SHA-256 of a whole cache file; None if there is none, with a warning if there is a damaged one."""
    if not path.exists():
        return None
    try:
        expected = path.with_suffix(".sha256").read_text(errors="replace")
    except FileNotFoundError:
        return None  # the process that wrote the pictures ended before it could vouch for them
    if sha256_of(path) != expected:
        display.warn(f"{path}: is damaged (its SHA-256 is another); the pictures are prepared again")
        return None
    display.line(f"pictures from {path}")
    return expected
