"""Split images into training, validation and test sets, without torch.

The split of an image is a hash of its label: no label is in two splits, and new images move no old ones. With
data.folds, each label is in the test split of one fold. A folder may give the splits itself.
"""

from collections.abc import Sequence

from captcha_exp.config import Config, FolderConfig
from captcha_exp.data import sources
from captcha_exp.errors import UserError
from captcha_exp.runtime import seeding

SPLITS = ("train", "validation", "test")


def split_images(keys: Sequence[str], given: Sequence[str], config: Config) -> dict[str, list[int]]:
    """Return the indices of the images of each split, in order.

    The split that is `given` to an image counts; an image without one is in the split that is given to
    those with its key. Of the training images, a hash of the keys decides which ones are in a split that no
    image was given, and of images of other keys, the split of each. data.folds ignores what is given.

    Raises:
        UserError: a split is empty; the line says what to change.
    """
    data = config.data
    given = [] if data.folds is not None else given
    of_all = {
        "test": data.test_fraction if data.folds is None else 1 / data.folds,
        "validation": data.validation_fraction,
    }
    of_training = {name: 0.0 if name in given else fraction for name, fraction in of_all.items()}
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    of_key = {key: name for key, name in zip(keys, given, strict=False) if name}
    for index, key in enumerate(keys):
        of_image = (given[index] or of_key.get(key, "")) if given else ""
        if of_image not in ("", "train"):
            splits[of_image].append(index)
            continue
        fractions = of_training if of_image else of_all
        hashed = seeding.hash_to_unit(data.split_seed, "split", key)
        if data.folds is not None:  # move the part of this fold to the start
            hashed = (hashed - data.fold / data.folds) % 1
        if hashed < fractions["test"]:
            splits["test"].append(index)
        elif hashed < fractions["test"] + fractions["validation"]:
            splits["validation"].append(index)
        else:
            splits["train"].append(index)
    for name, indices in splits.items():
        if not indices:
            key = data.path_text if isinstance(data, FolderConfig) else f"data.count={data.count}"
            change = "change data.validation_fraction and data.test_fraction"
            if data.folds is not None:
                change = "fewer folds"
            raise UserError(
                f"{key}: {len(set(keys))} distinct labels leave the {name} split empty; use more images, or "
                f"{change}"
            )
    return splits


def count_by_share(shares: Sequence[float], total: int) -> list[int]:
    """Return how many of a total belong to each share; they sum to the total."""
    counts, so_far = [], 0
    for number in range(1, len(shares) + 1):
        end = round(sum(shares[:number]) / sum(shares) * total)
        counts.append(end - so_far)
        so_far = end
    return counts


def generated_split_sizes(config: Config) -> dict[str, int]:
    """Return the number of images in each split of a generated dataset.

    Raises:
        UserError: a split would be empty, or a font lacks characters of the alphabet.
    """
    assert not isinstance(config.data, FolderConfig)
    source = sources.make_source(config.data, config.captcha)
    labels = source.scan().labels
    return {name: len(indices) for name, indices in split_images(labels, [], config).items()}
