"""The parts of gpu_session about memory: what is foretold on the CPU, and what the card then shows.

Each function is a part's work and runs in a process of its own. On the CPU all of it is done with small
numbers; figures of a card are None there.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_cases import (
    CARD,
    MIB,
    NETWORKS,
    Case,
    ProcessMeter,
    allocated_mib,
    attempt,
    clear,
    code_sha256,
    config_of,
    epoch,
    hold,
    noise,
    noise_batch,
    peaks,
    reserved_mib,
    start,
)
from gpu_judging import compacted, entries_of_model, replayed
from torch import nn

from captcha_exp import device as devices
from captcha_exp.config import Config
from captcha_exp.memory import plan as planning
from captcha_exp.memory.allocator import CachingAllocator, replay
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.step import fresh_state, train_step

Pictures = Mapping[str, int]
MOST_ENTRIES = 200_000  # of a recording; two steps take some thousand
CARDS = (CARD, "gtx1650")  # whose figures say what fits the article's card
LARGEST_PICTURES = {"train": 12_288, "validation": 250}
SENT = (
    "device.resident_limit_mib=0"  # no picture lives on the card: what is measured does not hang on how many
)


# -- predictions, on the CPU alone ---------------------------------------------------------------------------


def predictions(
    cases: Sequence[tuple[Case, Pictures]],
    budgets: Sequence[int],
    variants: Sequence[str],
    budget_mib: int,
    workers: int,
) -> dict[str, Any]:
    """What the plans say of every case, and the largest batch of each variant that they let fit."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        plans = {case.name: pool.submit(foretell, case, pictures, budgets) for case, pictures in cases}
        largest_of = {name: pool.submit(foretell_largest, name, budget_mib) for name in variants}
        return {
            "card": CARD,
            "torch": torch.__version__,
            "code_sha256": code_sha256(),
            "plans": {name: found.result() for name, found in plans.items()},
            "largest": {name: found.result() for name, found in largest_of.items()},
        }


def foretell(case: Case, pictures: Pictures, budgets: Sequence[int]) -> dict[str, Any]:
    """The plan of a case as JSON, and its verdict for each budget (MiB)."""
    case = Case(*case)
    config = config_of(case, "cuda")
    with _traced_once():
        plan = planning.Planner(config, pictures).at(case.batch)
        verdicts = {
            str(budget): planning.Planner(_budgeted(config, budget), pictures).at(case.batch).fits
            for budget in budgets
        }
    return {"case": list(case), "pictures": dict(pictures), "plan": plan.to_json(), "verdicts": verdicts}


def foretell_largest(variant: str, budget_mib: int) -> dict[str, int | None]:
    """The largest batch of the article's network that is said to fit, by each card's figures."""
    found: dict[str, int | None] = {}
    with _traced_once():
        for card in CARDS:
            config = config_of(Case("resnet18", variant, 100), "cuda", SENT, card=card)
            plan = planning.Planner(_budgeted(config, budget_mib), LARGEST_PICTURES).largest()
            found[card] = plan.batch_size if plan else None
    return found


def _budgeted(config: Config, budget_mib: int) -> Config:
    return replace(config, device=replace(config.device, vram_budget_mib=budget_mib))


@contextmanager
def _traced_once() -> Iterator[None]:
    """Within it each batch is traced once: neither card nor budget changes what a training asks for."""
    known = dict[int, Trace]()

    def remembered(config: Config, batch_size: int, pictures: Pictures) -> Trace:
        if batch_size not in known:
            known[batch_size] = trace(config, batch_size, pictures)
        return known[batch_size]

    with mock.patch.object(planning, "trace", remembered):
        yield


# -- plans ---------------------------------------------------------------------------------------------------


def plan(case: Case, pictures: Pictures, budgets: Sequence[int], device: str) -> dict[str, Any]:
    """The peaks of a case in a process that has done nothing else, and what the process held.

    Then, for budgets somewhat below that, whether it runs within them too: at a limit torch gives its cache
    back, and cuDNN takes smaller workspaces.
    """
    place = torch.device(device)
    meter = ProcessMeter(place)
    config = config_of(case, device)
    devices.set_up(config)
    data = noise(config, pictures)
    began = time.perf_counter()
    training, evaluation = epoch(config, data, place)
    figures: dict[str, Any] = {"case": list(case), "pictures": dict(pictures)}
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


# -- context -------------------------------------------------------------------------------------------------


