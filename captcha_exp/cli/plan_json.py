"""The types of the JSON of `captcha-exp plan --json`. They generate docs/plan.schema.json:

python -c "from captcha_exp.cli.plan_json import print_schema; print_schema()" > docs/plan.schema.json
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from captcha_exp.config.gpu import STRICT, GpuSpec
from captcha_exp.memory.interval import Fits

MiB = Annotated[float, Field(ge=0)]
Range = tuple[float, float]  # smallest and largest possible value; a budget may be fractional


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MemoryPeak:
    """The largest memory use of one kind of work."""

    allocated_mib: Range
    """torch.cuda.max_memory_allocated"""
    reserved_mib: Range
    """torch.cuda.max_memory_reserved"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BatchPlan:
    """Memory that a batch size needs, in a comparison of GPUs."""

    batch_size: Annotated[int, Field(ge=1)]
    """images of a training step"""
    tensors_mib: MiB
    """tensors of a training step, without resident images"""
    state_mib: MiB
    """of these, weights, statistics of batch norms, and optimizer state"""
    activations_mib: MiB
    """of these, everything else at the peak: activations, gradients, the batch"""
    images_mib: MiB
    """images that stay on the device for the whole training"""
    workspace_mib: Range
    """memory of cuBLAS and cuDNN in use at one time, at most"""
    training: MemoryPeak
    """peak of the training steps"""
    evaluation: MemoryPeak
    """peak of the evaluations"""
    reserved_mib: Range
    """memory that torch's allocator reserves over the whole run"""
    process_mib: Range
    """memory of the process: CUDA context and reserved memory"""
    budget_mib: Range | None
    """memory available to the process; null: unknown"""
    fits: Fits | None
    """the verdict; treat unsure as does not fit; null: the available memory is unknown"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TimedBatchPlan(BatchPlan):
    """Memory that a batch size needs on one GPU."""

    seconds: Annotated[float, Field(ge=0)]
    """time to compute the plan"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Advice:
    """Overrides with which train.batch_size fits."""

    overrides: list[str]
    """overrides to add to the command; none: it fits without them"""
    relative_time: Annotated[float, Field(gt=0)]
    """estimated time of a step; 1: the config without changes"""
    notes: list[str]
    """side effects"""
    plan: BatchPlan
    """the plan with these overrides"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class _Output:
    precision: Literal["fp32", "bf16", "fp16"]
    """device.precision"""
    images: dict[str, Annotated[int, Field(ge=0)]]
    """images of each split"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class OneGpuOutput(_Output):
    """Output for one GPU."""

    gpu: GpuSpec
    """figures of the GPU, each with its source"""
    budget_mib: Range | None
    """memory available to the process; null: unknown"""
    plans: list[TimedBatchPlan]
    """one plan for each batch size, in the order of the call"""
    max_batch_size: Annotated[int, Field(ge=1)] | None
    """largest batch size that fits; null: none fits, or the available memory is unknown"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GpuPlans:
    """A GPU of a comparison."""

    name: str
    """name or path of its file, as given to --gpu"""
    gpu: GpuSpec
    """figures of the GPU, each with its source"""
    memory_mib: Range | None
    """memory of the GPU; null: unknown"""
    budget_mib: Range | None
    """memory available to the process; null: unknown"""
    plans: list[BatchPlan]
    """one plan for each batch size, in the order of the call"""
    max_batch_size: Annotated[int, Field(ge=1)] | None
    """largest batch size that fits; null: none fits, or the available memory is unknown"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ManyGpusOutput(_Output):
    """Output of --gpu all, or of a list."""

    gpus: list[GpuPlans]
    """the GPUs, by memory and then name"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AdviceOutput(_Output):
    """Output of --advise."""

    gpu: GpuSpec
    """figures of the GPU, each with its source"""
    budget_mib: Range
    """memory available to the process"""
    batch_size: Annotated[int, Field(ge=1)]
    """train.batch_size"""
    advice: list[Advice]
    """combinations that fit, fastest first; none: no known combination fits"""


OUTPUT: TypeAdapter[OneGpuOutput | ManyGpusOutput | AdviceOutput] = TypeAdapter(
    OneGpuOutput | ManyGpusOutput | AdviceOutput
)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the output, draft 2020-12."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "captcha-exp plan --json"}
    return title | OUTPUT.json_schema()


def print_schema() -> None:
    """Print the schema as in the committed file."""
    print(json.dumps(schema(), indent=2))
