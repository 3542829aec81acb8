"""Attribute the differences between two results to the changes between the runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.changes import Change
from captcha_exp.reproduce.compare import TOLERANCES, Difference, Verdict
from captcha_exp.runtime.console import preview

Role: TypeAlias = Literal["cause", "suspect", "ruled_out"]

UNKNOWN_CAUSE = (
    "no recorded change: this device is not deterministic (train.deterministic=false, a GPU), "
    "or its hardware is faulty"
)
NON_DETERMINISTIC = "train.deterministic=false: two trainings are never identical"


@dataclass(frozen=True)
class AttributedChange:
    """A change and its role in the difference of the results."""

    change: Change
    role: Role

    def to_json(self) -> dict[str, Any]:
        """Return the entry of reproduction.json."""
        change = self.change
        return {"name": change.name, "before": change.before, "after": change.after, "role": self.role}


def attribute(
    changes: Sequence[Change], verdict: Verdict, same_images: bool, deterministic: bool
) -> list[AttributedChange]:
    """Assign a role to each change.

    A changed input of the run is a cause. Of the other possible causes, a single one is the cause if the
    training is `deterministic`; otherwise each is a suspect.
    """
    if verdict == "identical":
        return [AttributedChange(change, "ruled_out") for change in changes]
    possible = [change for change in changes if _may_be_cause(change, same_images)]
    has_input = any(change.is_input for change in possible)
    sources = {change.source for change in possible}
    is_sole = deterministic and not has_input and len(sources) == 1

    def role(change: Change) -> Role:
        if not _may_be_cause(change, same_images):
            return "ruled_out"
        return "cause" if change.is_input or is_sole else "suspect"

    return [AttributedChange(change, role(change)) for change in changes]


def _may_be_cause(change: Change, same_images: bool) -> bool:
    return change.affects == "numbers" or (change.affects == "images" and not same_images)


def format_verdict(
    verdict: Verdict,
    first_difference: Difference | None,
    attributed_changes: Sequence[AttributedChange],
    deterministic: bool,
) -> str:
    """Return the verdict in one line, with the first difference and its cause."""
    if verdict == "identical" or first_difference is None:
        notable = [each.change.describe() for each in attributed_changes if each.change.is_headline]
        return f"identical, but {preview(notable)}" if notable else "identical"
    line = f"{verdict}: first in {first_difference.describe()}"
    causes = [each.change.describe() for each in attributed_changes if each.role == "cause"]
    suspects = [each.change.describe() for each in attributed_changes if each.role == "suspect"]
    if causes:
        line += f"; cause: {preview(causes)}"
    if suspects:
        line += f"; {'also suspect' if causes else 'suspect'}: {preview(suspects)}"
    if not causes and not suspects:
        line += f"; {UNKNOWN_CAUSE if deterministic else NON_DETERMINISTIC}"
    return line


def tolerances() -> dict[str, str]:
    """Return the criteria of an equivalent run, for reproduction.json."""
    return dict(TOLERANCES)