def context(network: str, variant: str, batch: int, device: str) -> dict[str, Any]:
    """What the process holds of the card beside torch's reservation, after each thing that it does first.

    `kept_mib` is what is still allocated once all tensors of a stage are gone: workspaces of libraries.
    """
    place = torch.device(device)
    meter = ProcessMeter(place)
    config = config_of(Case(network, variant, batch), device)
    devices.set_up(config)
    stages: list[dict[str, Any]] = []

    def stage(name: str, act: Callable[[], object]) -> None:
        before = allocated_mib(place)
        act()
        gc.collect()
        now, after = meter.now(), allocated_mib(place)
        kept = None if before is None or after is None else after - before
        stages.append({"stage": name, "kept_mib": kept, "reserved_mib": reserved_mib(place), **now})

    def matrix_product(with_gradient: bool) -> None:
        left, right = (torch.rand(512, 512, device=place, requires_grad=with_gradient) for _ in range(2))
        with devices.autocast(config, place):
            product = left @ right
        if with_gradient:
            _backward(product)

    def linear() -> None:
        layer = nn.Linear(512, 144, device=place)
        with devices.autocast(config, place):
            out = layer(torch.rand(batch, 512, device=place))
        _backward(out)

    def convolution() -> None:
        shape = torch.channels_last
        images = torch.rand(batch, 64, 24, 56, device=place, requires_grad=True)
        weight = torch.rand(64, 64, 3, 3, device=place, requires_grad=True)
        with devices.autocast(config, place):
            out = F.conv2d(images.to(memory_format=shape), weight.to(memory_format=shape), padding=1)
        _backward(out)

    stage("CUDA starts", lambda: torch.zeros(1, device=place))
    stage("matrix product", functools.partial(matrix_product, False))
    stage("matrix product and its gradient", functools.partial(matrix_product, True))
    stage("linear layer and its gradient", linear)
    stage("convolution and its gradient", convolution)
    stage("training step", lambda: train_step(fresh_state(config, place), noise_batch(config, place), config))
    data = noise(config, {"train": batch, "validation": batch})
    stage("epoch", lambda: epoch(config, data, place))
    return {"network": network, "variant": variant, "batch": batch, "stages": stages}


def _backward(out: torch.Tensor) -> None:
    out.float().sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it


# -- what the allocator does ---------------------------------------------------------------------------------


