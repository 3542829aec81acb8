"""The argument parser: the commands and their flags."""

import argparse
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from os.path import expanduser as expand_user
from typing import TYPE_CHECKING

from captcha_exp.errors import UserError

if TYPE_CHECKING:
    from captcha_exp.model.answer import ReadingOptions

PROGRAM = "captcha-exp"

COMMANDS = {
    "train": "train a recognizer, test it, and record the run",
    "data": "build the dataset of a config and report what is in it, with a page of images",
    "plan": "predict the GPU memory that batch sizes need, without a GPU",
    "evaluate": "evaluate a run, or an exported model on labeled images and against a baseline",
    "reproduce": "train a finished run again from its saved config and compare the results",
    "predict": "predict the text in images; without images, prompt for them",
    "export": "write a run as one ONNX file, prove it, and log it to MLflow as a model",
    "report": "write the report of a run or a sweep as one HTML page",
    "watch": "find out without labels whether images are still those a model was trained on",
    "runs": "list the runs in outputs/",
    "diff": "compare two runs: config, environment, dataset, metrics",
    "sync": "deliver to MLflow what it does not have of earlier runs",
    "ui": "start MLflow's UI on 127.0.0.1 with the configured store",
    "calibrate": "measure the GPU of this machine and write a file for gpu=NAME",
    "doctor": "check this machine's setup and suggest fixes",
}
OVERRIDE_COMMANDS = ("train", "data", "plan", "ui", "calibrate", "doctor")  # commands that take overrides
RUN_HELP = "run directory, prefix of an MLflow run id, or latest (the newest that has finished)"
_CONFIG_FLAG = (
    "conf/ is always used; --config-dir DIR is searched before it, and experiment=NAME chooses a file"
)
FLAG_ANSWERS = {  # flag that is not supported -> what to use instead
    "--card": "was renamed to --gpu",
    **dict.fromkeys(("--config-path", "-cp", "--config-name", "-cn"), _CONFIG_FLAG),
    "--experimental-rerun": "use captcha-exp reproduce RUN",
    "--hydra-help": "use --help, or --cfg hydra for Hydra's own config",
    "--info": "use --cfg all, or captcha-exp doctor",
}


