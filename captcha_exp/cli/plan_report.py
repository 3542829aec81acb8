"""`captcha-exp plan`: predict what batch sizes need on a GPU and what makes one fit, and print it."""

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table
from rich.text import Text

from captcha_exp.cli.output import get_console
from captcha_exp.config import Config, resolve, to_dict, with_untuned_defaults
from captcha_exp.errors import UserError
from captcha_exp.memory.advisor import Advice, advise
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import MAX_MICRO_BATCHES, Plan, Planner, memory_budget
from captcha_exp.runtime.console import Display
from captcha_exp.runtime.device import detect_machine, gpu_total_mib

BATCH_SIZE_FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # of train.batch_size, where no sizes are asked for
COLORS = {"fits": "green", "unsure": "yellow", "does not fit": "red", None: ""}


def run(
    config: Config,
    arguments: argparse.Namespace,
    count_images: Callable[[Config], dict[str, int]],
    display: Display,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed; and, with --must-fit, what does not fit."""
    wanted, config = config.train.batch_size, resolve_for_plan(config)
    sizes = parse_batch_sizes(arguments.batch_sizes, wanted)
    budget_mib = memory_budget(config, total_mib := gpu_total_mib(config))
    if arguments.advise:
        _check_advise(arguments, wanted, budget_mib)
    if arguments.must_fit:
        check_must_fit(arguments, wanted, [] if budget_mib else [config.gpu.name])
    pictures = count_images(config)
    about = {
        "gpu": to_dict(config.gpu),
        "precision": config.device.precision,
        "images": pictures,
        "budget_mib": budget_mib,
    }
    if arguments.advise:
        found = advise(config, pictures, total_mib, display)
        if arguments.json:
            return about | {"batch_size": wanted, "advice": [each.to_json() for each in found]}, []
        _print_advice(found, int(wanted), config, budget_mib)
        return None, []
    planner = Planner(config, pictures, total_mib)
    plans, seconds = [], []
    with display.progress_bar("planning", len(sizes)) as bar:
        for size in sizes:
            began = time.perf_counter()
            plans.append(planner.plan_for(size))
            seconds.append(time.perf_counter() - began)
            bar.advance(1)
    largest = planner.max_batch_size()
    required = plans if arguments.batch_sizes else [plan for plan in plans if plan.batch_size == wanted]
    misfits = list_misfits(required, config.gpu.name) if arguments.must_fit else []
    if arguments.json:
        timed = [plan.to_json() | {"seconds": each} for plan, each in zip(plans, seconds, strict=True)]
        return about | {"plans": timed, "max_batch_size": largest or None}, misfits
    _print_plans(plans, largest, config, pictures)
    return None, misfits


def check_must_fit(arguments: argparse.Namespace, batch_size: int | str, unknown_gpus: Sequence[str]) -> None:
    """Check that --must-fit has an answer; `unknown` are GPUs whose memory size is not known.

    Raises:
        UserError: it has none; the line says what to add.
    """
    if arguments.advise:
        raise UserError("plan --must-fit: is not for --advise, which searches for what fits; leave one out")
    if unknown_gpus:
        raise UserError(
            f"plan --must-fit: the memory of {', '.join(unknown_gpus)} is not known; add "
            "device.vram_budget_mib=MIB, or --gpu with a card whose size is known"
        )
    if batch_size == "auto" and not arguments.batch_sizes:
        raise UserError(
            "plan --must-fit: train.batch_size=auto is not a number; add train.batch_size=NUMBER or "
            "--batch-sizes"
        )


def list_misfits(plans: Sequence[Plan], gpu_name: str) -> list[str]:
    """Return the plans whose verdict is not "fits", in words; unsure counts as no."""
    return [
        f"batch {plan.batch_size:,} on {gpu_name}: needs {plan.process_mib} MiB, "
        f"available {plan.budget_mib} MiB "
        f"({plan.fits})"
        for plan in plans
        if plan.fits != "fits"
    ]


def _check_advise(arguments: argparse.Namespace, wanted: int | str, budget_mib: MiBRange | None) -> None:
    if arguments.batch_sizes is not None:
        raise UserError("plan --advise: is about train.batch_size alone; leave --batch-sizes out")
    if budget_mib is None:
        raise UserError(
            "plan --advise: nothing says how much memory there is; add device.vram_budget_mib=MIB, or "
            "--gpu with a card whose size is known"
        )
    if wanted == "auto":
        raise UserError("plan --advise: wants the batch as a number; add train.batch_size=NUMBER")


def resolve_for_plan(config: Config) -> Config:
    """The resolved config, whether or not its device is here: nothing runs on it."""
    machine = detect_machine()
    machine = replace(machine, devices=(*machine.devices, "cuda", "mps", config.device.name))
    return with_untuned_defaults(resolve(config, machine))


def parse_batch_sizes(text: str | None, batch_size: int | str) -> list[int]:
    if text is None:
        own = batch_size if isinstance(batch_size, int) else 64
        return sorted({max(1, int(own * factor)) for factor in BATCH_SIZE_FACTORS})
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text) or max(map(int, text.split(","))) > 1_000_000:
        raise UserError(
            f"--batch-sizes={text}: must be whole numbers from 1 to 1000000 with commas between them, as in "
            "25,50,100"
        )
    return list(dict.fromkeys(map(int, text.split(","))))


def max_searched_batch_size(config: Config) -> int:
    """Return the images of MAX_PASSES micro-batches, up to which `largest` is searched; 0 without them."""
    return MAX_MICRO_BATCHES * (config.train.micro_batch_size or 0)


def _print_plans(
    plans: Sequence[Plan], largest: int | None, config: Config, pictures: Mapping[str, int]
) -> None:
    """A row for each batch size, and the largest that fits."""
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
    if max(plan.batch_size for plan in plans) > pictures["train"]:
        out.print(f"a batch holds no more than the training split has, {pictures['train']:,} pictures")
    if evaluating := [f"{plan.batch_size:,}" for plan in plans if plan.is_evaluation_peak]:
        out.print(
            f"with a batch of {', '.join(evaluating)} the evaluation is the peak: it takes "
            f"{config.train.eval_batch_size:,} pictures at a time (train.eval_batch_size)",
            markup=False,
        )
    if plans[0].budget_mib is None:
        out.print(
            "no verdict: the memory size is not known; add device.vram_budget_mib=MIB or --gpu",
            markup=False,
        )
    elif not largest:
        out.print("no batch size fits; captcha-exp plan --advise names what does", markup=False)
    elif largest == max_searched_batch_size(config) < pictures["train"]:
        out.print(
            f"batches up to {largest:,} fit, {MAX_MICRO_BATCHES} micro-batches; larger ones were not tried"
        )
    elif largest == pictures["train"]:
        out.print(f"the whole training split, {largest:,} pictures, fits in one batch")
    else:
        out.print(f"largest batch that fits: {largest:,}", style="bold")
    if any(plan.fits == "unsure" for plan in plans):
        out.print(
            "unsure counts as no: context and workspaces are known within bounds; on the card itself "
            "captcha-exp calibrate measures them",
            markup=False,
        )


def _print_advice(
    found: Sequence[Advice], batch_size: int, config: Config, budget_mib: MiBRange | None
) -> None:
    """A row for each combination, the cheapest in time first."""
    out = get_console()
    out.print(_headline(config, budget_mib), markup=False)
    if not found:
        out.print(f"nothing known here makes a batch of {batch_size:,} fit; take a smaller one")
        return
    if not found[0].overrides:
        out.print(f"a batch of {batch_size:,} fits as it stands")
        return
    title = f"with one of these a batch of {batch_size:,} fits; MiB"
    table = Table(
        "time", "tensors", "process", "add to the command", "note", title=title, title_justify="left"
    )
    for each in found:
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
    room = f", {budget_mib} MiB for the process" if budget_mib else ""
    return f"{config.name} in {config.device.precision} on {config.gpu.name}{room}"
