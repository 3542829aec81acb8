"""Measure the time that the loader takes from a training of `compact`.

A batch is loaded in the main thread, from images in memory: it is indexed, copied to the device and
augmented. That takes turns with the training steps on these batches. Prints one JSON line: milliseconds of
both, and the loader as a fraction of a step, without augmentation (experiment=quickstart) and with
`augment=mild`.

    python benchmarks/loader.py [--steps 30] [--rounds 7] [--threads 1] [OVERRIDE ...]
"""

import argparse
import json
import sys

import torch
from interference import conclude, exit_code
from loops import Step, prepare, requested_config, temporary_root
from rounds import compare, interleave, spread

CASES = {"no augmentation": (), "augment=mild": ("augment=mild",)}


def measure(step: Step, options: argparse.Namespace) -> dict[str, object]:
    """Return the milliseconds of the loader and of the step, and their ratio."""
    waiting = [step.load() for _ in range(options.steps)]

    def load() -> None:
        waiting[:] = [step.load() for _ in waiting]

    def train() -> None:
        for batch in waiting:
            step.train(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    works = {"loader": load, "step": train}
    interleave(works, 1)  # loads kernels
    found = interleave(works, options.rounds)
    ratio = compare(found["loader"], found["step"])
    per_step = 1000 / options.steps
    return {
        **{f"{name}_ms": spread([per_step * each.wall for each in found[name]]) for name in works},
        "fraction": ratio["wall"],
        "cpu_fraction": ratio["cpu"],
        **conclude(ratio["wall"]["median"], at_most=options.max_fraction),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="loaded, then trained, in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="(default: those that a training uses)")
    parser.add_argument("--max-fraction", type=float, help="goal of the fraction")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    if min(options.steps, options.rounds, options.threads or 1) < 1:
        parser.error("--steps, --rounds and --threads must be at least 1")
    overrides = [*options.overrides, "data.count=4000"]
    overrides += [f"device.threads={options.threads}"] if options.threads else []
    rows = {}
    with temporary_root():
        for name, more in CASES.items():
            step = Step(*prepare(requested_config("experiment=quickstart", *more, *overrides)))
            rows[name] = measure(step, options)
    about = {"precision": step.config.device.precision, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "loader", **about, "rounds": options.rounds, "cases": rows}))
    sys.exit(exit_code(*rows.values()))


if __name__ == "__main__":
    main()
