"""The command `data`: build the dataset of a config and report what is in it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.errors import UserError

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
    if arguments.folds is not None and arguments.folds < 2:
        raise UserError(f"--folds {arguments.folds}: must be at least 2")
    composed = try_compose(arguments.overrides, arguments.config_dir)
    machine = detect_machine()
    config = composed.to_config(machine)
    from captcha_exp.config import resolve
    from captcha_exp.data import dataset
    from captcha_exp.report import dataset_page, figures
    from captcha_exp.runtime.paths import root_dir

    if arguments.suspects or arguments.folds:
        _check_suspects(arguments, config)
    spec = dataset.inspect_dataset(resolve(config, machine))
    data = dataset.load_or_build(spec)
    page = root_dir() / spec.config.data.cache / f"{spec.key}.html"
    augmented = _augment(data, spec.config)
    dataset_page.write_page(data, augmented, page)
    files: dict[str, str | None] = {"page": str(page), "preview": None, "suspects_page": None}
    if arguments.preview:
        preview = page.with_suffix(".png")
        figures.try_to_plot(figures.plot_preview, data, augmented, preview)
        files["preview"] = str(preview)
    values = {**data.manifest, **dataset_page.summarize(data)}
    if arguments.suspects or arguments.folds:
        path = page.with_suffix(".suspects.html")
        values["suspects"] = _find_suspects(arguments, spec.config, machine, data, path)
        files["suspects_page"] = str(path)
    return data, {**values, **files}


def _find_suspects(
    arguments: argparse.Namespace, config: "Config", machine: "Machine", data: "Dataset", page: Path
) -> dict[str, Any]:
    """Write the page of suspected wrong labels; return the values of `--json`.

    Raises:
        UserError: no run can judge these images.
    """
    from captcha_exp.cli.sweep import train_folds
    from captcha_exp.config import FolderConfig
    from captcha_exp.curation.suspects import find_suspects
    from captcha_exp.data.sources.corrections import corrections_path
    from captcha_exp.report import suspects_page

    assert isinstance(config.data, FolderConfig)  # checked before
    run_dirs = _find_named_runs(arguments)
    if arguments.folds:
        run_dirs += train_folds(arguments, machine, data.manifest["key"])
    suspects = find_suspects(config, data, run_dirs)
    values = suspects.to_json()
    target = corrections_path(Path(config.data.paths[0]))
    suspects_page.write_page(data, values["found"], target, page)
    return {**values, "corrections": str(target)}


def _check_suspects(arguments: argparse.Namespace, config: "Config") -> None:
    """Check what can be known before images are read.

    Raises:
        UserError: the images are not those of one folder, or a run does not exist.
    """
    from captcha_exp.config import FolderConfig

    if not isinstance(config.data, FolderConfig):
        raise UserError(f"data={config.data.source}: has no labels that could be wrong; use data=folder")
    if len(config.data.paths) > 1:
        raise UserError(f"{config.data.path_text}: corrections belong to one folder; name one, then another")
    _find_named_runs(arguments)


def _find_named_runs(arguments: argparse.Namespace) -> list[Path]:
    """Return the directories of the runs of --suspects.

    Raises:
        UserError: one does not exist, or no run of a sweep has finished.
    """
    from captcha_exp.cli.sweep import finished_runs
    from captcha_exp.runs import SweepInfo, find_run, resolve_dir
    from captcha_exp.sweep.record import Sweep

    run_dirs: list[Path] = []
    for name in arguments.suspects:
        sweep_dir = resolve_dir(name, SweepInfo.filename)
        named = [find_run(name, finished=True)] if sweep_dir is None else finished_runs(Sweep(sweep_dir))
        if not named:
            raise UserError(f"--suspects={name}: no run of this sweep has finished")
        run_dirs += named
    return run_dirs


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
