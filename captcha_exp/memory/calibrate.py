"""Measure the CUDA GPU of this machine (`gpu_probe`) and write the file of its bounds (`gpu_profile`).

The process must not have used CUDA before, because the size of the context is measured as a difference.
`calibrate_from_session` writes the file of another machine's GPU from the measurements in a session's file
(`session`).
"""

import logging
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from captcha_exp.config import Config, GpuSpec, Machine, gpu_to_yaml, load_gpu, resolve
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.memory.gpu_probe import measure
from captcha_exp.memory.gpu_profile import build_gpu_spec
from captcha_exp.memory.session import gpu_spec_from_session, read_session, read_versions
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import checkout_dir, conf_dir

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
RESERVED_NAMES = {"null", "true", "false", "inf", "nan", "all"}  # values in Hydra; plan --gpu all: every GPU


def calibrate(
    configs: Sequence[Config],
    machine: Machine,
    *,
    name: str | None = None,
    config_dir: str | None = None,
    force: bool = False,
    command: Sequence[str] = (),
) -> tuple[GpuSpec, Path]:
    """Measure the GPU and write its file; return the figures and the path.

    The networks of all configs are measured, on the device of the first one.

    Raises:
        UserError: no CUDA GPU is available, or the file cannot be written; nothing has been measured.
    """
    device_name = _resolve_device(configs[0], machine)
    folder = resolve_gpu_dir(config_dir)
    if name is not None:
        _check_name(name)
    free = devices.nvml_free_bytes()  # before this process takes any of it
    device = torch.device(device_name)
    properties = torch.cuda.get_device_properties(device)
    path = _output_path(folder, name or slug(properties.name), force)
    chosen = [replace(c, device=replace(c.device, name=device_name, precision="fp32")) for c in configs]
    free_before = free.get(str(getattr(properties, "uuid", "")))
    logger.info(f"{properties.name}: measuring; do not use the GPU for anything else meanwhile")
    readings = measure(
        [resolve(config, machine) for config in chosen],
        device,
        None if free_before is None else free_before / devices.MIB,
    )
    spec = build_gpu_spec(readings, configs[0].gpu)
    software = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": format_cudnn_version(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]  # as above
        "driver": devices.driver_version(),
    }
    _write_gpu_file(
        path, spec, [_format_measurement(spec, time.strftime("%Y-%m-%d"), software), _format_command(command)]
    )
    return spec, path


def calibrate_from_session(
    session_file: Path,
    fallback: GpuSpec,
    *,
    name: str | None = None,
    config_dir: str | None = None,
    force: bool = False,
    command: Sequence[str] = (),
) -> tuple[GpuSpec, Path]:
    """Write a GPU's file from a session of benchmarks/gpu_session.py; return the figures and the path.

    Needs no GPU. Figures that the session did not measure keep the bounds of `fallback`.

    Raises:
        UserError: the session has no calibration, or the file cannot be written; nothing is written.
    """
    folder = resolve_gpu_dir(config_dir)
    if name is not None:
        _check_name(name)
    session = read_session(session_file)
    gpu = gpu_spec_from_session(session, fallback, session_file)
    path = _output_path(folder, name or slug(gpu.name), force)
    date, software = read_versions(session)
    software["cuDNN"] = format_cudnn_version(software["cuDNN"])
    _write_gpu_file(
        path,
        gpu,
        [
            _format_measurement(gpu, date, software),
            f"Session: {session_file.name}",
            _format_command(command),
        ],
    )
    return gpu, path


def _output_path(folder: Path, stem: str, force: bool) -> Path:
    path = folder / f"{stem}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; use --force to overwrite it, or another --name")
    return path


def _format_measurement(gpu: GpuSpec, date: str, software: Mapping[str, object]) -> str:
    """Return the first line of a GPU file: the GPU, the date and the software versions."""
    known = ", ".join(f"{part} {version or 'unknown'}" for part, version in software.items())
    return f"{gpu.name}, measured on {date} with {known}"


def _format_command(command: Sequence[str]) -> str:
    return f"Command: {shlex.join(command)}"


def _resolve_device(config: Config, machine: Machine) -> str:
    """Return the name of the requested CUDA device.

    Raises:
        UserError: it is not available, or this process has used CUDA already.
    """
    asked = config.device.name
    name = "cuda" if asked == "auto" else asked
    if not name.startswith("cuda"):
        raise UserError(f"device.name={asked}: only a CUDA GPU can be measured; use auto or cuda")
    if name not in machine.devices:
        raise UserError(
            f"device.name={asked}: no CUDA GPU to measure: "
            f"{machine.unavailable_reason['cuda']}; without one use "
            "gpu=generic, or a file measured on another machine, in DIR/gpu/ of --config-dir DIR"
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
        raise UserError("this process has used CUDA already; run captcha-exp calibrate in a new process")
    return name


def resolve_gpu_dir(config_dir: str | None) -> Path:
    """Return the directory of the GPU files.

    Raises:
        UserError: it is part of the installed package, whose next installation would delete the file.
    """
    if config_dir is not None:
        return Path(config_dir).expanduser().absolute() / "gpu"
    if checkout_dir() is None:
        raise UserError(
            f"{conf_dir()}: belongs to the installed package; use a directory of your own: --config-dir DIR"
        )
    return conf_dir() / "gpu"


def slug(text: str) -> str:
    """Return a GPU's name as the stem of its file."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")
    return (
        words if NAME_PATTERN.fullmatch(words) and words not in RESERVED_NAMES else f"gpu-{words}".rstrip("-")
    )


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name) or name.lower() in RESERVED_NAMES:
        raise UserError(
            f"--name={name}: must be a letter, then letters, digits, _ and -, 64 at most, for gpu=NAME"
        )


def _write_gpu_file(path: Path, gpu: GpuSpec, header: Sequence[str]) -> None:
    """Write the GPU file below these comment lines, after a check that it loads as the same figures."""
    text = "".join(f"# {' '.join(line.split())}\n" for line in header) + gpu_to_yaml(gpu)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        if load_gpu(draft) != gpu:
            raise RunFailed(f"{path}: does not load as the measured figures; nothing is written")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def format_cudnn_version(number: object) -> str | None:
    """Return the version as text: 90100 is 9.1.0; 8902, the format before version 9, is 8.9.2."""
    if not isinstance(number, int):
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"
