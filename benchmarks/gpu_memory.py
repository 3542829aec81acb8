"""The parts of gpu_session about memory: measured peaks of trainings whose peaks were predicted.

Each function is one part and runs in its own process. On the CPU it runs with small sizes, and figures of a
GPU are None.
"""

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from gpu_cases import (
    NETWORKS,
    Case,
    ProcessMeter,
    allocated_mib,
    clear,
    limit_memory,
    make_config,
    noise_batch,
    noise_dataset,
    oom_reason,
    reserved_mib,
    run_epoch,
)
from gpu_comparison import compact_events, model_entries, replay_recording

from captcha_exp.config import Config
from captcha_exp.memory import gpu_probe, replay
from captcha_exp.memory.allocator import CachingAllocator, replay_events
from captcha_exp.memory.gpu_profile import (
    ConvWorkspace,
    GpuMeasurements,
    MemoryStage,
    TimingRound,
)
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices

SplitSizes = Mapping[str, int]
MAX_ENTRIES = 200_000  # of a recording; two steps take some thousands


# -- plans ---------------------------------------------------------------------------------------------------


def plan(case: Case, split_sizes: SplitSizes, budgets: Sequence[int], device: str) -> dict[str, Any]:
    """Measure the peaks of a case in a fresh process, and the memory of the process.

    Then try smaller budgets: at a limit torch frees its cache, and cuDNN uses smaller workspaces.
    """
    torch_device = torch.device(device)
    meter = ProcessMeter(torch_device)
    config = make_config(case, device)
    devices.setup_device(config)
    data = noise_dataset(config, split_sizes)
    began = time.perf_counter()
    training, evaluation = run_epoch(config, data, torch_device)
    figures: dict[str, Any] = {"case": list(case), "images": dict(split_sizes)}
    figures |= {"training": training, "evaluation": evaluation, "seconds": time.perf_counter() - began}
    figures |= meter.measure()
    if torch_device.type != "cuda":
        return figures | {"process_peak_mib": figures["process_mib"], "ran_within": {}}
    context = figures["context_mib"]
    peak = context + max(training["reserved_mib"], evaluation["reserved_mib"])
    ran_within = runs_within(
        budgets, context, peak, functools.partial(run_epoch, config, data, torch_device), torch_device
    )
    return figures | {"process_peak_mib": peak, "ran_within": ran_within}


def runs_within(
    budgets: Sequence[int],
    context_mib: float,
    peak_mib: float,
    run: Callable[[], object],
    device: torch.device,
) -> dict[str, bool]:
    """Return, for each budget between half of the unlimited peak and that peak, whether the run succeeds."""
    found = {}
    for budget in budgets:
        if max(peak_mib / 2, context_mib) < budget < peak_mib:
            clear(device)
            limit_memory(budget, context_mib)
            found[str(budget)] = oom_reason(run, device) is None
    return found


# -- context and calibration ---------------------------------------------------------------------------------


def calibration(batches: Mapping[str, int], device: str) -> dict[str, Any]:
    """Return the measurements for session_to_gpu_file.py, on both networks.

    On the CPU they are fake, to test that they can be written and read.
    """
    torch_device = torch.device(device)
    if torch_device.type == "cpu":
        return asdict(_fake_measurements())
    free = ProcessMeter(torch_device).free_before_mib  # before this process uses the GPU
    configs = [make_config(Case(network, "fp32", batches[network]), device) for network in NETWORKS]
    return asdict(gpu_probe.measure(configs, torch_device, free))


def _fake_measurements() -> GpuMeasurements:
    """Return measurements that belong to no GPU."""
    return GpuMeasurements(
        name="no GPU, a dry run",
        totals_mib=(4000.0, 4000.0),
        free_before_mib=3990.0,
        stages=tuple(MemoryStage(after, 400.0, 100.0, 390.0) for after in ("one", "two", "three")),
        cublas_mib=16.0,
        cublas_config=":4096:8",
        transients=(ConvWorkspace("resnet18", "fp32", 16, 64.0),),
        deterministic=True,
        rounds=(TimingRound("resnet18", 100, {"fp32": 0.2, "bf16": 0.1}),),
    )


