"""The command `data`: build the dataset of a config and report what is in it."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from captcha_exp.cli.hydra_config import try_compose

if TYPE_CHECKING:
    from captcha_exp.config import Config, Machine
    from captcha_exp.data.dataset import Dataset

NUM_AUGMENTED = 10  # images that are shown augmented
NUM_VERSIONS = 5  # of each


def report(
    arguments: argparse.Namespace, detect_machine: Callable[[], "Machine"]
) -> tuple["Dataset", dict[str, Any]]:
    """Build the dataset; return it, and the values of `--json`: manifest, summary, and files written.

    Raises:
        UserError: images cannot be used; the lines say which, and what to do.
    """
    config = try_compose(arguments.overrides, arguments.config_dir).to_config(detect_machine())
    from captcha_exp.config import resolve
    from captcha_exp.data import dataset
    from captcha_exp.report import dataset_page, figures
    from captcha_exp.runtime.paths import root_dir

    spec = dataset.inspect_dataset(resolve(config, detect_machine()))
    data = dataset.load_or_build(spec)
    page = root_dir() / spec.config.data.cache / f"{spec.key}.html"
    augmented = _augment(data, spec.config)
    dataset_page.write_page(data, augmented, page)
    files: dict[str, str | None] = {"page": str(page), "preview": None}
    if arguments.preview:
        preview = page.with_suffix(".png")
        figures.try_to_plot(figures.plot_preview, data, augmented, preview)
        files["preview"] = str(preview)
    return data, {**data.manifest, **dataset_page.summarize(data), **files}


def _augment(data: "Dataset", config: "Config") -> list[Any]:
    """Return augmented versions (N, H, W, C) of the first images; none if there is no augmentation."""
    import torch

    from captcha_exp.data.augment import Augmenter, is_off
    from captcha_exp.data.dataset import Batch

    if is_off(config.augment):
        return []
    count = min(NUM_AUGMENTED, len(data.labels))
    batch = Batch(data.images[:count], data.targets[:count], torch.arange(count))
    last = config.train.epochs  # the warmup has ended
    epochs = [max(1, last - number) for number in range(NUM_VERSIONS)]
    device = torch.device("cpu")
    return [Augmenter(config, epoch, len(data.images), device)(batch).images.numpy() for epoch in epochs]
