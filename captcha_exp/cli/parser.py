"""The command line: the verbs, and what each takes beside overrides."""

import argparse
from collections.abc import Callable, Mapping
from typing import TypeAlias

PROGRAM = "captcha-exp"

Handler: TypeAlias = Callable[[argparse.Namespace], int]
"""does what a verb is for; gives the exit code"""

COMMANDS = {
    "train": "train a recogniser, test it, record it",
    "data": "draw the pictures of a config and show some",
    "plan": "memory of a graphics card that batch sizes need, told without one",
    "evaluate": "accuracy of a run: whole, per character, per position, confusions",
    "reproduce": "train a finished run again from what it saved, and say whether it came out the same",
    "predict": "the text in pictures; asks for them where none is given",
    "runs": "list the runs in outputs/, or some of them",
    "diff": "what two runs differ in: config, environment, dataset, metrics",
    "ui": "MLflow's UI on 127.0.0.1, with the right store",
    "calibrate": "measure the CUDA card of this machine, into a file for gpu=NAME",
    "doctor": "what is wrong with this machine's set-up, and what to do",
}
OVERRIDE_COMMANDS = ("train", "data", "plan", "ui", "calibrate", "doctor")  # the verbs that take overrides


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's help, with every verb beside its text: argparse forgets that verbs are indented."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 2 * self._indent_increment + max(map(len, COMMANDS))


def build_parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """The command line, with what each verb does as `act`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train text-captcha recognisers in PyTorch: configured with Hydra, recorded in MLflow.",
        formatter_class=_HelpFormatter,
        epilog=f'TAB completion in bash:  eval "$({PROGRAM} -sc install=bash)"',
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, json: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=COMMANDS[name], description=COMMANDS[name], allow_abbrev=False)
        added.set_defaults(act=handlers[name])
        if name in OVERRIDE_COMMANDS:
            what = "experiment=NAME, group=NAME or key=value; see conf/"
            added.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=what)
            added.add_argument(
                "--config-dir", "-cd", metavar="DIR", help="a folder of YAML files beside conf/"
            )
        if json:
            added.add_argument("--json", action="store_true", help="print JSON, for a script")
        return added

    train = verb("train")
    what = "a sweep: key=value,value,... spans a grid of trainings"
    train.add_argument("--multirun", "-m", action="store_true", help=what)
    what = (
        "auto, the default: go on with the newest unfinished run (-m: sweep) of just this config and code, "
        "or begin one; never: begin one; RUN: this one, its folder, the beginning of its MLflow id, or latest"
    )
    train.add_argument("--resume", default="auto", metavar="auto|never|RUN", help=what)
    what = "print the composed config and stop"
    train.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help=what)
    verb("data")
    plan = verb("plan")
    plan.add_argument("--batch-sizes", metavar="N,N,...", help="default: around train.batch_size")
    what = (
        "a file in conf/gpu/ by its name, or the path of another; gpu=NAME does the same. NAME,FILE,... or "
        "all (every file of conf/gpu/ but generic) prints one row for each GPU"
    )
    plan.add_argument("--gpu", metavar="NAME", help=what)
    what = "exit with code 3 unless the verdict of train.batch_size, or of every --batch-sizes, is fits"
    plan.add_argument("--must-fit", action="store_true", help=what)
    what = "name what makes train.batch_size fit, the cheapest in time first"
    plan.add_argument("--advise", action="store_true", help=what)
    plan.epilog = (
        "exit code: 0; 3 with --must-fit if a batch size does not fit or is unsure; 2 a mistake in the call"
    )
    evaluate = verb("evaluate")
    what = "a run's folder, the beginning of an MLflow run id, or latest"
    evaluate.add_argument("run", metavar="RUN", help=what)
    evaluate.add_argument("--split", choices=("train", "validation", "test"), default="test")
    _add_reproduce_arguments(verb("reproduce"))
    predict = verb("predict")
    predict.add_argument("run", metavar="RUN", help=f"{what}, or a .safetensors file of weights")
    what = "a picture, or a folder of them; with none, asks for one after the other"
    predict.add_argument("images", nargs="*", metavar="PICTURE", help=what)
    for reading in (evaluate, predict):
        what = "auto, cpu, cuda, cuda:N or mps (default: %(default)s)"
        reading.add_argument("--device", default="auto", metavar="NAME", help=what)
    _add_runs_arguments(verb("runs"))
    _add_diff_arguments(verb("diff"))
    ui = verb("ui", json=False)
    ui.add_argument("--port", type=int, help="default: 5000, or the next free one")
    calibrate = verb("calibrate")
    calibrate.add_argument("--name", metavar="NAME", help="default: after the card, as in nvidia-h200")
    calibrate.add_argument("--force", action="store_true", help="write over a file that is there")
    what = "a session of benchmarks/gpu_session.py: write its GPU's file; needs no GPU, takes no overrides"
    calibrate.add_argument("--from", dest="session", metavar="FILE.json", help=what)
    verb("doctor")
    return parser


_METRICS_NOTE = (  # that of record/facts.py
    "train/* and val/* are those of the best epoch, memory/* is the maximum, speed/* the median of the epochs"
)


def _add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """CONDITION..., --sort, --reverse, --columns and --limit."""
    what = (
        "KEY OP VALUE in one word, OP one of = != > >= < <= ~ (contains): test/accuracy>98%%; all must hold"
    )
    parser.add_argument("conditions", nargs="*", metavar="CONDITION", help=what)
    what = "by a leaf of the config, a metric or a fact of run.json; the smallest first (default: started)"
    parser.add_argument("--sort", metavar="KEY", help=what)
    parser.add_argument("--reverse", action="store_true", help="the largest first; without --sort the newest")
    parser.add_argument("--columns", metavar="KEY,KEY,...", help="show these keys too")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N")
    parser.epilog = _METRICS_NOTE


def _add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and OVERRIDE..."""
    what = "a run's folder, an MLflow run id (its beginning, or whole where only the store has it), or latest"
    parser.add_argument("run", metavar="RUN", help=what)
    what = "key=value: another value than the saved one; the verdict names it"
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=what)
    parser.epilog = (
        "exit code: 0 identical, 3 equivalent, 4 different; 1 the new run failed, 2 a mistake in the call"
    )


def _add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN RUN and --all."""
    what = "a run's folder, the beginning of an MLflow run id, or latest"
    parser.add_argument("run", nargs=2, metavar="RUN", help=what)
    parser.add_argument("--all", action="store_true", help="show what is the same, too")
    parser.epilog = _METRICS_NOTE
