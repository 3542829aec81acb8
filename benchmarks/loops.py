"""The two training loops that benchmarks compare: the article's and this project's, on the same images."""

import itertools
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import article_loop
import torch
from torch import Tensor, nn

from captcha_exp import compose, load
from captcha_exp.config import Config, resolve
from captcha_exp.data import dataset
from captcha_exp.data.augment import Augmenter
from captcha_exp.data.dataset import Batch, Dataset, Split
from captcha_exp.errors import UserError
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import ProgressBar
from captcha_exp.runtime.shutdown import ShutdownHandler
from captcha_exp.training import sanity
from captcha_exp.training.autotune import autotune
from captcha_exp.training.checkpointer import Checkpointer
from captcha_exp.training.train import train_epoch

TRAIN_SHARD, VALIDATION_SHARD = 800, 100  # images, as in the article


@contextmanager
def temporary_root() -> Iterator[Path]:
    """Let the project write to a temporary directory."""
    with TemporaryDirectory() as folder, mock.patch.dict("os.environ", {"CAPTCHA_EXP_ROOT": folder}):
        yield Path(folder)


def requested_config(*overrides: str, tracking: str = "none") -> Config:
    """Return a config as a user asks for it; exit with code 2 if it is invalid."""
    try:
        return load(compose(f"tracking={tracking}", *overrides))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def prepare(requested: Config) -> tuple[Config, Dataset]:
    """Return the config that this machine trains, and its images, rendered."""
    config = resolve(requested, devices.detect_machine())
    devices.setup_device(config)
    spec = dataset.inspect_dataset(config)
    config, _ = autotune(spec.config, requested, spec.split_sizes)
    return config, dataset.load_or_build(spec)


# -- the article's loop --------------------------------------------------------------------------------------


def write_shards(images: Tensor, labels: list[str], folder: Path, size: int) -> None:
    """Write images (N, H, W, C) uint8 as the article's files; the last one may have fewer images."""
    folder.mkdir(parents=True)
    ids = torch.tensor([[article_loop.ALPHABET.index(c) for c in label] for label in labels])
    targets = nn.functional.one_hot(ids, len(article_loop.ALPHABET)).float().flatten(1)
    pixels = images.permute(0, 3, 1, 2).contiguous().float() / 255
    for number, start in enumerate(range(0, len(labels), size)):
        part = slice(start, start + size)
        tensors = {"images": pixels[part].clone(), "labels": targets[part].clone()}
        article_loop.write_gzip(folder / f"{number:05}.gz", tensors)


class ArticleLoop:
    """The article's program: its network, its files, its loop, with its own settings."""

    def __init__(self, data: Dataset, folder: Path, seed: int, device: torch.device) -> None:
        """Write the images of each split to files, in an order that depends on the seed, and initialize."""
        self.device, self.folder = device, folder
        order = torch.Generator().manual_seed(seed)
        for name, size in (("train", TRAIN_SHARD), ("validation", VALIDATION_SHARD), ("test", TRAIN_SHARD)):
            if name not in data.split_indices:
                continue
            rows = data.split_indices[name]
            rows = rows[torch.randperm(len(rows), generator=order)]
            shutil.rmtree(folder / name, ignore_errors=True)
            write_shards(data.images[rows], [data.labels[n] for n in rows.tolist()], folder / name, size)
        torch.manual_seed(seed)
        self.network = article_loop.Network().to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters())

    def shards(self, split: str) -> list[Path]:
        """Return the files of a split."""
        return sorted((self.folder / split).glob("*.gz"))

    def train_shard(self, shard: Path) -> None:
        """Read a file and train on its images, in batches of 100."""
        batches = article_loop.batches(shard, article_loop.BATCH)
        article_loop.train_steps(self.network, self.optimizer, batches, self.device)

    def train_epoch(self) -> None:
        """Train on every image once."""
        for shard in self.shards("train"):
            self.train_shard(shard)

    def accuracy(self, split: str) -> float:
        """Return the accuracy (exact match) on a split."""
        counts = [
            article_loop.evaluate(self.network, article_loop.batches(path, article_loop.BATCH), self.device)
            for path in self.shards(split)
        ]
        return article_loop.accuracy(counts)


# -- this project's loop -------------------------------------------------------------------------------------


class OurLoop:
    """The training of a config, epoch by epoch, with sanity checks and checkpoints as in `train`."""

    def __init__(self, config: Config, data: Dataset, folder: Path) -> None:
        self.config, self._data = config, data
        self.device = devices.setup_device(config)
        self._training = self._split("train")
        self.state = init_train_state(config, self.device)
        checker = sanity.SanityChecker(self._training, data.labels, config, lambda _: None)
        self._checker = checker
        self._checkpointer = Checkpointer(folder / "checkpoint", config, checker, ShutdownHandler(None))

    def _split(self, name: str) -> Split:
        return self._data.split(name, self.device, self.config.device.preload_limit_mib)

    def train_epoch(self) -> None:
        """Train on every image once."""
        self.state.begin_or_continue_epoch(self.device)
        augmenter = Augmenter(self.config, self.state.epoch, len(self._data.labels), self.device)
        around = self._checker, self._checkpointer, ProgressBar()
        train_epoch(self.state, self._training, augmenter, self.config, *around)
        self.state.progress = None

    def accuracy(self, split: str) -> float:
        """Return the accuracy (exact match) on a split, in fp32."""
        return evaluate(self.state.model, self._split(split), devices.in_fp32(self.config)).accuracy


class Step:
    """A training step of a config with its loader, called again and again."""

    def __init__(self, config: Config, data: Dataset) -> None:
        self.config, self._data = config, data
        self._device = devices.setup_device(config)
        self.state = init_train_state(config, self._device)
        self.state.model.train()
        self._batches = self._iterate()

    def _iterate(self) -> Iterator[Batch]:
        """Yield augmented batches of full size without end, as an epoch does."""
        training = self._data.split("train", self._device, self.config.device.preload_limit_mib)
        size = int(self.config.train.batch_size)
        for epoch in itertools.repeat(self.config.train.epochs):  # after the warm-up of the augmentation
            augmenter = Augmenter(self.config, epoch, len(self._data.labels), self._device)
            order = training.epoch_order(self.config.seed, epoch)
            yield from map(augmenter, training.batches(size, order[: len(order) // size * size]))

    def load(self) -> Batch:
        """Return the next batch."""
        return next(self._batches)

    def train(self, batch: Batch) -> None:
        """Train on a batch."""
        train_step(self.state, batch, self.config)

    def __call__(self) -> None:
        self.train(self.load())


def first_images(data: Dataset, num_images: int) -> Dataset:
    """Return the dataset with this number of its images as training split, repeated where it has fewer."""
    rows = torch.tensor(list(itertools.islice(itertools.cycle(range(len(data.labels))), num_images)))
    return replace(data, split_indices={"train": rows})
