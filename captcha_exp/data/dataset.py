"""Datasets: images in one uint8 tensor, cached in a file, split by label, and iterated in batches.

The name of the cache file is a hash of everything that the images depend on: size, alphabet, generator and
its version. It is written once, under a file lock, verified by its SHA-256 and memory-mapped.
"""

import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import numpy.typing as npt
import safetensors
import torch
from pydantic import TypeAdapter
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import Config, FolderConfig, to_dict, untrusted_keys, with_captcha
from captcha_exp.data import sources
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.duplicates import split_keys
from captcha_exp.data.scan_report import check_shares, check_splits, report_scan
from captcha_exp.data.sources import ScanResult
from captcha_exp.data.splits import count_by_share, split_images
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding
from captcha_exp.runtime.files import describe_broken_link, sha256_of, write_atomically
from captcha_exp.runtime.paths import root_dir
from captcha_exp.runtime.text import escape_unprintable

logger = logging.getLogger(__name__)

CACHE_FORMAT_VERSION = 7  # raised when the cache file of the same config would have other content
DEFAULT_CACHE = "outputs/cache"  # data.cache of a saved run whose own is not trusted


class Batch(NamedTuple):
    """A batch of images on the device."""

    images: Tensor  # (B, H, W, C) uint8
    targets: Tensor  # (B, T) int64, class ids, END after the last character
    indices: Tensor  # (B,) int64, indices of the images in the dataset

    def micro_batches(self, size: int) -> "Iterator[Batch]":
        """Split the batch into micro-batches of this size; the last one may be smaller."""
        for start in range(0, self.indices.shape[0], size):
            yield Batch(*(part[start : start + size] for part in self))


def random_batch(config: Config, size: int, device: torch.device) -> Batch:
    """Return a batch of random images and labels, for measurements that do not depend on the content."""
    captcha = config.captcha
    generator = torch.Generator().manual_seed(seeding.derive_seed(config.seed, "probe"))
    shape = (size, captcha.height, captcha.width, captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, len(captcha.alphabet), (size, captcha.length), generator=generator)
    return Batch(images.to(device), targets.to(device), torch.arange(size))


class Quota(NamedTuple):
    """How many of some images of a split are in an epoch."""

    rows: Tensor  # (n,) int64, their positions in the split
    num_drawn: int


@dataclass(frozen=True)
class Split:
    """One split of a dataset."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64
    indices: Tensor  # (N,) int64, indices of the images in the dataset
    device: torch.device
    quotas: tuple[Quota, ...] = ()
    """of the folders of data.shares; empty: every image is once in an epoch"""

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """Yield batches in the given order (n,), else in dataset order; the last one may be smaller."""
        for start in range(0, len(self) if order is None else len(order), size):
            parts = [self.images, self.targets, self.indices]
            if order is None:
                parts = [part[start : start + size] for part in parts]
            else:  # ten times as fast as part[rows]
                rows = order[start : start + size]
                parts = [part.index_select(0, rows.to(part.device)) for part in parts]
            yield Batch(*map(self._to_device, parts))

    def _to_device(self, part: Tensor) -> Tensor:
        # Compare types: "cuda" != "cuda:0", the device of preloaded splits.
        if self.device.type == "cuda" and part.is_cpu:
            part = part.pin_memory()  # the copy then overlaps with the step
        return part.to(self.device, non_blocking=True)

    def epoch_order(self, seed: int, epoch: int) -> Tensor:
        """Return the (N,) int64 order of an epoch, a function of seed and epoch.

        With quotas, images are left out or repeated, each at most once more than others of its quota.
        """
        generator = torch.Generator().manual_seed(seeding.derive_seed(seed, "order", epoch))
        order = torch.randperm(len(self), generator=generator)
        if self.quotas:
            drawn = []
            for rows, num_drawn in self.quotas:
                starts = range(0, num_drawn, len(rows))
                rounds = [torch.randperm(len(rows), generator=generator) for _ in starts]
                drawn += [rows[torch.cat(rounds)[:num_drawn]]] if rounds else []
            order = torch.cat(drawn)[order]
        return order.to(self.indices.device)


@dataclass(frozen=True)
class Dataset:
    """The images of a run with their labels and splits."""

    images: Tensor  # (N, H, W, C) uint8
    targets: Tensor  # (N, T) int64, class ids
    labels: list[str]
    split_indices: dict[str, Tensor]  # split -> (n,) int64, indices of its images
    manifest: dict[str, Any]  # content of dataset.json
    shares: tuple[float, ...] = ()  # of the folders in the training split; empty: every image counts once

    @property
    def alphabet(self) -> Alphabet:
        """The alphabet of the class ids."""
        return Alphabet(self.manifest["provenance"]["captcha"]["alphabet"])

    def image_name(self, index: int) -> str:
        """Return the file name of an image, or the index of a generated one."""
        files = self.manifest["files"]
        return str(files[index]["file"]) if files else str(index)

    def folder_numbers(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return for images (n,) the number of the folder of each, from 1; 0 if there are not several."""
        if not self.manifest["folders"]:
            return np.zeros(len(indices), np.int64)
        return np.array([sources.folder_number(self.image_name(int(n))) for n in indices], np.int64)

    def split(self, name: str, device: torch.device, preload_limit_mib: int) -> Split:
        """Return a split, on the device if it is not larger than the limit."""
        rows = self.split_indices[name]
        images, targets = self.images.index_select(0, rows), self.targets.index_select(0, rows)
        quotas = self._quotas(rows) if name == "train" and self.shares else ()
        if images.nbytes <= preload_limit_mib * 2**20:
            images, targets, rows = images.to(device), targets.to(device), rows.to(device)
        return Split(images, targets, rows, device, quotas)

    def _quotas(self, rows: Tensor) -> tuple[Quota, ...]:
        """Return the quotas of the folders in a split with these images, which sum to their number."""
        folders = torch.from_numpy(self.folder_numbers(rows.numpy()))
        counts = count_by_share(self.shares, len(rows))
        return tuple(Quota((folders == n).nonzero()[:, 0], count) for n, count in enumerate(counts, 1))


