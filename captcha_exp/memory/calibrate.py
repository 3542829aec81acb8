"""Write the file of a GPU's bounds (`gpu_profile`) from measurements.

`calibrate` measures the CUDA GPU of this machine (`gpu_probe`). The process must not have used CUDA before,
because the size of the context is measured as a difference.

`calibrate_from_session` needs no GPU: it reads what benchmarks/gpu_session.py measured on another machine. A
session is a JSON file with `benchmark`, `date`, `machine` and `parts`, each with `figures` or an `error`.
"""

import json
import logging
import math
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from captcha_exp.config import Config, GpuSpec, Machine, gpu_to_yaml, load_gpu, resolve
from captcha_exp.errors import RunFailed, UserError
from captcha_exp.memory.gpu_probe import measure
from captcha_exp.memory.gpu_profile import CONTEXT_MARGIN_MIB, build_gpu_spec, measurements_from_json
from captcha_exp.memory.interval import MiBRange
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.paths import checkout_dir, conf_dir

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
RESERVED_NAMES = {"null", "true", "false", "inf", "nan", "all"}  # values in Hydra; plan --gpu all: every GPU
BENCHMARK = "gpu_session"
MAX_MIB = 1e6  # more than any GPU has
REMEASURE_HINT = "measure it with python benchmarks/gpu_session.py --parts calibration --out FILE.json"


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
        "cuDNN": format_cudnn_version(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]  # as above
        "driver": devices.driver_version(),
    }
    return file.write(path, build_gpu_spec(measurements, configs[0].gpu), time.strftime("%Y-%m-%d"), software)


def calibrate_from_session(session_file: Path, fallback: GpuSpec, file: GpuFile) -> tuple[GpuSpec, Path]:
    """Write a GPU's file from a session; return the figures and the path.

    Figures that the session did not measure keep the bounds of `fallback`.

    Raises:
        UserError: the session has no calibration, or the file cannot be written; nothing is written.
    """
    session = _read_session(session_file)
    gpu = _gpu_spec_from_session(session, fallback, session_file)
    return file.write(file.path(gpu.name), gpu, *_read_versions(session), f"Session: {session_file.name}")


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


def _read_session(file: Path) -> dict[str, Any]:
    """Return a session of a GPU.

    Raises:
        UserError: the file cannot be read, is incomplete, is no session or is a dry run. Use another one.
    """
    try:
        session = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; use another --from") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are among these
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}: not a complete JSON file ({reason}); copy it again, or {REMEASURE_HINT}"
        ) from None
    if not isinstance(session, dict) or session.get("benchmark") != BENCHMARK:
        raise UserError(f"{file}: not a session of benchmarks/gpu_session.py; {REMEASURE_HINT}")
    if not isinstance(session.get("machine"), dict) or not isinstance(session.get("parts"), dict):
        raise UserError(f"{file}: has no machine or no parts; {REMEASURE_HINT}")
    if not session["machine"].get("gpu") or session.get("dry_run"):
        raise UserError(
            f"{file}: contains no GPU measurements, only a dry run or predictions; {REMEASURE_HINT}"
        )
    return session


def _gpu_spec_from_session(session: Mapping[str, Any], fallback: GpuSpec, file: Path) -> GpuSpec:
    """Return the figures from a session's calibration; its trainings may widen the bounds of the context.

    Raises:
        UserError: the part is missing, failed, invalid or of another GPU. Measure the GPU again.
    """
    part = session["parts"].get("calibration")
    if not isinstance(part, dict):
        raise UserError(f"{file}: has no part calibration; {REMEASURE_HINT}")
    if "figures" not in part:
        lines = str(part.get("error", "it has no figures")).split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "no reason is given")
        raise UserError(f"{file}: its part calibration failed: {reason[:200]}; {REMEASURE_HINT}")
    try:
        measurements = measurements_from_json(part["figures"])
    except UserError as error:
        raise UserError(f"{file}: part calibration: {error}; {REMEASURE_HINT}") from None
    if measurements.name != session["machine"]["gpu"]:
        raise UserError(
            f"{file}: part calibration is of {measurements.name!r}, the session of "
            f"{session['machine']['gpu']!r}; {REMEASURE_HINT}"
        )
    return _widen_context(
        build_gpu_spec(measurements, fallback), list(_measured_contexts_mib(session["parts"]))
    )


def _read_versions(session: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
    """Return the date of a session and its versions of torch, CUDA, cuDNN and the driver."""
    machine = session["machine"]
    dates = [date for date in (machine.get("date"), session.get("date")) if isinstance(date, str)]
    date = next((date for date in dates if re.fullmatch(r"\d{4}-\d\d-\d\d", date)), "an unknown date")
    software = {"torch": "torch", "CUDA": "cuda", "cuDNN": "cudnn", "driver": "driver"}
    versions = {name: machine.get(key) for name, key in software.items()}
    return date, versions | {"cuDNN": format_cudnn_version(versions["cuDNN"])}


def _measured_contexts_mib(parts: Mapping[str, Any]) -> Iterator[float]:
    """Yield the MiB of each measured training's process outside torch's allocator, by NVML."""
    for name, part in parts.items():
        figures = part.get("figures") if isinstance(part, dict) else None
        if name.startswith("plan-") and isinstance(figures, dict):
            context: Any = figures.get("context_mib")
            by = str(figures.get("process_by"))
            # Without NVML the figure includes the memory of other programs.
            if by.startswith("NVML") and type(context) in (int, float) and 0 <= context <= MAX_MIB:
                yield float(context)


def _widen_context(gpu: GpuSpec, contexts_mib: list[float]) -> GpuSpec:
    """Return the GPU with bounds of the context that include these values, with the same margin."""
    if not contexts_mib:
        return gpu
    known, low, high = gpu.context_mib, min(contexts_mib), max(contexts_mib)
    context = replace(
        known,
        min=min(known.min, float(math.floor(low))),
        max=max(known.max, float(math.ceil(high) + CONTEXT_MARGIN_MIB)),
        source=f"{known.source}; {len(contexts_mib)} trainings of the session used {MiBRange(low, high)}",
    )
    return replace(gpu, context_mib=context)
