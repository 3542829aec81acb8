"""The verbs. Each parses, calls one function of the package, and prints.

Config says what a run is, a flag says how this call is made: flags and the verb are taken off before Hydra's
grammar sees the rest. Only this package knows Hydra (`composing`); `summary` is what a person reads at the
end.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from captcha_exp.cli.hydra_config import complete, show_config, try_compose
from captcha_exp.cli.hydra_config import compose as compose
from captcha_exp.cli.parser import COMMANDS, OVERRIDE_COMMANDS, PROGRAM, build_parser
from captcha_exp.errors import UserError
from captcha_exp.runtime.shutdown import ShutdownHandler, TimeLimitReached

if TYPE_CHECKING:
    from captcha_exp.config import GpuSpec, Machine

OS_ERROR_HINTS = {
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room and start again",
    errno.EROFS: "CAPTCHA_EXP_ROOT=FOLDER chooses a folder that can be written to",
    errno.EACCES: "give yourself the right, or choose another folder with CAPTCHA_EXP_ROOT=FOLDER",
    errno.EIO: "the disk is faulty: bring what is on it to another",
}
"""troubles of a machine, and what to do; whatever else a file raises is a mistake of ours"""


def main() -> NoReturn:
    """The command: exit code 0, 1 for a run that failed or a problem that was found, 2 for a mistake in
    the call, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an odd terminal cannot show does not end a sweep
            stream.reconfigure(errors="backslashreplace")
    # SIGTERM ends in order, as Ctrl-C does: a run's record says KILLED, a server that was started ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(_dispatch(sys.argv[1:]))
    except UserError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read along has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in OS_ERROR_HINTS:
            raise
        print(
            f"{error.filename or PROGRAM}: {error.strerror}; {OS_ERROR_HINTS[error.errno]}", file=sys.stderr
        )
        sys.exit(1)


def _dispatch(argv: list[str]) -> int:
    if "-sc" in argv or "--shell-completion" in argv:
        return complete(argv, COMMANDS, OVERRIDE_COMMANDS)
    parser = build_parser(HANDLERS)
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes the overrides, or conditions, before the first flag alone.
    words = getattr(arguments, "overrides", getattr(arguments, "conditions", None))
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif words is not None:
        words += rest
    code: int = arguments.act(arguments)
    return code


# -- verbs ---------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    if arguments.cfg:
        return show_config(arguments.cfg, arguments.overrides, arguments.config_dir)
    from captcha_exp.runtime.console import RichDisplay
    from captcha_exp.tracking import close_stale_runs, make_tracker

    display = RichDisplay()
    close_stale_runs(display)
    composed = None
    if not arguments.multirun:
        composed = try_compose(arguments.overrides, arguments.config_dir)
    if composed is None or composed.multirun:
        from captcha_exp.cli.sweep import train_sweep

        return train_sweep(arguments, _detect_machine(), display)
    from captcha_exp.cli import resume
    from captcha_exp.training.train import resume as resume_training
    from captcha_exp.training.train import train

    with resume.plan_resume(arguments, composed, _detect_machine(), display) as start:
        config = start.requested
        if config.train.on_oom == "split":  # a process that ran out of memory is no place to start again
            from captcha_exp.sweep.supervisor import TrainJob, train_with_oom_retry

            minutes = config.train.max_minutes  # of all its processes together
            leave_at = None if minutes is None else time.time() + 60 * minutes
            order = TrainJob(
                config, start.choices, lineage=start.lineage, extend_from=start.extend_from, deadline=leave_at
            )
            folder = train_with_oom_retry(order, resume.run_dir_factory(start, arguments.resume, display))
        else:
            tracker = make_tracker(config, display, start.choices)
            if start.run_dir is None:
                result = train(config, tracker, display, lineage=start.lineage, extend_from=start.extend_from)
            else:
                shutdown = ShutdownHandler(
                    config.train.max_minutes
                )  # the limit of this process, not of the run
                result = resume_training(
                    start.run_dir, tracker, display, extend_from=start.extend_from, shutdown=shutdown
                )
            folder = result.run_dir
    return _report_training(folder, arguments)


