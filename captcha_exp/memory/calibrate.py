"""Measure the CUDA GPU of this machine (`gpu_probe`) and write the file of its bounds (`gpu_profile`).

The process must not have used CUDA before, because the size of the context is measured as a difference.
"""

import logging
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from captcha_exp.config import Config, GpuSpec, Machine, gpu_to_yaml, resolve
from captcha_exp.errors import UserError, one_line
from captcha_exp.memory.gpu_probe import measure
from captcha_exp.memory.gpu_profile import build_gpu_spec
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import checkout_dir, conf_dir

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED_NAMES = {"null", "true", "false", "inf", "nan", "all"}  # values in Hydra; plan --gpu all: every GPU


def gpu_file_path(gpu_name: str, name: str | None, config_dir: str | None, force: bool) -> Path:
    """Return the path of a GPU's file; its stem is `name`, by default the name of the GPU in lower case.

    Raises:
        UserError: the name is invalid, the file exists without `force`, or its directory is part of the
            installed package, whose next installation would delete it.
    """
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    if not NAME_PATTERN.fullmatch(name) or name.lower() in RESERVED_NAMES:
        raise UserError(f"--name={name}: must be a letter, then letters, digits, _ and -, for gpu=NAME")
    if config_dir is None and checkout_dir() is None:
        raise UserError(
            f"{conf_dir()}: belongs to the installed package; use a directory of your own: --config-dir DIR"
        )
    directory = conf_dir() if config_dir is None else Path(config_dir).expanduser().absolute()
    path = directory / "gpu" / f"{name}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; use --force to overwrite it, or another --name")
    return path


def write_gpu_file(
    path: Path, gpu: GpuSpec, date: str, software: Mapping[str, object], command: Sequence[str], *more: str
) -> None:
    """Write a GPU's file; the lines of its header are date and software versions, `more`, and the command.

    Raises:
        UserError: it cannot be written.
    """
    known = ", ".join(f"{part} {version or 'unknown'}" for part, version in software.items())
    header = [f"{gpu.name}, measured on {date} with {known}", *more, f"Command: {shlex.join(command)}"]
    text = "".join(f"# {one_line(line)}\n" for line in header) + gpu_to_yaml(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def calibrate(
    configs: Sequence[Config],
    machine: Machine,
    find_path: Callable[[str], Path],
    command: Sequence[str],
) -> tuple[GpuSpec, Path]:
    """Measure the GPU and write its file; return the figures and the path.

    The networks of all configs are measured, on the device of the first one. `find_path` gets the name of the
    GPU, and returns the path of the file.

    Raises:
        UserError: no CUDA GPU is available, or the file cannot be written; nothing has been measured.
    """
    requested = configs[0].device.name
    device_name = "cuda" if requested == "auto" else requested
    if not device_name.startswith("cuda") or device_name not in machine.devices:
        raise UserError(
            f"device.name={requested}: no CUDA GPU to measure ({machine.unavailable_reason['cuda']}); use "
            "cuda, or on a machine without one gpu=generic or a file that was measured on another machine"
        )
    free = devices.nvml_free_bytes()  # before this process takes any of it
    device = torch.device(device_name)
    properties = torch.cuda.get_device_properties(device)
    path = find_path(properties.name)
    settings = replace(configs[0].device, name=device_name, precision="fp32")
    resolved = [resolve(replace(config, device=settings), machine) for config in configs]
    free_before = free.get(str(getattr(properties, "uuid", "")))
    free_mib = None if free_before is None else free_before / devices.MIB
    logger.info(f"{properties.name}: measuring; do not use the GPU for anything else meanwhile")
    measurements = measure(resolved, device, free_mib)
    software = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # untyped in torch
        "driver": devices.driver_version(),
    }
    gpu = build_gpu_spec(measurements, configs[0].gpu)
    write_gpu_file(path, gpu, time.strftime("%Y-%m-%d"), software, command)
    return gpu, path
