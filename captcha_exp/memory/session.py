"""Read the file of a GPU session (benchmarks/gpu_session.py) for a calibration.

Needs no GPU, and no part of the benchmarks: a session is a JSON file with `benchmark`, `date`, `machine` and
`parts`, each part with `figures` or an `error`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from captcha_exp.config import GpuSpec
from captcha_exp.errors import UserError, one_line
from captcha_exp.memory.gpu_profile import CONTEXT_MARGIN_MIB, build_gpu_spec, measurements_from_json

BENCHMARK = "gpu_session"
MAX_MIB = 1e6  # more than any GPU has
REMEASURE_HINT = "measure it with python benchmarks/gpu_session.py --parts calibration --out FILE.json"


def read_session(file: Path) -> dict[str, Any]:
    """Return a session of a GPU.

    Raises:
        UserError: the file cannot be read, is incomplete, is no session or is a dry run. Use another one.
    """
    try:
        session = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; use another --from") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are among these
        raise UserError(
            f"{file}: not a complete JSON file ({one_line(error)}); copy it again, or {REMEASURE_HINT}"
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


def gpu_spec_from_session(session: Mapping[str, Any], fallback: GpuSpec, file: Path) -> GpuSpec:
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
        readings = measurements_from_json(part["figures"])
    except UserError as error:
        raise UserError(f"{file}: part calibration: {error}; {REMEASURE_HINT}") from None
    if readings.name != session["machine"]["gpu"]:
        raise UserError(
            f"{file}: part calibration is of {readings.name!r}, the session of "
            f"{session['machine']['gpu']!r}; {REMEASURE_HINT}"
        )
    return _widen_context(build_gpu_spec(readings, fallback), list(_measured_contexts_mib(session["parts"])))


def read_versions(session: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
    """Return the session's date and its versions of torch, CUDA, cuDNN (a number) and the driver."""
    machine = session["machine"]
    dates = [date for date in (machine.get("date"), session.get("date")) if isinstance(date, str)]
    date = next((date for date in dates if re.fullmatch(r"\d{4}-\d\d-\d\d", date)), "an unknown date")
    keys = {"torch": "torch", "CUDA": "cuda", "cuDNN": "cudnn", "driver": "driver"}
    return date, {name: machine.get(key) for name, key in keys.items()}


def _measured_contexts_mib(parts: Mapping[str, Any]) -> Iterator[float]:
    """Yield the MiB of each measured training's process outside torch's allocator, by NVML."""
    for name, part in parts.items():
        figures = part.get("figures") if isinstance(part, dict) else None
        if not name.startswith("plan-") or not isinstance(figures, dict):
            continue
        context, by = figures.get("context_mib"), figures.get("process_by")
        # Without NVML the figure includes the memory of other programs.
        if isinstance(by, str) and by.startswith("NVML") and _is_mib(context):
            yield float(context)


def _is_mib(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_MIB


def _widen_context(gpu: GpuSpec, contexts_mib: list[float]) -> GpuSpec:
    """Return the GPU with bounds of the context that include these values, with the same margin."""
    if not contexts_mib:
        return gpu
    was, low, high = gpu.context_mib, min(contexts_mib), max(contexts_mib)
    seen = f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"
    context = replace(
        was,
        min=min(was.min, float(math.floor(low))),
        max=max(was.max, float(math.ceil(high) + CONTEXT_MARGIN_MIB)),
        source=f"{was.source}; {len(contexts_mib)} trainings of the session used {seen}",
    )
    return replace(gpu, context_mib=context)
