"""Divide images into training, validation and test splits, without torch.

The split of an image is a hash of its label: no label is in two splits, and adding images moves none.
"""

from captcha_exp.config import Config, FolderConfig
from captcha_exp.data import sources
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding
from captcha_exp.runtime.console import NullDisplay

SPLITS = ("train", "validation", "test")


def split_by_label(labels: list[str], config: Config) -> dict[str, list[int]]:
    """Return the indices of the images of each split, in order.

    Raises:
        UserError: a split is empty; the line says what to change.
    """
    data = config.data
    members: dict[str, list[int]] = {name: [] for name in SPLITS}
    for number, place in enumerate(seeding.hash_many_to_unit(data.split_seed, "split", labels)):
        if place < data.test_fraction:
            members["test"].append(number)
        elif place < data.test_fraction + data.validation_fraction:
            members["validation"].append(number)
        else:
            members["train"].append(number)
    for name, numbers in members.items():
        if not numbers:
            which = f"data.path={data.path}" if isinstance(data, FolderConfig) else f"data.count={data.count}"
            raise UserError(
                f"{which}: {len(set(labels))} different labels leave the {name} split empty; "
                f"take more pictures, or change data.validation_fraction and data.test_fraction"
            )
    return members


def generated_split_sizes(config: Config) -> dict[str, int]:
    """Return the number of images in each split of a data source that draws its images.

    Raises:
        UserError: a split would be empty, or a font cannot draw the alphabet; the line says what to change.
    """
    assert not isinstance(config.data, FolderConfig)
    source = sources.make_source(config.data, config.captcha, NullDisplay())
    labels = source.scan(NullDisplay()).labels
    return {name: len(numbers) for name, numbers in split_by_label(labels, config).items()}
