"""Before a training: its config without any `auto`, its dataset and its memory plan. Creates no files."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from captcha_exp.config import Config, resolve, with_planned_precision
from captcha_exp.data import dataset
from captcha_exp.data.dataset import DatasetSpec
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model import heads
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.fork import run_in_child
from captcha_exp.training import autotune


@dataclass(frozen=True)
class PreparedTraining:
    """A training that is ready to start."""

    config: Config  # without any `auto`
    device: torch.device
    dataset_spec: DatasetSpec
    trials: dict[str, autotune.Trials]  # for environment.json
    wait_for_plan: Callable[[], dict[str, Any]]

    @functools.cached_property
    def plan(self) -> Plan:
        """The planned memory."""
        return Plan.from_json(self.wait_for_plan())


@contextlib.contextmanager
def prepare(requested: Config) -> Iterator[PreparedTraining]:
    """Resolve and autotune the config, inspect the dataset, and plan the memory.

    Without a GPU the plan does not depend on trials, and a child process makes it during them.
    """
    config = resolve(requested, devices.detect_machine())
    device = devices.setup_device(config)
    spec = dataset.inspect_dataset(config)
    heads.report_choice(requested, spec.config)

    def plan_memory(config: Config) -> Callable[[], dict[str, Any]]:
        planned = config if device.type == "cuda" else with_planned_precision(config, requested)
        return functools.partial(_plan_memory, planned, spec.split_sizes)

    with contextlib.ExitStack() as stack:
        wait_for_plan: Callable[[], dict[str, Any]] | None = None
        if device.type != "cuda" and spec.config.train.batch_size != "auto":
            # Before any kernel runs: its threads would be lost in a fork.
            wait_for_plan = stack.enter_context(run_in_child(plan_memory(spec.config)))
        config, trials = autotune.autotune(spec.config, requested, spec.split_sizes)
        devices.set_memory_limit(config, device)
        yield PreparedTraining(config, device, spec, trials, wait_for_plan or plan_memory(config))


def _plan_memory(config: Config, split_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the plan for the batch size of a config, as values that `json` can write."""
    planner = Planner(config, split_sizes, devices.gpu_total_mib(config))
    return planner.plan_for(int(config.train.batch_size)).to_json()
