"""Write the file of a GPU for conf/gpu/ from a session of gpu_session.py, on a machine without that GPU.

    python benchmarks/session_to_gpu_file.py benchmarks/results/DATE-GPU.json --name NAME

The bounds are those of `captcha-exp calibrate` on that machine, and the measured trainings of the session may
widen the bounds of the context. What the session did not measure keeps the bounds of conf/gpu/generic.yaml.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from captcha_exp import compose, load
from captcha_exp.config import GpuSpec
from captcha_exp.errors import UserError
from captcha_exp.memory.calibrate import gpu_file_path, write_gpu_file
from captcha_exp.memory.gpu_profile import CONTEXT_MARGIN_MIB, GpuMeasurements, build_gpu_spec
from captcha_exp.memory.interval import MiBRange

REMEASURE_HINT = "measure it with python benchmarks/gpu_session.py --parts calibration --out FILE.json"


def main(argv: list[str]) -> None:
    """Write the file and print its path.

    Raises:
        UserError: the session has no calibration, or the file cannot be written; nothing is written.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("session", type=Path, metavar="SESSION.json")
    parser.add_argument("--name", help="name of the file; default: the name of the GPU")
    parser.add_argument("--config-dir", metavar="DIR", help="write DIR/gpu/NAME.yaml instead of conf/gpu/")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    arguments = parser.parse_args(argv)
    session = read_session(arguments.session)
    gpu = gpu_spec_of(session, load(compose("gpu=generic")).gpu, arguments.session)
    machine = session["machine"]
    software = {
        "torch": machine.get("torch"),
        "CUDA": machine.get("cuda"),
        "cuDNN": machine.get("cudnn"),
        "driver": machine.get("driver"),
    }
    command = ["python", "benchmarks/session_to_gpu_file.py", *argv]
    date = str(machine.get("date") or session.get("date") or "an unknown date")
    path = gpu_file_path(gpu.name, arguments.name, arguments.config_dir, arguments.force)
    write_gpu_file(path, gpu, date, software, command, f"Session: {arguments.session.name}")
    print(path)


def read_session(file: Path) -> dict[str, Any]:
    """Return a session of a GPU.

    Raises:
        UserError: the file cannot be read, or is no session of a GPU; use another one.
    """
    try:
        session = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}; copy it again, or {REMEASURE_HINT}") from None
    if not isinstance(session, dict) or session.get("benchmark") != "gpu_session":
        raise UserError(f"{file}: not a session of benchmarks/gpu_session.py; {REMEASURE_HINT}")
    if not session["machine"].get("gpu") or session.get("dry_run"):
        raise UserError(f"{file}: only a dry run or predictions, without a GPU; {REMEASURE_HINT}")
    return session


def gpu_spec_of(session: Mapping[str, Any], fallback: GpuSpec, file: Path) -> GpuSpec:
    """Return the bounds from the calibration of a session.

    Raises:
        UserError: the part is missing, failed, invalid or of another GPU; measure the GPU again.
    """
    part = session["parts"].get("calibration") or {"error": "the session does not have it"}
    if "figures" not in part:
        reason = (part["error"].strip().splitlines() or ["no reason is given"])[-1]
        raise UserError(f"{file}: part calibration failed: {reason.strip()[:200]}; {REMEASURE_HINT}")
    try:
        measurements = measurements_from_json(part["figures"])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: part calibration: {key}: {first['msg']}; {REMEASURE_HINT}") from None
    if measurements.name != session["machine"]["gpu"]:
        raise UserError(
            f"{file}: part calibration is of {measurements.name!r}, the session of "
            f"{session['machine']['gpu']!r}; {REMEASURE_HINT}"
        )
    gpu = build_gpu_spec(measurements, fallback)
    return _widen_context(gpu, list(_measured_contexts_mib(session["parts"])))


def measurements_from_json(values: object) -> GpuMeasurements:
    """Return the measurements from the figures of a part.

    Raises:
        ValidationError: a value is missing or has the wrong type.
    """
    # As JSON, because a strict validation of Python values rejects a list for a tuple.
    return TypeAdapter(GpuMeasurements).validate_json(json.dumps(values), strict=True)


def _measured_contexts_mib(parts: Mapping[str, Any]) -> Iterator[float]:
    """Yield the MiB of each measured training's process outside torch's allocator, by NVML."""
    for name, part in parts.items():
        figures = part.get("figures", {})
        # Without NVML the figure includes the memory of other programs.
        if name.startswith("plan-") and str(figures.get("process_by")).startswith("NVML"):
            yield figures["context_mib"]


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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit("\n".join(error.lines))