@dataclass(frozen=True)
class DatasetSpec:
    """The labels and splits of a dataset, before its images are rendered or decoded."""

    config: Config  # with the captcha group that was inferred
    source: sources.Source
    scan: ScanResult
    split_indices: dict[str, Tensor]  # split -> (n,) int64, indices of its images
    provenance: dict[str, Any]  # everything that the pixels depend on
    cache_path: Path

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of images by split."""
        return {name: len(indices) for name, indices in self.split_indices.items()}

    @property
    def key(self) -> str:
        """Name of the cache file, and of the dataset."""
        return self.cache_path.stem


def inspect_dataset(config: Config) -> DatasetSpec:
    """Return the labels and splits of a resolved config, and infer its captcha group; creates no files.

    Raises:
        UserError: a split would be empty, images cannot be rendered or those of a folder not be used, or
            data.cache cannot be written; the lines say which, and what to change.
    """
    source = sources.make_source(config.data, config.captcha)
    config = with_captcha(config, source.captcha)
    provenance = {"format": CACHE_FORMAT_VERSION, "captcha": to_dict(config.captcha), **source.provenance}
    key = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:32]
    path = root_dir() / config.data.cache / f"{key}.safetensors"
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for names that are too long
        _check_creatable(path.parent, config)
        if not isinstance(config.data, FolderConfig):
            sources.check_rendering(config.data, config.captcha)
    # For a generator, a scan is faster than verifying the cache file.
    cached = _read_cache(path) if isinstance(config.data, FolderConfig) else None
    scan = source.scan() if cached is None else cached[1]
    if isinstance(config.data, FolderConfig):
        report_scan(scan, source, config)
    keys = split_keys(scan.labels, scan.duplicates)
    splits = split_images(keys, scan.splits, config)
    check_splits(scan, splits, config)
    if isinstance(config.data, FolderConfig):
        check_shares([scan.files[n][0] for n in splits["train"]], config.data)
    split_indices = {name: torch.tensor(indices) for name, indices in splits.items()}
    return DatasetSpec(config, source, scan, split_indices, provenance, path)


def check_images_exist(config: Config) -> None:
    """Check that the folders of a saved run are where they were.

    Raises:
        UserError: one is not; put it, or a link to it, there again.
    """
    paths = config.data.paths if isinstance(config.data, FolderConfig) else ()
    if missing := [path for path in paths if not os.path.exists(path)]:  # noqa: PTH110 - Path's raises on long names
        raise UserError(
            f"data.path={missing[0]}: the images of the run are not there any more; put them, or a symbolic "
            "link to them, there again"
        )


def with_trusted_cache(config: Config) -> Config:
    """Return the config of a saved run with a cache directory that may be written to.

    data.cache is kept if it is inside the root directory or has cached images; else it becomes the default.
    """
    if "data.cache" not in untrusted_keys(config, root_dir()):
        return config
    logger.warning(
        f"data.cache={config.data.cache} of the run: is outside {root_dir()}; using {DEFAULT_CACHE}"
    )
    return replace(config, data=replace(config.data, cache=DEFAULT_CACHE))


def _check_creatable(directory: Path, config: Config) -> None:
    """Check that a directory exists and is writable, or can be created.

    Raises:
        UserError: it does not; the line names the part of the path that is in the way.
    """
    if broken := describe_broken_link(directory):
        raise UserError(broken)
    for path in (directory, *directory.parents):
        try:
            is_dir = stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = f"cannot be used: {getattr(error, 'strerror', None) or error}"
        else:
            if is_dir and os.access(path, os.W_OK | os.X_OK):
                return
            reason = "is not writable" if is_dir else "is not a directory"
        raise UserError(f"data.cache={config.data.cache}: {escape_unprintable(str(path))[-200:]} {reason}")


def load_or_build(spec: DatasetSpec) -> Dataset:
    """Load the images of a dataset from the cache; if they are not cached, render or decode them first.

    Raises:
        RunFailed: rendering failed; the line has the last line of the rendering process's error output.
    """
    scan, captcha = spec.scan, spec.config.captcha
    alphabet = Alphabet(captcha.alphabet)
    labels = scan.labels
    path = spec.cache_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        for part in path.parent.glob(f".{path.stem}.*.part"):  # of a process killed while writing
            part.unlink()
        cached = _read_cache(path)
        if cached is not None:
            logger.info(f"Using cached images from {path}")
        elif path.exists():
            logger.warning(f"{path}: is damaged or incomplete; rebuilding it")
        else:
            logger.debug(f"no cached images at {path}")
        digest = _build_cache(path, spec) if cached is None else cached[0]
    with safetensors.safe_open(path, "pt") as file:
        images = file.get_tensor("images")
    targets = torch.tensor([alphabet.encode_padded(label, captcha.length) for label in labels])
    split_of = {n: name for name, indices in spec.split_indices.items() for n in indices.tolist()}
    manifest = {
        "key": spec.key,
        "provenance": spec.provenance,
        "images_sha256": digest,
        "labels_sha256": hashlib.sha256("\n".join(labels).encode()).hexdigest(),
        "images": len(labels),
        "distinct_labels": len(set(labels)),
        "lengths": {str(length): n for length, n in sorted(Counter(map(len, labels)).items())},
        "splits": spec.split_sizes,
        "folders": _count_by_folder(scan, spec.config),
        "files": [
            {"file": name, "sha256": sha256, "label": label, "split": split_of[n]}
            for n, ((name, sha256), label) in enumerate(zip(scan.files, labels, strict=False))
        ],
        "sizes": scan.sizes,
        "formats": scan.formats,
        "rejected": [
            {"file": name, "reason": reason, "kind": scan.kind_of(name)} for name, reason in scan.rejected
        ],
        "duplicates": [asdict(group) for group in scan.duplicates],
        "remarks": scan.remarks,
        "ignored": spec.source.ignored,
        "corrections": spec.source.corrections,
        "inferred": [asdict(each) for each in spec.source.inferences],
    }
    shares = getattr(spec.config.data, "shares", None) or ()
    return Dataset(images, targets, labels, spec.split_indices, manifest, shares)


def _count_by_folder(scan: ScanResult, config: Config) -> list[dict[str, Any]]:
    """Return path and number of images of each of several folders."""
    if not isinstance(config.data, FolderConfig) or len(config.data.paths) == 1:
        return []
    counts = Counter(sources.folder_number(name) for name, _ in scan.files)
    return [{"path": path, "images": counts[n]} for n, path in enumerate(config.data.paths, 1)]


def _build_cache(path: Path, spec: DatasetSpec) -> str:
    """Render or decode the images, write the cache file, and return its SHA-256."""
    images = torch.from_numpy(spec.source.load_images())
    # A single metadata key: safetensors writes several in random order, which would change the SHA-256.
    write_atomically(path, to_safetensors({"images": images}, {"scan": json.dumps(asdict(spec.scan))}))
    digest = sha256_of(path)
    write_atomically(path.with_suffix(".sha256"), digest.encode())
    return digest


def _read_cache(path: Path) -> tuple[str, ScanResult] | None:
    """Return the SHA-256 and the scan result of a cache file; None if it is missing or damaged."""
    try:
        digest = path.with_suffix(".sha256").read_text(errors="replace")
        if sha256_of(path) != digest:
            return None
        with safetensors.safe_open(path, "pt") as file:
            return digest, TypeAdapter(ScanResult).validate_json(file.metadata()["scan"])
    except FileNotFoundError:  # also if the process was killed before it wrote the hash
        return None
