"""Suspected wrong labels: images that models which were not trained on them read as something else.

Each model reads every image that was not in its own training split; k-fold trainings have such a model for
each image. Suspects are ranked by the likelihood ratio, how many times as probable as the label the reading
is, averaged over the models as a logarithm. A model that misreads an image usually gives some probability to
what it shows, the label; it gives none to a wrong label.

Source: out-of-sample predicted probabilities as in Northcutt, Jiang and Chuang, Confident learning, JAIR 70
(2021), here of whole texts.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captcha_exp import runs
from captcha_exp.config import CaptchaConfig, Config, with_captcha
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Dataset
from captcha_exp.errors import UserError
from captcha_exp.model.predict import Comparison, Predictor
from captcha_exp.model.weights import max_file_bytes
from captcha_exp.runtime.console import progress_bar
from captcha_exp.runtime.text import preview

MIN_RATIO = 50.0
"""likelihood ratio from which on a label is probably wrong: if 2 % of the labels are, more likely than not"""
MIN_CONFIDENCE = 0.1
"""probability of the reading below which nothing is probable: the model cannot read the image"""
MAX_SHOWN_RATIO = 1000  # larger ones only say that the network has not seen such a case


@dataclass(frozen=True)
class Suspect:
    """An image whose label differs from what models read in it."""

    index: int  # in the dataset
    file: str
    label: str
    read: str
    confidence: float  # mean probability of `read`
    ratio: float  # likelihood ratio of the reading and the label

    @property
    def is_probable(self) -> bool:
        """Whether the label is probably wrong."""
        return self.ratio >= MIN_RATIO and self.confidence >= MIN_CONFIDENCE

    def to_json(self) -> dict[str, Any]:
        """Return the values that `data --json` prints."""
        shown = f"{self.ratio:.0f}" if self.ratio <= MAX_SHOWN_RATIO else f"over {MAX_SHOWN_RATIO:,}"
        return {**asdict(self), "ratio_text": shown, "probable": self.is_probable}


@dataclass(frozen=True)
class Suspects:
    """The suspects of a dataset, the most certain first, and what was read to find them."""

    found: list[Suspect]
    num_read: int  # images that a model has read
    num_unread: int  # images that all models were trained on, or whose label none of them can predict
    num_decided: int  # images that have a correction already, and are no suspects

    @property
    def num_probable(self) -> int:
        """Number of labels that are probably wrong."""
        return sum(suspect.is_probable for suspect in self.found)

    def to_json(self) -> dict[str, Any]:
        """Return the values that `data --json` prints."""
        return {
            "found": [suspect.to_json() for suspect in self.found],
            "probable": self.num_probable,
            "read": self.num_read,
            "unread": self.num_unread,
            "decided": self.num_decided,
        }


def find_suspects(config: Config, data: Dataset, run_dirs: Sequence[Path]) -> Suspects:
    """Read the images of a dataset with the models of finished runs that were not trained on them.

    Args:
        config: The resolved config of the dataset; its device reads the images.
        data: The dataset, of a folder.
        run_dirs: The runs. Their captcha groups may differ from that of the config.

    Raises:
        UserError: every image was in the training split of every run, or a run cannot be read.
    """
    votes: list[dict[str, float]] = [defaultdict(float) for _ in data.labels]
    num_votes, log_ratios = [0] * len(data.labels), [0.0] * len(data.labels)
    with progress_bar(f"reading with {len(run_dirs)} models", len(run_dirs)) as bar:
        for run_dir in run_dirs:
            for index, (text, probability, log_ratio) in _read_unseen(config, data, run_dir).items():
                votes[index][text] += probability
                num_votes[index] += 1
                log_ratios[index] += 0.0 if text == data.labels[index] else log_ratio
            bar.advance(1)
    if not any(num_votes):
        raise UserError(
            f"{preview([str(each) for each in run_dirs])}: was trained on all of these images, or has other "
            "characters or lengths than their labels; name runs of other images, or train five models that "
            "each leave out a fifth with --folds 5"
        )
    decided = {each["file"] for each in data.manifest["corrections"]}  # somebody has looked at them
    found = []
    for index, label in enumerate(data.labels):
        if not num_votes[index] or data.image_name(index) in decided:
            continue
        read, probability = max(votes[index].items(), key=lambda item: (item[1], item[0]))
        if read != label:
            probability, log_ratio = (each / num_votes[index] for each in (probability, log_ratios[index]))
            ratio = math.exp(log_ratio)
            found.append(Suspect(index, data.image_name(index), label, read, probability, ratio))
    found.sort(key=lambda each: (-each.ratio, each.file))
    num_read = sum(map(bool, num_votes))
    return Suspects(found, num_read, len(data.labels) - num_read, len(decided))


def _read_unseen(config: Config, data: Dataset, run_dir: Path) -> dict[int, Comparison]:
    """Return index -> comparison of the images that were not in the training split of a run.

    Those with a label that the run cannot predict are left out.
    """
    run = runs.load(run_dir)
    trained_on = {
        each["sha256"]
        for each in run.read_json("dataset.json")["files"]
        if each.get("split", "train") == "train"  # not recorded by early versions
    }
    weights = run.path(runs.WEIGHTS, max_file_bytes(run.config()))
    predictor = Predictor(weights, config.device.name)
    images = _images_by_name(config, data, predictor.config.captcha)
    chosen = [
        (n, images[each["file"]])
        for n, each in enumerate(data.manifest["files"])
        if each["sha256"] not in trained_on
        and each["file"] in images
        and predictor.can_predict(data.labels[n])
    ]
    found: dict[int, Comparison] = {}
    size = predictor.config.train.eval_batch_size
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        labels = [data.labels[index] for index, _ in part]
        compared = predictor.compare_with_labels(torch.stack([image for _, image in part]), labels)
        for (index, _), each in zip(part, compared, strict=True):
            text = data.alphabet.fold_case(each.text) if config.captcha.case == "fold" else each.text
            found[index] = each._replace(text=text)
    return found


def _images_by_name(config: Config, data: Dataset, captcha: CaptchaConfig) -> dict[str, Tensor]:
    """Return the images (H, W, C) of a dataset by file name, in the size and channels of another config."""
    shape = {key: getattr(captcha, key) for key in ("width", "height", "channels")}
    other = replace(config.captcha, **shape)
    if other != config.captcha:
        data = dataset.load_or_build(dataset.inspect_dataset(with_captcha(config, other)))
    return {each["file"]: data.images[n] for n, each in enumerate(data.manifest["files"])}