def allocator_trace(network: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Every block that torch gave from the first tensor to the last of `steps` steps, and our model's answer.

    On the CPU the events are those of memory.trace, recorded from our own model: the same road, no evidence.
    """
    place = torch.device(device)
    config = config_of(Case(network, "fp32", batch), device)
    devices.set_up(config)
    pictures = {"train": steps * batch, "validation": batch}
    traced = trace(config, batch, pictures)  # of tensors alone: what is above it are workspaces
    found = _recorded(config, pictures, place) if place.type == "cuda" else _modelled(traced)
    found |= {"network": network, "batch": batch, "pictures": pictures}
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
    splits = [data.split(name, device, config.device.resident_limit_mib) for name in pictures]
    state = fresh_state(config, device)
    torch.cuda.memory._snapshot()  # leaves a mark among the entries
    state.model.train()
    order = splits[0].shuffled(config.seed, 1)
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
        "from": "card",
        "expandable_segments": planning.expandable_segments(),
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
    usage = replay(traced.events, allocator, {})
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


# -- workspaces ----------------------------------------------------------------------------------------------


def workspaces(cap: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """What a step takes beyond its tensors, and its seconds, with CUDNN_CONV_WSCAP_DBG as the process has it.

    With train.deterministic cuDNN's engines are chosen by rule, without it by trial.
    """
    import os

    place = torch.device(device)
    cases: dict[str, Any] = {}
    for network in NETWORKS:
        for deterministic in ("true", "false"):
            more = f"train.deterministic={deterministic}"
            config = config_of(Case(network, "fp32", batch), device, more)
            devices.set_up(config)
            name = f"{network}-{'deterministic' if deterministic == 'true' else 'tried'}"
            cases[name] = _beyond_tensors(config, steps, place)
            clear(place)
    return {"cap": cap, "seen": os.environ.get("CUDNN_CONV_WSCAP_DBG"), "batch": batch, "cases": cases}


def _beyond_tensors(config: Config, steps: int, device: torch.device) -> dict[str, Any]:
    """The peaks of three steps, foretold for tensors alone and measured; the median seconds of later ones."""
    size = int(config.train.batch_size)
    pictures = {"train": 3 * size, "validation": 1}
    said = _tensors_alone(config, pictures)
    found, seconds = _three_steps(config, pictures, steps, device)
    gc.collect()
    kept = allocated_mib(device)  # all tensors are gone: what is left belongs to cuBLAS
    rows = []
    for foretold, measured in zip(said, found, strict=True):
        row: dict[str, Any] = {"foretold": foretold, "measured": measured}
        if kept is not None:
            for what in ("requested_mib", "allocated_mib"):
                row[f"beyond_{what}"] = measured[what] - foretold[what] - kept
        rows.append(row)
    return {"kept_mib": kept, "steps": rows, "step_seconds": seconds}


def _tensors_alone(config: Config, pictures: Pictures) -> list[dict[str, float]]:
    """The peaks of the first steps that the trace and the model of the allocator give, without workspaces."""
    traced = trace(config, int(config.train.batch_size), pictures)
    allocator, found = CachingAllocator(expandable=planning.expandable_segments()), []
    live: dict[int, Any] = {}
    for phase in traced.phases:
        allocator.reset_peaks()
        usage = replay(traced.events[phase.begin : phase.end], allocator, live)
        if phase.name.startswith("epoch 1: step"):
            requested, allocated = usage.requested_bytes / MIB, usage.allocated_bytes / MIB
            found.append({"requested_mib": requested, "allocated_mib": allocated})
    return found


def _three_steps(
    config: Config, pictures: Pictures, steps: int, device: torch.device
) -> tuple[list[dict[str, Any]], float]:
    """The peaks of each of the first three steps; the median seconds of `steps` more."""
    data, found = noise(config, pictures), []
    limit = config.device.resident_limit_mib
    training, validation = (data.split(name, device, limit) for name in ("train", "validation"))
    state = fresh_state(config, device)
    batches = training.batches(int(config.train.batch_size), training.shuffled(config.seed, 1))
    state.model.train()
    for _ in range(3):
        start(device)
        batch = next(batches)
        _kept = train_step(state, batch, config)  # lives until the next one
        found.append(peaks(device))
    assert len(validation) == pictures["validation"]  # it lives on the device until here, as in a training
    return found, step_seconds(lambda: train_step(state, batch, config), steps, device)


def step_seconds(act: Callable[[], object], steps: int, device: torch.device) -> float:
    """The median seconds of so many, each waited for."""
    taken = []
    for _ in range(steps):
        wait(device)
        began = time.perf_counter()
        act()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the largest batch ---------------------------------------------------------------------------------------


def largest(who: str, budget_mib: int, first: int, most: int, tries: int, device: str) -> dict[str, Any]:
    """The largest batch that runs within a budget, and the smallest that does not, as far as was looked.

    `who` is "article", its loop, or a variant of ours with its network. All tries are in one process; what
    torch still holds when one begins stands beside it.
    """
    place = torch.device(device)
    meter = ProcessMeter(place)
    run = _article_run if who == "article" else functools.partial(_our_run, who)
    seen: list[dict[str, Any]] = []
    run(first, place)  # loads the kernels, so that the context is known
    context_mib = meter.now()["context_mib"]
    clear(place)
    if context_mib is not None:
        hold(budget_mib, context_mib)

    def runs(batch: int) -> bool:
        left, began = reserved_mib(place), time.perf_counter()
        start(place)
        reason = attempt(lambda: run(batch, place), place)
        row = {"batch": batch, "ran": reason is None, "left_mib": left, "reason": reason}
        seen.append(
            row | {"reserved_mib": peaks(place)["reserved_mib"], "seconds": time.perf_counter() - began}
        )
        return reason is None

    found, refused = search(runs, first, most, tries)
    after = meter.now()["context_mib"]  # more than before, if larger batches loaded other kernels
    figures = {"who": who, "budget_mib": budget_mib, "largest": found, "refused": refused, "tries": seen}
    return figures | {"context_mib": context_mib, "context_after_mib": after}


def search(runs: Callable[[int], bool], first: int, most: int, tries: int) -> tuple[int | None, int | None]:
    """The largest that ran and the smallest that did not, by doubling or halving, then by bisection."""
    good: int | None = None
    bad: int | None = None
    batch = first
    for _ in range(tries):
        if runs(batch):
            good = batch
        else:
            bad = batch
        if good is None:
            batch //= 2
        elif bad is None:
            batch = min(2 * batch, most)
        else:
            batch = (good + bad) // 2
        if batch in (0, good, bad):
            break
    return good, bad


def _article_run(batch: int, device: torch.device) -> None:
    """Three steps of the article's loop, and its evaluation of the 100 pictures of a shard."""
    import article_loop as loop

    pictures = torch.rand(batch, 3, loop.HEIGHT, loop.WIDTH)
    codes = F.one_hot(torch.zeros(batch, loop.LENGTH, dtype=torch.int64), len(loop.ALPHABET))
    given = [(pictures, codes.flatten(1).float())]
    network = loop.fresh(device)
    optimizer = torch.optim.Adam(network.parameters())
    loop.steps(network, optimizer, given * 3, device)
    loop.examine(network, [(part[:100], code[:100]) for part, code in given], device)


def _our_run(variant: str, batch: int, device: torch.device) -> None:
    """An epoch of three steps and an evaluation of ours."""
    name: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    config = config_of(Case("resnet18", variant, batch), name, SENT)
    devices.set_up(config)
    validation = LARGEST_PICTURES["validation"] if name == "cuda" else 2
    epoch(config, noise(config, {"train": 3 * batch, "validation": validation}), device)