def _report_training(folder: Path, arguments: argparse.Namespace) -> int:
    state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if arguments.json:
        _print_json({"run_dir": str(folder), "status": state["status"], **state["result"]})
    elif state["result"]:
        from captcha_exp.cli import output

        output.print_training(folder, _program_name())
    if state["error"] == TimeLimitReached.__name__:  # in a process of its own, which cannot say so itself
        return TimeLimitReached.exit_code
    return 0 if state["status"] == "FINISHED" else 1


def _data(arguments: argparse.Namespace) -> int:
    config = try_compose(arguments.overrides, arguments.config_dir).to_config(_detect_machine())
    from captcha_exp.cli import output
    from captcha_exp.config import resolve
    from captcha_exp.data import dataset
    from captcha_exp.report import figures
    from captcha_exp.runtime.console import RichDisplay
    from captcha_exp.runtime.paths import root_dir

    config, display = resolve(config, _detect_machine()), RichDisplay()
    data = dataset.load_or_build(dataset.inspect_dataset(config, display), config, display)
    sheet = root_dir() / config.data.cache / f"{data.manifest['key']}.png"
    figures.plot_samples(data.images[:30].numpy(), data.labels[:30], sheet)
    if arguments.json:
        _print_json({**data.manifest, "sheet": str(sheet)})
    else:
        output.print_dataset(data.manifest, sheet)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import plan

    values, misfits = plan.plan(arguments)
    _print_values(values)
    if misfits:
        print(f"plan --must-fit: does not fit: {'; '.join(misfits)}", file=sys.stderr)
        return plan.MISFIT_EXIT_CODE
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import output
    from captcha_exp.model.evaluate import evaluate_run
    from captcha_exp.runs import find_run
    from captcha_exp.runtime.console import RichDisplay

    folder = find_run(arguments.run)
    evaluation, data = evaluate_run(folder, arguments.split, RichDisplay(), arguments.device)
    if arguments.json:
        _print_json({"run_dir": str(folder), "split": arguments.split, **evaluation.to_json(data)})
    else:
        output.print_evaluation(evaluation, data, folder, arguments.split)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import interactive, output
    from captcha_exp.model.predict import Predictor, find_images, resolve_weights
    from captcha_exp.runtime.console import RichDisplay

    display = RichDisplay()
    reader = Predictor(resolve_weights(arguments.run), arguments.device, display)
    if not arguments.pictures:
        interactive.prompt_loop(reader, arguments.json)
        return 0
    readings = list(reader.predict_all(find_images(arguments.pictures), display))
    if arguments.json:
        _print_json([reading.to_json() for reading in readings])
    else:
        output.print_predictions(readings)
    return 1 if any(reading.error for reading in readings) else 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import reproduce
    from captcha_exp.runtime.console import RichDisplay
    from captcha_exp.tracking import close_stale_runs

    display = RichDisplay()
    close_stale_runs(display)
    made = reproduce.reproduce(arguments, _detect_machine(), display)
    if arguments.json:
        _print_json(made.to_json())
    else:
        reproduce.print_reproduction(made)
    return reproduce.EXIT_CODES[made.verdict]


