"""Pictures -> text, with a run's weights or a weights file.

What a picture goes through is what it went through in training: decoded, brought to the size of the config
by the one resize, read in the precision of the run.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.images import InvalidImage
from captcha_exp.data.sources.folder import decode_image, list_images, read_bytes
from captcha_exp.errors import UserError
from captcha_exp.model import networks
from captcha_exp.model.weights import load_weights
from captcha_exp.runs import check_file_unchanged, find_run
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display


@dataclass(frozen=True)
class Prediction:
    """What stands in one picture, or why that cannot be said."""

    image: Path
    text: str = ""
    confidences: tuple[float, ...] = ()  # of each character, in [0, 1]
    error: str = ""

    @property
    def confidence(self) -> float:
        """Of the whole text, in [0, 1]: the head takes its characters for independent."""
        return float(np.prod(self.confidences)) if self.confidences else 0.0

    def to_json(self) -> dict[str, Any]:
        if self.error:
            return {"picture": str(self.image), "error": self.error}
        return {
            "picture": str(self.image),
            "text": self.text,
            "confidence": self.confidence,
            "confidences": list(self.confidences),
        }


class Predictor:
    """A trained recogniser that reads picture files."""

    def __init__(self, weights: Path, device: str, display: Display) -> None:
        """From a weights file, onto a device: auto or a name as in device.name.

        Raises:
            UserError: the file is missing, damaged or no recogniser; the device is not here.
        """
        model, config = load_weights(weights, torch.device("cpu"))
        self.config = devices.for_inference(config, device, display)
        self.device = devices.setup_device(self.config)
        self._model = networks.to_device(model, self.device)
        self._alphabet = Alphabet(self.config.captcha.alphabet)

    @torch.inference_mode()
    def predict(self, paths: Sequence[Path]) -> list[Prediction]:
        """A reading for each picture, in order; one that cannot be used has an error instead of a text."""
        arrays, usable, readings = [], [], dict[Path, Prediction]()
        for path in paths:
            try:
                arrays.append(decode_image(read_bytes(path), self.config.captcha)[1])
                usable.append(path)
            except InvalidImage as reason:
                readings[path] = Prediction(path, error=str(reason))
        if arrays:
            images = torch.from_numpy(np.stack(arrays)).to(self.device)
            with devices.autocast(self.config, self.device):
                logits = self._model(images)
            ids, confidences = (x.cpu().tolist() for x in self._model.head.decode(logits.float()))
            for path, characters, sure in zip(usable, ids, confidences, strict=True):
                readings[path] = Prediction(path, self._alphabet.decode(characters), tuple(sure))
        return [readings[path] for path in paths]

    def predict_all(self, paths: Sequence[Path], display: Display) -> Iterator[Prediction]:
        """Readings of many pictures, some hundred at a time."""
        with display.progress_bar(f"reading {len(paths):,} pictures", len(paths)) as bar:
            size = self.config.train.eval_batch_size
            for start in range(0, len(paths), size):
                yield from self.predict(paths[start : start + size])
                bar.advance(min(size, len(paths) - start))


def resolve_weights(run: str) -> Path:
    """The weights file that is meant: of a run, or a .safetensors file itself.

    Raises:
        UserError: there is no such run or file, or it is not the one that the run ended with.
    """
    if run.endswith(".safetensors"):
        return Path(run)
    folder = find_run(run)
    check_file_unchanged(folder, "model.safetensors")
    return folder / "model.safetensors"


def find_images(names: Sequence[str]) -> list[Path]:
    """The pictures that are meant: each name is a picture or a folder of them, inner folders included.

    Raises:
        UserError: a folder has no picture in it.
    """
    files: list[Path] = []
    for name in names:
        path = expand_path(name)
        if not os.path.isdir(path):  # noqa: PTH112 - pathlib's own raises where a name is too long
            files.append(path)
            continue
        inside = list_images(path)
        if not inside:
            raise UserError(f"{name}: there is no picture in this folder")
        files += inside
    return files


def expand_path(name: str) -> Path:
    """The path of this name, with `~` for a person's home; as it stands where there is no such person."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)
