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

from captcha_exp.config import Config, DataConfig, FolderConfig, to_dict
from captcha_exp.data import sources
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.sources import ScanResult
from captcha_exp.data.splits import split_by_label
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding
from captcha_exp.runtime.console import Display, escape_unprintable
from captcha_exp.runtime.files import sha256_of, write_atomically
from captcha_exp.runtime.paths import root_dir

CACHE_FORMAT_VERSION = 3  # of the cache file; raised when it would hold something else for the same question
MAX_REJECTED_SHOWN = 50  # rows of the table of pictures that cannot be used


class Batch(NamedTuple):
    """Pictures on the device, and which they are."""

    images: Tensor  # (B, H, W, C) uint8
    targets: Tensor  # (B, T) int64, class ids
    indices: Tensor  # (B,) int64, numbers of the pictures in the dataset

    def micro_batches(self, size: int) -> "Iterator[Batch]":
        """The batch in parts of this size; the last one takes what is left."""
        for start in range(0, self.indices.shape[0], size):
            yield Batch(*(part[start : start + size] for part in self))


def random_batch(config: Config, size: int, device: torch.device) -> Batch:
    """Pictures of noise with labels of noise: for what does not depend on what they show."""
    captcha = config.captcha
    generator = torch.Generator().manual_seed(seeding.derive_seed(config.seed, "probe"))
    shape = (size, captcha.height, captcha.width, captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, len(captcha.alphabet), (size, captcha.length), generator=generator)
    return Batch(images.to(device), targets.to(device), torch.arange(size))


@dataclass(frozen=True)
class Split:
    """One side of the split."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64
    indices: Tensor  # (N,) int64, numbers of the pictures in the dataset
    device: torch.device

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """The pictures of this order (n,), else all as they stand; the last batch takes what is left."""
        for start in range(0, len(self) if order is None else len(order), size):
            if order is None:
                images, targets, rows = (
                    x[start : start + size] for x in (self.images, self.targets, self.indices)
                )
            else:
                chosen = order[start : start + size]
                images, targets, rows = self.images[chosen], self.targets[chosen], self.indices[chosen]
            yield Batch(*map(self._to_device, (images, targets, rows)))

    def _to_device(self, part: Tensor) -> Tensor:
        if (
            self.device.type == "cuda" and part.is_cpu
        ):  # "cuda" is not equal to "cuda:0", where resident parts are
            part = part.pin_memory()  # from there the copy runs beside the step
        return part.to(self.device, non_blocking=True)

    def permutation(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64, another order for each epoch, the same for the same seed."""
        generator = torch.Generator().manual_seed(seeding.derive_seed(seed, "order", epoch))
        return torch.randperm(len(self), generator=generator).to(self.indices.device)


