"""Train with MLflow servers that are absent, stopped, killed, slow or that break connections.

Each training is the real command with a real `mlflow server` on 127.0.0.1, most of them behind a proxy. Then
`captcha-exp sync` delivers the rest, and MLflow must have every metric of every epoch once, the files and the
status, in one run. They take turns of a second, with each other and with the same training without tracking:
the ratio is that of the seconds from the run directory to the metrics of the last epoch. A round takes twenty
minutes. Prints each ratio, and at the end one JSON line; exit code 1 if there is a fault. A median ratio
above --max-ratio is one: use an idle machine.

    python benchmarks/tracking.py [--repeats 2] [--epochs 60] [--count 4000] [--max-ratio 1.03]
                                  [--cases NAME ...]
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from interference import interference
from mlflow_servers import SLOW_SECONDS, Proxy, Server
from time_slices import SlicedTraining, run_in_turns

CONFIG = (
    "name=tracking",
    "captcha.alphabet='0123456789'",
    "captcha.length=2",
    "captcha.width=64",
    "captcha.height=32",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
    "train.batch_size=50",
    "train.patience=null",
    "device.name=cpu",
)
CASES = ("local", "server", "absent", "middle", "end", "slow", "resets")
MAX_WARNINGS = 2


def command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "captcha_exp", *words],
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


class Bench:
    """The trainings and their faults."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._config = (*CONFIG, f"train.epochs={options.epochs}", f"data.count={options.count}")
        self._number = 0
        self.faults: list[str] = []
        self.ratios: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.command_ratios: dict[str, list[float]] = defaultdict(list)
        self.later_ratios: dict[str, list[float]] = defaultdict(list)
        self.cost: dict[str, list[float]] = defaultdict(list)
        self.warnings: dict[str, int] = defaultdict(int)
        self._cache = folder / "cache"
        root = self._new_root("cache-of")
        done = command(root, "data", *self._config)
        if done.returncode:
            raise RuntimeError(done.stderr)
        shutil.copytree(root / "outputs" / "cache", self._cache)

    def _new_root(self, name: str) -> Path:
        self._number += 1
        root = self._folder / f"{self._number:02}-{name}"
        (root / "outputs").mkdir(parents=True)
        if self._cache.exists():
            shutil.copytree(self._cache, root / "outputs" / "cache")
        return root

    def train_round(self, cases: Sequence[str], plain_first: bool) -> None:
        """Train without tracking and with each case, all in turns."""
        epochs = self._options.epochs
        plain = SlicedTraining(self._new_root("none"), (*self._config, "tracking=none"), epochs)
        tracked: dict[str, SlicedTraining] = {}
        uris: dict[str, str] = {}
        actions: list[Callable[[], None]] = []
        served: list[tuple[Server, Proxy]] = []
        with contextlib.ExitStack() as stack:
            for case in cases:
                root = self._new_root(case)
                uris[case] = f"sqlite:///{root}/mlruns/mlflow.db"
                if case != "local":
                    server, proxy = self._serve(root, case, stack)
                    uris[case] = server.uri
                    served.append((server, proxy))
                    actions.append(self._server_actions(root, case, server))
                uri = uris[case] if case == "local" else proxy.uri
                tracked[case] = SlicedTraining(root, (*self._config, f"tracking.uri={uri}"), epochs)
            order = (plain, *tracked.values()) if plain_first else (*tracked.values(), plain)

            def act() -> None:
                for each in actions:
                    each()

            run_in_turns(order, act)
            if plain.returncode:
                self._fault("none", f"exit code {plain.returncode}: {plain.stderr[-2000:]}")
            for case, training in tracked.items():
                self._record(case, training, plain)
                self._check_end(case, training)
            for server, proxy in served:
                proxy.seconds, proxy.breaks = 0.0, False
                server.start()
            for case, training in tracked.items():
                self._check(training.root, case, uris[case])

    def _serve(self, root: Path, case: str, stack: contextlib.ExitStack) -> tuple[Server, Proxy]:
        """Return a server and a proxy for it, as they are at the start of a case."""
        server = Server(root / "server")
        stack.callback(server.kill)
        proxy = Proxy(server)
        stack.callback(proxy.close)
        proxy.seconds = SLOW_SECONDS if case == "slow" else 0.0
        proxy.breaks = case == "resets"
        if case != "absent":
            server.start()
        return server, proxy

    def _server_actions(self, root: Path, case: str, server: Server) -> Callable[[], None]:
        """Return a function that kills or starts the server when the training has reached some epoch.

        It is called while no training runs: the CPU time that a server needs to start is not theirs.
        """
        epochs = self._options.epochs
        actions = {
            "middle": [(epochs // 3, server.kill), (2 * epochs // 3, server.start)],
            "end": [(epochs - 1, server.kill)],
        }.get(case, [])

        def act() -> None:
            while actions and self._epochs(root) >= actions[0][0]:
                actions.pop(0)[1]()

        return act

    @staticmethod
    def _epochs(root: Path) -> int:
        return sum(len(path.read_bytes().splitlines()) for path in root.glob("outputs/*/*/metrics.jsonl"))

    def _record(self, case: str, tracked: SlicedTraining, plain: SlicedTraining) -> None:
        ratio = tracked.training_seconds / plain.training_seconds
        self.ratios[case].append(ratio)
        self.seconds[case].append(tracked.training_seconds)
        self.cost[case].append(tracked.training_seconds - plain.training_seconds)
        self.later_ratios[case].append(tracked.later_seconds / plain.later_seconds)
        self.command_ratios[case].append(tracked.active_seconds / plain.active_seconds)
        print(f"{case}: ratio {ratio:.4f} of training times", file=sys.stderr, flush=True)

    def _check_end(self, case: str, tracked: SlicedTraining) -> None:
        """Check warnings, exit code, status and summary of a training."""
        warnings = [line for line in tracked.stderr.splitlines() if line.startswith("warning:")]
        self.warnings[case] = max(self.warnings[case], len(warnings))
        if len(warnings) > MAX_WARNINGS:
            self._fault(case, f"{len(warnings)} warnings: {warnings}")
        if tracked.returncode:
            return self._fault(case, f"exit code {tracked.returncode}: {tracked.stderr[-2000:]}")
        info = json.loads(self._run_dir(tracked.root).joinpath("run.json").read_text())
        if info["status"] != "FINISHED":
            self._fault(case, f"status {info['status']}")
        if bool(info["mlflow"]["owed"]) == info["mlflow"]["closed"]:
            self._fault(case, f"owed {info['mlflow']['owed']}, closed {info['mlflow']['closed']}")
        if ("MLflow does not have yet" in tracked.stdout) == info["mlflow"]["closed"]:
            self._fault(case, "the summary does not say what is owed")
        return None

    @staticmethod
    def _run_dir(root: Path) -> Path:
        (path,) = root.glob("outputs/*/*/run.json")
        return path.parent

    def _check(self, root: Path, case: str, uri: str) -> None:
        """Deliver what is owed, and compare MLflow with the run directory."""
        from mlflow import MlflowClient

        done = command(root, "sync")
        if done.returncode:
            self._fault(case, f"sync: exit code {done.returncode}: {done.stdout}{done.stderr}")
        if not command(root, "sync").stdout.startswith("nothing to deliver"):
            self._fault(case, "a second sync has something to deliver")
        run_dir, client = self._run_dir(root), MlflowClient(uri)
        experiment = client.get_experiment_by_name("captcha_exp")
        if experiment is None:
            return self._fault(case, "no experiment")
        found = client.search_runs([experiment.experiment_id])
        if len(found) != 1:
            return self._fault(case, f"{len(found)} runs")
        run_id = found[0].info.run_id
        if found[0].info.status != "FINISHED":
            self._fault(case, f"status {found[0].info.status} in MLflow")
        expected = defaultdict(list)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            for key, value in row["metrics"].items():
                expected[key].append((row["step"], row["timestamp_ms"], value))
        for key, values in expected.items():
            history = client.get_metric_history(run_id, key)
            if sorted((m.step, m.timestamp, m.value) for m in history) != sorted(values):
                self._fault(case, f"{key}: {len(history)} values in MLflow, {len(values)} in the run")
        if found[0].data.metrics.keys() != expected.keys():
            self._fault(case, "other metrics in MLflow")
        names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
        wanted = {name for name in names if not name.startswith("checkpoint/")}
        if (sent := set(_artifacts(client, run_id))) != wanted:
            self._fault(case, f"files {sorted(sent ^ wanted)}")
        return None

    def _fault(self, case: str, text: str) -> None:
        self.faults.append(f"{case}: {text}")
        print(f"{case}: {text}", file=sys.stderr)

    def figures(self) -> dict[str, Any]:
        limit = self._options.max_ratio
        ratios = _medians(self.ratios, 4)
        slow = [f"{case}: ratio {ratio} of training times" for case, ratio in ratios.items() if ratio > limit]
        return {
            "ratio": ratios,
            "ratios": {case: [round(each, 4) for each in values] for case, values in self.ratios.items()},
            "ratio_after_3_epochs": _medians(self.later_ratios, 4),
            "seconds": _medians(self.seconds, 1),
            "cost_seconds": _medians(self.cost, 1),
            "command_ratio": {
                case: round(statistics.median(v), 4) for case, v in self.command_ratios.items()
            },
            "warnings": dict(self.warnings),
            "faults": self.faults + slow,
        }


def _medians(values: dict[str, list[float]], digits: int) -> dict[str, float]:
    return {case: round(statistics.median(each), digits) for case, each in values.items()}


def _artifacts(client: Any, run_id: str, path: str | None = None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, path):
        if item.is_dir:
            yield from _artifacts(client, run_id, item.path)
        else:
            yield item.path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--count", type=int, default=4000, help="images")
    parser.add_argument("--max-ratio", type=float, default=1.03, help="inf on a busy machine")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="NAME")
    parser.add_argument("--folder", type=Path, help="new folder to keep the runs in, for inspection")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        bench = Bench(folder, options)
        for repeat in range(options.repeats):
            bench.train_round(options.cases, plain_first=repeat % 2 == 0)
        figures = bench.figures()
    size = {"epochs": options.epochs, "count": options.count}
    print(json.dumps({"benchmark": "tracking", **size, **figures, "machine": interference()}))
    sys.exit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
