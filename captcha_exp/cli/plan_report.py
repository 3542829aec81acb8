"""`captcha-exp plan` for one GPU: print the memory of batch sizes, or advice to make one fit."""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from captcha_exp.cli.output import get_console
from captcha_exp.cli.plan_json import AdviceOutput, OneGpuOutput, TimedPlan
from captcha_exp.config import Config, Precision, resolve, with_untuned_defaults
from captcha_exp.errors import UserError
from captcha_exp.memory.advisor import Advice, advise
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import MAX_MICRO_BATCHES, Plan, Planner, memory_budget
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.device import detect_machine, gpu_total_mib

BATCH_SIZE_FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # of train.batch_size, without --batch-sizes
COLORS = {"fits": "green", "unsure": "yellow", "does not fit": "red", None: ""}


def run(
    config: Config,
    arguments: argparse.Namespace,
    count_images: Callable[[Config], dict[str, int]],
    display: Display,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed, and the misfits for --must-fit."""
    batch_size, config = config.train.batch_size, resolve_for_plan(config)
    sizes = parse_batch_sizes(arguments.batch_sizes, batch_size)
    total_mib = gpu_total_mib(config)
    budget_mib = memory_budget(config.gpu, config.device.vram_budget_mib, total_mib)
    if arguments.advise:
        _check_advise(arguments, batch_size, budget_mib)
    if arguments.must_fit:
        check_must_fit(arguments, batch_size, [] if budget_mib else [config.gpu.name])
    split_sizes = count_images(config)
    precision = cast(Precision, config.device.precision)
    if arguments.advise:
        assert budget_mib is not None
        advice = advise(config, split_sizes, total_mib, display)
        if arguments.json:
            output = AdviceOutput(config.gpu, precision, split_sizes, budget_mib, int(batch_size), advice)
            return asdict(output), []
        _print_advice(advice, int(batch_size), config, budget_mib)
        return None, []
    planner = Planner(config, split_sizes, total_mib)
    plans = []
    with display.progress_bar("planning", len(sizes)) as bar:
        for size in sizes:
            start = time.perf_counter()
            plan = planner.plan_for(size)
            plans.append(TimedPlan(**vars(plan), seconds=time.perf_counter() - start))
            bar.advance(1)
    max_batch_size = planner.max_batch_size() or None
    required = plans if arguments.batch_sizes else [plan for plan in plans if plan.batch_size == batch_size]
    misfits = list_misfits(required, config.gpu.name) if arguments.must_fit else []
    if arguments.json:
        return asdict(
            OneGpuOutput(config.gpu, precision, split_sizes, budget_mib, plans, max_batch_size)
        ), misfits
    _print_plans(plans, max_batch_size, config, split_sizes["train"])
    return None, misfits


def check_must_fit(arguments: argparse.Namespace, batch_size: int | str, unknown_gpus: Sequence[str]) -> None:
    """Check that --must-fit can be decided; `unknown_gpus` are GPUs whose memory size is unknown.

    Raises:
        UserError: it cannot; the line says which flag or override to add or remove.
    """
    if arguments.advise:
        raise UserError("plan --must-fit: cannot be combined with --advise; remove one of them")
    if unknown_gpus:
        raise UserError(
            f"plan --must-fit: the memory size of {', '.join(unknown_gpus)} is unknown; add "
            "device.vram_budget_mib=MIB, or --gpu with a GPU of known memory size"
        )
    if batch_size == "auto" and not arguments.batch_sizes:
        raise UserError(
            "plan --must-fit: train.batch_size=auto is not a number; add train.batch_size=NUMBER or "
            "--batch-sizes"
        )


def list_misfits(plans: Sequence[Plan], gpu_name: str) -> list[str]:
    """Describe the plans whose verdict is not "fits"; unsure is treated as does not fit."""
    return [
        f"batch {plan.batch_size:,} on {gpu_name}: needs {plan.process_mib} MiB, "
        f"available {plan.budget_mib} MiB "
        f"({plan.fits})"
        for plan in plans
        if plan.fits != "fits"
    ]


def _check_advise(arguments: argparse.Namespace, batch_size: int | str, budget_mib: MiBRange | None) -> None:
    if arguments.batch_sizes is not None:
        raise UserError("plan --advise: uses train.batch_size only; remove --batch-sizes")
    if budget_mib is None:
        raise UserError(
            "plan --advise: the memory size is unknown; add device.vram_budget_mib=MIB, or --gpu with a GPU "
            "of known memory size"
        )
    if batch_size == "auto":
        raise UserError("plan --advise: train.batch_size=auto is not a number; add train.batch_size=NUMBER")


def resolve_for_plan(config: Config) -> Config:
    """Resolve the config, whether or not its device is available: nothing runs on it."""
    machine = detect_machine()
    machine = replace(machine, devices=(*machine.devices, "cuda", "mps", config.device.name))
    return with_untuned_defaults(resolve(config, machine))


def parse_batch_sizes(text: str | None, batch_size: int | str) -> list[int]:
    """Parse --batch-sizes; by default return sizes around train.batch_size.

    Raises:
        UserError: the text is not a list of whole numbers from 1 to 1000000; the line has an example.
    """
    if text is None:
        center = batch_size if isinstance(batch_size, int) else 64
        return sorted({max(1, int(center * factor)) for factor in BATCH_SIZE_FACTORS})
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text) or max(map(int, text.split(","))) > 1_000_000:
        raise UserError(
            f"--batch-sizes={text}: must be whole numbers from 1 to 1000000, separated by commas, as in "
            "25,50,100"
        )
    return list(dict.fromkeys(map(int, text.split(","))))


def max_searched_batch_size(config: Config) -> int:
    """Return the images of MAX_MICRO_BATCHES, the limit of the search; 0 without micro-batches."""
    return MAX_MICRO_BATCHES * (config.train.micro_batch_size or 0)


def _print_plans(
    plans: Sequence[Plan], max_batch_size: int | None, config: Config, train_images: int
) -> None:
    """Print a row for each batch size, and the largest that fits."""
    out = get_console()
    out.print(_headline(config, plans[0].budget_mib), markup=False)
    columns = ("batch", "state", "activations", "images", "workspace", "reserved", "process", "verdict")
    table = Table(*columns, title="MiB", title_justify="left")
    for column in table.columns[:-1]:
        column.justify = "right"
    for plan in plans:
        table.add_row(
            f"{plan.batch_size:,}",
            f"{plan.state_mib:,.0f}",
            f"{plan.activations_mib:,.0f}",
            f"{plan.images_mib:,.0f}",
            str(plan.workspace_mib),
            str(plan.reserved_mib),
            str(plan.process_mib),
            Text(plan.fits or "", COLORS[plan.fits]),
        )
    out.print(table)
    if max(plan.batch_size for plan in plans) > train_images:
        out.print(f"a batch is limited to the training split, {train_images:,} images")
    if sizes := [f"{plan.batch_size:,}" for plan in plans if plan.is_evaluation_peak]:
        out.print(
            f"batch size {', '.join(sizes)}: evaluation needs the most memory, with "
            f"train.eval_batch_size={config.train.eval_batch_size:,}",
            markup=False,
        )
    if plans[0].budget_mib is None:
        out.print(
            "no verdict: the memory size is unknown; add device.vram_budget_mib=MIB or --gpu",
            markup=False,
        )
    elif not max_batch_size:
        out.print("no batch size fits; captcha-exp plan --advise suggests other overrides", markup=False)
    elif max_batch_size == max_searched_batch_size(config) < train_images:
        out.print(
            f"batch sizes up to {max_batch_size:,} fit ({MAX_MICRO_BATCHES} micro-batches, the limit of the "
            "search)"
        )
    elif max_batch_size == train_images:
        out.print(f"the whole training split, {max_batch_size:,} images, fits in one batch")
    else:
        out.print(f"largest batch that fits: {max_batch_size:,}", style="bold")
    if any(plan.fits == "unsure" for plan in plans):
        out.print(
            "unsure is treated as does not fit: context and workspaces are only known within bounds; "
            "captcha-exp calibrate measures them on the GPU",
            markup=False,
        )


def _print_advice(
    advice: Sequence[Advice], batch_size: int, config: Config, budget_mib: MiBRange | None
) -> None:
    """Print a row for each combination of overrides, fastest first."""
    out = get_console()
    out.print(_headline(config, budget_mib), markup=False)
    if not advice:
        out.print(f"no known combination makes batch size {batch_size:,} fit; use a smaller one")
        return
    if not advice[0].overrides:
        out.print(f"batch size {batch_size:,} fits without changes")
        return
    title = f"batch size {batch_size:,} fits with one of these; MiB"
    table = Table(
        "time", "tensors", "process", "add to the command", "note", title=title, title_justify="left"
    )
    for each in advice:
        table.add_row(
            f"{each.relative_time:.2f}",
            f"{each.plan.tensors_mib:,.0f}",
            str(each.plan.process_mib),
            Text("\n".join(each.overrides)),
            Text("\n".join(each.notes)),
        )
    out.print(table)
    out.print("time: of a step, estimated, relative to the unchanged config")


def _headline(config: Config, budget_mib: MiBRange | None) -> str:
    budget = f", {budget_mib} MiB for the process" if budget_mib else ""
    return f"{config.name} in {config.device.precision} on {config.gpu.name}{budget}"
