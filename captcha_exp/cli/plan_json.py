"""The output of `captcha-exp plan --json`. Its types generate docs/plan.schema.json:

python -m captcha_exp.cli.plan_json > docs/plan.schema.json
"""

import json
from typing import Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from captcha_exp.config import GpuSpec, Precision
from captcha_exp.config.gpu import STRICT
from captcha_exp.memory.advisor import Advice
from captcha_exp.memory.interval import MiBRange, described
from captcha_exp.memory.plan import Plan

GpuFigures = Annotated[GpuSpec, described("figures of the GPU, each with its source")]
TrainingPrecision = Annotated[Precision, described("device.precision")]
SplitSizes = Annotated[dict[str, Annotated[int, Field(ge=0)]], described("images of each split")]
Budget = Annotated[MiBRange | None, described("memory available to the process; null: unknown")]
MaxBatchSize = Annotated[
    Annotated[int, Field(ge=1)] | None,
    described("largest batch size that fits; null: none fits, or the available memory is unknown"),
]


@dataclass(config=STRICT, frozen=True)
class OneGpuOutput:
    """Output for one GPU."""

    gpu: GpuFigures
    precision: TrainingPrecision
    images: SplitSizes
    budget_mib: Budget
    plans: Annotated[list[Plan], described("one plan for each batch size, in the order of the call")]
    max_batch_size: MaxBatchSize


@dataclass(config=STRICT, frozen=True)
class GpuPlans:
    """A GPU of a comparison."""

    name: Annotated[str, described("name or path of its file, as given to --gpu")]
    gpu: GpuFigures
    precision: TrainingPrecision
    memory_mib: Annotated[MiBRange | None, described("memory of the GPU; null: unknown")]
    budget_mib: Budget
    plans: Annotated[list[Plan], described("one plan for each batch size, in the order of the call")]
    max_batch_size: MaxBatchSize


@dataclass(config=STRICT, frozen=True)
class ManyGpusOutput:
    """Output of --gpu all, or of a list."""

    images: SplitSizes
    gpus: Annotated[list[GpuPlans], described("the GPUs, by memory and then name")]


@dataclass(config=STRICT, frozen=True)
class AdviceOutput:
    """Output of --advise."""

    gpu: GpuFigures
    precision: TrainingPrecision
    images: SplitSizes
    budget_mib: Annotated[MiBRange, described("memory available to the process")]
    batch_size: Annotated[int, Field(ge=1), described("train.batch_size")]
    advice: Annotated[list[Advice], described("combinations that fit, fastest first; none: none is known")]


PlanOutput: TypeAlias = OneGpuOutput | ManyGpusOutput | AdviceOutput
OUTPUT: TypeAdapter[PlanOutput] = TypeAdapter(PlanOutput)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the output, draft 2020-12."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "captcha-exp plan --json"}
    return title | OUTPUT.json_schema()


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
