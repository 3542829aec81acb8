"""A finished run on this machine: its weights and images, evaluated again."""

import logging
from pathlib import Path

from captcha_exp import runs
from captcha_exp.config import Config, flatten_mapping
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Dataset, DatasetSpec
from captcha_exp.model.evaluate import Evaluation, evaluate
from captcha_exp.model.weights import load_weights, max_file_bytes
from captcha_exp.runs import SavedRun
from captcha_exp.runs.fields import changed_values
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.text import preview

logger = logging.getLogger(__name__)


def evaluate_run(run_dir: Path, split: str, device_name: str = "auto") -> tuple[Evaluation, Dataset]:
    """Evaluate the best weights of a finished run on one of its splits; return the dataset as well.

    Raises:
        UserError: the run has no weights, or one of its files is damaged or was edited; restore it.
    """
    run = runs.load(run_dir)
    config = run.config()
    weights = run.path(runs.WEIGHTS, max_file_bytes(config))
    # The device that the run was trained on may not exist here; inference works on any.
    config = devices.for_inference(config, device_name)
    device = devices.setup_device(config)
    model, _ = load_weights(weights, device)
    _, data = load_images_of(run, config)
    images = data.split(split, device, config.device.preload_limit_mib)
    return evaluate(model, images, config), data


def load_images_of(run: SavedRun, config: Config) -> tuple[DatasetSpec, Dataset]:
    """Return the dataset of a run, with its config for this machine; warn if the images have changed.

    Raises:
        UserError: the images are not where they were, or cannot be used; the lines say which.
    """
    dataset.check_images_exist(config)
    spec = dataset.inspect_dataset(dataset.with_trusted_cache(config))
    data, recorded = dataset.load_or_build(spec), run.read_json("dataset.json")
    if data.manifest["images_sha256"] != recorded.get("images_sha256"):
        then, now = flatten_mapping(recorded.get("provenance") or {}), flatten_mapping(spec.provenance)
        changes = [f"{key} {old} -> {new}" for key, (old, new) in changed_values(then, now).items()]
        reason = preview(changes) if changes else "equal settings gave other bytes"
        logger.warning(f"the images differ from those of the run: {reason}")
    return spec, data
