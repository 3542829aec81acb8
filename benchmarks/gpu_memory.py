"""The parts of gpu_session about memory: what the GPU shows of trainings whose peaks were predicted.

Each function is the work of one part and runs in a process of its own. On the CPU all of it is done with
small numbers; figures of a GPU are None there.
"""

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpu_cases import (
    NETWORKS,
    Case,
    ProcessMeter,
    allocated_mib,
    attempt,
    clear,
    config_of,
    epoch,
    hold,
    noise,
    noise_batch,
    reserved_mib,
)
from gpu_judging import compacted, entries_of_model, replayed

from captcha_exp.config import Config
from captcha_exp.memory import gpu_probe
from captcha_exp.memory import replay as plays
from captcha_exp.memory.allocator import CachingAllocator, replay_events
from captcha_exp.memory.gpu_profile import (
    ConvWorkspace,
    GpuMeasurements,
    MemoryStage,
    TimingRound,
    measurements_to_json,
)
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import NullDisplay

Pictures = Mapping[str, int]
MOST_ENTRIES = 200_000  # of a recording; two steps take some thousand


# -- plans ---------------------------------------------------------------------------------------------------


def plan(case: Case, pictures: Pictures, budgets: Sequence[int], device: str) -> dict[str, Any]:
    """The peaks of a case in a process that has done nothing else, and what the process held.

    Then, for budgets somewhat below that, whether it runs within them too: at a limit torch gives its cache
    back, and cuDNN takes smaller workspaces.
    """
    place = torch.device(device)
    meter = ProcessMeter(place)
    config = config_of(case, device)
    devices.setup_device(config)
    data = noise(config, pictures)
    began = time.perf_counter()
    training, evaluation = epoch(config, data, place)
    figures: dict[str, Any] = {"case": list(case), "images": dict(pictures)}
    figures |= {"training": training, "evaluation": evaluation, "seconds": time.perf_counter() - began}
    figures |= meter.now()
    if place.type != "cuda":
        return figures | {"process_peak_mib": figures["process_mib"], "ran_within": {}}
    context = figures["context_mib"]
    peak = context + max(training["reserved_mib"], evaluation["reserved_mib"])
    ran = runs_within(budgets, context, peak, functools.partial(epoch, config, data, place), place)
    return figures | {"process_peak_mib": peak, "ran_within": ran}


def runs_within(
    budgets: Sequence[int],
    context_mib: float,
    peak_mib: float,
    run: Callable[[], object],
    device: torch.device,
) -> dict[str, bool]:
    """For each budget from half of a free run's peak up to it: whether the run does with it."""
    found = {}
    for budget in budgets:
        if max(peak_mib / 2, context_mib) < budget < peak_mib:
            clear(device)
            hold(budget, context_mib)
            found[str(budget)] = attempt(run, device) is None
    return found


# -- context and calibration -------------------------------------------------------------------------------


def calibration(batches: Mapping[str, int], device: str) -> dict[str, Any]:
    """Return the readings that `captcha-exp calibrate --from` makes a GPU's file of, on both networks.

    On the CPU they are made up: only their way into the file is tried.
    """
    place = torch.device(device)
    if place.type == "cpu":
        return measurements_to_json(_made_up())
    free = ProcessMeter(place).free_before_mib  # before this process takes any of it
    configs = [config_of(Case(network, "fp32", batches[network]), device) for network in NETWORKS]
    return measurements_to_json(gpu_probe.measure(configs, place, free, NullDisplay()))


def _made_up() -> GpuMeasurements:
    """Return readings of no GPU."""
    return GpuMeasurements(
        name="no GPU, a dry run",
        totals_mib=(4000.0, 4000.0),
        free_before_mib=3990.0,
        stages=tuple(MemoryStage(after, 400.0, 100.0, 390.0) for after in ("one", "two", "three")),
        smallest=2,
        cublas_mib=16.0,
        cublas_config=":4096:8",
        transients=(ConvWorkspace("resnet18", "fp32", 16, 64.0),),
        deterministic=True,
        rounds=(TimingRound("resnet18", 100, {"fp32": 0.2, "bf16": 0.1}),),
    )


