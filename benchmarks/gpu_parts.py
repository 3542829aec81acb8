"""Define the parts of gpu_session: the function of each, its time limit, and the call it belongs to.

`Part.estimate` is the expected number of seconds on an H200; `python benchmarks/gpu_session.py --list` prints
the table. The estimates are the rounded `wall_seconds` of the session of 2026-11-27 in results/. Three tests
of tests-1 to -3 failed early in it and one ran for 95 s: the estimates of these parts allow for both.

    START         3 s    a forked child: 1 s for the CUDA context, 2 s to load kernels of cuBLAS and cuDNN
"""

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import gpu_limits
import gpu_memory
import gpu_predictions
import gpu_speed
import gpu_trainings
from gpu_cases import NETWORKS, Case
from gpu_trainings import QUICK

PRECISIONS = ("fp32", "bf16", "fp16")
VARIANTS = ("fp32", "bf16", "fp32-again", "bf16-again")
ARTICLE_MIB = 3908  # memory of the article's GPU as reported by torch
BUDGETS = (
    768,
    1024,
    1536,
    2048,
    3072,
    ARTICLE_MIB,
    6144,
    8192,
    12288,
)  # MiB; each plan is checked against all of them
FIRST_CASES = (  # both networks, fp32 and bf16, small and large batches
    Case("resnet18", "fp32", 100),
    Case("resnet18", "bf16", 32),
    Case("compact", "fp32", 128),
    Case("compact", "bf16", 4096),
    Case("resnet18", "fp32", 1000),
    Case("resnet18", "bf16", 400),
)
OTHER_CASES = (
    Case("resnet18", "bf16", 100),
    Case("compact", "bf16", 128),
    Case("compact", "fp32", 4096),
    Case("resnet18", "fp32-again", 1000),
    Case("resnet18", "bf16", 1000),
    Case("compact", "bf16-again", 4096),
    Case("resnet18", "fp32", 32),
    Case("resnet18", "fp32", 400),
)
DRY_CASES = (Case("resnet18", "fp32-again", 2), Case("compact", "bf16", 8))  # bf16 is slow on most CPUs
VALIDATION = {"resnet18": 250, "compact": 1200}  # images
TEST_GROUPS = 3  # of the gpu tests not marked gpu_quick
START = 3.0  # seconds

CALL_SECONDS = {1: 240, 2: 150, 3: 150}
_FIRST = tuple(f"plan-{case.name}" for case in FIRST_CASES)
_OTHER = tuple(f"plan-{case.name}" for case in OTHER_CASES)
CALLS: dict[int, tuple[str, ...]] = {
    1: (
        "predictions",
        *_FIRST,
        "allocator-trace-resnet18",
        "tests-quick",
        "calibration",
        "context-resnet18-fp32",
        "context-compact-bf16",
        "doctor",
        "tests-1",
        "tests-2",
    ),
    2: (
        "article-cuda",
        "ours-cuda-fp32",
        "ours-cuda-bf16",
        "auto-cuda",
        "speed-resnet18-bf16",
        "speed-compact-bf16",
        "speed-resnet18-fp32",
        "speed-compact-fp32",
        "matrix-products",
        "graphs",
        "ours-cuda-fp16",
        "determinism-true",
        "determinism-false",
    ),
    3: (
        "predictions",
        "largest-article",
        "largest-fp32",
        "largest-bf16-again",
        "allocator-trace-compact",
        *_OTHER,
        "tests-3",
        "workspaces-none",
        "workspaces-8",
    ),
}
PREDICTED = ("plan-", "largest-")  # measured only if the file has predictions


