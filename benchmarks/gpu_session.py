"""Measure what a GPU does: the article's loop and ours side by side, and plans against what the GPU shows.

    python benchmarks/gpu_session.py --parts predictions --out FILE    on any machine, before
    python benchmarks/gpu_session.py --call 1 --predictions FILE       240 s: plans, tests, calibration
    python benchmarks/gpu_session.py --call 2 --out FILE               150 s: article's loop and ours, speed
    python benchmarks/gpu_session.py --call 3 --out FILE               150 s: limits, plans, what is left
    python benchmarks/gpu_session.py --call 1 --dry-run                the same on the CPU, small numbers
    python benchmarks/gpu_session.py --list                            the parts, limits and estimates

Each part runs in a child process, so that no part sees the memory, the caches or the settings of another.
This process imports torch once, never touches the GPU, and forks the children (see gpu_processes). The file
is written after each part: a call that is cut loses the part at hand, and the next call continues with the
parts that have no figures. `plan` in --parts means every part whose name begins with `plan-`.

    predictions        on the CPU, in the file before anything that they speak of is measured
    plan-*             one training each: peaks, and what the process holds of the GPU
    allocator-trace-*  what torch asked the driver for, event by event, and our model of its allocator
    tests-*            the tests marked gpu; tests-quick has the essential ones
    calibration        what `captcha-exp calibrate --from FILE` makes a GPU's file of
    context-*          what one training holds beside torch's reservation, step by step
    largest-*          the largest batch in the memory of the article's GPU, by its loop and by ours
    workspaces-*       what cuDNN takes beside the tensors, under limits that it may or may not obey
    speed-*, matrix-products, determinism-*, and the trainings of the article's pictures

The unit of time is the article's: the seconds that 1,000 pictures take, of which 800 train and 100 validate.
Of several epochs the median counts; the first one, which loads kernels, is left out.

Exit code: 0 if every chosen part has figures and no gpu test failed, 1 if not, 2 if a file or an argument
is refused, 143 after SIGTERM. The last line of standard output is a summary in JSON; tables go to standard
error.
"""

# ruff: noqa: E402 - the first lines set the time and the environment before torch is imported
import time

BEGAN = time.perf_counter()  # imports count towards --seconds

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads, which a fork does not copy
if str(HERE.parent) not in sys.path:
    sys.path.insert(1, str(HERE.parent))

import argparse
import functools
import importlib
import json
import math
import signal
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import gpu_judging
import gpu_processes
import gpu_tables
import gpu_trainings
from gpu_cases import code_sha256
from gpu_files import (
    BENCHMARK,
    Refused,
    carried_predictions,
    check_same_machine,
    claimed,
    read_session,
    save_elsewhere,
    write_session,
)
from gpu_parts import CALL_SECONDS, CALLS, PREDICTED, Numbers, Part, call, table
from gpu_processes import WORK, Work
from gpu_tables import ARTICLE

LEAST_SECONDS = 8  # a part with less cannot start and measure
IMPORTED = (  # what parts import late; imported once here, before the first fork
    "captcha.image",
    "captcha_exp.doctor.collect",
    "captcha_exp.training.train",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",
)

RunPart = Callable[[str, Part, float], dict[str, Any]]  # name, part, seconds -> its record


def chosen_parts(asked: str, names: list[str]) -> list[str]:
    """Return the parts in a comma-separated list; the beginning of a name, up to a dash, means all such.

    Raises:
        Refused: a name matches no part; the line lists the parts.
    """
    found, unknown = [], []
    for word in asked.split(","):
        meant = [name for name in names if name == word or name.startswith(f"{word}-")]
        found += [name for name in meant if name not in found]
        unknown += [] if meant else [word]
    if unknown:
        raise Refused(f"--parts: no part is named {', '.join(unknown)}; the parts are {', '.join(names)}")
    return found