def context(network: str, variant: str, batch: int, device: str) -> dict[str, Any]:
    """Return what a training of one network in one precision holds beside torch's reservation, and keeps.

    `kept_mib` is what is still allocated once all tensors of a stage are gone: workspaces of libraries. What
    matrix products and convolutions alone take is among the readings of `calibration`.
    """
    place = torch.device(device)
    meter = ProcessMeter(place)
    config = config_of(Case(network, variant, batch), device)
    devices.setup_device(config)
    stages: list[dict[str, Any]] = []

    def stage(name: str, act: Callable[[], object]) -> None:
        before = allocated_mib(place)
        act()
        gc.collect()
        now, after = meter.now(), allocated_mib(place)
        kept = None if before is None or after is None else after - before
        stages.append({"stage": name, "kept_mib": kept, "reserved_mib": reserved_mib(place), **now})

    stage("CUDA starts", lambda: torch.zeros(1, device=place))
    stage(
        "training step",
        lambda: train_step(init_train_state(config, place), noise_batch(config, place), config),
    )
    data = noise(config, {"train": batch, "validation": batch})
    stage("epoch", lambda: epoch(config, data, place))
    return {"network": network, "variant": variant, "batch": batch, "stages": stages}


# -- what the allocator does ---------------------------------------------------------------------------------


def allocator_trace(network: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Every block that torch gave from the first tensor to the last of `steps` steps, and our model's answer.

    On the CPU the events are those of memory.trace, recorded from our own model: the same road, no evidence.
    """
    place = torch.device(device)
    config = config_of(Case(network, "fp32", batch), device)
    devices.setup_device(config)
    pictures = {"train": steps * batch, "validation": batch}
    traced = trace(config, batch, pictures)  # of tensors alone: what is above it are workspaces
    found = _recorded(config, pictures, place) if place.type == "cuda" else _modelled(traced)
    found |= {"network": network, "batch": batch, "images": pictures}
    seen = ("train split", "validation split", "state", "epoch 1: s")
    found["traced_bytes"] = max(phase.peak_bytes for phase in traced.phases if phase.name.startswith(seen))
    return found | {"replayed": replayed(found)}


def _recorded(config: Config, pictures: Pictures, device: torch.device) -> dict[str, Any]:
    """The recording of a card, from before the first tensor: our model begins with nothing."""
    data = noise(config, pictures)
    torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types for it
    before = torch.cuda.memory_reserved(device)
    record = torch.cuda.memory._record_memory_history
    record(enabled="all", context=None, stacks="python", max_entries=MOST_ENTRIES)  # no frames: quick, small
    names = ["state"]
    splits = [data.split(name, device, config.device.preload_limit_mib) for name in pictures]
    state = init_train_state(config, device)
    torch.cuda.memory._snapshot()  # leaves a mark among the entries
    state.model.train()
    order = splits[0].permutation(config.seed, 1)
    for number, batch in enumerate(splits[0].batches(int(config.train.batch_size), order), 1):
        _kept = train_step(state, batch, config)  # lives until the next one
        torch.cuda.synchronize(device)
        torch.cuda.memory._snapshot()
        names.append(f"step {number}")
    stats = torch.cuda.memory_stats(device)
    snapshot = torch.cuda.memory._snapshot()
    record(enabled=None)
    traces = snapshot["device_traces"]
    entries = traces[torch.cuda.current_device()]
    return {
        "from": "gpu",
        "expandable_segments": plays.uses_expandable_segments(),
        "entries": len(entries),
        "reserved_before_bytes": before,
        "mark_names": names,
        "peaks": {
            "requested_bytes": stats["requested_bytes.all.peak"],
            "allocated_bytes": stats["allocated_bytes.all.peak"],
            "reserved_bytes": stats["reserved_bytes.all.peak"],
        },
        **compacted(entries),
    }


def _modelled(traced: Trace) -> dict[str, Any]:
    allocator = CachingAllocator()
    usage = replay_events(traced.events, allocator, {})
    phases = [traced.events[phase.begin : phase.end] for phase in traced.phases]
    entries = list(entries_of_model(phases))
    return {
        "from": "model",
        "expandable_segments": False,
        "entries": len(entries),
        "reserved_before_bytes": 0,
        "mark_names": [phase.name for phase in traced.phases],
        "peaks": usage._asdict(),
        **compacted(entries),
    }
