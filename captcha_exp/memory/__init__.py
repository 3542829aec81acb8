"""Predict the GPU memory of a training run without a GPU, and suggest settings that make it fit.

    process = context + reserved            in MiB, as nvidia-smi shows it for the process
    reserved = allocator(tensors + workspaces)

- tensors: `trace` runs the training code (three steps, evaluations) on tensors without values, and
  `fake_device` records each allocation and deallocation
- allocator: `allocator` and `blocks` model torch's caching allocator: sizes rounded to 512 bytes, small and
  large segments, splits, best fit, and a flush of the cache before running out of memory
- workspaces: cuBLAS keeps one from its first matrix product on; cuDNN allocates one while a convolution runs,
  bounded by the GPU's file and by CONV_WORKSPACE_FACTOR times the tensors of the convolution
- context: bounds with their source, from the GPU's file like those of the workspaces

Modules:

- `plan`: *fits*, *does not fit* or *unsure*, which is treated as *does not fit*; `interval`: the ranges in it
- `trace`, `trace_cache`: a traced training; traces of one config by batch size. `fake_device`, `gpu_kernels`,
  `torch_patches`: tensors without values, dispatched as on CUDA
- `allocator`, `blocks`: the model of the allocator; `replay`: a trace and its workspaces on it
- `advisor`: settings with which a batch fits
- `module` and `module_*`: the same prediction for any `nn.Module`
- `calibrate`, `gpu_probe`, `gpu_profile`: measured bounds for the file of a GPU

Sources: torch 2.10 to 2.13, c10/cuda/CUDACachingAllocator.cpp, aten/src/ATen/cuda/CublasHandlePool.cpp,
aten/src/ATen/native/cudnn/Conv_v8.cpp; those of each GPU are in conf/gpu/.

Known error of the tensors: at most 1.0 % against torch's profiler in 80 training runs on a CPU, without the
blocks that CPU kernels allocate and free inside one convolution, and at most 4.9 % with them for 32 images or
more per forward pass (benchmarks/trace_accuracy.py; up to 11 % for fewer). plan.ERROR_MARGIN adds 2 % to the
reserved memory.

On a GPU: NVIDIA H100 80GB HBM3, 14 trainings: the middle of the predicted bounds is off the measured process
peak by 26.7% (median) and 78.6% (worst), no false *fits*, allocated bytes at most 0.0% outside the bounds
(benchmarks/results/2026-11-27-nvidia-h100.json). NVIDIA H200, 14 trainings: the middle of the predicted
bounds is off the measured process peak by 26.7% (median) and 78.6% (worst), no false *fits*, allocated bytes
at most 0.0% outside the bounds (benchmarks/results/2026-11-27-nvidia-h200.json).

No process peak was outside the predicted bounds; those of the H100 were predicted before the measurement.
They are wide because the published figures of conf/gpu/h100.yaml and h200.yaml were used, which bound cuDNN's
workspace by an estimate (driver 580.159.04, torch 2.11.0+cu130, 2026-11-27).

Bounds of workspaces and contexts are measured, published by others, or estimates; each file says which. Not
counted: memory that GPU kernels use outside torch's allocator beyond the context, fragmentation by other
streams, and cuDNN's benchmark of its engines (train.deterministic=false), which tries larger workspaces.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captcha_exp.memory.module import plan_module as plan_module

__all__ = ["plan_module"]


def __getattr__(name: str) -> object:
    """Import the public names on first use, because importing torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'captcha_exp.memory' has no attribute {name!r}")
    from captcha_exp.memory import module

    return getattr(module, name)
