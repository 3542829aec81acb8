"""Inference on image files with the weights of a run or a weights file.

Images are preprocessed as in training: decoded, resized to the size of the config by the same function, and
predicted in fp32.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captcha_exp import runs
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.images import InvalidImage, read_bytes
from captcha_exp.data.sources.folder import decode_image, list_images
from captcha_exp.model import networks
from captcha_exp.model.answer import Alternative, Answer, Reader, ReadingOptions
from captcha_exp.model.weights import load_weights, max_file_bytes
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import progress_bar


@dataclass(frozen=True, kw_only=True)
class Prediction(Answer):
    """The predicted text of an image file, or the reason why it cannot be used."""

    image: Path
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the values that `predict --json` prints."""
        return {"image": str(self.image), **({"error": self.error} if self.error else super().to_json())}


class Comparison(NamedTuple):
    """The predicted text of an image, compared with its label."""

    text: str
    confidence: float  # of the whole text, in [0, 1]
    log_ratio: float  # of the probabilities of the text and of the label


class Predictor:
    """A trained recognizer that predicts the text of image files."""

    def __init__(self, weights: Path, device: str, options: ReadingOptions | None = None) -> None:
        """Load a weights file onto a device, "auto" or a name as in device.name.

        Raises:
            UserError: the file is missing, damaged or not a recognizer, the device is not available, or the
                model cannot read in this way.
        """
        model, config = load_weights(weights, torch.device("cpu"))
        self.config = devices.for_inference(config, device)
        self.device = devices.setup_device(self.config)
        self._model = networks.to_device(model, self.device)
        captcha = self.config.captcha
        self._alphabet = Alphabet(captcha.alphabet)
        self._reader = Reader(
            str(self.config.model.head),
            captcha.alphabet,
            captcha.shortest_length,
            captcha.length,
            model.calibration,
            options or ReadingOptions(),
        )

    def _logits(self, images: Tensor) -> Tensor:
        with devices.autocast(self.config, self.device):
            logits: Tensor = self._model(images.to(self.device))
        return logits.float()

    @torch.inference_mode()
    def predict_images(self, images: Tensor) -> list[Answer]:
        """Return the answers for images (N, H, W, C) uint8."""
        logits = self._logits(images)
        if self._reader.needs_search:
            return [self._reader.search(each) for each in self._model.log_probs(logits).cpu().numpy()]
        ids, confidences, text_confidence = self._model.decode(logits)
        found = []
        rows = (ids.cpu().tolist(), text_confidence.cpu().tolist(), confidences.cpu().tolist())
        for row, confidence, of_characters in zip(*rows, strict=True):
            text = self._alphabet.decode(row)
            best = Alternative(text, confidence, tuple(of_characters[: len(text)]))
            found.append(self._reader.answer((best,)))
        return found

    def can_predict(self, label: str) -> bool:
        """Return whether a label has the characters and the length of those that the model was trained on."""
        captcha = self.config.captcha
        lengths = range(captcha.shortest_length, captcha.length + 1)
        return set(captcha.alphabet) >= set(self._to_alphabet(label)) and len(label) in lengths

    def _to_alphabet(self, label: str) -> str:
        return self._alphabet.fold_case(label) if self.config.captcha.case == "fold" else label

    @torch.inference_mode()
    def compare_with_labels(self, images: Tensor, labels: Sequence[str]) -> list[Comparison]:
        """Compare the predicted texts of images (N, H, W, C) uint8 with labels that it can predict."""
        head, length = self._model.head, self.config.captcha.length
        texts = [self._to_alphabet(label) for label in labels]
        targets = torch.tensor([self._alphabet.encode_padded(text, length) for text in texts])
        logits, smoothing = self._logits(images), self.config.train.label_smoothing
        ids, _, confidences = self._model.decode(logits)
        of_labels = head.log_likelihood(logits, targets.to(self.device), smoothing)
        ratios = head.log_likelihood(logits, ids, smoothing) - of_labels
        rows = zip(ids.cpu().tolist(), confidences.cpu().tolist(), ratios.cpu().tolist(), strict=True)
        return [Comparison(self._alphabet.decode(row), *values) for row, *values in rows]

    def predict(self, paths: Sequence[Path]) -> list[Prediction]:
        """Return one prediction per image, in order; that of an invalid image has an error and no text."""
        arrays, valid, predictions = [], [], dict[Path, Prediction]()
        for path in paths:
            try:
                arrays.append(decode_image(read_bytes(path), self.config.captcha)[1])
                valid.append(path)
            except InvalidImage as reason:
                predictions[path] = Prediction(image=path, error=str(reason))
        if arrays:
            found = self.predict_images(torch.from_numpy(np.stack(arrays)))
            for path, answer in zip(valid, found, strict=True):
                predictions[path] = Prediction(image=path, **vars(answer))
        return [predictions[path] for path in paths]

    def predict_all(self, paths: Sequence[Path]) -> Iterator[Prediction]:
        """Yield the predictions of many images, predicted in batches."""
        with progress_bar(f"predicting {len(paths):,} images", len(paths)) as bar:
            size = self.config.train.eval_batch_size
            for start in range(0, len(paths), size):
                yield from self.predict(paths[start : start + size])
                bar.advance(min(size, len(paths) - start))


def resolve_weights(run: str) -> Path:
    """Return the weights file of a run; a name that ends in .safetensors is the file itself.

    Raises:
        UserError: there is no such run, or its weights were changed after it finished; restore them.
    """
    if run.endswith(".safetensors"):
        return Path(run)
    saved = runs.load(runs.find_run(run, finished=True))
    return saved.path(runs.WEIGHTS, max_file_bytes(saved.config()))


def find_images(names: Sequence[str]) -> list[Path]:
    """Return the image files for these names; a folder stands for all images in it, recursively.

    Raises:
        UserError: a folder contains no image.
    """
    files: list[Path] = []
    for name in names:
        path = expand_path(name)
        if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for names that are too long
            files.append(path)
            continue
        files += list_images(path)
    return files


def expand_path(name: str) -> Path:
    """Return the path with `~` expanded; unchanged if there is no such user."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises if there is no such user