def context(network: str, variant: str, batch: int, device: str) -> dict[str, Any]:
    """Measure memory outside torch's reservation, stage by stage, for one network and precision.

    `kept_mib` is still allocated after all tensors of a stage are freed: workspaces of libraries. Matrix
    products and convolutions on their own are measured by `calibration`.
    """
    torch_device = torch.device(device)
    meter = ProcessMeter(torch_device)
    config = make_config(Case(network, variant, batch), device)
    devices.setup_device(config)
    stages: list[dict[str, Any]] = []

    def run_stage(name: str, function: Callable[[], object]) -> None:
        before = allocated_mib(torch_device)
        function()
        gc.collect()
        measured, after = meter.measure(), allocated_mib(torch_device)
        kept = None if before is None or after is None else after - before
        stages.append(
            {"stage": name, "kept_mib": kept, "reserved_mib": reserved_mib(torch_device), **measured}
        )

    run_stage("CUDA starts", lambda: torch.zeros(1, device=torch_device))
    run_stage(
        "training step",
        lambda: train_step(init_train_state(config, torch_device), noise_batch(config, torch_device), config),
    )
    data = noise_dataset(config, {"train": batch, "validation": batch})
    run_stage("epoch", lambda: run_epoch(config, data, torch_device))
    return {"network": network, "variant": variant, "batch": batch, "stages": stages}


# -- the allocator -------------------------------------------------------------------------------------------


def allocator_trace(network: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Record all allocations of `steps` steps from the first tensor on, and replay them with our model.

    On the CPU the events come from memory.trace through our own model: this tests the code path only.
    """
    torch_device = torch.device(device)
    config = make_config(Case(network, "fp32", batch), device)
    devices.setup_device(config)
    split_sizes = {"train": steps * batch, "validation": batch}
    traced = trace(config, batch, split_sizes)  # tensors only, without workspaces
    found = (
        _record_on_gpu(config, split_sizes, torch_device)
        if torch_device.type == "cuda"
        else _record_model(traced)
    )
    found |= {"network": network, "batch": batch, "images": split_sizes}
    recorded_phases = ("train split", "validation split", "state", "epoch 1: s")
    found["traced_bytes"] = max(
        phase.peak_bytes for phase in traced.phases if phase.name.startswith(recorded_phases)
    )
    return found | {"replayed": replay_recording(found)}


def _record_on_gpu(config: Config, split_sizes: SplitSizes, device: torch.device) -> dict[str, Any]:
    """Record the allocator of the GPU from before the first tensor, since our model starts empty."""
    data = noise_dataset(config, split_sizes)
    torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types for it
    before = torch.cuda.memory_reserved(device)
    record_history = torch.cuda.memory._record_memory_history
    record_history(
        enabled="all", context=None, stacks="python", max_entries=MAX_ENTRIES
    )  # no frames: fast and small
    names = ["state"]
    splits = [data.split(name, device, config.device.preload_limit_mib) for name in split_sizes]
    state = init_train_state(config, device)
    torch.cuda.memory._snapshot()  # adds a mark to the entries
    state.model.train()
    order = splits[0].epoch_order(config.seed, 1)
    for number, batch in enumerate(splits[0].batches(int(config.train.batch_size), order), 1):
        _kept = train_step(state, batch, config)  # freed in the next iteration
        torch.cuda.synchronize(device)
        torch.cuda.memory._snapshot()
        names.append(f"step {number}")
    stats = torch.cuda.memory_stats(device)
    snapshot = torch.cuda.memory._snapshot()
    record_history(enabled=None)
    traces = snapshot["device_traces"]
    entries = traces[torch.cuda.current_device()]
    return {
        "from": "gpu",
        "expandable_segments": replay.uses_expandable_segments(),
        "entries": len(entries),
        "reserved_before_bytes": before,
        "mark_names": names,
        "peaks": {
            "requested_bytes": stats["requested_bytes.all.peak"],
            "allocated_bytes": stats["allocated_bytes.all.peak"],
            "reserved_bytes": stats["reserved_bytes.all.peak"],
        },
        **compact_events(entries),
    }


def _record_model(traced: Trace) -> dict[str, Any]:
    allocator = CachingAllocator()
    usage = replay_events(traced.events, allocator, {})
    phases = [traced.events[phase.begin : phase.end] for phase in traced.phases]
    entries = list(model_entries(phases))
    return {
        "from": "model",
        "expandable_segments": False,
        "entries": len(entries),
        "reserved_before_bytes": 0,
        "mark_names": [phase.name for phase in traced.phases],
        "peaks": usage._asdict(),
        **compact_events(entries),
    }
