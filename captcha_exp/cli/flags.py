"""What the verbs that look around take on the command line; imports nothing that they need to do it."""

import argparse

_RULE = (  # that of record/facts.py
    "train/* and val/* are those of the best epoch, memory/* is the maximum, speed/* the median of the epochs"
)


def of_runs(parser: argparse.ArgumentParser) -> None:
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
    parser.epilog = _RULE


def of_diff(parser: argparse.ArgumentParser) -> None:
    """RUN RUN and --all."""
    what = "a run's folder, the beginning of an MLflow run id, or latest"
    parser.add_argument("run", nargs=2, metavar="RUN", help=what)
    parser.add_argument("--all", action="store_true", help="show what is the same, too")
    parser.epilog = _RULE