def _runs(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import runs
    from captcha_exp.runtime.console import RichDisplay
    from captcha_exp.tracking import close_stale_runs

    close_stale_runs(RichDisplay())
    return _print_values(runs.list_runs(arguments))


def _diff(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import diff

    return _print_values(diff.diff(arguments))


def _ui(arguments: argparse.Namespace) -> int:
    config = try_compose(arguments.overrides, arguments.config_dir).to_config(None)
    from captcha_exp.config import MlflowConfig, resolve
    from captcha_exp.runtime.console import RichDisplay
    from captcha_exp.tracking import serve_ui

    tracking = resolve(config, _detect_machine()).tracking
    if not isinstance(tracking, MlflowConfig):
        raise UserError("tracking=none: keeps no MLflow store to show; take tracking=mlflow")
    serve_ui(tracking, arguments.port, RichDisplay())
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    options = {
        "name": arguments.name,
        "config_dir": arguments.config_dir,
        "force": arguments.force,
        "command": [PROGRAM, *sys.argv[1:]],
    }
    card, path = (_calibrate_this_gpu if arguments.session is None else _calibrate_from_session)(
        arguments, options
    )
    from captcha_exp.cli import output
    from captcha_exp.config import to_dict

    if arguments.json:
        _print_json({"path": str(path), "gpu": to_dict(card)})
    else:
        output.print_gpu(card, path, arguments.config_dir)
    return 0


def _calibrate_this_gpu(arguments: argparse.Namespace, options: dict[str, Any]) -> "tuple[GpuSpec, Path]":
    # The article's network and this project's own, on the same pictures; an override goes before.
    asked = {text.partition("=")[0] for text in arguments.overrides}
    words = (("experiment=article",), ("experiment=article", "model=compact"))
    left = (tuple(w for w in several if w.partition("=")[0] not in asked) for several in words)
    configs = [
        try_compose([*several, *arguments.overrides], arguments.config_dir).to_config(None)
        for several in dict.fromkeys(left)
    ]
    from captcha_exp.memory.calibrate import calibrate
    from captcha_exp.runtime.console import RichDisplay

    return calibrate(configs, _detect_machine(), RichDisplay(), **options)


def _calibrate_from_session(arguments: argparse.Namespace, options: dict[str, Any]) -> "tuple[GpuSpec, Path]":
    if arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]}: calibrate --from takes no overrides, "
            "the session says what was measured"
        )
    known = try_compose(["gpu=generic"], arguments.config_dir).to_config(None).gpu
    from captcha_exp.memory.calibrate import calibrate_from_session

    return calibrate_from_session(Path(arguments.session), known, **options)


def _doctor(arguments: argparse.Namespace) -> int:
    # Checked without the machine: a device that is not here is something to be found, not a refusal.
    config = try_compose(arguments.overrides, arguments.config_dir).to_config(None)
    from dataclasses import asdict

    from captcha_exp.cli import output
    from captcha_exp.doctor import collect_info, run_checks

    found = run_checks(collect_info(config))
    if arguments.json:
        _print_json([asdict(finding) for finding in found])
    else:
        output.print_findings(found)
    return 1 if any(finding.level == "problem" for finding in found) else 0


HANDLERS = {
    "train": _train,
    "data": _data,
    "plan": _plan,
    "evaluate": _evaluate,
    "reproduce": _reproduce,
    "predict": _predict,
    "runs": _runs,
    "diff": _diff,
    "ui": _ui,
    "calibrate": _calibrate,
    "doctor": _doctor,
}


def _detect_machine() -> "Machine":
    from captcha_exp.runtime.device import detect_machine

    return detect_machine()


def _print_values(values: Any) -> int:
    """Exit code 0, with values printed unless they have been told in words."""
    if values is not None:
        _print_json(values)
    return 0


def _print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text.encode("utf-8", "backslashreplace").decode())  # a file name may be no UTF-8


def _program_name() -> str:
    """The command as this person can type it: by name if the shell finds it, else by its path from here."""
    import shutil

    if shutil.which(PROGRAM):
        return PROGRAM
    script = (
        Path(sys.argv[0])
        if Path(sys.argv[0]).name.startswith(PROGRAM)
        else Path(sys.executable).parent / PROGRAM
    )
    if not script.exists():
        return "python -m captcha_exp"
    with contextlib.suppress(ValueError):
        return str(script.absolute().relative_to(Path.cwd()))
    return str(script)
