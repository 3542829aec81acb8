"""The picture of a sweep, drawn of its verdict."""

from pathlib import Path

from captcha_exp.report import figures
from captcha_exp.runtime.console import shown
from captcha_exp.sweep.aggregate import Group, shortened
from captcha_exp.sweep.conclusions import batch_was_swept, by_others
from captcha_exp.sweep.summary import Verdict

LONGEST = 28  # characters of a name below a picture


def draw(verdict: Verdict, path: Path) -> None:
    """A PNG file: memory, speed and accuracy against the batch size, or against what else was swept."""
    groups = verdict.groups
    budgets = sorted({group.budget_mib for group in groups if group.budget_mib is not None})
    axis, names = "batch size", []
    if batch_was_swept(groups):
        series = [
            figures.Series(name, [_point(group, group.batch_size or 0) for group in members])
            for name, members in by_others(groups)
        ]
    else:
        series = [figures.Series("", [_point(group, place) for place, group in enumerate(groups)])]
        axis = ", ".join(map(shown, groups[0].swept)) if groups else ""
        names = [_name(group) for group in groups]
    figures.sweep(series, budgets, axis, names, path)


def _name(group: Group) -> str:
    """The values, short enough to stand below a picture."""
    values = group.swept.values()
    return ", ".join(shortened(value, max(8, LONGEST // len(values))) for value in values) or "all points"


def _point(group: Group, at: int) -> figures.Point:
    found = {name: mean.value for name, mean in group.figures.items()}
    accuracy = group.figures.get("val_accuracy")
    return figures.Point(
        at=at,
        predicted_mib=group.predicted_mib,
        measured_mib=found.get("measured_mib") if group.on_card else None,
        fits=group.fits not in ("does not fit", "unsure"),
        pictures_per_second=found.get("pictures_per_second"),
        val_accuracy=found.get("val_accuracy"),
        accuracy_interval=None if accuracy is None else accuracy.interval,
    )
