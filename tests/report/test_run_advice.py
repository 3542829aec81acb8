"""Each rule of what to try next fires for figures that it is for, and not for others."""

from typing import Any

import pytest

from captcha_exp.model.proportions import wilson_interval
from captcha_exp.report.advice import Figures, suggest
from captcha_exp.report.run_content import Confusion, RecordedMisread, TestResult


def figures(
    correct: int = 1960,
    validation: tuple[float, ...] = (0.7, 0.98, 0.979),
    training: tuple[float, ...] = (0.5, 0.97, 0.98),
    test: dict[str, Any] | None = None,
    **others: Any,
) -> Figures:
    """Return figures of a good run of 2,000 test images, for which no rule fires, with other values."""
    low, high = wilson_interval(correct, 2000)
    result = TestResult(
        images=2000,
        correct=correct,
        accuracy=correct / 2000,
        accuracy_low=low,
        accuracy_high=high,
        char_accuracy=0.99,
        char_accuracy_at_chance=0.11,
    ).model_copy(update=test or {})
    rows = [{"train/accuracy": t, "val/accuracy": v} for t, v in zip(training, validation, strict=True)]
    best = max(range(len(rows)), key=validation.__getitem__) + 1
    values: dict[str, Any] = {"num_validation": 2000, "is_augmented": False, "mean_confidence": 0.98}
    return Figures(run="it", test=result, epochs=rows, best_epoch=best, **(values | others))


def misread(confidence: float) -> RecordedMisread:
    return RecordedMisread(image="a.png", label="a", predicted="b", confidence=confidence)


def confusion(label: str, predicted: str, count: int) -> Confusion:
    return Confusion(label=label, predicted=predicted, count=count)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"validation": (0.7, 0.9, 0.98)}, "still rising at the end, by 8.0 points"),
        ({"training": (0.5, 0.999, 0.999), "validation": (0.5, 0.94, 0.93)}, "augment=mild and more epochs"),
        (
            {"training": (0.5, 0.999, 0.999), "validation": (0.5, 0.94, 0.93), "is_augmented": True},
            "or with a larger train.weight_decay",
        ),
        ({"training": (0.5, 0.8, 0.8), "validation": (0.5, 0.82, 0.81)}, "larger model"),
        ({"has_files": True, "test": {"misreads": [misread(0.999), misread(0.5)]}}, "1 of 2 misread images"),
        (
            {"num_wrong_chars": 20, "test": {"confusions": [confusion("0", "o", 6)]}},
            "6 of 20 wrong characters are '0' read as 'o'",
        ),
        ({"test": {"confusions": [confusion("x", "X", 6)]}}, "captcha.case=fold"),
        ({"test": {"confusions": [confusion("x", "", 6)]}}, "a missing 'x': check the lengths"),
        (
            {"test": {"by_position": [0.99, 0.9]}, "position_counts": (2000, 2000)},
            "character 2 is correct in 90.0%",
        ),
        ({"mean_confidence": 0.995}, "confidences are too high: their mean is 99.5%"),
        ({"mean_confidence": 0.5}, "confidences are too low"),
        ({"correct": 1000, "mean_confidence": None}, "4.4 points wide"),
        ({"is_speed_disturbed": True}, "the speed was disturbed"),
        ({"test": {"char_accuracy": 0.15}}, "15.0% of the characters are correct, 11.0% would be chance"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rule_fires_alone(changed: dict[str, Any], part: str) -> None:
    (suggestion,) = suggest(figures(**changed))
    assert part in suggestion.text


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"validation": (0.7, 0.9795, 0.98)},  # within the standard error
        {"validation": (0.7, 0.9, 0.98), "num_validation": None},
        {"has_files": False, "test": {"misreads": [misread(0.999)]}},
        {"has_files": True, "test": {"misreads": [misread(0.9)]}},
        {"num_wrong_chars": 40, "test": {"confusions": [confusion("0", "o", 6)]}},
        {"test": {"by_position": [0.99, 0.985]}, "position_counts": (2000, 2000)},
        {"test": {"by_position": [0.99, 0.9]}},
        {"validation": (float("nan"),), "training": (float("nan"),)},
        {"validation": (0.98,), "training": (0.97,)},
    ],
    ids=str,
)
def test_no_rule_fires(changed: dict[str, Any]) -> None:
    assert suggest(figures(**changed)) == []


def test_commands_name_the_run() -> None:
    (suggestion,) = suggest(figures(validation=(0.7, 0.9, 0.98)))
    assert suggestion.command == "captcha-exp train --resume it train.epochs=6"
