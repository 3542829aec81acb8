"""`captcha-exp plan`: plan batch sizes on one GPU or several, or look for settings that make one fit."""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

from captcha_exp.cli import plan_json
from captcha_exp.cli.plan_tables import print_output
from captcha_exp.config import (
    CaptchaConfig,
    Config,
    Precision,
    resolve,
    with_captcha,
    with_default_batch_size,
    with_planned_precision,
)
from captcha_exp.errors import UserError
from captcha_exp.memory.advisor import advise
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import Plan, Planner, PlannerCache, memory_budget
from captcha_exp.runtime import fork
from captcha_exp.runtime.console import progress_bar
from captcha_exp.runtime.device import detect_machine, gpu_total_mib

BATCH_SIZE_FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # of train.batch_size, without --batch-sizes


def run(
    configs: Mapping[str, Config],
    compares_gpus: bool,
    arguments: argparse.Namespace,
    count_images: Callable[[Config], tuple[CaptchaConfig, dict[str, int]]],
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed, and the misfits for --must-fit.

    The configs differ only in the GPU; their keys name it in messages.
    """
    requested = next(iter(configs.values()))
    batch_size = requested.train.batch_size
    factors = (1,) if compares_gpus else BATCH_SIZE_FACTORS
    sizes = parse_batch_sizes(arguments.batch_sizes, batch_size, factors)
    resolved = {name: _resolve_for_plan(config) for name, config in configs.items()}
    config = next(iter(resolved.values()))
    total_mib = None if compares_gpus else gpu_total_mib(config)
    requested_mib = config.device.vram_budget_mib
    budgets = {name: memory_budget(each.gpu, requested_mib, total_mib) for name, each in resolved.items()}
    if arguments.advise or arguments.must_fit:
        _check_verdict(arguments, batch_size, [name for name, budget in budgets.items() if budget is None])
    captcha, split_sizes = count_images(config)
    resolved = {name: with_captcha(each, captcha) for name, each in resolved.items()}
    config = next(iter(resolved.values()))
    precision = cast(Precision, config.device.precision)
    budget_mib = budgets[next(iter(budgets))]
    output: plan_json.PlanOutput
    plans: list[tuple[str, Plan]] = []  # with the name of the GPU
    if arguments.advise:
        assert budget_mib is not None
        advice = advise(config, split_sizes, total_mib)
        output = plan_json.AdviceOutput(
            config.gpu, precision, split_sizes, budget_mib, int(batch_size), advice
        )
    elif compares_gpus:
        rows = _compare_gpus(resolved, sizes, split_sizes)
        output = plan_json.ManyGpusOutput(split_sizes, rows)
        plans = [(row.gpu.name, plan) for row in rows for plan in row.plans]
    else:
        planner = Planner(config, split_sizes, total_mib)
        with progress_bar("planning", len(sizes)) as bar:
            for size in sizes:
                plans.append((config.gpu.name, planner.plan_for(size)))
                bar.advance(1)
        of_gpu, largest = [plan for _, plan in plans], planner.max_batch_size() or None
        output = plan_json.OneGpuOutput(config.gpu, precision, split_sizes, budget_mib, of_gpu, largest)
    misfits = [
        f"batch {plan.batch_size:,} on {gpu_name}: needs {plan.process_mib} MiB, "
        f"available {plan.budget_mib} MiB ({plan.fits})"
        for gpu_name, plan in plans
        if plan.fits != "fits"
        and arguments.must_fit
        and (arguments.batch_sizes or plan.batch_size == batch_size)
    ]
    if arguments.json:
        return asdict(output), misfits
    print_output(output, config, requested)
    return None, misfits


def _check_verdict(arguments: argparse.Namespace, batch_size: int | str, unknown_gpus: Sequence[str]) -> None:
    """Check that --advise or --must-fit can be decided; `unknown_gpus` are those of unknown memory size.

    Raises:
        UserError: it cannot; the line says which flag or override to add or remove.
    """
    flag = "plan --advise" if arguments.advise else "plan --must-fit"
    if arguments.advise and arguments.batch_sizes is not None:
        raise UserError(f"{flag}: uses train.batch_size only; remove --batch-sizes")
    if unknown_gpus:
        size = "the memory size" if arguments.advise else f"the memory size of {', '.join(unknown_gpus)}"
        raise UserError(
            f"{flag}: {size} is unknown; add device.vram_budget_mib=MIB, or --gpu with a GPU of known memory "
            "size"
        )
    if batch_size == "auto" and not arguments.batch_sizes:
        alternative = "" if arguments.advise else " or --batch-sizes"
        raise UserError(
            f"{flag}: train.batch_size=auto is not a number; add train.batch_size=NUMBER{alternative}"
        )


def _resolve_for_plan(config: Config) -> Config:
    """Resolve the config, whether or not its device is available: nothing runs on it."""
    machine = detect_machine()
    machine = replace(machine, devices=(*machine.devices, "cuda", "mps", config.device.name))
    return with_planned_precision(with_default_batch_size(resolve(config, machine)), config)


def parse_batch_sizes(
    text: str | None, batch_size: int | str, factors: Sequence[float] = BATCH_SIZE_FACTORS
) -> list[int]:
    """Parse --batch-sizes; by default return these multiples of train.batch_size.

    Raises:
        UserError: the text is not a list of whole numbers from 1 to 1000000; the line has an example.
    """
    if text is None:
        center = batch_size if isinstance(batch_size, int) else 64
        return sorted({max(1, int(center * factor)) for factor in factors})
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text) or max(map(int, text.split(","))) > 1_000_000:
        raise UserError(
            f"--batch-sizes={text}: must be whole numbers from 1 to 1000000, separated by commas, as in "
            "25,50,100"
        )
    return list(dict.fromkeys(map(int, text.split(","))))


def _compare_gpus(
    configs: Mapping[str, Config], sizes: Sequence[int], split_sizes: Mapping[str, int]
) -> list[plan_json.GpuPlans]:
    """Return the plans of each GPU, sorted by memory; GPUs of unknown memory come last."""
    by_precision = {config.device.precision: config for config in configs.values()}
    caches = {precision: PlannerCache(config, split_sizes) for precision, config in by_precision.items()}
    planners = {
        name: Planner(config, split_sizes, cache=caches[config.device.precision])
        for name, config in configs.items()
    }
    names = list(planners)

    def find_max_batch_sizes(names: Sequence[str]) -> dict[str, int | None]:
        return {name: planners[name].max_batch_size() for name in names}

    # Once the shared traces exist, a child process searches for half of the GPUs.
    half = partial(find_max_batch_sizes, names[1::2])
    has_traces = all(cache.traces.can_interpolate for cache in caches.values())
    start = fork.run_in_child if has_traces else nullcontext
    plans, max_batch_sizes = {}, dict[str, int | None]()
    with start(half) as wait, progress_bar("planning", len(names)) as bar:
        for index, name in enumerate(names):
            plans[name] = [planners[name].plan_for(size) for size in sizes]
            if index % 2 == 0:
                max_batch_sizes |= find_max_batch_sizes([name])
            bar.advance(1)
        max_batch_sizes |= wait()

    def row(name: str, config: Config) -> plan_json.GpuPlans:
        total, budget_mib = config.gpu.total_mib, planners[name].budget_mib
        memory_mib = MiBRange(total.min, total.max) if total else None
        precision = cast(Precision, config.device.precision)
        return plan_json.GpuPlans(
            name, config.gpu, precision, memory_mib, budget_mib, plans[name], max_batch_sizes[name] or None
        )

    return sorted(
        (row(name, config) for name, config in configs.items()),
        key=lambda each: (each.memory_mib.max if each.memory_mib else math.inf, each.gpu.name),
    )
