"""`captcha-exp plan --gpu all`: the same batch sizes on several GPUs, a row for each."""

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
from captcha_exp.runtime.console import Display


class GpuRow(NamedTuple):
    """A GPU with its plans."""

    name: str  # of its file, or the file
    config: Config
    memory_mib: MiBRange | None  # what the GPU has in all
    plans: list[Plan]
    max_batch_size: int | None  # 0: no batch size fits; None: memory unknown

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
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
    display: Display,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed; and, with --must-fit, what does not fit.

    The configs differ in the GPU alone.
    """
    first = next(iter(configs.values()))
    wanted = first.train.batch_size
    own = wanted if isinstance(wanted, int) else 64
    sizes = parse_batch_sizes(arguments.batch_sizes or str(own), wanted)
    resolved = {name: resolve_for_plan(config) for name, config in configs.items()}
    if arguments.must_fit:
        unknown = [name for name, config in resolved.items() if memory_budget(config) is None]
        check_must_fit(arguments, wanted, unknown)
    first = next(iter(resolved.values()))
    pictures = count_images(first)
    rows = _rows(resolved, sizes, pictures, display)
    misfits = []
    if arguments.must_fit:
        misfits = [text for row in rows for text in list_misfits(row.plans, row.config.gpu.name)]
    if arguments.json:
        about = {"precision": first.device.precision, "images": pictures}
        return about | {"gpus": [row.to_json() for row in rows]}, misfits
    _print_rows(rows, first)
    _print_notes(rows, next(iter(configs.values())), pictures["train"])
    return None, misfits


def _rows(
    configs: Mapping[str, Config], sizes: Sequence[int], pictures: Mapping[str, int], display: Display
) -> list[GpuRow]:
    """Return the GPUs with the least memory first, those of unknown memory last."""
    shared = PlannerCache(next(iter(configs.values())), pictures)
    planners = {name: Planner(config, pictures, cache=shared) for name, config in configs.items()}
    names = list(planners)

    def largest_batches(of: Sequence[str]) -> dict[str, int | None]:
        return {name: planners[name].max_batch_size() for name in of}

    # Each of two processes searches for half of the GPUs, once what both need has been traced.
    others = partial(largest_batches, names[1::2])
    start = fork.run_in_child if shared.traces.can_interpolate() else nullcontext
    plans, largest = {}, dict[str, int | None]()
    with start(others) as wait, display.progress_bar("planning", len(names)) as bar:
        for number, name in enumerate(names):
            plans[name] = [planners[name].plan_for(size) for size in sizes]
            if number % 2 == 0:
                largest |= largest_batches([name])
            bar.advance(1)
        largest |= wait()
    rows = []
    for name, config in configs.items():
        total = config.gpu.total_mib
        memory_mib = MiBRange(total.min, total.max) if total else None
        rows.append(GpuRow(name, config, memory_mib, plans[name], largest[name]))
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
    if sixteen := config.device.precision != "fp32":
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
                    if sixteen
                    else []
                ),
            )
    out.print(table)
    if sixteen:
        out.print(f"speed is that of training in {config.device.precision}, times as fast as in fp32")
        for row in rows:
            if _low_precision_speed(row).min < 1:
                out.print(f"{row.config.gpu.name}: {_low_precision_speed(row).source}", markup=False)
    if config.device.vram_budget_mib is not None:
        budget_mib = config.device.vram_budget_mib
        out.print(f"the process may take {budget_mib:,} MiB where a GPU has as much (device.vram_budget_mib)")
    out.print(
        "largest is the largest batch that fits; unsure counts as no; a desktop and other programs may hold "
        "some of the memory (other_processes_mib in a GPU's file)",
        markup=False,
    )


def _print_notes(rows: Sequence[GpuRow], asked: Config, train_images: int) -> None:
    """Print what the plans assume that the config leaves open."""
    out = get_console()
    if asked.device.precision == "auto":
        out.print("device.precision=auto is planned as fp32, which needs the most memory")
    if asked.train.batch_size == "auto":
        out.print("train.batch_size=auto is planned as the batch sizes above; name others with --batch-sizes")
    if max(plan.batch_size for row in rows for plan in row.plans) > train_images:
        out.print(f"a batch holds no more than the training split has, {train_images:,} images")
    if 0 < max_searched_batch_size(asked) < train_images:
        out.print(
            f"largest is searched up to {MAX_MICRO_BATCHES} micro-batches, "
            f"{max_searched_batch_size(asked):,} images"
        )


def _low_precision_speed(row: GpuRow) -> Bounds:
    """Return how fast this GPU trains in 16 bits, as its file says."""
    gpu = row.config.gpu
    return gpu.bf16_speedup if row.config.device.precision == "bf16" else gpu.fp16_speedup
