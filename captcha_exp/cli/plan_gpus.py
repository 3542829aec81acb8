"""`captcha-exp plan --gpu all`: plan the same batch sizes on several GPUs, one row for each."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from captcha_exp.cli.output import get_console
from captcha_exp.cli.plan_report import (
    COLORS,
    check_must_fit,
    list_misfits,
    max_searched_batch_size,
    parse_batch_sizes,
    resolve_for_plan,
)
from captcha_exp.config import Bounds, Config, to_dict
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import MAX_MICRO_BATCHES, Plan, Planner, PlannerCache, memory_budget
from captcha_exp.runtime import fork
from captcha_exp.runtime.console import progress_bar


class GpuRow(NamedTuple):
    """A GPU with its plans."""

    name: str  # as given to --gpu: the name or path of its file
    config: Config
    memory_mib: MiBRange | None  # total memory of the GPU
    plans: list[Plan]
    max_batch_size: int | None  # 0: no batch size fits; None: memory unknown

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "name": self.name,
            "gpu": to_dict(self.config.gpu),
            "memory_mib": self.memory_mib,
            "budget_mib": self.plans[0].budget_mib,
            "plans": [plan.to_json() for plan in self.plans],
            "max_batch_size": self.max_batch_size or None,
        }


def run(
    configs: Mapping[str, Config],
    arguments: argparse.Namespace,
    count_images: Callable[[Config], dict[str, int]],
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
        unknown = [name for name, config in resolved.items() if memory_budget(config) is None]
        check_must_fit(arguments, batch_size, unknown)
    first = next(iter(resolved.values()))
    split_sizes = count_images(first)
    rows = _rows(resolved, sizes, split_sizes)
    misfits = []
    if arguments.must_fit:
        misfits = [text for row in rows for text in list_misfits(row.plans, row.config.gpu.name)]
    if arguments.json:
        header = {"precision": first.device.precision, "images": split_sizes}
        return header | {"gpus": [row.to_json() for row in rows]}, misfits
    _print_rows(rows, first)
    _print_notes(rows, next(iter(configs.values())), split_sizes["train"])
    return None, misfits


def _rows(
    configs: Mapping[str, Config], sizes: Sequence[int], split_sizes: Mapping[str, int]
) -> list[GpuRow]:
    """Return a row for each GPU, sorted by memory; GPUs of unknown memory come last."""
    cache = PlannerCache(next(iter(configs.values())), split_sizes)
    planners = {name: Planner(config, split_sizes, cache=cache) for name, config in configs.items()}
    names = list(planners)

    def find_max_batch_sizes(names: Sequence[str]) -> dict[str, int | None]:
        return {name: planners[name].max_batch_size() for name in names}

    # Once the shared traces exist, a child process searches for half of the GPUs.
    half = partial(find_max_batch_sizes, names[1::2])
    start = fork.run_in_child if cache.traces.can_interpolate() else nullcontext
    plans, max_batch_sizes = {}, dict[str, int | None]()
    with start(half) as wait, progress_bar("planning", len(names)) as bar:
        for index, name in enumerate(names):
            plans[name] = [planners[name].plan_for(size) for size in sizes]
            if index % 2 == 0:
                max_batch_sizes |= find_max_batch_sizes([name])
            bar.advance(1)
        max_batch_sizes |= wait()
    rows = []
    for name, config in configs.items():
        total = config.gpu.total_mib
        memory_mib = MiBRange(total.min, total.max) if total else None
        rows.append(GpuRow(name, config, memory_mib, plans[name], max_batch_sizes[name]))
    return sorted(rows, key=_by_memory)


def _by_memory(row: GpuRow) -> tuple[bool, float, str]:
    return (row.memory_mib is None, row.memory_mib.max if row.memory_mib else 0, row.config.gpu.name)


def _print_rows(rows: Sequence[GpuRow], config: Config) -> None:
    """Print a row for each GPU and batch size, and what the columns mean."""
    out = get_console()
    out.print(f"{config.name} in {config.device.precision}", markup=False)
    table = Table(
        "GPU", "memory", "batch", "process", "verdict", "largest", title="MiB", title_justify="left"
    )
    if is_16_bit := config.device.precision != "fp32":
        table.add_column("speed")
    for column in (1, 2, 3, 5):
        table.columns[column].justify = "right"
    for row in rows:
        for plan in row.plans:
            table.add_row(
                Text(row.config.gpu.name),
                str(row.memory_mib or "unknown"),
                f"{plan.batch_size:,}",
                str(plan.process_mib),
                Text(plan.fits or "unknown", COLORS[plan.fits]),
                "unknown"
                if row.max_batch_size is None
                else f"{row.max_batch_size:,}"
                if row.max_batch_size
                else "none",
                *(
                    [f"{_low_precision_speed(row).min:g} to {_low_precision_speed(row).max:g}"]
                    if is_16_bit
                    else []
                ),
            )
    out.print(table)
    if is_16_bit:
        out.print(f"speed: of training in {config.device.precision}, relative to fp32")
        for row in rows:
            if _low_precision_speed(row).min < 1:
                out.print(f"{row.config.gpu.name}: {_low_precision_speed(row).source}", markup=False)
    if config.device.vram_budget_mib is not None:
        budget_mib = config.device.vram_budget_mib
        out.print(f"memory limit: {budget_mib:,} MiB on GPUs that have as much (device.vram_budget_mib)")
    out.print(
        "largest: the largest batch size that fits; unsure is treated as does not fit; a desktop and other "
        "programs use some of the memory (other_processes_mib in a GPU's file)",
        markup=False,
    )


def _print_notes(rows: Sequence[GpuRow], requested: Config, train_images: int) -> None:
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


def _low_precision_speed(row: GpuRow) -> Bounds:
    """Return the speed of training in 16 bits relative to fp32, from the GPU's file."""
    gpu = row.config.gpu
    return gpu.bf16_speedup if row.config.device.precision == "bf16" else gpu.fp16_speedup
