"""Whether the pictures of a run are still there: told before its training starts."""

from collections.abc import Mapping
from typing import Any

from captcha_exp.config import Config, FolderConfig
from captcha_exp.data import dataset
from captcha_exp.data.sources import folder
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import NullDisplay, escape_unprintable

MAX_SHOWN = 5  # names of each kind
CHANGE_KINDS = ("another content", "another label", "missing", "new")


def changed_files(config: Config, manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Kind of difference -> names of files of the folder that are not as the run had them.

    Raises:
        UserError: the folder is not there, or cannot be read; the line says how to name another.
    """
    if not isinstance(config.data, FolderConfig):
        return {}
    try:
        found = folder.scan_folder(config.data, config.captcha, NullDisplay())
    except UserError as error:
        hint = "data.path=DIR names the folder where it is now"
        raise UserError(*error.lines[:-1], f"{error.lines[-1]}; {hint}") from None
    now = {candidate.name: candidate for candidate in found.candidates}
    then = {str(file["file"]): file for file in manifest.get("files", [])}
    refused = {str(file["file"]) for file in manifest.get("rejected", [])}
    both = [name for name in then if name in now]
    differing = {
        "another content": [n for n in both if now[n].sha256 != then[n]["sha256"]],
        "another label": [n for n in both if now[n].label != then[n]["label"]],
        "missing": [name for name in then if name not in now],
        "new": [name for name in now if name not in then and name not in refused],
    }
    return {kind: names for kind, names in differing.items() if names}


def describe_files(kind: str, names: list[str]) -> str:
    """The files of one kind, in a few words."""
    more = f" and {len(names) - MAX_SHOWN:,} more" if len(names) > MAX_SHOWN else ""
    return f"{kind}: {', '.join(map(escape_unprintable, names[:MAX_SHOWN]))}{more}"


def rendered_differently(config: Config, manifest: Mapping[str, Any]) -> bool:
    """Whether pictures are to be drawn from something else than the run's were."""
    if isinstance(config.data, FolderConfig):
        return False
    return dataset.inspect_dataset(config, NullDisplay()).key != manifest.get("key")
