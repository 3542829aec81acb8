"""Which of the differences around two runs is the cause of those between their results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.changes import Drift
from captcha_exp.reproduce.compare import TOLERANCES, Difference, Verdict

Role: TypeAlias = Literal["cause", "suspect", "cleared"]

NAMED = 3  # in the verdict's line; the table has all
UNKNOWN = (
    "nothing that is recorded has changed: the numbers of this device are not always the same "
    "(train.deterministic=false, a card), or its hardware is faulty"
)


@dataclass(frozen=True)
class Judged:
    """Something that has changed, and what it has to do with the results."""

    drift: Drift
    role: Role

    def to_json(self) -> dict[str, Any]:
        """As reproduction.json has it."""
        drift = self.drift
        return {"what": drift.what, "then": drift.then, "now": drift.now, "role": self.role}


def judge(found: Sequence[Drift], verdict: Verdict, same_pictures: bool, certain: bool) -> list[Judged]:
    """Each with its role; `certain` says that a training without any change gives the same bits.

    What ran otherwise is a cause. Of the rest, what is the only one that can be is the cause; of several,
    each is a suspect.
    """
    if verdict == "identical":
        return [Judged(drift, "cleared") for drift in found]
    possible = [drift for drift in found if _can_be(drift, same_pictures)]
    ran = [drift for drift in possible if drift.ran]
    sources = {drift.source for drift in possible}
    sole = certain and not ran and len(sources) == 1
    return [
        Judged(drift, "cleared" if not _can_be(drift, same_pictures) else _role(drift.ran or sole))
        for drift in found
    ]


def _role(is_certain: bool) -> Role:
    return "cause" if is_certain else "suspect"


def _can_be(drift: Drift, same_pictures: bool) -> bool:
    return drift.touches == "numbers" or (drift.touches == "pictures" and not same_pictures)


def sentence(verdict: Verdict, first: Difference | None, judged: Sequence[Judged], repeatable: bool) -> str:
    """The verdict in a line: the first difference, and the cause."""
    if verdict == "identical" or first is None:
        told = [each.drift.words() for each in judged if each.drift.headline]
        return f"identical, but {_some(told)}" if told else "identical"
    line = f"{verdict}: first in {first.words()}"
    causes = [each.drift.words() for each in judged if each.role == "cause"]
    suspects = [each.drift.words() for each in judged if each.role == "suspect"]
    if causes:
        line += f"; cause: {_some(causes)}"
    if suspects:
        line += f"; {'also suspect' if causes else 'suspect'}: {_some(suspects)}"
    if not causes and not suspects:
        line += f"; {UNKNOWN}" if repeatable else "; train.deterministic=false: no two trainings are the same"
    return line


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more


def tolerances() -> dict[str, str]:
    """What equivalent means, for reproduction.json."""
    return dict(TOLERANCES)
