"""Too little memory, told as a result: where it happened, how much was taken, what would spare it.

A step cannot be repeated after it: an optimiser that was stopped half-way has moved some of its state, batch
norms have seen the batch. A run can, from its beginning and in a fresh process, with smaller parts of the
same batch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from captcha_exp.config import Config
from captcha_exp.errors import RunFailed
from captcha_exp.memory.advisor import advise
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.model.state import TrainState
from captcha_exp.runs import MetricsRow, Run, now_ms
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display

OomPhase: TypeAlias = Literal["training", "evaluation"]

MAX_REMEDIES = 3  # that are named
MAX_REMEDY_FRACTION = 0.9  # of what was foretold: a remedy that spares less may fail just so


class TrainingOutOfMemoryError(RunFailed):
    """A run that took more memory than there was; its record says where, and the line what would help."""

    def __init__(self, line: str, is_result: bool) -> None:
        super().__init__(line)
        self.is_result = is_result
        self.exit_code = 0 if is_result else 1


def record_oom(
    state: TrainState | None,
    plan: Plan,
    split_sizes: Mapping[str, int],
    config: Config,
    run: Run,
    display: Display,
) -> tuple[TrainingOutOfMemoryError, MetricsRow]:
    """What to raise, and the metrics of a run that has just met too little memory; noted in its record."""
    device = torch.device(config.device.name)
    # Evaluation puts the model into its own mode, and has not come to put it back.
    during: OomPhase = "evaluation" if state is not None and not state.model.training else "training"
    phase = {"training": "train", "evaluation": "eval"}[during]
    meter = devices.MemoryMeter(device)
    metrics = meter.peaks(phase) | plan.prediction_error_metrics([])
    peak_mib = metrics["memory/process_peak_mib"] = meter.process_peak_mib()
    epoch, step = (state.epoch, state.step + 1) if state is not None else (0, 0)
    splits = config.train.on_oom == "split"  # that is tried next, and needs no search for others
    spared = [] if splits else find_remedies(plan, split_sizes, config, display)
    run.update(
        tags={**run.state["tags"], "oom": "true"},
        oom={
            "during": during,
            "epoch": epoch,
            "step": step,
            "peak_mib": peak_mib,
            "predicted_mib": plan.process_mib,
            "remedies": spared,
        },
    )
    place = f"{during}, epoch {epoch}, step {step}" if step else "setting up"
    line = (
        f"out of memory in {place}: {peak_mib:,.0f} MiB taken at most, {plan.process_mib} MiB foretold "
        f"for {config.gpu.name}; "
        f"{'train.on_oom=split tries less at a time' if splits else format_remedies(spared)}"
    )
    return TrainingOutOfMemoryError(line, config.train.on_oom != "fail"), MetricsRow(epoch, now_ms(), metrics)


def find_remedies(plan: Plan, split_sizes: Mapping[str, int], config: Config, display: Display) -> list[str]:
    """The cheapest in time of what needs clearly less than this plan, each with the MiB that it needs.

    Where there are few, the largest batch that fits is one more.
    """
    room_mib = MAX_REMEDY_FRACTION * plan.process_mib.max
    if plan.budget_mib is not None:
        room_mib = min(room_mib, plan.budget_mib.min)
    if room_mib <= config.gpu.context_mib.max:  # nothing fits: half a minute would be spent to find none
        return []
    tighter = replace(config, device=replace(config.device, vram_budget_mib=max(1, int(room_mib))))
    found = advise(tighter, split_sizes, None, display)[:MAX_REMEDIES]
    named = [f"{' '.join(each.overrides)} ({each.plan.process_mib} MiB)" for each in found]
    if len(named) < MAX_REMEDIES and (largest := Planner(tighter, split_sizes).max_batch_plan()):
        named.append(f"train.batch_size={largest.batch_size} ({largest.process_mib} MiB)")
    return named


def format_remedies(remedies: list[str]) -> str:
    """Remedies in one line."""
    if not remedies:
        return "nothing known here needs clearly less; take smaller pictures or a smaller network"
    return f"the cheapest that spare memory: {', or '.join(remedies)}"
