"""Draw the figures of the README and docs/sweeps.md: docs/overview.png and docs/sweep-summary.png.

    python benchmarks/overview.py RUN

RUN is a finished run of experiment=quickstart. New captchas are rendered and predicted with it; the sweep's
figures are those of the table in docs/sweeps.md.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.config import CaptchaLibraryConfig
from captcha_exp.data.sources.generators import get_renderer_spec, image_rng

DOCS = Path(__file__).resolve().parents[1] / "docs"
NUM_CAPTCHAS = 8
SEED = 1  # of the rendered captchas; the quickstart trains on those of seed 0
BUDGET_MIB = 1500  # of the sweep in docs/sweeps.md
BLUE, BROWN, GREEN, RED = "#3b7ea1", "#7a3b2e", "#2e7d32", "#c62828"


@dataclass(frozen=True)
class Job:
    """A row of the sweep's table; measured figures are None where a job was not trained."""

    batch_size: int
    predicted_mib: tuple[float, float]
    images_per_second: float | None
    accuracy: float | None


def sweep_of(page: str) -> tuple[list[Job], str]:
    """Return the jobs of the table in docs/sweeps.md, and the conclusion below it."""
    text = page.split("<!-- sweep-summary:begin -->")[1].split("<!-- sweep-summary:end -->")[0]
    jobs = []
    for line in text.splitlines():
        if row := re.match(r" +(\d+) +([\d,]+) to ([\d,]+) ", line):
            size, low, high = (float(cell.replace(",", "")) for cell in row.groups())
            trained = re.search(r"fits +([\d,]+) +([\d.]+)%", line)
            jobs.append(
                Job(
                    batch_size=int(size),
                    predicted_mib=(low, high),
                    images_per_second=float(trained[1].replace(",", "")) if trained else None,
                    accuracy=float(trained[2]) if trained else None,
                )
            )
    return jobs, text[text.index("batch_size=256 is") :].replace("```", "").strip()


def captchas(folder: Path) -> list[tuple[Path, str]]:
    """Render new captchas into a folder; return each file with its label."""
    config = load(compose("experiment=quickstart", "tracking=none"))
    assert isinstance(config.data, CaptchaLibraryConfig)
    data = replace(config.data, seed=SEED)
    spec = get_renderer_spec(data)
    render = spec.make_renderer()
    made = []
    for index in range(NUM_CAPTCHAS):
        rng = image_rng(data, index)
        text = spec.sample_label(config.captcha, rng)
        path = folder / f"{index}.png"
        render(text, rng).save(path)
        made.append((path, text))
    return made


def predict(run: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what `captcha-exp predict --json` prints for each image."""
    command = [sys.executable, "-m", "captcha_exp", "predict", run, *map(str, paths), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def draw_captchas(figure: Figure, where: SubplotSpec, run: str) -> None:
    """Draw captchas with the predicted text, red where it is not the label."""
    grid = where.subgridspec(NUM_CAPTCHAS // 2, 2, hspace=0.75, wspace=0.15)
    with tempfile.TemporaryDirectory() as folder:
        made = captchas(Path(folder))
        predictions = predict(run, [path for path, _ in made])
        for number, ((path, text), prediction) in enumerate(zip(made, predictions, strict=True)):
            axes = figure.add_subplot(grid[number // 2, number % 2])
            with Image.open(path) as image:
                axes.imshow(image)
            axes.set_axis_off()
            axes.set_title(
                prediction["text"],
                family="monospace",
                size=12,
                color=GREEN if prediction["text"] == text else RED,
            )


def draw_memory(axes: Axes, jobs: Sequence[Job]) -> None:
    """Draw the predicted range of each job against the budget."""
    for place, job in enumerate(jobs):
        low, high = job.predicted_mib
        fits = high <= BUDGET_MIB
        axes.bar(place, high - low, bottom=low, width=0.5, color=BLUE if fits else BROWN, alpha=0.6)
        if not fits:
            axes.text(place, high + 60, "does not fit", ha="center", color=BROWN, size=9)
    axes.axhline(BUDGET_MIB, color=BROWN, linestyle="--", linewidth=1)
    axes.text(-0.4, BUDGET_MIB + 50, f"budget {BUDGET_MIB:,} MiB", color=BROWN, size=9)
    axes.set(title="predicted GPU memory, MiB", ylim=(0, 3700))
    _label(axes, jobs)


def draw_line(axes: Axes, jobs: Sequence[Job], name: str, title: str) -> None:
    """Draw a measured figure of each job that was trained."""
    points = [(place, getattr(job, name)) for place, job in enumerate(jobs) if getattr(job, name) is not None]
    axes.plot(*zip(*points, strict=True), "o-", color=BLUE)
    axes.set(title=title)
    _label(axes, jobs)


def _label(axes: Axes, jobs: Sequence[Job]) -> None:
    axes.set_xticks(range(len(jobs)), [str(job.batch_size) for job in jobs])
    axes.set_xlim(-0.6, len(jobs) - 0.4)
    axes.set_xlabel("batch size")
    axes.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="as in captcha-exp predict RUN")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="DIR", help="default: docs/")
    asked = parser.parse_args(arguments)
    jobs, conclusion = sweep_of((DOCS / "sweeps.md").read_text(encoding="utf-8"))

    figure = Figure(figsize=(12, 4.4))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1, 2.2), left=0.02, right=0.98, wspace=0.12, bottom=0.06, top=0.86
    )
    figure.text(0.163, 0.965, "captchas in, text out", ha="center", size=13, weight="bold")
    figure.text(0.67, 0.965, "a sweep in, a conclusion out", ha="center", size=13, weight="bold")
    draw_captchas(figure, grid[0], asked.run)
    plots = grid[1].subgridspec(2, 2, height_ratios=(4, 1), hspace=0.55, wspace=0.25)
    draw_memory(figure.add_subplot(plots[0, 0]), jobs)
    draw_line(figure.add_subplot(plots[0, 1]), jobs, "accuracy", "validation accuracy after one epoch, %")
    words = figure.add_subplot(plots[1, :])
    words.set_axis_off()
    words.text(0.5, 0.2, conclusion, ha="center", va="center", size=8.5, family="monospace")
    figure.savefig(asked.out / "overview.png", dpi=100, metadata={"Software": None})

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, speed, accuracy = figure.subplots(1, 3)
    draw_memory(memory, jobs)
    draw_line(speed, jobs, "images_per_second", "images/s in training")
    speed.set_ylim(0, 2600)
    draw_line(accuracy, jobs, "accuracy", "validation accuracy after one epoch, %")
    figure.savefig(asked.out / "sweep-summary.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
