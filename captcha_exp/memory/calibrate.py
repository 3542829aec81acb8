"""Measure the CUDA GPU of this machine (`gpu_probe`) and write the file of its bounds (`gpu_profile`).

The process must not have used CUDA before, because the size of the context is measured as a difference.
"""

import logging
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from captcha_exp.config import Config, GpuSpec, Machine, gpu_to_yaml, load_gpu, resolve
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.memory.gpu_probe import measure
from captcha_exp.memory.gpu_profile import build_gpu_spec
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import checkout_dir, conf_dir

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
RESERVED_NAMES = {"null", "true", "false", "inf", "nan", "all"}  # values in Hydra; plan --gpu all: every GPU


@dataclass(frozen=True)
class GpuFile:
    """The file to write."""

    name: str | None  # its stem; None: that of the GPU
    config_dir: str | None
    force: bool  # whether it may exist
    command: Sequence[str]  # named in its header

    def path(self, gpu_name: str) -> Path:
        """Return the path for this GPU.

        Raises:
            UserError: the name is invalid, or the file exists.
        """
        if self.name is not None and not _is_valid_name(self.name):
            raise UserError(
                f"--name={self.name}: must be a letter, then letters, digits, _ and -, 64 at most, for "
                "gpu=NAME"
            )
        path = resolve_gpu_dir(self.config_dir) / f"{self.name or slug(gpu_name)}.yaml"
        if path.exists() and not self.force:
            raise UserError(f"{path}: exists already; use --force to overwrite it, or another --name")
        return path

    def write(
        self, path: Path, gpu: GpuSpec, date: str, software: Mapping[str, object], *more: str
    ) -> tuple[GpuSpec, Path]:
        """Write the file, after a check that it loads as the same figures; return its GPU and path.

        The lines of its header are the date and the software versions, `more`, and the command.
        """
        known = ", ".join(f"{part} {version or 'unknown'}" for part, version in software.items())
        command = f"Command: {shlex.join(self.command)}"
        header = [f"{gpu.name}, measured on {date} with {known}", *more, command]
        text = "".join(f"# {' '.join(line.split())}\n" for line in header) + gpu_to_yaml(gpu)
        with tempfile.TemporaryDirectory() as directory:
            draft = Path(directory) / path.name
            draft.write_text(text, encoding="utf-8")
            if load_gpu(draft) != gpu:
                raise RunFailed(f"{path}: does not load as the measured figures; nothing is written")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
        return gpu, path


def calibrate(configs: Sequence[Config], machine: Machine, file: GpuFile) -> tuple[GpuSpec, Path]:
    """Measure the GPU and write its file; return the figures and the path.

    The networks of all configs are measured, on the device of the first one.

    Raises:
        UserError: no CUDA GPU is available, or the file cannot be written; nothing has been measured.
    """
    device_name = _resolve_device(configs[0], machine)
    free = devices.nvml_free_bytes()  # before this process takes any of it
    device = torch.device(device_name)
    properties = torch.cuda.get_device_properties(device)
    path = file.path(properties.name)
    chosen = [replace(c, device=replace(c.device, name=device_name, precision="fp32")) for c in configs]
    free_before = free.get(str(getattr(properties, "uuid", "")))
    free_mib = None if free_before is None else free_before / devices.MIB
    logger.info(f"{properties.name}: measuring; do not use the GPU for anything else meanwhile")
    measurements = measure([resolve(config, machine) for config in chosen], device, free_mib)
    software = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": format_cudnn_version(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]  # untyped in torch
        "driver": devices.driver_version(),
    }
    return file.write(path, build_gpu_spec(measurements, configs[0].gpu), time.strftime("%Y-%m-%d"), software)


def _resolve_device(config: Config, machine: Machine) -> str:
    """Return the name of the requested CUDA device.

    Raises:
        UserError: it is not available, or this process has used CUDA already.
    """
    requested = config.device.name
    name = "cuda" if requested == "auto" else requested
    if not name.startswith("cuda"):
        raise UserError(f"device.name={requested}: only a CUDA GPU can be measured; use auto or cuda")
    if name not in machine.devices:
        raise UserError(
            f"device.name={requested}: no CUDA GPU to measure: "
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
    return words if _is_valid_name(words) else f"gpu-{words}".rstrip("-")


def _is_valid_name(name: str) -> bool:
    return NAME_PATTERN.fullmatch(name) is not None and name.lower() not in RESERVED_NAMES


def format_cudnn_version(number: object) -> str | None:
    """Return the version as text: 90100 is 9.1.0; 8902, the format before version 9, is 8.9.2."""
    if not isinstance(number, int):
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"
