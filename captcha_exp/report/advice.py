"""Suggest what to try next after a run: rules on its figures, each of which can be checked by hand.

A rule fires only if the data could not easily show the same by chance: differences are compared with their
standard error or their intervals.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from captcha_exp.model.proportions import wilson_interval
from captcha_exp.report.run_content import TestResult

OVERFITTING_GAP = 0.05  # of training above validation accuracy
UNDERFITTING_ACCURACY = 0.9  # of training
WIDE_INTERVAL = 0.03  # from its low to its high end
NEAR_CHANCE = 0.1  # above the character accuracy of always predicting the most frequent character
CONFIDENT = 0.99  # of a wrong prediction that may be a wrong label
DOMINANT_SHARE, DOMINANT_COUNT = 0.2, 5  # of one confusion among all wrong characters


class Suggestion(NamedTuple):
    """What to try, with the figure that it is derived from, and a command if one does it."""

    text: str
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a finished run that the rules use; None or empty where it is not known."""

    run: str
    """as a command accepts it, quoted for a shell"""
    test: TestResult
    epochs: Sequence[Mapping[str, float]]
    """the metrics of each epoch"""
    best_epoch: int
    num_validation: int | None
    is_augmented: bool | None
    has_files: bool = False
    """whether the images are files with labels that could be wrong"""
    mean_confidence: float | None = None
    is_speed_disturbed: bool = False
    position_counts: Sequence[int] = ()
    """number of labels that have a character at each position"""
    num_wrong_chars: int | None = None


def suggest(figures: Figures) -> list[Suggestion]:
    """Return suggestions, the most important first."""
    if _is_near_chance(figures.test):
        text = (
            f"{figures.test.char_accuracy:.1%} of the characters are correct, "
            f"{figures.test.char_accuracy_at_chance:.1%} would be chance: the model has not learned to read "
            "yet; check the labels on the dataset page, and train for more epochs"
        )
        return [Suggestion(text, _more_epochs(figures))]
    rules = (_not_converged, _overfitting, _underfitting, _wrong_labels, _dominant_confusion)
    more = (_weak_position, _confidences, _wide_interval, _disturbed_speed)
    return [suggestion for rule in (*rules, *more) for suggestion in rule(figures)]


def _is_near_chance(test: TestResult) -> bool:
    chance = test.char_accuracy_at_chance
    return chance is not None and test.char_accuracy < min(1.0, chance + NEAR_CHANCE)


def _more_epochs(figures: Figures) -> str:
    return f"captcha-exp train --resume {figures.run} train.epochs={2 * max(1, len(figures.epochs))}"


def _values(figures: Figures, key: str) -> list[float]:
    return [row[key] for row in figures.epochs if key in row]


def _not_converged(figures: Figures) -> Iterator[Suggestion]:
    """Suggest more epochs if the last one is the best by more than the standard error of its accuracy."""
    accuracies = _values(figures, "val/accuracy")
    if len(accuracies) < 2 or not figures.num_validation or not all(map(math.isfinite, accuracies)):
        return
    last, before = accuracies[-1], max(accuracies[:-1])
    if figures.best_epoch == len(accuracies) and last - before > _standard_error(before, figures):
        text = (
            f"validation accuracy was still rising at the end, by {100 * (last - before):.1f} points in the "
            "last epoch: train for more epochs"
        )
        yield Suggestion(text, _more_epochs(figures))


def _standard_error(accuracy: float, figures: Figures) -> float:
    count = figures.num_validation or 1
    return math.sqrt(max(accuracy * (1 - accuracy), 1 / count) / count)


def _at_best(figures: Figures) -> tuple[float, float] | None:
    """Return training and validation accuracy of the best epoch."""
    if not 0 < figures.best_epoch <= len(figures.epochs):
        return None
    row = figures.epochs[figures.best_epoch - 1]
    pair = row.get("train/accuracy", math.nan), row.get("val/accuracy", math.nan)
    return pair if all(map(math.isfinite, pair)) else None


def _overfitting(figures: Figures) -> Iterator[Suggestion]:
    if (pair := _at_best(figures)) and pair[0] - pair[1] > OVERFITTING_GAP:
        start = (
            f"training accuracy ({pair[0]:.1%}) is {100 * (pair[0] - pair[1]):.1f} points above validation "
            f"accuracy ({pair[1]:.1%}): the model remembers its images; "
        )
        if figures.is_augmented:
            yield Suggestion(start + "train on more images, or with a larger train.weight_decay")
        else:
            yield Suggestion(start + "train on more images, or with augment=mild and more epochs")


