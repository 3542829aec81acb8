"""Whether the pictures of a run are still there: told before its training starts."""

from collections.abc import Mapping
from typing import Any

from captcha_exp.config import Config, Folder
from captcha_exp.data import dataset
from captcha_exp.data.sources import folder
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import Silent, shown

SHOWN = 5  # names of each kind
KINDS = ("another content", "another label", "missing", "new")


def other_files(config: Config, manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Kind of difference -> names of files of the folder that are not as the run had them.

    Raises:
        UserError: the folder is not there, or cannot be read; the line says how to name another.
    """
    if not isinstance(config.data, Folder):
        return {}
    try:
        found = folder.find(config.data, config.captcha, Silent())
    except UserError as error:
        hint = "data.path=DIR names the folder where it is now"
        raise UserError(*error.lines[:-1], f"{error.lines[-1]}; {hint}") from None
    now = {candidate.name: candidate for candidate in found.candidates}
    then = {str(file["file"]): file for file in manifest.get("files", [])}
    refused = {str(file["file"]) for file in manifest.get("refused", [])}
    both = [name for name in then if name in now]
    differing = {
        "another content": [n for n in both if now[n].sha256 != then[n]["sha256"]],
        "another label": [n for n in both if now[n].label != then[n]["label"]],
        "missing": [name for name in then if name not in now],
        "new": [name for name in now if name not in then and name not in refused],
    }
    return {kind: names for kind, names in differing.items() if names}


def words(kind: str, names: list[str]) -> str:
    """The files of one kind, in a few words."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{kind}: {', '.join(map(shown, names[:SHOWN]))}{more}"


def made_otherwise(config: Config, manifest: Mapping[str, Any]) -> bool:
    """Whether pictures are to be drawn from something else than the run's were."""
    if isinstance(config.data, Folder):
        return False
    return dataset.outline(config, Silent()).key != manifest.get("key")