class _HelpFormatter(argparse.HelpFormatter):
    """A help formatter with each command and its description on one line.

    argparse does not count the indentation of the commands.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 2 * self._indent_increment + max(map(len, COMMANDS))


def check_words(argv: Sequence[str]) -> None:
    """Check the command and the flags that argparse does not know.

    Raises:
        UserError: the command is unknown, or the flag is one of Hydra's; the line has what to type instead.
    """
    for word in argv:
        if answer := FLAG_ANSWERS.get(flag := word.partition("=")[0]):
            raise UserError(f"{flag}: {answer}")
    if not argv or argv[0].startswith("-") or argv[0] in COMMANDS:
        return
    close = get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(COMMANDS)}"
    raise UserError(f"{argv[0]}: unknown command; {hint}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; the namespace has the name of the command as `command`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train text-captcha recognizers in PyTorch: configured with Hydra, recorded in MLflow.",
        formatter_class=_HelpFormatter,
        epilog=f'TAB completion in bash:  eval "$({PROGRAM} -sc install=bash)"',
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add_command(name: str, json: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=COMMANDS[name], description=COMMANDS[name], allow_abbrev=False
        )
        if name in OVERRIDE_COMMANDS:
            text = "experiment=NAME, group=NAME or key=value; see conf/"
            command.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=text)
            text = "a directory of YAML files that is searched before conf/"
            command.add_argument("--config-dir", "-cd", metavar="DIR", type=expand_user, help=text)
        if json:
            command.add_argument("--json", action="store_true", help="print JSON")
        _add_log_level(command)
        return command

    train = add_command("train")
    text = "run a sweep: key=value,value,... spans a grid of jobs"
    train.add_argument("--multirun", "-m", action="store_true", help=text)
    text = (
        "auto (default): resume the latest unfinished run (-m: sweep) with the same config and code, or "
        "start a new one; never: start a new one; RUN: resume this one (run directory, prefix of its MLflow "
        "run id, or latest: the newest one; -m: a sweep directory); if it has finished, for more epochs: "
        "--resume RUN train.epochs=N"
    )
    train.add_argument("--resume", default="auto", metavar="auto|never|RUN", type=expand_user, help=text)
    text = (
        "with -m: train the jobs of the latest sweep with the same jobs again (or of --resume=SWEEP) whose "
        "speed was disturbed by other processes"
    )
    train.add_argument("--rerun-disturbed", action="store_true", help=text)
    text = "print a composed config and exit: job: the run's; hydra: Hydra's own; all: both"
    train.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help=text)
    text = "also write an image of the first images as the network sees them, resized and augmented"
    data = add_command("data")
    data.add_argument("--preview", action="store_true", help=text)
    text = (
        "also write a page of images whose labels look wrong: those that RUN, or the runs of a sweep, has "
        "not been trained on and reads as something else"
    )
    data.add_argument("--suspects", metavar="RUN", action="append", default=[], type=expand_user, help=text)
    text = "train N models for that page, each without one of N parts of the labels"
    data.add_argument("--folds", metavar="N", type=int, help=text)
    plan = add_command("plan")
    text = "default: from 1/4 to 8 times train.batch_size"
    plan.add_argument("--batch-sizes", metavar="N,N,...", help=text)
    text = (
        "name of a file in conf/gpu/, or the path of another file; the same as gpu=NAME. NAME,FILE,... or "
        "all (every file in conf/gpu/ except generic) prints one row for each GPU"
    )
    plan.add_argument("--gpu", metavar="NAME", type=expand_user, help=text)
    text = "exit with code 3 unless train.batch_size, or every size in --batch-sizes, fits"
    question = plan.add_mutually_exclusive_group()
    question.add_argument("--must-fit", action="store_true", help=text)
    text = "list overrides with which train.batch_size fits, fastest first"
    question.add_argument("--advise", action="store_true", help=text)
    plan.epilog = (
        "exit codes: 0 success; 2 usage error; 3 with --must-fit if a batch size does not fit or is unsure"
    )
    evaluate = add_command("evaluate")
    evaluate.add_argument(
        "run", metavar="RUN", type=expand_user, help=f"{RUN_HELP}, or an exported model: .onnx, with --data"
    )
    text = "images to evaluate on (default: %(default)s)"
    evaluate.add_argument("--split", choices=("train", "validation", "test"), default="test", help=text)
    _add_guard_arguments(evaluate)
    _add_reproduce_arguments(add_command("reproduce"))
    predict = add_command("predict")
    predict.add_argument(
        "run",
        metavar="RUN",
        type=expand_user,
        help=f"{RUN_HELP}, or a file: .onnx (exported) or .safetensors (weights)",
    )
    text = "prove that an .onnx file answers here as PyTorch did, with the test images in it"
    predict.add_argument("--self-test", action="store_true", help=text)
    text = "an image or a directory of images; without any, prompt for paths"
    predict.add_argument("images", nargs="*", default=[], metavar="IMAGE", help=text)
    _add_reading_arguments(predict)
    for inference in (evaluate, predict):
        text = "auto, cpu, cuda, cuda:N or mps (default: %(default)s)"
        inference.add_argument("--device", default="auto", metavar="NAME", help=text)
    export = add_command("export")
    export.add_argument("run", metavar="RUN", type=expand_user, help=RUN_HELP)
    text = "file to write; default: model.onnx, with --quantize model.int8.onnx, in the run directory"
    export.add_argument("--output", "-o", metavar="FILE", type=expand_user, help=text)
    text = "int8: a smaller and faster file; its accuracy is measured beside that of fp32 (default: none)"
    export.add_argument("--quantize", choices=("none", "int8"), default="none", help=text)
    text = "also register the file in MLflow, as a version of the model NAME with the alias newest"
    export.add_argument("--register", metavar="NAME", help=text)
    export.epilog = (
        "exit codes: 0 proven and written; 1 it reads otherwise than the run, or --register failed; "
        "2 usage error"
    )
    report = add_command("report")
    text = f"{RUN_HELP}; or a sweep directory"
    report.add_argument("run", metavar="RUN|SWEEP", type=expand_user, help=text)
    text = "file to write; default: report/run.html in the run directory, summary.html in that of a sweep"
    report.add_argument("--output", "-o", metavar="FILE", type=expand_user, help=text)
    _add_watch_arguments(add_command("watch"))
    _add_runs_arguments(add_command("runs"))
    _add_diff_arguments(add_command("diff"))
    sync = add_command("sync")
    text = "deliver to this store instead, as after a training with a mistyped tracking.uri"
    sync.add_argument("--to", metavar="URI", help=text)
    sync.epilog = "exit codes: 0 MLflow has everything; 1 something could not be delivered"
    ui = add_command("ui", json=False)
    ui.add_argument("--port", type=int, help="default: 5000, or the next free one")
    calibrate = add_command("calibrate")
    text = "name of the file; default: the name of the GPU, as in nvidia-h200"
    calibrate.add_argument("--name", metavar="NAME", help=text)
    calibrate.add_argument("--force", action="store_true", help="overwrite an existing file")
    add_command("doctor")
    return parser


def _add_log_level(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose."""
    group = parser.add_mutually_exclusive_group()
    for name, level, text in (
        ("quiet", logging.WARNING, "print only warnings and errors to standard error, and no progress bars"),
        ("verbose", logging.DEBUG, "also print debug messages, each with the module that it is from"),
    ):
        group.add_argument(
            f"-{name[0]}",
            f"--{name}",
            dest="log_level",
            action="store_const",
            const=level,
            default=logging.INFO,
            help=text,
        )