def _underfitting(figures: Figures) -> Iterator[Suggestion]:
    pair = _at_best(figures)
    if pair and pair[0] < UNDERFITTING_ACCURACY and pair[0] - pair[1] <= OVERFITTING_GAP and pair[1] < 0.95:
        weaker = ", or a weaker augmentation" if figures.is_augmented else ""
        text = (
            f"training accuracy is only {pair[0]:.1%} at the best epoch: try more epochs, a larger model "
            f"(model=resnet18){weaker}"
        )
        yield Suggestion(text)


def _wrong_labels(figures: Figures) -> Iterator[Suggestion]:
    wrong = [each for each in figures.test.misreads if (each.confidence or 0.0) >= CONFIDENT]
    if wrong and figures.has_files:
        text = (
            f"{len(wrong):,} of {len(figures.test.misreads):,} misread images were read with a confidence of "
            f"{CONFIDENT:.0%} or more: their labels may be wrong; find suspected labels with --folds"
        )
        yield Suggestion(text, "captcha-exp data --folds 5 data=folder data.path=...")


def _dominant_confusion(figures: Figures) -> Iterator[Suggestion]:
    confusions = figures.test.confusions
    wrong = figures.num_wrong_chars or sum(each.count for each in confusions)
    if not confusions:
        return
    label, predicted, count = confusions[0].label, confusions[0].predicted, confusions[0].count
    if count < DOMINANT_COUNT or count < DOMINANT_SHARE * wrong:
        return
    if label and predicted:
        text = f"{count:,} of {wrong:,} wrong characters are {label!r} read as {predicted!r}: "
        if label.casefold() == predicted.casefold():
            text += "if case does not matter, use an alphabet of one case and captcha.case=fold"
        else:
            text += "check whether a person can distinguish them, and add images with these characters"
    else:
        kind = f"a missing {label!r}" if label else f"an added {predicted!r}"
        text = f"{count:,} of {wrong:,} wrong characters are {kind}: check the lengths of the labels"
    yield Suggestion(text)


def _weak_position(figures: Figures) -> Iterator[Suggestion]:
    """Suggest a check of the images if the intervals of the worst and the best position are apart."""
    fractions, counts = figures.test.by_position, figures.position_counts
    if len(fractions) < 2 or len(counts) != len(fractions) or not all(counts):
        return
    worst, best = (choose(range(len(fractions)), key=fractions.__getitem__) for choose in (min, max))
    high_of_worst = wilson_interval(round(fractions[worst] * counts[worst]), counts[worst])[1]
    low_of_best = wilson_interval(round(fractions[best] * counts[best]), counts[best])[0]
    if high_of_worst < low_of_best:
        text = (
            f"character {worst + 1} is correct in {fractions[worst]:.1%} of the images, character {best + 1} "
            f"in {fractions[best]:.1%}: check whether it is cut off or too small in the resized images"
        )
        yield Suggestion(text)


def _confidences(figures: Figures) -> Iterator[Suggestion]:
    mean, test = figures.mean_confidence, figures.test
    if mean is None or test.accuracy_low <= mean <= test.accuracy_high:
        return
    if mean > test.accuracy_high:
        text = "confidences are too high"
        hint = "accept answers only above a threshold of the coverage table"
    else:
        text, hint = "confidences are too low", "choose a threshold from the coverage table, not by its value"
    yield Suggestion(
        f"{text}: their mean is {mean:.1%}, and {test.accuracy:.1%} of the images are correct; {hint}"
    )


def _wide_interval(figures: Figures) -> Iterator[Suggestion]:
    low, high = figures.test.accuracy_low, figures.test.accuracy_high
    if high - low > WIDE_INTERVAL:
        text = (
            f"the interval of the test accuracy is {100 * (high - low):.1f} points wide, as the test split "
            f"has {figures.test.images:,} images: use more, with a larger data.test_fraction or more images"
        )
        yield Suggestion(text)


def _disturbed_speed(figures: Figures) -> Iterator[Suggestion]:
    if figures.is_speed_disturbed:
        yield Suggestion("the speed was disturbed by other processes: measure it again on an idle machine")