def measure(
    session: dict[str, Any],
    names: list[str],
    parts: Mapping[str, Part],
    out: Path,
    until: float,
    run: RunPart,
) -> list[str]:
    """Run the parts in this order, write the file after each, and return the names of those not begun.

    `until` is a time of `time.perf_counter`: no part begins for which too little time is left, and none runs
    past it. A part whose predictions are not in the file is not begun either.
    """
    done, skipped = session["parts"], []
    for name in names:
        part, left = parts[name], until - time.perf_counter()
        if left < max(LEAST_SECONDS, min(part.estimate, part.limit)):
            skipped.append(name)
            print(f"{name}: not begun, {max(0.0, left):.0f} s left", file=sys.stderr, flush=True)
            continue
        if name.startswith(PREDICTED) and "figures" not in done.get("predictions", {}):
            skipped.append(name)
            print(f"{name}: not begun, the file has no predictions of it", file=sys.stderr, flush=True)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        done[name] = run(name, part, min(part.limit, left))
        if failed := write_session(out, session):
            print(f"{failed}; tried again after the next part", file=sys.stderr, flush=True)
        text = done[name].get("error", "done").strip().splitlines()[-1]
        print(f"{name}: {text} ({done[name]['wall_seconds']:.1f} s)", file=sys.stderr, flush=True)
    return skipped


def part_runner(arguments: argparse.Namespace, work: Path) -> RunPart:
    """Return the function that runs a part in a child process, and import what the children need."""
    reason = "asked for" if arguments.fresh_processes else gpu_processes.reason_not_to_fork()
    if reason is None:
        for name in IMPORTED:
            importlib.import_module(name)
        reason = gpu_processes.reason_not_to_fork()
    if reason is not None:
        print(f"each part is started as a new process: {reason}", file=sys.stderr, flush=True)
    fresh = None if reason is None else (["--dry-run"] if arguments.dry_run else [])

    def run(name: str, part: Part, limit: float) -> dict[str, Any]:
        act = functools.partial(part.act, **part.arguments)
        return gpu_processes.run(Work(name, act), limit, {WORK: str(work), **part.environment}, fresh)

    return run


def machine_part(device: str) -> Part:
    """Return the part that describes the machine; a child asks, as this process must not touch the GPU."""
    return Part(gpu_trainings.machine, {"device": device}, 60, 3)


def all_parts(dry_run: bool) -> dict[str, Part]:
    """Return the parts by name."""
    return Numbers(dry_run).parts()


