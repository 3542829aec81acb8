"""How much memory of a graphics card a training takes, told without one, and what makes it fit.

    process = context + reserved            in MiB of the card, as nvidia-smi shows it for the process
    reserved = allocator(tensors + workspaces)

- tensors: `trace` runs the training's own code (three steps, evaluations) on tensors without numbers, and
  `recorder` sees their memory come and go
- allocator: `allocator` and `blocks`, a model of torch's caching allocator to which all that is played: 512
  bytes at least, small and large segments, splits, best fit, and at the limit flush and try again
- workspaces: cuBLAS keeps one from its first product on; cuDNN takes one for each convolution while it runs,
  at most that of the card's file and WORKSPACE_TIMES the tensors of the convolution
- context: the card's file; like the workspaces an interval with its source

`plan` puts it together and says *fits*, *does not fit* or *unsure*, which counts as no. `advice` names what
makes a batch fit. On a card `calibrate` replaces the intervals by what it measures (`measuring`, `judging`).

Sources: torch 2.10 to 2.13, c10/cuda/CUDACachingAllocator.cpp, aten/src/ATen/cuda/CublasHandlePool.cpp,
aten/src/ATen/native/cudnn/Conv_v8.cpp; each card's in conf/gpu/.

Known error: of the tensors at most 1.0 % against torch's profiler in 80 trainings run on a CPU, without what
its kernels take and give back inside one convolution, and at most 4.9 % with it, from passes of 32 pictures
on (benchmarks/trace_accuracy.py; with fewer up to 11 %). plan.ERROR adds 2 % to all that is reserved.

On a GPU: NVIDIA H200, 14 trainings: the middle of the predicted bounds is off the measured process peak by
26.7% (median) and 78.6% (worst), no false *fits*, allocated bytes at most 0.0% outside the bounds
(benchmarks/results/2026-11-27-nvidia-h200.json).

Bounds of workspaces and contexts are measured, published by others, or estimates; each file says which. Not
counted: what a GPU's kernels take outside torch's allocator beyond the context, fragmentation by other
streams, cuDNN's search for the fastest engine (train.deterministic=false), which tries larger workspaces.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captcha_exp.memory.module import ModulePlan as ModulePlan
    from captcha_exp.memory.module import plan_module as plan_module

__all__ = ["ModulePlan", "plan_module"]


def __getattr__(name: str) -> object:
    """Import the public names at first use: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'captcha_exp.memory' has no attribute {name!r}")
    from captcha_exp.memory import module

    return getattr(module, name)