@dataclass(frozen=True)
class Dataset:
    """All pictures of a run."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64, class ids
    labels: list[str]
    split_indices: dict[str, Tensor]  # split -> (n,) int64, numbers of its pictures
    manifest: dict[str, Any]  # the content of dataset.json

    @property
    def alphabet(self) -> Alphabet:
        """What the class ids stand for."""
        return Alphabet(self.manifest["provenance"]["captcha"]["alphabet"])

    def image_name(self, index: int) -> str:
        """The file of a picture, or the number of a drawn one."""
        files = self.manifest["files"]
        return str(files[index]["file"]) if files else str(index)

    def split(self, name: str, device: torch.device, preload_limit_mib: int) -> Split:
        """One side; a side up to the limit lives on the device, a larger one is sent batch by batch."""
        rows = self.split_indices[name]
        images, targets = self.images[rows], self.targets[rows]
        if images.nbytes <= preload_limit_mib * 2**20:
            images, targets, rows = images.to(device), targets.to(device), rows.to(device)
        return Split(images, targets, rows, device)


@dataclass(frozen=True)
class DatasetSpec:
    """Which pictures a run has and on which side each is, before they are drawn or written to the cache."""

    source: sources.Source
    scan: ScanResult
    split_indices: dict[str, Tensor]  # split -> (n,) int64, numbers of its pictures
    provenance: dict[str, Any]  # everything that the bytes of the pictures depend on

    @property
    def split_sizes(self) -> dict[str, int]:
        """Split -> its pictures."""
        return {name: len(rows) for name, rows in self.split_indices.items()}

    @property
    def key(self) -> str:
        """The name of the cache file, and of the dataset."""
        return _cache_key(self.provenance)


def inspect_dataset(config: Config, display: Display) -> DatasetSpec:
    """The labels and the split of a resolved config; nothing is created.

    Raises:
        UserError: a split would be empty, a font cannot draw the alphabet, or pictures of a folder cannot be
            used; the lines say which, and what to change.
    """
    source = sources.make_source(config.data, config.captcha, display)
    provenance = {"format": CACHE_FORMAT_VERSION, "captcha": to_dict(config.captcha), **source.provenance}
    path = _cache_path(config, _cache_key(provenance))
    # A generator says what it will draw faster than a cache file is checked.
    known = _load_cached_scan(path) if isinstance(config.data, FolderConfig) else None
    verdict = known or source.scan(display)
    _report_scan(verdict, source.ignored, config.data, display)
    members = {
        name: torch.tensor(numbers) for name, numbers in split_by_label(verdict.labels, config).items()
    }
    return DatasetSpec(source, verdict, members, provenance)


def load_or_build(spec: DatasetSpec, config: Config, display: Display) -> Dataset:
    """The pictures of an outline, from the cache or drawn now.

    Raises:
        RunFailed: drawing failed; the line gives the drawing process's last words.
    """
    verdict, alphabet = spec.scan, Alphabet(config.captcha.alphabet)
    labels = verdict.labels
    path = _cache_path(config, spec.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        for part in path.parent.glob(f".{path.stem}.*.part"):  # of a process that was killed while it wrote
            part.unlink()
        digest = _verify_cache(path, display)
        if digest is None:
            digest = _build_cache(path, spec, display)
    with safetensors.safe_open(path, "pt") as file:
        images = file.get_tensor("images")
    targets = torch.tensor([alphabet.encode(label) for label in labels])
    manifest = {
        "key": spec.key,
        "provenance": spec.provenance,
        "images_sha256": digest,
        "labels_sha256": hashlib.sha256("\n".join(labels).encode()).hexdigest(),
        "images": len(labels),
        "distinct_labels": len(set(labels)),
        "lengths": {str(length): n for length, n in sorted(Counter(map(len, labels)).items())},
        "splits": spec.split_sizes,
        "files": [
            {"file": name, "sha256": sha256, "label": label}
            for (name, sha256), label in zip(verdict.files, labels, strict=False)
        ],
        "sizes": verdict.sizes,
        "rejected": [{"file": name, "reason": reason} for name, reason in verdict.refused],
        "notes": verdict.notes,
        "others": spec.source.ignored,
    }
    return Dataset(images, targets, labels, spec.split_indices, manifest)


def _cache_key(provenance: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:32]


def _cache_path(config: Config, key: str) -> Path:
    return root_dir() / config.data.cache / f"{key}.safetensors"


def _report_scan(scan: ScanResult, ignored: list[str], data: DataConfig, display: Display) -> None:
    """Say what became of every file that is not simply in use.

    Raises:
        UserError: pictures cannot be used, and data.on_invalid=error.
    """
    if not isinstance(data, FolderConfig):
        return
    for note, names in scan.notes.items():
        display.info(f"in use, {len(names):,} times: {note} ({_summarize_names(names)})")
    if ignored:
        display.info(f"not pictures ({len(ignored):,}): {_summarize_names(ignored)}")
    if not scan.refused:
        return
    bad, good = len(scan.refused), len(scan.labels)
    which = f"data.path={data.path}: {bad:,} of {bad + good:,} pictures cannot be used"
    width = min(40, max(len(escape_unprintable(name)) for name, _ in scan.refused))
    table = [
        f"  {escape_unprintable(name):<{width}}  {reason}"
        for name, reason in scan.refused[:MAX_REJECTED_SHOWN]
    ]
    if bad > MAX_REJECTED_SHOWN:
        table.append(
            f"  and {bad - MAX_REJECTED_SHOWN:,} more; captcha-exp data --json "
            "data.on_invalid=skip ... names all"
        )
    if data.on_invalid == "error" or not good:
        what = f"train on the other {good:,} with data.on_invalid=skip" if good else "there is no other"
        raise UserError(f"{which}; mend them or take them out, or {what}", *table)
    display.warn("\n".join([f"{which}; the other {good:,} are taken (data.on_invalid=skip)", *table]))


def _summarize_names(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(escape_unprintable, names[:3])) + more


def _build_cache(path: Path, spec: DatasetSpec, display: Display) -> str:
    """Draw or read, write, and return the SHA-256 of the file."""
    images = torch.from_numpy(spec.source.load_images(display))
    # One key alone: safetensors orders several by chance, and the same pictures are to be the same file.
    write_atomically(path, to_safetensors({"images": images}, {"verdict": json.dumps(asdict(spec.scan))}))
    digest = sha256_of(path)
    write_atomically(path.with_suffix(".sha256"), digest.encode())
    return digest


def _load_cached_scan(path: Path) -> ScanResult | None:
    """What a whole cache file says of its source; None where there is none to be believed."""
    try:
        if sha256_of(path) != path.with_suffix(".sha256").read_text(errors="replace"):
            return None
        with safetensors.safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["verdict"])
    except FileNotFoundError:
        return None
    return ScanResult(**{**values, **{k: [tuple(pair) for pair in values[k]] for k in ("files", "rejected")}})


def _verify_cache(path: Path, display: Display) -> str | None:
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
    display.info(f"pictures from {path}")
    return expected
