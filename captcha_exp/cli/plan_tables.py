"""Print the output of `captcha-exp plan` as tables with notes."""

from collections.abc import Iterator

from rich.text import Text

from captcha_exp.cli.output import get_console, make_table
from captcha_exp.cli.plan_json import AdviceOutput, GpuPlans, ManyGpusOutput, OneGpuOutput, PlanOutput
from captcha_exp.config import Config
from captcha_exp.memory.advisor import speedup
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import MAX_MICRO_BATCHES

COLORS = {"fits": "green", "unsure": "yellow", "does not fit": "red", None: ""}


def print_output(output: PlanOutput, config: Config, requested: Config) -> None:
    """Print the output; `requested` is the config before it was resolved."""
    match output:
        case OneGpuOutput():
            _print_plans(output, config)
        case ManyGpusOutput():
            _print_comparison(output, config, requested)
        case AdviceOutput():
            _print_advice(output, config)


def _print_plans(output: OneGpuOutput, config: Config) -> None:
    """Print a row for each batch size, and the largest that fits."""
    out = get_console()
    _print_headline(config, output.budget_mib)
    numbers = ("batch", "state", "activations", "images", "workspace", "reserved", "process")
    rows: list[tuple[str | Text, ...]] = [
        (
            f"{plan.batch_size:,}",
            *(f"{mib:,.0f}" for mib in (plan.state_mib, plan.activations_mib, plan.images_mib)),
            *map(str, (plan.workspace_mib, plan.reserved_mib, plan.process_mib)),
            Text(plan.fits or "", COLORS[plan.fits]),
        )
        for plan in output.plans
    ]
    out.print(make_table((*numbers, "verdict"), rows, "MiB", right=numbers))
    for note in _plan_notes(output, config):
        out.print(note)


def _plan_notes(output: OneGpuOutput, config: Config) -> Iterator[str]:
    """Yield notes on the plans, with rich's markup."""
    train_images, max_batch_size = output.images["train"], output.max_batch_size
    if max(plan.batch_size for plan in output.plans) > train_images:
        yield f"a batch is limited to the training split, {train_images:,} images"
    if sizes := [f"{plan.batch_size:,}" for plan in output.plans if plan.is_evaluation_peak]:
        yield (
            f"batch size {', '.join(sizes)}: evaluation needs the most memory, with "
            f"train.eval_batch_size={config.train.eval_batch_size:,}"
        )
    if output.budget_mib is None:
        yield "no verdict: the memory size is unknown; add device.vram_budget_mib=MIB or --gpu"
    elif max_batch_size is None:
        yield "no batch size fits; captcha-exp plan --advise suggests other overrides"
    elif max_batch_size == _max_searched_batch_size(config) < train_images:
        yield (
            f"batch sizes up to {max_batch_size:,} fit ({MAX_MICRO_BATCHES} micro-batches, the limit of the "
            "search)"
        )
    elif max_batch_size == train_images:
        yield f"the whole training split, {max_batch_size:,} images, fits in one batch"
    else:
        yield f"[bold]largest batch that fits: {max_batch_size:,}"
    if any(plan.fits == "unsure" for plan in output.plans):
        yield (
            "unsure is treated as does not fit: context and workspaces are only known within bounds; "
            "captcha-exp calibrate measures them on the GPU"
        )


def _max_searched_batch_size(config: Config) -> int:
    """Return the images of MAX_MICRO_BATCHES, the limit of the search; 0 without micro-batches."""
    return MAX_MICRO_BATCHES * (config.train.micro_batch_size or 0)


def _print_comparison(output: ManyGpusOutput, config: Config, requested: Config) -> None:
    """Print a row for each GPU and batch size, and what the columns mean."""
    out, has_speeds = get_console(), any(row.precision != "fp32" for row in output.gpus)
    out.print(config.name, markup=False)
    rows: list[tuple[str | Text, ...]] = [
        (
            row.gpu.name,
            str(row.memory_mib or "unknown"),
            row.precision,
            f"{plan.batch_size:,}",
            str(plan.process_mib),
            Text(plan.fits or "unknown", COLORS[plan.fits]),
            f"{row.max_batch_size:,}" if row.max_batch_size else "none" if row.budget_mib else "unknown",
            *([_format_speed(row)] if has_speeds else []),
        )
        for row in output.gpus
        for plan in row.plans
    ]
    columns = ["GPU", "memory", "precision", "batch", "process", "verdict", "largest"]
    columns += ["speed"] if has_speeds else []
    out.print(make_table(columns, rows, "MiB", right=("memory", "batch", "process", "largest")))
    if has_speeds:
        out.print("speed: of training, relative to fp32")
    for row in output.gpus:
        if row.precision != "fp32" and (speed := speedup(row.gpu, row.precision)).min < 1:
            out.print(f"{row.gpu.name}: {speed.source}", markup=False)
    for note in _comparison_notes(output, requested):
        out.print(note)


def _format_speed(row: GpuPlans) -> str:
    if row.precision == "fp32":
        return "1"
    speed = speedup(row.gpu, row.precision)
    return f"{speed.min:g} to {speed.max:g}"


def _comparison_notes(output: ManyGpusOutput, requested: Config) -> Iterator[str]:
    """Yield the meaning of the columns, and the assumptions about values that the config leaves open."""
    if requested.device.vram_budget_mib is not None:
        limit = f"{requested.device.vram_budget_mib:,} MiB"
        yield f"memory limit: {limit} on GPUs that have as much (device.vram_budget_mib)"
    yield (
        "largest: the largest batch size that fits; unsure is treated as does not fit; a desktop and other "
        "programs use some of the memory (other_processes_mib in a GPU's file)"
    )
    if requested.train.batch_size == "auto":
        yield "train.batch_size=auto is planned as the batch sizes above; set others with --batch-sizes"
    train_images, max_searched = output.images["train"], _max_searched_batch_size(requested)
    if max(plan.batch_size for plan in output.gpus[0].plans) > train_images:
        yield f"a batch is limited to the training split, {train_images:,} images"
    if 0 < max_searched < train_images:
        yield f"largest is searched up to {MAX_MICRO_BATCHES} micro-batches, {max_searched:,} images"


def _print_advice(output: AdviceOutput, config: Config) -> None:
    """Print a row for each combination of overrides, fastest first."""
    out, batch_size = get_console(), f"batch size {output.batch_size:,}"
    _print_headline(config, output.budget_mib)
    if not output.advice:
        out.print(f"no known combination makes {batch_size} fit; use a smaller one")
    elif not output.advice[0].overrides:
        out.print(f"{batch_size} fits without changes")
    else:
        rows = [
            (
                f"{each.relative_time:.2f}",
                f"{each.plan.tensors_mib:,.0f}",
                str(each.plan.process_mib),
                Text("\n".join(each.overrides)),
                Text("\n".join(each.notes)),
            )
            for each in output.advice
        ]
        columns = ("time", "tensors", "process", "add to the command", "note")
        out.print(make_table(columns, rows, f"{batch_size} fits with one of these; MiB"))
        out.print("time: of a step, estimated, relative to the unchanged config")


def _print_headline(config: Config, budget_mib: MiBRange | None) -> None:
    budget = f", {budget_mib} MiB for the process" if budget_mib else ""
    text = f"{config.name} in {config.device.precision} on {config.gpu.name}{budget}"
    get_console().print(text, markup=False)