class Part(NamedTuple):
    """A measurement: a function with its arguments, run in a child process."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    limit: int  # seconds
    estimate: float  # seconds on an H200
    environment: Mapping[str, str] = MappingProxyType({})  # set before the child initializes CUDA


class PartFactory:
    """Builds the parts, for a GPU or, with small sizes, for a dry run on the CPU."""

    def __init__(self, dry_run: bool) -> None:
        self.device = "cpu" if dry_run else "cuda"
        self.dry_run = dry_run

    def parts(self) -> dict[str, Part]:
        """Return all parts by name."""
        return self._memory() | self._limits() | self._trainings() | self._speed()

    def cases(self) -> list[tuple[Case, dict[str, int]]]:
        """Return the trainings that are predicted and measured, each with its split sizes."""
        if self.dry_run:
            return [(case, {"train": 3 * case.batch, "validation": case.batch}) for case in DRY_CASES]
        return [
            (case, {"train": 3 * case.batch, "validation": VALIDATION[case.network]})  # three steps
            for case in (*FIRST_CASES, *OTHER_CASES)
        ]

    def _memory(self) -> dict[str, Part]:
        dry, device = self.dry_run, {"device": self.device}
        small, cases = 2 if dry else 100, self.cases()
        budgets = (1024, 3908) if dry else BUDGETS
        predicted: dict[str, Any] = {
            "cases": cases,
            "budgets": budgets,
            "variants": ("fp32-again",) if dry else VARIANTS,
            # In a dry run no batch fits: searching for the largest one takes a minute.
            "budget_mib": 900 if dry else ARTICLE_MIB,
            "workers": 1 if dry else min(16, os.cpu_count() or 1),
        }
        parts = {
            "predictions": Part(gpu_predictions.predictions, predicted, 600, 0)
        }  # made in advance on another machine
        for case, split_sizes in cases:
            arguments: dict[str, Any] = {
                "case": case,
                "split_sizes": split_sizes,
                "budgets": budgets,
                **device,
            }
            parts[f"plan-{case.name}"] = Part(gpu_memory.plan, arguments, 40, START + 1)
        for network in NETWORKS:
            arguments = {"network": network, "batch": 8 if dry else 100, "steps": 2, **device}
            parts[f"allocator-trace-{network}"] = Part(gpu_memory.allocator_trace, arguments, 45, START)
        batches = {"resnet18": 100, "compact": 128}
        parts["calibration"] = Part(gpu_memory.calibration, {"batches": batches, **device}, 80, START + 9)
        for network, variant in (("resnet18", "fp32"), ("compact", "bf16")):
            arguments = {"network": network, "variant": variant, "batch": small, **device}
            parts[f"context-{network}-{variant}"] = Part(gpu_memory.context, arguments, 40, START)
        return parts

    def _limits(self) -> dict[str, Part]:
        dry, device = self.dry_run, {"device": self.device}
        tries = (
            {"first": 2, "max_batch": 4, "tries": 2} if dry else {"first": 64, "max_batch": 4096, "tries": 12}
        )
        parts: dict[str, Part] = {}
        for program in ("article", "fp32-again") if dry else ("article", *VARIANTS):
            arguments: dict[str, Any] = {"program": program, "budget_mib": ARTICLE_MIB, **tries, **device}
            parts[f"largest-{program}"] = Part(gpu_limits.largest, arguments, 60, START + 9)
        for cap in ("8",) if dry else ("none", "0", "8", "64", "128"):
            arguments = {"cap": cap, "batch": 2 if dry else 100, "steps": 1 if dry else 10, **device}
            environment = {} if cap == "none" else {"CUDNN_CONV_WSCAP_DBG": cap}
            parts[f"workspaces-{cap}"] = Part(gpu_limits.workspaces, arguments, 60, START + 14, environment)
        return parts

    def _speed(self) -> dict[str, Part]:
        dry, device = self.dry_run, {"device": self.device}
        seconds = {"seconds": 0.0 if dry else 0.4}
        max_batch = {"resnet18": 8, "compact": 8} if dry else {"resnet18": 1024, "compact": 4096}
        batches = {"resnet18": 2, "compact": 8} if dry else {"resnet18": 100, "compact": 128}
        parts = {}
        for deterministic in (True, False):
            arguments: dict[str, Any] = {
                "deterministic": deterministic,
                "batches": batches,
                "steps": 2 if dry else 30,
            }
            arguments |= device
            seconds_more = 1 if deterministic else 13  # cudnn.benchmark takes time
            parts[f"determinism-{str(deterministic).lower()}"] = Part(
                gpu_speed.determinism, arguments, 40, START + seconds_more
            )
        arguments = {"size": 128 if dry else 4096, **seconds, **device}
        parts["matrix-products"] = Part(gpu_speed.matrix_products, arguments, 40, START)
        for network in NETWORKS:
            for variant in PRECISIONS[:1] if dry else PRECISIONS:
                arguments = {
                    "network": network,
                    "variant": variant,
                    "max_batch": max_batch[network],
                    **seconds,
                    **device,
                }
                parts[f"speed-{network}-{variant}"] = Part(gpu_speed.speed, arguments, 60, START + 8)
        arguments = {"batches": batches, "variants": ["fp32"] if dry else ["fp32", "bf16"], **device}
        parts["graphs"] = Part(gpu_speed.graphs, arguments | {"steps": 2 if dry else 30}, 60, START + 3)
        return parts

    def _trainings(self) -> dict[str, Part]:
        dry, device = self.dry_run, self.device
        shard = 50 if dry else 1000  # images
        few: dict[str, Any] = {"shards": 1, "shard": shard, "epochs": 2}
        many: dict[str, Any] = few if dry else {"shards": 2, "shard": shard, "epochs": 4}
        batch = {"batch": 10 if dry else 100}
        parts = {"doctor": Part(gpu_trainings.doctor, {"device": device}, 30, START + 2)}
        quick, others = f"gpu and {QUICK}", f"gpu and not {QUICK}"
        arguments: dict[str, Any] = {"marks": quick, "group": None, "groups": 1, "collect_only": dry}
        parts["tests-quick"] = Part(gpu_trainings.tests, arguments, 120, START + 62)
        for number in range(TEST_GROUPS):
            arguments = {"marks": others, "group": number, "groups": TEST_GROUPS, "collect_only": dry}
            parts[f"tests-{number + 1}"] = Part(gpu_trainings.tests, arguments, 120, START + 32)
        parts["article-cpu"] = Part(gpu_trainings.article_loop, {"device": "cpu", **few}, 120, 15)
        arguments = {"device": "cpu", "precision": "fp32", **few, **batch}
        parts["ours-cpu-fp32"] = Part(gpu_trainings.ours, arguments, 120, 15)
        if not dry:
            parts["article-cuda"] = Part(
                gpu_trainings.article_loop, {"device": "cuda", **many}, 60, START + 13
            )
        for precision in () if dry else PRECISIONS:  # a dry run has ours-cpu-fp32 already
            arguments = {"device": device, "precision": precision, **many, **batch}
            parts[f"ours-{device}-{precision}"] = Part(gpu_trainings.ours, arguments, 60, START + 7)
        arguments = {"device": device, "precision": "auto", **many, **batch}
        arguments |= {"more": ("model=compact",)} if dry else {}  # bf16 ResNet-18 takes minutes on a CPU
        parts[f"auto-{device}"] = Part(gpu_trainings.ours, arguments, 60, START + 7)
        return parts


def parts_of_call(number: int, names: Iterable[str], done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the parts of a call that have no figures yet, the most valuable first.

    The third call includes all remaining parts of the first two. Parts that failed before come last.
    """
    known = [*dict.fromkeys(names)]
    listed = [name for name in CALLS[number] if name in known]
    if number == 3:
        own = {name for number in (1, 2) for name in CALLS[number]}
        listed += [name for name in known if name in own] + [name for name in known if name not in own]
    else:  # a dry run has other plans, and cpu instead of cuda
        listed += [name for name in known if _call_of(name) == number]
    missing = [name for name in dict.fromkeys(listed) if "figures" not in done.get(name, {})]
    return sorted(missing, key=lambda name: "error" in done.get(name, {}))


def _call_of(name: str) -> int | None:
    """Return the call of a part that only dry runs have."""
    if name in {f"plan-{case.name}" for case in DRY_CASES}:
        return 1
    return 2 if name == "auto-cpu" else None


def table(parts: Mapping[str, Part]) -> str:
    """Return the parts with their calls, limits and estimates, in Markdown."""
    calls = {name: number for number in (3, 2, 1) for name in CALLS[number]}
    lines = ["| part | call | limit, s | estimate, s |", "|---|---|---|---|"]
    for name in sorted(parts, key=lambda name: calls.get(name, 4)):
        number = calls.get(name, "3, if time is left")
        lines.append(f"| {name} | {number} | {parts[name].limit} | {parts[name].estimate:g} |")
    for number, names in CALLS.items():
        total = sum(parts[name].estimate for name in names if name in parts)
        lines.append(f"| call {number}, without its start | | {CALL_SECONDS[number]} | {total:g} |")
    return "\n".join(lines)
