"""Which of the differences around two runs is the cause of those between their results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.changes import Change
from captcha_exp.reproduce.compare import TOLERANCES, Difference, Verdict

Role: TypeAlias = Literal["cause", "suspect", "cleared"]

MAX_NAMED = 3  # in the verdict's line; the table has all
UNKNOWN_CAUSE = (
    "nothing that is recorded has changed: the numbers of this device are not always the same "
    "(train.deterministic=false, a card), or its hardware is faulty"
)


@dataclass(frozen=True)
class AttributedChange:
    """Something that has changed, and what it has to do with the results."""

    change: Change
    role: Role

    def to_json(self) -> dict[str, Any]:
        """As reproduction.json has it."""
        drift = self.change
        return {"what": drift.name, "then": drift.before, "now": drift.after, "role": self.role}


def attribute(
    changes: Sequence[Change], verdict: Verdict, same_images: bool, deterministic: bool
) -> list[AttributedChange]:
    """Each with its role; `certain` says that a training without any change gives the same bits.

    What ran otherwise is a cause. Of the rest, what is the only one that can be is the cause; of several,
    each is a suspect.
    """
    if verdict == "identical":
        return [AttributedChange(drift, "cleared") for drift in changes]
    possible = [drift for drift in changes if _may_be_cause(drift, same_images)]
    ran = [drift for drift in possible if drift.is_input]
    sources = {drift.source for drift in possible}
    sole = deterministic and not ran and len(sources) == 1
    return [
        AttributedChange(
            drift, "cleared" if not _may_be_cause(drift, same_images) else _role(drift.is_input or sole)
        )
        for drift in changes
    ]


def _role(is_certain: bool) -> Role:
    return "cause" if is_certain else "suspect"


def _may_be_cause(drift: Change, same_images: bool) -> bool:
    return drift.affects == "numbers" or (drift.affects == "images" and not same_images)


def format_verdict(
    verdict: Verdict,
    first_difference: Difference | None,
    attributed_changes: Sequence[AttributedChange],
    deterministic: bool,
) -> str:
    """The verdict in a line: the first difference, and the cause."""
    if verdict == "identical" or first_difference is None:
        told = [each.change.describe() for each in attributed_changes if each.change.is_headline]
        return f"identical, but {_join_truncated(told)}" if told else "identical"
    line = f"{verdict}: first in {first_difference.describe()}"
    causes = [each.change.describe() for each in attributed_changes if each.role == "cause"]
    suspects = [each.change.describe() for each in attributed_changes if each.role == "suspect"]
    if causes:
        line += f"; cause: {_join_truncated(causes)}"
    if suspects:
        line += f"; {'also suspect' if causes else 'suspect'}: {_join_truncated(suspects)}"
    if not causes and not suspects:
        line += (
            f"; {UNKNOWN_CAUSE}"
            if deterministic
            else "; train.deterministic=false: no two trainings are the same"
        )
    return line


def _join_truncated(words: Sequence[str]) -> str:
    more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
    return ", ".join(words[:MAX_NAMED]) + more


def tolerances() -> dict[str, str]:
    """What equivalent means, for reproduction.json."""
    return dict(TOLERANCES)
