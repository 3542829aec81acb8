"""Check before training that the images are those of the reference run."""

from collections.abc import Mapping
from typing import Any

from captcha_exp.config import Config, FolderConfig
from captcha_exp.data.sources import folder
from captcha_exp.errors import UserError
from captcha_exp.runtime.text import preview

MAX_SHOWN = 5  # file names per kind of change


def describe_changed_files(config: Config, manifest: Mapping[str, Any]) -> list[str]:
    """Describe how the image folder differs from the manifest, one text per kind, as in "missing: 0009.png".

    Raises:
        UserError: the folder is missing or not readable; set data.path to its current location.
    """
    if not isinstance(config.data, FolderConfig):
        return []
    try:
        scan = folder.scan_folder(config.data, config.captcha)
    except UserError as error:
        hint = "set data.path=DIR to its current location"
        if len(config.data.paths) > 1:
            hint = "set 'data.path=[DIR,DIR]' to the current locations of all"
        raise UserError(*error.lines[:-1], f"{error.lines[-1]}; {hint}") from None
    current = {candidate.name: candidate for candidate in scan.candidates}
    recorded = {str(file["file"]): file for file in manifest.get("files", [])}
    rejected = {str(file["file"]) for file in manifest.get("rejected", [])}
    common = [name for name in recorded if name in current]
    changed = {
        "different content": [n for n in common if current[n].sha256 != recorded[n]["sha256"]],
        "different label": [n for n in common if current[n].label != recorded[n]["label"]],
        "missing": [name for name in recorded if name not in current],
        "new": [name for name in current if name not in recorded and name not in rejected],
    }
    corrected = {each.file for each in scan.corrections}
    hint = ", by corrections.csv; data.apply_corrections=false ignores it"
    return [
        f"{kind}: {preview(names, MAX_SHOWN)}{hint if corrected.issuperset(names) else ''}"
        for kind, names in changed.items()
        if names
    ]
