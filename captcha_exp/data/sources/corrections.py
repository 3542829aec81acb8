"""Corrections of labels: a table beside the images that says which labels are wrong; no file is changed.

Its columns are file, action and label. Actions: `label` gives an image the label in that column, `drop`
leaves the image out, `keep` says that its label is right. A row without an action is undecided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from captcha_exp.data.sources import tables
from captcha_exp.data.sources.files import Files
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.runtime.text import escape_unprintable

NAME = "corrections.csv"
ACTIONS = ("label", "drop", "keep")


@dataclass(frozen=True)
class Correction:
    """A decision about the label of an image."""

    file: str
    action: str
    label: str = ""  # the right one, for the action `label`
    was: str = ""  # the label in the name or the table

    def to_json(self) -> dict[str, Any]:
        """Return the values in dataset.json."""
        return asdict(self)


def find_corrections(files: Files) -> Path | None:
    """Return the path of the corrections of a folder or an archive; None if there are none."""
    path = corrections_path(files.path)
    return path if path.is_file() else None


def corrections_path(source: Path) -> Path:
    """Return where the corrections are: in a folder, or next to an archive."""
    return source.with_name(f"{source.name}.{NAME}") if source.is_file() else source / NAME


def apply_corrections(
    files: Files, table: Path, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Correction]]:
    """Return the candidates with the corrections of a table, without dropped ones; and the corrections.

    A row that cannot be applied becomes a candidate with its reason.
    """
    by_name = {each.name: each for each in candidates if not each.is_row}
    nfc_names = {normalize("NFC", name): name for name in by_name}
    corrections: dict[str, Correction] = {}
    problems = []
    columns = tables.FILE_COLUMNS, ("action",), ("label",)
    for row, (named, action, label) in tables.read_rows(files, table, *columns):
        name = tables.find_file(files, table, named, nfc_names)
        if name not in by_name:
            problem = f"names {escape_unprintable(named)!r}, which is not an image there"
        elif not action:
            continue
        elif action.lower() not in ACTIONS:
            problem = f"has the action {action!r}; write {', '.join(ACTIONS)}, or nothing"
        elif action.lower() == "label" and not label:
            problem = f"has no label for {escape_unprintable(named)!r}; write it, or the action drop"
        else:
            label = label if action.lower() == "label" else ""
            correction = Correction(name, action.lower(), label, by_name[name].label)
            if corrections.setdefault(name, correction) == correction:
                continue
            problem = f"contradicts an earlier row about {escape_unprintable(named)!r}; remove one of them"
        problems.append(Candidate(f"{NAME}, row {row}", label, problem))
    corrected = [_correct(each, corrections) for each in candidates]
    return [each for each in corrected if each is not None] + problems, list(corrections.values())


def _correct(candidate: Candidate, corrections: Mapping[str, Correction]) -> Candidate | None:
    """Return a candidate with its correction; None if it is dropped."""
    correction = corrections.get(candidate.name)
    if correction is None or correction.action == "keep":
        return candidate
    if correction.action == "drop":
        return None
    return replace(candidate, label=correction.label, reason="")
