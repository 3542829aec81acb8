"""The entry point `captcha-exp` and its commands: each parses, calls one function of the package, and prints.

The config defines a run, flags define a call: argparse removes the command and the flags before Hydra parses
the overrides.
"""

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from captcha_exp.cli.hydra_config import compose as compose
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.launcher import complete
from captcha_exp.cli.overrides import quote
from captcha_exp.cli.parser import COMMANDS, OVERRIDE_COMMANDS, PROGRAM, build_parser, check_words
from captcha_exp.errors import UserError

if TYPE_CHECKING:
    from captcha_exp.config import Machine, MlflowConfig

OS_ERROR_HINTS = {
    errno.ENOSPC: "free up disk space and start again",
    errno.EDQUOT: "free up disk space and start again",
    errno.EROFS: "set CAPTCHA_EXP_ROOT to a writable directory",
    errno.EACCES: "change the permissions, or set CAPTCHA_EXP_ROOT to another directory",
    errno.EIO: "the disk has errors: copy its files to another one",
}
"""remedies for errors of the machine; any other OSError is a bug and has a traceback"""


def main() -> NoReturn:
    """Run a command and exit.

    Exit codes: 0 success; 1 a failed run, an image that cannot be used, or a problem found; 2 usage error;
    75 time limit reached (train.max_minutes), the run can be resumed; 130 Ctrl-C; 141 the reader of a pipe
    has exited; 143 SIGTERM. `plan --must-fit`, `evaluate --must-hold`, `watch` and `reproduce` have codes of
    their own, 3 and 4.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character the terminal lacks must not end a sweep
            stream.reconfigure(errors="backslashreplace")
    # Exit cleanly on SIGTERM: runs are marked KILLED and child processes are stopped.
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        sys.exit(_dispatch(sys.argv[1:]))
    except UserError as error:
        for line in error.lines:
            print(_escape(line), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has exited, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in OS_ERROR_HINTS:
            raise
        line = f"{error.filename or PROGRAM}: {error.strerror}; {OS_ERROR_HINTS[error.errno]}"
        print(_escape(line), file=sys.stderr)
        sys.exit(1)


def _escape(line: str) -> str:
    from captcha_exp.runtime.text import escape_unprintable

    return escape_unprintable(line)


def _exit_on_sigterm(*_: object) -> NoReturn:
    os.write(2, f"{PROGRAM}: stopped by SIGTERM\n".encode())  # print may have been interrupted
    sys.exit(143)


def _dispatch(argv: list[str]) -> int:
    if "-sc" in argv or "--shell-completion" in argv:
        return complete(argv, COMMANDS, OVERRIDE_COMMANDS)
    check_words(argv)
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse accepts overrides, conditions and images only before the first flag.
    lists = (getattr(arguments, name, None) for name in ("overrides", "conditions", "images"))
    words = next((each for each in lists if each is not None), None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        hint = "; settings have no dashes, as in train.epochs=3" if hasattr(arguments, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    elif words is not None:
        words += rest
    if (handler := _find_onnx_handler(arguments)) is not None:
        return handler(arguments)
    from captcha_exp.runtime.console import set_up_logging
    from captcha_exp.runtime.environment import fill_in_environment

    fill_in_environment()
    set_up_logging(arguments.log_level)
    return HANDLERS[arguments.command](arguments)


def _find_onnx_handler(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int] | None:
    """Return the handler of a command that reads an exported model, which works without most packages."""
    if arguments.command == "watch":
        from captcha_exp.cli import watch

        return watch.watch
    if arguments.command not in ("predict", "evaluate") or not arguments.run.endswith(".onnx"):
        return None
    from captcha_exp.cli import evaluate_onnx, predict_onnx

    return predict_onnx.predict if arguments.command == "predict" else evaluate_onnx.evaluate


# -- commands ------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    if arguments.cfg:
        from captcha_exp.cli.grid import show_config

        return show_config(arguments.cfg, arguments.overrides, arguments.config_dir, arguments.multirun)
    from captcha_exp.cli.train import train

    return train(arguments, _detect_machine, _program_name())


def _data(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import data, output

    built, values = data.report(arguments, _detect_machine)
    _print_result(arguments, values, output.print_dataset, built.manifest, values)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import output, plan

    values, misfits = plan.plan(arguments)
    if values is not None:
        output.print_json(values)
    if misfits:
        print(f"plan --must-fit: does not fit: {'; '.join(misfits)}", file=sys.stderr)
        return plan.MISFIT_EXIT_CODE
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import evaluate_onnx, output
    from captcha_exp.model.saved import evaluate_run
    from captcha_exp.runs import find_run

    evaluate_onnx.check_flags(arguments)
    run_dir = find_run(arguments.run, finished=True)
    evaluation, data = evaluate_run(run_dir, arguments.split, arguments.device)
    values = {"run_dir": str(run_dir), "split": arguments.split, **evaluation.to_json(data)}
    _print_result(arguments, values, output.print_evaluation, evaluation, data, run_dir, arguments.split)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import output, predict

    predictions = predict.predict(arguments)
    values = [prediction.to_json() for prediction in predictions]
    if arguments.images:
        _print_result(arguments, values, output.print_predictions, predictions)
    return 1 if any(prediction.error for prediction in predictions) else 0


def _export(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import export

    result = export.export(arguments)
    _print_result(arguments, result.to_json(), export.print_export, result, _program_name())
    export.check_registered(arguments, result)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import report

    written = report.report(arguments)
    _print_result(arguments, written.to_json(), report.print_report, written)
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import reproduce
    from captcha_exp.tracking.sync import close_stale_runs

    close_stale_runs()
    reproduction = reproduce.reproduce(arguments, _detect_machine())
    _print_result(arguments, reproduction.to_json(), reproduce.print_reproduction, reproduction)
    return reproduce.EXIT_CODES[reproduction.verdict]


def _runs(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import runs
    from captcha_exp.tracking.sync import close_stale_runs, sync_in_background

    close_stale_runs()
    sync_in_background()
    runs.list_runs(arguments)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import diff

    diff.diff(arguments)
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import output
    from captcha_exp.tracking.sync import SYNC_LOCK_SECONDS, close_stale_runs, find_owed, redirect, sync_owed

    close_stale_runs()
    if arguments.to is not None:
        redirect(find_owed(), _tracking_of([f"tracking.uri={quote(arguments.to)}"]).uri)
    results = sync_owed(find_owed(), timeout=SYNC_LOCK_SECONDS)
    _print_result(arguments, [result.to_json() for result in results], output.print_sync, results)
    return 1 if any(result.problem is not None for result in results) else 0


def _ui(arguments: argparse.Namespace) -> int:
    tracking = _tracking_of(arguments.overrides, arguments.config_dir)
    from captcha_exp.tracking.server import serve_ui

    serve_ui(tracking, arguments.port)
    return 0


def _tracking_of(overrides: Sequence[str], config_dir: str | None = None) -> "MlflowConfig":
    """Return the resolved MLflow store of these overrides."""
    config = try_compose(overrides, config_dir).to_config(None)
    from captcha_exp.config import MlflowConfig, resolve

    tracking = resolve(config, _detect_machine()).tracking
    if not isinstance(tracking, MlflowConfig):
        raise UserError("tracking=none: has no MLflow store; use tracking=mlflow")
    return tracking


def _calibrate(arguments: argparse.Namespace) -> int:
    from captcha_exp.cli import calibrate, output
    from captcha_exp.config import to_dict

    gpu, path = calibrate.calibrate(arguments, _detect_machine)
    values = {"path": str(path), "gpu": to_dict(gpu)}
    _print_result(arguments, values, output.print_gpu, gpu, path, arguments.config_dir)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    # Not checked against the machine: a missing device is a finding, not an error.
    config = try_compose(arguments.overrides, arguments.config_dir).to_config(None)
    from dataclasses import asdict

    from captcha_exp.cli import output
    from captcha_exp.doctor import collect_info, run_checks

    findings = run_checks(collect_info(config))
    _print_result(arguments, [asdict(finding) for finding in findings], output.print_findings, findings)
    return 1 if any(finding.level == "problem" for finding in findings) else 0


HANDLERS = {
    "train": _train,
    "data": _data,
    "plan": _plan,
    "evaluate": _evaluate,
    "reproduce": _reproduce,
    "predict": _predict,
    "export": _export,
    "report": _report,
    "runs": _runs,
    "diff": _diff,
    "sync": _sync,
    "ui": _ui,
    "calibrate": _calibrate,
    "doctor": _doctor,
}


def _detect_machine() -> "Machine":
    from captcha_exp.runtime.device import detect_machine

    return detect_machine()


def _print_result(
    arguments: argparse.Namespace, values: Any, print_text: Callable[..., None], *result: Any
) -> None:
    """Print the values as JSON with --json, else the result as text."""
    from captcha_exp.cli.output import print_json

    if arguments.json:
        print_json(values)
    else:
        print_text(*result)


def _program_name() -> str:
    """Return the command as typed here: its name if it is on PATH, else its path."""
    import shutil

    if shutil.which(PROGRAM):
        return PROGRAM
    return "python -m captcha_exp" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