def failures(session: Mapping[str, Any], names: list[str], skipped: list[str]) -> dict[str, str]:
    """Return what is missing of the chosen parts: one line for each that failed or did not begin."""
    found = dict.fromkeys(skipped, "not begun")
    for name in names:
        part = session["parts"].get(name, {})
        if "error" in part and name not in found:
            found[name] = str(part["error"]).strip().splitlines()[-1]
        if failed := gpu_judging.failed_tests({name: part}):
            found[name] = f"failed: {', '.join(failed)}"
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small numbers")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts", help="only these, separated by commas (default: all)")
    which.add_argument("--call", type=int, choices=CALLS, help="the parts of one call")
    which.add_argument("--list", action="store_true", help="print the parts and exit")
    which.add_argument("--one", help=argparse.SUPPRESS)  # this part, in this process
    parser.add_argument(
        "--seconds", type=float, help="the limit of the whole call (default: 240, 150 and 150 with --call)"
    )
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/DATE-GPU.json)")
    parser.add_argument("--predictions", type=Path, help="a session's file whose predictions are taken")
    parser.add_argument(
        "--fresh-processes", action="store_true", help="start each part as a new process instead of forking"
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def run_session(arguments: argparse.Namespace, work: Path) -> int:
    """Run the chosen parts and return the exit code.

    Raises:
        Refused: a file or an argument does not fit; nothing has been written.
    """
    parts = all_parts(arguments.dry_run)
    names = list(parts) if arguments.parts is None else chosen_parts(arguments.parts, list(parts))
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise Refused(f"--seconds {arguments.seconds:g}: must be above 0")
    # Files are checked before anything slow happens.
    if arguments.out is not None:
        with claimed(arguments.out):
            pass
    before = read_session(arguments.out) if arguments.out and arguments.out.exists() else None
    carried = None
    if arguments.predictions:
        carried = carried_predictions(
            arguments.predictions, read_session(arguments.predictions), code_sha256()
        )
        if carried is None:
            raise Refused(f"{arguments.predictions}: has no predictions; make them with --parts predictions")
    run = part_runner(arguments, work)
    on_cpu = arguments.dry_run or names == ["predictions"]
    asked = run("machine-cpu" if on_cpu else "machine", machine_part("cpu" if on_cpu else "cuda"), 60)
    if "error" in asked:
        raise Refused(asked["error"].strip().splitlines()[-1])
    about = asked["figures"]
    kind = "dry-run" if arguments.dry_run else (about["gpu"] or "predictions").lower().replace(" ", "-")
    out = arguments.out or HERE / "results" / f"{about['date']}-{kind}.json"
    if before is None and out.exists():
        before = read_session(out)
    session: dict[str, Any] = {
        "benchmark": BENCHMARK,
        "date": about["date"],
        "dry_run": arguments.dry_run,
        "machine": about,
        "article": ARTICLE,
        "parts": {},
    }
    if before is not None:
        if names == ["predictions"]:  # on any machine; what is in the file keeps its own
            session |= {key: before[key] for key in ("date", "machine", "dry_run") if key in before}
        else:
            check_same_machine(out, before, about, arguments.dry_run)
        session["parts"] = dict(before["parts"])
        own = carried_predictions(out, before, code_sha256())
        if own is None and carried is not None:
            session["parts"]["predictions"] = carried
    elif carried is not None:
        session["parts"]["predictions"] = carried
    with claimed(out):
        if out.exists():  # another session may have ended since it was read
            session["parts"] |= read_session(out)["parts"]
        return _measure_and_report(session, arguments, names, parts, out, run)


def _measure_and_report(
    session: dict[str, Any],
    arguments: argparse.Namespace,
    names: list[str],
    parts: Mapping[str, Part],
    out: Path,
    run: RunPart,
) -> int:
    done = session["parts"]
    number = arguments.call
    names = call(number, names, done) if number else names
    if "figures" in done.get("predictions", {}):
        names = [name for name in names if name != "predictions"]  # never again once something was measured
    elif "predictions" in names or any(name.startswith(PREDICTED) for name in names):
        names = ["predictions", *(name for name in names if name != "predictions")]
    seconds = arguments.seconds or CALL_SECONDS.get(number, 24 * 3600)
    skipped = measure(session, names, parts, out, BEGAN + seconds, run)
    missing = failures(session, names, skipped)
    if failed := write_session(out, session):  # what was carried is kept although nothing began
        missing[out.name] = f"{failed}; the session is in {save_elsewhere(session)}"
        print(missing[out.name], file=sys.stderr, flush=True)
    print(gpu_tables.trainings(done), file=sys.stderr)
    print(f"\n{gpu_tables.tables(session)}", file=sys.stderr, flush=True)
    summary = {
        "benchmark": BENCHMARK,
        "file": out.name,
        "call": number,
        "gpu": session["machine"]["gpu"],
        "seconds": round(time.perf_counter() - BEGAN, 1),
        "part_seconds": {name: done[name]["wall_seconds"] for name in names if name not in skipped},
        "missing": missing,
        "summary": gpu_judging.summary(session),
    }
    print(json.dumps(summary))
    return 1 if missing else 0


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.list:
        print(table(all_parts(arguments.dry_run)))
        return 0
    if arguments.one:  # a part that could not be forked
        gpu_processes.end_with_parent(os.getppid())
        machines = {"machine": machine_part("cuda"), "machine-cpu": machine_part("cpu")}
        chosen = (all_parts(arguments.dry_run) | machines)[arguments.one]
        gpu_processes.perform(functools.partial(chosen.act, **chosen.arguments), arguments.result)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # the running part's processes are ended, too
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-session-") as work:
            return run_session(arguments, Path(work))
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
