"""Measure a GPU: speed of the article's loop and of ours, and predicted against measured memory.

    python benchmarks/gpu_session.py --parts predictions --out FILE    on any machine, in advance
    python benchmarks/gpu_session.py --call 1 --predictions FILE       240 s: plans, tests, calibration
    python benchmarks/gpu_session.py --call 2 --out FILE               150 s: article's loop and ours, speed
    python benchmarks/gpu_session.py --call 3 --out FILE               150 s: limits, plans, remaining parts
    python benchmarks/gpu_session.py --call 1 --dry-run                the same on the CPU, small numbers
    python benchmarks/gpu_session.py --list                            the parts, limits and estimates

Each part runs in its own child process, isolated from the memory, caches and settings of the others. This
process imports torch once, never uses the GPU, and forks the children (see gpu_processes). The file is
written after each part: an interrupted call loses only the running part, and the next call continues with
the parts that have no figures. `plan` in --parts selects every part whose name begins with `plan-`.

    predictions        on the CPU, written before anything they predict is measured
    plan-*             one training each: peaks, and GPU memory of the process
    allocator-trace-*  all events of torch's allocator, and their replay by our model
    tests-*            the tests marked gpu; tests-quick has the essential ones
    calibration        the input of session_to_gpu_file.py
    context-*          memory outside torch's reservation, stage by stage
    largest-*          the largest batch within the memory of the article's GPU, in its loop and in ours
    workspaces-*       workspaces of cuDNN under several limits
    speed-*, matrix-products, determinism-*, and trainings on the article's images

The unit of time is the article's: seconds per 1,000 images, of which 800 train and 100 validate. The figure
is the median over epochs, without the first one, which loads kernels.

Exit code: 0 if every chosen part has figures and no gpu test failed, 1 if not, 2 if a file or an argument
is invalid, 143 after SIGTERM. The last line of standard output is a summary in JSON; tables go to standard
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

import gpu_comparison
import gpu_processes
import gpu_tables
import gpu_trainings
from gpu_cases import code_sha256
from gpu_files import (
    BENCHMARK,
    SessionError,
    check_same_machine,
    load_predictions,
    locked,
    read_session,
    save_to_temp_file,
    write_session,
)
from gpu_parts import CALL_SECONDS, CALLS, PREDICTED, Part, PartFactory, parts_of_call, table
from gpu_processes import SHARED_DIR, Task
from gpu_tables import ARTICLE
from interference import interference

MIN_SECONDS = 8  # a part needs at least this much time
PRELOADED = (  # lazy imports of the parts, done once before the first fork
    "captcha.image",
    "captcha_exp.doctor.collect",
    "captcha_exp.training.train",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",
)

RunPart = Callable[[str, Part, float], dict[str, Any]]  # name, part, seconds -> its record


def select_parts(selection: str, names: list[str]) -> list[str]:
    """Return the parts in a comma-separated list; a prefix up to a dash selects all matching parts.

    Raises:
        SessionError: a name matches no part; the message lists the parts.
    """
    found, unknown = [], []
    for word in selection.split(","):
        matches = [name for name in names if name == word or name.startswith(f"{word}-")]
        found += [name for name in matches if name not in found]
        unknown += [] if matches else [word]
    if unknown:
        raise SessionError(
            f"--parts: no part is named {', '.join(unknown)}; the parts are {', '.join(names)}"
        )
    return found


def measure(
    session: dict[str, Any],
    names: list[str],
    parts: Mapping[str, Part],
    out: Path,
    deadline: float,
    run: RunPart,
) -> list[str]:
    """Run the parts in this order, write the file after each, and return the names of those not started.

    `deadline` is on the clock of `time.perf_counter`: a part is skipped if too little time is left, and none
    runs past the deadline. A part whose predictions are missing is skipped too.
    """
    done, skipped = session["parts"], []
    for name in names:
        part, left = parts[name], deadline - time.perf_counter()
        if left < max(MIN_SECONDS, min(part.estimate, part.limit)):
            skipped.append(name)
            print(f"{name}: not started, {max(0.0, left):.0f} s left", file=sys.stderr, flush=True)
            continue
        if name.startswith(PREDICTED) and "figures" not in done.get("predictions", {}):
            skipped.append(name)
            print(f"{name}: not started, the file has no predictions for it", file=sys.stderr, flush=True)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        done[name] = run(name, part, min(part.limit, left))
        if failed := write_session(out, session):
            print(f"{failed}; will retry after the next part", file=sys.stderr, flush=True)
        text = done[name].get("error", "done").strip().splitlines()[-1]
        print(f"{name}: {text} ({done[name]['wall_seconds']:.1f} s)", file=sys.stderr, flush=True)
    return skipped


def part_runner(arguments: argparse.Namespace, work: Path) -> RunPart:
    """Return the function that runs a part in a child process; preload the imports of the children."""
    reason = "--fresh-processes" if arguments.fresh_processes else gpu_processes.reason_not_to_fork()
    if reason is None:
        for name in PRELOADED:
            importlib.import_module(name)
        reason = gpu_processes.reason_not_to_fork()
    if reason is not None:
        print(f"Starting each part as a new process: {reason}", file=sys.stderr, flush=True)
    fresh = None if reason is None else (["--dry-run"] if arguments.dry_run else [])

    def run(name: str, part: Part, limit: float) -> dict[str, Any]:
        function = functools.partial(part.function, **part.arguments)
        return gpu_processes.run(
            Task(name, function), limit, {SHARED_DIR: str(work), **part.environment}, fresh
        )

    return run


def machine_part(device: str) -> Part:
    """Return the part that describes the machine, run in a child: this process must not use the GPU."""
    return Part(gpu_trainings.machine, {"device": device}, 60, 3)


def all_parts(dry_run: bool) -> dict[str, Part]:
    """Return the parts by name."""
    return PartFactory(dry_run).parts()


def failures(session: Mapping[str, Any], names: list[str], skipped: list[str]) -> dict[str, str]:
    """Return, for each chosen part that failed or was not started, the reason in one line."""
    found = dict.fromkeys(skipped, "not started")
    for name in names:
        part = session["parts"].get(name, {})
        if "error" in part and name not in found:
            found[name] = str(part["error"]).strip().splitlines()[-1]
        if failed := gpu_comparison.failed_tests({name: part}):
            found[name] = f"failed: {', '.join(failed)}"
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with small sizes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts", help="run only these, separated by commas (default: all)")
    which.add_argument("--call", type=int, choices=CALLS, help="run the parts of one call")
    which.add_argument("--list", action="store_true", help="print the parts and exit")
    which.add_argument("--one", help=argparse.SUPPRESS)  # this part, in this process
    parser.add_argument(
        "--seconds", type=float, help="time limit of the call (default: 240, 150 and 150 with --call)"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file to write (default: benchmarks/results/DATE-GPU.json)"
    )
    parser.add_argument("--predictions", type=Path, help="session file to take the predictions from")
    parser.add_argument(
        "--fresh-processes", action="store_true", help="start each part as a new process instead of forking"
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def run_session(arguments: argparse.Namespace, work: Path) -> int:
    """Run the chosen parts and return the exit code.

    Raises:
        SessionError: a file or an argument is invalid; nothing has been written.
    """
    parts = all_parts(arguments.dry_run)
    names = list(parts) if arguments.parts is None else select_parts(arguments.parts, list(parts))
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise SessionError(f"--seconds {arguments.seconds:g}: must be above 0")
    # Check the files before anything slow.
    if arguments.out is not None:
        with locked(arguments.out):
            pass
    before = read_session(arguments.out) if arguments.out and arguments.out.exists() else None
    loaded = None
    if arguments.predictions:
        loaded = load_predictions(arguments.predictions, read_session(arguments.predictions), code_sha256())
        if loaded is None:
            raise SessionError(
                f"{arguments.predictions}: has no predictions; create them with --parts predictions"
            )
    run = part_runner(arguments, work)
    on_cpu = arguments.dry_run or names == ["predictions"]
    record = run("machine-cpu" if on_cpu else "machine", machine_part("cpu" if on_cpu else "cuda"), 60)
    if "error" in record:
        raise SessionError(record["error"].strip().splitlines()[-1])
    about = record["figures"]
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
        if names == ["predictions"]:  # may run on another machine: keep the description of the measured one
            session |= {key: before[key] for key in ("date", "machine", "dry_run") if key in before}
        else:
            check_same_machine(out, before, about, arguments.dry_run)
        session["parts"] = dict(before["parts"])
        own = load_predictions(out, before, code_sha256())
        if own is None and loaded is not None:
            session["parts"]["predictions"] = loaded
    elif loaded is not None:
        session["parts"]["predictions"] = loaded
    with locked(out):
        if out.exists():  # another session may have written since
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
    names = parts_of_call(number, names, done) if number else names
    if "figures" in done.get("predictions", {}):
        names = [name for name in names if name != "predictions"]  # never repeated
    elif "predictions" in names or any(name.startswith(PREDICTED) for name in names):
        names = ["predictions", *(name for name in names if name != "predictions")]
    seconds = arguments.seconds or CALL_SECONDS.get(number, 24 * 3600)
    skipped = measure(session, names, parts, out, BEGAN + seconds, run)
    missing = failures(session, names, skipped)
    if failed := write_session(out, session):  # keeps the loaded predictions even if no part ran
        missing[out.name] = f"{failed}; the session is in {save_to_temp_file(session)}"
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
        "summary": gpu_comparison.summary(session),
        **interference(),
    }
    print(json.dumps(summary))
    return 1 if missing else 0


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.list:
        print(table(all_parts(arguments.dry_run)))
        return 0
    if arguments.one:  # child process started without fork
        gpu_processes.exit_with_parent(os.getppid())
        machines = {"machine": machine_part("cuda"), "machine-cpu": machine_part("cpu")}
        chosen = (all_parts(arguments.dry_run) | machines)[arguments.one]
        gpu_processes.write_result(functools.partial(chosen.function, **chosen.arguments), arguments.result)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # also ends the processes of the running part
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-session-") as work:
            return run_session(arguments, Path(work))
    except SessionError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
