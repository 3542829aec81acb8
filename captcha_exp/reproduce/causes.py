"""Attribute the differences between two results to the changes between the runs."""

from collections.abc import Sequence
from dataclasses import replace

from captcha_exp.reproduce.changes import Change, Role
from captcha_exp.reproduce.compare import Difference, Verdict
from captcha_exp.runtime.text import preview

UNKNOWN_CAUSE = (
    "no recorded change: this device is not deterministic (train.deterministic=false, a GPU), "
    "or its hardware is faulty"
)
NON_DETERMINISTIC = "train.deterministic=false: two trainings are never identical"


def attribute(
    changes: Sequence[Change], verdict: Verdict, same_images: bool, deterministic: bool
) -> list[Change]:
    """Set the role of each change in the difference of the results.

    A changed input of the run is a cause. Of the other possible causes, a single one is the cause if the
    training is `deterministic`; otherwise each is a suspect.
    """
    effects = {"numbers"} if same_images else {"numbers", "images"}
    possible = [change for change in changes if change.affects in effects and verdict != "identical"]
    has_input = any(change.is_input for change in possible)
    is_sole = deterministic and not has_input and len(possible) == 1

    def role(change: Change) -> Role:
        if change not in possible:
            return "ruled_out"
        return "cause" if change.is_input or is_sole else "suspect"

    return [replace(change, role=role(change)) for change in changes]


def format_verdict(
    verdict: Verdict,
    differences: Sequence[Difference],
    changes: Sequence[Change],
    deterministic: bool,
) -> str:
    """Return the verdict in one line, with the first difference and its cause."""
    if verdict == "identical":
        notable = [each.describe() for each in changes if each.affects != "nothing"]
        return f"identical, but {preview(notable)}" if notable else "identical"
    line = f"{verdict}: first in {differences[0].describe()}"
    causes = [each.describe() for each in changes if each.role == "cause"]
    suspects = [each.describe() for each in changes if each.role == "suspect"]
    if causes:
        line += f"; cause: {preview(causes)}"
    if suspects:
        line += f"; {'also suspect' if causes else 'suspect'}: {preview(suspects)}"
    if not causes and not suspects:
        line += f"; {UNKNOWN_CAUSE if deterministic else NON_DETERMINISTIC}"
    return line
