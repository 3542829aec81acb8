"""A card file of the CUDA card that is here: `measuring` reads its counters, `judging` makes a card of it.

In a process that has not touched CUDA before: what is there already cannot be seen to come. `calibrate_from`
writes the file of a GPU that is elsewhere, from the readings in a session's file (`session`).
"""

import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from captcha_exp.config import Card, Config, Machine, card_to_yaml, load_card, resolve
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.memory.gpu_probe import measure
from captcha_exp.memory.gpu_profile import judge
from captcha_exp.memory.session import card_of, read_session, versions_of
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import checkout, conf

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
NO_NAMES = {"null", "true", "false", "inf", "nan", "all"}  # values for Hydra; every GPU for plan --card


def calibrate(
    configs: Sequence[Config],
    machine: Machine,
    display: Display,
    *,
    name: str | None = None,
    config_dir: str | None = None,
    force: bool = False,
    command: Sequence[str] = (),
) -> tuple[Card, Path]:
    """The measured card and its file; the configs say which networks are tried, the first one which card.

    Raises:
        UserError: there is no CUDA card, or no place for the file; nothing has been measured.
    """
    device_name = _device(configs[0], machine)
    folder = folder_of(config_dir)
    if name is not None:
        _check_name(name)
    free = devices.nvml_free_bytes()  # before this process takes any of it
    device = torch.device(device_name)
    properties = torch.cuda.get_device_properties(device)
    path = _free_path(folder, name or slug(properties.name), force)
    chosen = [replace(c, device=replace(c.device, name=device_name, precision="fp32")) for c in configs]
    free_before = free.get(str(getattr(properties, "uuid", "")))
    display.line(f"{properties.name}: measuring; nothing else should use the card meanwhile")
    readings = measure(
        [resolve(config, machine) for config in chosen],
        device,
        None if free_before is None else free_before / devices.MIB,
        display,
    )
    card = judge(readings, configs[0].card)
    software = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": cudnn_version(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]  # as above
        "driver": devices.driver_version(),
    }
    _write(path, card, [_measured(card, time.strftime("%Y-%m-%d"), software), _command(command)])
    return card, path


def calibrate_from(
    file: Path,
    known: Card,
    *,
    name: str | None = None,
    config_dir: str | None = None,
    force: bool = False,
    command: Sequence[str] = (),
) -> tuple[Card, Path]:
    """Write a GPU's file from a session of benchmarks/gpu_session.py; return the card and the file's path.

    Needs no GPU. What the session did not measure keeps the bounds of the known card.

    Raises:
        UserError: the session has no calibration, or there is no place for the file; nothing is written.
    """
    folder = folder_of(config_dir)
    if name is not None:
        _check_name(name)
    session = read_session(file)
    card = card_of(session, known, file)
    path = _free_path(folder, name or slug(card.name), force)
    date, software = versions_of(session)
    software["cuDNN"] = cudnn_version(software["cuDNN"])
    _write(path, card, [_measured(card, date, software), f"Session: {file.name}", _command(command)])
    return card, path


def _free_path(folder: Path, stem: str, force: bool) -> Path:
    path = folder / f"{stem}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path}: is there already; take --force to write over it, or another --name")
    return path


def _measured(card: Card, date: str, software: Mapping[str, object]) -> str:
    """Return the first line of a card file: the GPU, when it was measured, and with what."""
    known = ", ".join(f"{part} {version or 'unknown'}" for part, version in software.items())
    return f"{card.name}, measured on {date} with {known}"


def _command(command: Sequence[str]) -> str:
    return f"Command: {shlex.join(command)}"


def _device(config: Config, machine: Machine) -> str:
    """The name of the CUDA card that is meant.

    Raises:
        UserError: it is not here, or cannot be measured any more.
    """
    asked = config.device.name
    name = "cuda" if asked == "auto" else asked
    if not name.startswith("cuda"):
        raise UserError(f"device.name={asked}: only a CUDA card can be measured; write auto or cuda")
    if name not in machine.devices:
        raise UserError(
            f"device.name={asked}: no CUDA card to measure: {machine.why_not['cuda']}; without one take "
            "card=generic, or the file of somebody who has the card, in DIR/card/ of --config-dir DIR"
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
        raise UserError("this process has used CUDA already; call captcha-exp calibrate by itself")
    return name


def folder_of(config_dir: str | None) -> Path:
    """The folder of the card files.

    Raises:
        UserError: there is none that would outlive the next installation.
    """
    if config_dir is not None:
        return Path(config_dir).expanduser().absolute() / "card"
    if checkout() is None:
        raise UserError(
            f"{conf()}: belongs to the installed package; give a folder of your own: --config-dir DIR"
        )
    return conf() / "card"


def slug(text: str) -> str:
    """A card's name as the name of its file."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")
    return words if NAME.fullmatch(words) and words not in NO_NAMES else f"card-{words}".rstrip("-")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or name.lower() in NO_NAMES:
        raise UserError(
            f"--name={name}: must be a letter, then letters, digits, _ and -, 64 at most, for card=NAME"
        )


def _write(path: Path, card: Card, head: Sequence[str]) -> None:
    """Write the card file under these lines of comment, once it has been read back as the same card."""
    text = "".join(f"# {' '.join(line.split())}\n" for line in head) + card_to_yaml(card)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        if load_card(draft) != card:
            raise RunFailed(f"{path}: would not say what was measured; nothing is written")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def cudnn_version(number: object) -> str | None:
    """Return the version in words: 90100 is 9.1.0; 8902, as before version 9, is 8.9.2."""
    if not isinstance(number, int):
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"
