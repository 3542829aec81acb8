"""A sweep from its first point to its verdict.

Its parent stands in MLflow before the first point starts, and the verdict is made however the sweep ends.
"""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp import runs
from captcha_exp.config import Mlflow, leaves
from captcha_exp.errors import RunFailed
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.shutdown import TimeIsUp, undisturbed
from captcha_exp.sweep import record as recorded
from captcha_exp.sweep.figure import draw
from captcha_exp.sweep.forecast import Foretold, record_unfit
from captcha_exp.sweep.record import SETTLED, Sweep
from captcha_exp.sweep.results import became, goes_on, rows
from captcha_exp.sweep.summary import Verdict
from captcha_exp.tracking import close_left, tracker_of

if TYPE_CHECKING:
    from captcha_exp.tracking import Parent

SECONDS_TO_END = 5.0  # for the processes of a launcher that was stopped; they end with it

Launch = Callable[[Path, Sequence[int]], None]
"""runs the points with these numbers of the sweep in this folder, and comes back when they have ended"""


def run(
    found: Sequence[Foretold],
    launch: Launch,
    side_by_side: int,
    display: Display,
    tell: Callable[[Sweep, Verdict], None],
    resumed: Sweep | None = None,
    minutes: float | None = None,
) -> Verdict:
    """The verdict, after every point that was not settled yet has had its run; it is told however that ends.

    Raises:
        RunFailed: MLflow's store cannot be opened, or the launcher itself fails.
        TimeIsUp: so many minutes have passed; what is left of the points, the same command goes on with.
    """
    if resumed is None:
        about = {"foretold": [each.to_json() for each in found], "side_by_side": side_by_side}
        sweep = recorded.create(found[0].config.name, [each.point for each in found], about)
    else:
        sweep = resumed
        sweep.reopen()
    status: runs.Status = "FAILED"
    error: str | None = None
    parent = None
    try:
        sweep.limit(minutes)
        parent = _parent(sweep, found, display)
        _run_points(sweep, found, launch, display)
        if sweep.until is not None and _wants_time(sweep, sweep.until):
            raise TimeIsUp(
                "train.stop_after_minutes: the time is up; what the points have reached is saved, and the "
                "same command goes on"
            )
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, TimeIsUp) as interruption:
        status, error = "KILLED", type(interruption).__name__
        raise
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        with undisturbed():
            _close_what_was_left(sweep, display)
            verdict = Verdict(rows(sweep), side_by_side)
            status = "FAILED" if status == "FINISHED" and verdict.failed else status
            is_written = _write_down(verdict, sweep, status, error, parent, display)
            tell(sweep, verdict)
    if not is_written:
        again = f"--resume={shlex.quote(str(sweep.folder))}"
        raise RunFailed(f"{sweep.folder}: does not have the verdict; make room, and {again} writes it")
    return verdict


def _write_down(
    verdict: Verdict,
    sweep: Sweep,
    status: runs.Status,
    error: str | None,
    parent: "Parent | None",
    display: Display,
) -> bool:
    """Whether the sweep's folder has the verdict; MLflow gets it, too."""
    try:
        _write(verdict, sweep.folder)
        sweep.close(status, error)
        if parent is not None and parent.finish(
            sweep.folder, sweep.state, verdict.figures(), verdict.to_markdown()
        ):
            sweep.note(mlflow={**sweep.state["mlflow"], "closed": True})
    except OSError as trouble:  # a full disk
        display.warn(f"the verdict cannot be written: {trouble}")
        return False
    return True


def _run_points(sweep: Sweep, found: Sequence[Foretold], launch: Launch, display: Display) -> None:
    """Each point that is not settled: recorded where it is not to be trained, else launched."""
    display.line(f"sweep {sweep.folder}, {len(found)} points")
    open_points = [each for each in found if _became(sweep, each) not in SETTLED]
    if settled := len(found) - len(open_points):
        display.line(f"{settled} of them are settled already")
    for each in open_points:
        if not each.is_trained:
            point, parent = each.point, (sweep.state["mlflow"] or {}).get("run_id")
            tracker = tracker_of(each.config, display, point.choices, point.name, parent)
            with undisturbed():
                record_unfit(each, sweep.new_attempt(point), tracker, display)
    if numbers := [each.point.number for each in open_points if each.is_trained]:
        launch(sweep.folder, numbers)


def _wants_time(sweep: Sweep, until: float) -> bool:
    """Whether the time ended a point, or kept one from being begun."""
    over = time.time() >= until
    return any(
        row.error == TimeIsUp.__name__ if row.became == "killed" else over and row.became == "not run"
        for row in rows(sweep)
    )


def _became(sweep: Sweep, each: Foretold) -> str:
    attempts = sweep.attempts(each.point)
    return became(attempts[-1] if attempts else None)


def _write(verdict: Verdict, folder: Path) -> None:
    """verdict.json, .csv, .md and .png."""
    texts = {
        "json": json.dumps(verdict.to_json(), indent=2, ensure_ascii=False) + "\n",
        "csv": verdict.to_csv(),
        "md": verdict.to_markdown(),
    }
    for ending, text in texts.items():
        write_atomically(folder / f"verdict.{ending}", text.encode("utf-8", "backslashreplace"))
    draw(verdict, folder / "verdict.png")


def _close_what_was_left(sweep: Sweep, display: Display) -> None:
    """A launcher that was stopped may have ended the processes of points with no time for a last word."""
    deadline = time.monotonic() + SECONDS_TO_END
    for point in sweep.points:
        for folder in sweep.attempts(point):
            while goes_on(folder) and time.monotonic() < deadline:
                time.sleep(0.05)
            close_left(folder, "KILLED", "interrupted", display)


# -- in MLflow -----------------------------------------------------------------------------------------------


def _parent(sweep: Sweep, found: Sequence[Foretold], display: Display) -> "Parent | None":
    tracking = found[0].config.tracking  # resolved; the same for all points
    if not isinstance(tracking, Mlflow):
        return None
    from captcha_exp.tracking import Parent

    parent = Parent(tracking, display)
    known = (sweep.state["mlflow"] or {}).get("run_id")
    if known is None or not parent.go_on(known):
        sweep.note(mlflow=parent.noted)  # before there is a run, so that none stays that no folder knows of
        parent.begin(sweep.folder, sweep.state, _params(found))
    sweep.note(mlflow=parent.noted)
    return parent


def _params(found: Sequence[Foretold]) -> dict[str, str]:
    """Every leaf of the configs; what the points do not have in common, with all its values."""
    each = [leaves(foretold.config) for foretold in found]
    keys = dict.fromkeys(key for one in each for key in one)
    return {key: ", ".join(dict.fromkeys(one[key] for one in each if key in one)) for key in keys}
