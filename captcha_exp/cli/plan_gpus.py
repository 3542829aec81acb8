"""`captcha-exp plan --gpu all`: plan the same batch sizes on several GPUs, one row for each."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from captcha_exp.cli.output import get_console
from captcha_exp.cli.plan_json import GpuPlans, ManyGpusOutput
from captcha_exp.cli.plan_report import (
    COLORS,
    check_must_fit,
    list_misfits,
    max_searched_batch_size,
    parse_batch_sizes,
    resolve_for_plan,
)
from captcha_exp.config import Config, Precision
from captcha_exp.memory.advisor import speedup
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import MAX_MICRO_BATCHES, Planner, PlannerCache, memory_budget
from captcha_exp.runtime import fork
from captcha_exp.runtime.console import Display


def run(
    configs: Mapping[str, Config],
    arguments: argparse.Namespace,
    count_images: Callable[[Config], dict[str, int]],
    display: Display,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed, and the misfits for --must-fit.

    The configs differ only in the GPU.
    """
    first = next(iter(configs.values()))
    batch_size = first.train.batch_size
    default = batch_size if isinstance(batch_size, int) else 64
    sizes = parse_batch_sizes(arguments.batch_sizes or str(default), batch_size)
    resolved = {name: resolve_for_plan(config) for name, config in configs.items()}
    if arguments.must_fit:
        limit = first.device.vram_budget_mib
        unknown = [name for name, config in resolved.items() if memory_budget(config.gpu, limit) is None]
        check_must_fit(arguments, batch_size, unknown)
    first = next(iter(resolved.values()))
    split_sizes = count_images(first)
    rows = _rows(resolved, sizes, split_sizes, display)
    misfits = []
    if arguments.must_fit:
        misfits = [text for row in rows for text in list_misfits(row.plans, row.gpu.name)]
    if arguments.json:
        precision = cast(Precision, first.device.precision)
        return asdict(ManyGpusOutput(precision, split_sizes, rows)), misfits
    _print_rows(rows, first)
    _print_notes(rows, next(iter(configs.values())), split_sizes["train"])
    return None, misfits


def _rows(
    configs: Mapping[str, Config], sizes: Sequence[int], split_sizes: Mapping[str, int], display: Display
) -> list[GpuPlans]:
    """Return a row for each GPU, sorted by memory; GPUs of unknown memory come last."""
    cache = PlannerCache(next(iter(configs.values())), split_sizes)
    planners = {name: Planner(config, split_sizes, cache=cache) for name, config in configs.items()}
    names = list(planners)

    def find_max_batch_sizes(names: Sequence[str]) -> dict[str, int | None]:
        return {name: planners[name].max_batch_size() for name in names}

    # Once the shared traces exist, a child process searches for half of the GPUs.
    half = partial(find_max_batch_sizes, names[1::2])
    start = fork.run_in_child if cache.traces.can_interpolate else nullcontext
    plans, max_batch_sizes = {}, dict[str, int | None]()
    with start(half) as wait, display.progress_bar("planning", len(names)) as bar:
        for index, name in enumerate(names):
            plans[name] = [planners[name].plan_for(size) for size in sizes]
            if index % 2 == 0:
                max_batch_sizes |= find_max_batch_sizes([name])
            bar.advance(1)
        max_batch_sizes |= wait()
    rows = [
        GpuPlans(
            name,
            config.gpu,
            MiBRange(config.gpu.total_mib.min, config.gpu.total_mib.max) if config.gpu.total_mib else None,
            planners[name].budget_mib,
            plans[name],
            max_batch_sizes[name] or None,
        )
        for name, config in configs.items()
    ]
    return sorted(
        rows, key=lambda row: (row.memory_mib is None, row.memory_mib and row.memory_mib.max, row.gpu.name)
    )


def _print_rows(rows: Sequence[GpuPlans], config: Config) -> None:
    """Print a row for each GPU and batch size, and what the columns mean."""
    out, precision = get_console(), config.device.precision
    out.print(f"{config.name} in {precision}", markup=False)
    table = Table(
        "GPU", "memory", "batch", "process", "verdict", "largest", title="MiB", title_justify="left"
    )
    for column in (1, 2, 3, 5):
        table.columns[column].justify = "right"
    speedups = {} if precision == "fp32" else {row.name: speedup(row.gpu, precision) for row in rows}
    if speedups:
        table.add_column("speed")
    for row in rows:
        largest = "unknown" if row.budget_mib is None else "none"
        if row.max_batch_size is not None:
            largest = f"{row.max_batch_size:,}"
        speed = [f"{speedups[row.name].min:g} to {speedups[row.name].max:g}"] if speedups else []
        for plan in row.plans:
            table.add_row(
                Text(row.gpu.name),
                str(row.memory_mib or "unknown"),
                f"{plan.batch_size:,}",
                str(plan.process_mib),
                Text(plan.fits or "unknown", COLORS[plan.fits]),
                largest,
                *speed,
            )
    out.print(table)
    if speedups:
        out.print(f"speed: of training in {precision}, relative to fp32")
        for row in rows:
            if speedups[row.name].min < 1:
                out.print(f"{row.gpu.name}: {speedups[row.name].source}", markup=False)
    if config.device.vram_budget_mib is not None:
        budget_mib = config.device.vram_budget_mib
        out.print(f"memory limit: {budget_mib:,} MiB on GPUs that have as much (device.vram_budget_mib)")
    out.print(
        "largest: the largest batch size that fits; unsure is treated as does not fit; a desktop and other "
        "programs use some of the memory (other_processes_mib in a GPU's file)",
        markup=False,
    )


def _print_notes(rows: Sequence[GpuPlans], requested: Config, train_images: int) -> None:
    """Print the assumptions about values that the config leaves open."""
    out = get_console()
    if requested.device.precision == "auto":
        out.print("device.precision=auto is planned as fp32, which needs the most memory")
    if requested.train.batch_size == "auto":
        out.print("train.batch_size=auto is planned as the batch sizes above; set others with --batch-sizes")
    if max(plan.batch_size for row in rows for plan in row.plans) > train_images:
        out.print(f"a batch is limited to the training split, {train_images:,} images")
    if 0 < max_searched_batch_size(requested) < train_images:
        out.print(
            f"largest is searched up to {MAX_MICRO_BATCHES} micro-batches, "
            f"{max_searched_batch_size(requested):,} images"
        )