_METRICS_NOTE = (  # see runs/fields.py
    "train/* and val/* are values of the best epoch, memory/* the maximum and speed/* the median over epochs"
)


def _add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONDITION..., --sort, --reverse, --columns and --limit."""
    text = (
        "KEY OP VALUE without spaces, OP one of = != > >= < <= ~ (contains), as in test/accuracy>98%%; "
        "all conditions must hold"
    )
    parser.add_argument("conditions", nargs="*", default=[], metavar="CONDITION", help=text)
    text = "sort by a config key, a metric or a field of run.json, ascending (default: started)"
    parser.add_argument("--sort", metavar="KEY", help=text)
    parser.add_argument("--reverse", action="store_true", help="sort in descending order")
    parser.add_argument("--columns", action="append", metavar="KEY,KEY,...", help="also show these keys")
    parser.add_argument("--limit", type=int, metavar="N", help="show only the first N runs")
    parser.epilog = _METRICS_NOTE


def _add_guard_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the images that an exported model is evaluated on, and its baseline."""
    text = "for an exported model: a folder or archive of labeled images, as for data=folder"
    parser.add_argument("--data", metavar="DIR", type=expand_user, help=text)
    text = "compare with this file: accuracy on the same images, size, and speed on the same machine"
    parser.add_argument("--baseline", metavar="FILE", type=expand_user, help=text)
    text = "exit with code 3 if the model is worse than the baseline"
    parser.add_argument("--must-hold", action="store_true", help=text)
    text = "write the measurement as a baseline; not if --must-hold fails"
    parser.add_argument("--save-baseline", metavar="FILE", type=expand_user, help=text)
    parser.add_argument("--force", action="store_true", help="overwrite an existing baseline")
    text = "for an exported model: keys of data, such as data.labels=folders"
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=text)
    parser.epilog = "exit codes: 0 success; 2 usage error; 3 with --must-hold if the model is worse"


def _add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, DIR and --order."""
    text = "file of captcha-exp export"
    parser.add_argument("model", metavar="MODEL.onnx", type=expand_user, help=text)
    parser.add_argument("folder", metavar="DIR", type=expand_user, help="a folder of images, without labels")
    text = (
        "order of the images: time: of their last change; name; random: by a hash of the content, for images "
        "that were copied or sorted; auto (default): time, or random if all were written within a minute"
    )
    parser.add_argument("--order", choices=("auto", "time", "name", "random"), default="auto", help=text)
    parser.epilog = (
        "exit codes: 0 no change found; 1 none, but images that cannot be used; 2 usage error; 3 changed"
    )


def _add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN and OVERRIDE..."""
    text = (
        "run directory, prefix of an MLflow run id (the full id for a run that only MLflow has), or latest "
        "(the newest that has finished)"
    )
    parser.add_argument("run", metavar="RUN", type=expand_user, help=text)
    text = "key=value: change a value of the saved config; the verdict lists it"
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=text)
    parser.epilog = "exit codes: 0 identical, 3 equivalent, 4 different; 1 the new run failed, 2 usage error"


def _add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --min-confidence, --length, --mask and --top."""
    text = (
        "abstain where it is needed for this fraction of the answers to be right, as in 0.99; not a limit of "
        "the printed confidence"
    )
    parser.add_argument("--min-confidence", metavar="FRACTION", type=float, help=text)
    parser.add_argument("--length", metavar="N", type=int, help="only texts of N characters")
    text = "only texts such as '[0-9]{2}[A-Z]{3}': characters, ., sets, each perhaps with {2}, {2,4} or ?"
    parser.add_argument("--mask", metavar="MASK", help=text)
    text = "print the N most likely texts of each image (default: %(default)s)"
    parser.add_argument("--top", metavar="N", type=int, default=1, help=text)


def _add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RUN RUN and --all."""
    parser.add_argument("run", nargs=2, metavar="RUN", type=expand_user, help=RUN_HELP)
    parser.add_argument("--all", action="store_true", help="also show equal values")
    parser.epilog = _METRICS_NOTE


def reading_options(arguments: argparse.Namespace) -> "ReadingOptions":
    """Return how `predict` reads images."""
    from captcha_exp.model.answer import ReadingOptions

    return ReadingOptions(arguments.min_confidence, arguments.length, arguments.mask, arguments.top)
