"""Out of memory as a result: where it happened, the peak, and what would need less memory.

The failed step cannot be repeated: the optimizer may have updated a part of its state, and batch norms have
already counted the batch. A run can be repeated from the start in a new process, with smaller micro-batches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from captcha_exp.config import Config
from captcha_exp.errors import RunFailed
from captcha_exp.memory.advisor import advise
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model.state import TrainState
from captcha_exp.runs import MetricsRow, Run, now_ms
from captcha_exp.runs.info import OutOfMemory
from captcha_exp.runtime import device as devices

MAX_REMEDIES = 3  # in a message
MAX_REMEDY_FRACTION = 0.9  # of the predicted memory: a remedy that saves less may fail as well


class TrainingOutOfMemoryError(RunFailed):
    """A run is out of memory; the message says where it happened and what would help."""

    def __init__(self, line: str, is_result: bool) -> None:
        super().__init__(line)
        self.is_result = is_result
        self.exit_code = 0 if is_result else 1


def record_oom(
    state: TrainState | None, plan: Plan, split_sizes: Mapping[str, int], config: Config, run: Run
) -> tuple[TrainingOutOfMemoryError, MetricsRow]:
    """Record that a run is out of memory; return the error to raise and the metrics to log."""
    device = torch.device(config.device.name)
    # The evaluation did not get to restore the training mode.
    in_evaluation = state is not None and not state.model.training
    during: Literal["training", "evaluation"] = "evaluation" if in_evaluation else "training"
    phase = "eval" if in_evaluation else "train"
    meter = devices.MemoryMeter(device)
    metrics = meter.peaks(phase) | plan.prediction_error_metrics([])
    peak_mib = metrics["memory/process_peak_mib"] = meter.process_peak_mib()
    epoch, step = (state.epoch, state.step + 1) if state is not None else (0, 0)
    splits = config.train.on_oom == "split"  # tried next, so remedies are not needed
    remedies = [] if splits else find_remedies(plan, split_sizes, config)
    run.update(
        tags={**run.info.tags, "oom": "true"},
        oom=OutOfMemory(
            during=during,
            epoch=epoch,
            step=step,
            peak_mib=peak_mib,
            predicted_mib=plan.process_mib,
            remedies=remedies,
        ),
    )
    position = f"{during}, epoch {epoch}, step {step}" if step else "setup"
    message = (
        f"out of memory in {position}: peak {peak_mib:,.0f} MiB, predicted {plan.process_mib} MiB for "
        f"{config.gpu.name}; "
        f"{'retrying with smaller parts (train.on_oom=split)' if splits else format_remedies(remedies)}"
    )
    error = TrainingOutOfMemoryError(message, config.train.on_oom != "fail")
    return error, MetricsRow(epoch, now_ms(), metrics)


def find_remedies(plan: Plan, split_sizes: Mapping[str, int], config: Config) -> list[str]:
    """Return the fastest settings that need clearly less memory than this plan, each with its MiB.

    If there are few, the largest batch size that fits is added.
    """
    limit_mib = MAX_REMEDY_FRACTION * plan.process_mib.max
    if plan.budget_mib is not None:
        limit_mib = min(limit_mib, plan.budget_mib.min)
    if limit_mib <= config.gpu.context_mib.max:  # nothing can fit: skip the search, which takes half a minute
        return []
    tighter = replace(config, device=replace(config.device, vram_budget_mib=max(1, int(limit_mib))))
    advice = advise(tighter, split_sizes, None)[:MAX_REMEDIES]
    remedies = [f"{' '.join(each.overrides)} ({each.plan.process_mib} MiB)" for each in advice]
    if len(remedies) < MAX_REMEDIES and (largest := Planner(tighter, split_sizes).max_batch_plan()):
        remedies.append(f"train.batch_size={largest.batch_size} ({largest.process_mib} MiB)")
    return remedies


def format_remedies(remedies: list[str]) -> str:
    """Return remedies in one line."""
    if not remedies:
        return "no setting needs clearly less memory; use smaller images or a smaller network"
    return f"to need less memory, set {', or '.join(remedies)}"
