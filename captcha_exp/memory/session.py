"""The file of a GPU session (benchmarks/gpu_session.py): what a calibration needs of it.

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

from captcha_exp.config import Card
from captcha_exp.errors import UserError
from captcha_exp.memory.gpu_profile import MARGIN_MIB, judge, readings_from_json

BENCHMARK = "gpu_session"
MAX_MIB = 1e6  # more than any GPU has
AGAIN = "measure it with python benchmarks/gpu_session.py --parts calibration --out FILE.json"


def read_session(file: Path) -> dict[str, Any]:
    """Return a session of a GPU.

    Raises:
        UserError: the file cannot be read, is cut, is of another program or of a dry run. Give another one.
    """
    try:
        session = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; give another --from") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are among these
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not a whole JSON file ({reason}); copy it again, or {AGAIN}") from None
    if not isinstance(session, dict) or session.get("benchmark") != BENCHMARK:
        raise UserError(f"{file}: not a session of benchmarks/gpu_session.py; {AGAIN}")
    if not isinstance(session.get("machine"), dict) or not isinstance(session.get("parts"), dict):
        raise UserError(f"{file}: has no machine or no parts; {AGAIN}")
    if not session["machine"].get("card") or session.get("dry_run"):
        raise UserError(f"{file}: no GPU was measured, only a dry run or predictions; {AGAIN}")
    return session


def card_of(session: Mapping[str, Any], known: Card, file: Path) -> Card:
    """Return the card that a session's calibration makes; its trainings may widen the context's interval.

    Raises:
        UserError: the part is missing, failed or damaged, or is of another GPU; the line names the file.
    """
    part = session["parts"].get("calibration")
    if not isinstance(part, dict):
        raise UserError(f"{file}: has no part calibration; {AGAIN}")
    if "figures" not in part:
        lines = str(part.get("error", "it has no figures")).split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "no reason is given")
        raise UserError(f"{file}: its part calibration failed: {reason[:200]}; {AGAIN}")
    try:
        readings = readings_from_json(part["figures"])
    except UserError as error:
        raise UserError(f"{file}: part calibration: {error}; {AGAIN}") from None
    if readings.name != session["machine"]["card"]:
        raise UserError(
            f"{file}: part calibration is of {readings.name!r}, the session of "
            f"{session['machine']['card']!r}; {AGAIN}"
        )
    return _widened(judge(readings, known), list(_contexts(session["parts"])))


def versions_of(session: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
    """Return the session's date and its versions of torch, CUDA, cuDNN (a number) and the driver."""
    machine = session["machine"]
    dates = [date for date in (machine.get("date"), session.get("date")) if isinstance(date, str)]
    date = next((date for date in dates if re.fullmatch(r"\d{4}-\d\d-\d\d", date)), "an unknown day")
    keys = {"torch": "torch", "CUDA": "cuda", "cuDNN": "cudnn", "driver": "driver"}
    return date, {name: machine.get(key) for name, key in keys.items()}


def _contexts(parts: Mapping[str, Any]) -> Iterator[float]:
    """Yield the MiB that each measured training's process held beside torch's allocator, by NVML."""
    for name, part in parts.items():
        figures = part.get("figures") if isinstance(part, dict) else None
        if not name.startswith("plan-") or not isinstance(figures, dict):
            continue
        context, by = figures.get("context_mib"), figures.get("process_by")
        # Without NVML a process is all that the GPU has in use, other programs included.
        if isinstance(by, str) and by.startswith("NVML") and _is_mib(context):
            yield float(context)


def _is_mib(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_MIB


def _widened(card: Card, contexts: list[float]) -> Card:
    """Return the card with an interval of the context that holds these, too, with the same margin."""
    if not contexts:
        return card
    was, low, high = card.context_mib, min(contexts), max(contexts)
    seen = f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"
    context = replace(
        was,
        least=min(was.least, float(math.floor(low))),
        most=max(was.most, float(math.ceil(high) + MARGIN_MIB)),
        source=f"{was.source}; {len(contexts)} trainings of the session held {seen}",
    )
    return replace(card, context_mib=context)
