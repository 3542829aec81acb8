"""What a run ran on: versions, code, machine. Whatever may make two runs differ is written down here."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from captcha_exp.config import Config
from captcha_exp.runs.source_code import code_sha256, git_info

_PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "captcha",
    "wheezy.captcha",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "safetensors",
    "mlflow",
)
_NUMERICS_PREFIXES = (
    *("ATEN_", "TORCH", "PYTORCH_", "NPY_"),  # which kernels torch and NumPy take
    *("ONEDNN_", "DNNL_", "MKL_", "MKLDNN_", "OPENBLAS_", "BLIS_", "VECLIB_"),  # and their libraries
    *("OMP_", "GOMP_", "KMP_"),  # how work is shared among threads
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32_OVERRIDE"),
    *("GLIBC_TUNABLES", "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_"),  # which mathematical functions are loaded
    *("FREETYPE_PROPERTIES", "PYTHONHASHSEED"),  # how letters are drawn; the order of sets
)
_SECRET_NAME = re.compile(r"(?i)token|secret|passw|pwd|credential|auth|_key($|_)")
_URL_CREDENTIALS = re.compile(r"://[^/]*@")  # an address with a password


def collect_environment(config: Config) -> dict[str, Any]:
    """The content of environment.json for a resolved config."""
    return {
        "captcha_exp": package_version("captcha-exp"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "packages": {name: package_version(name) for name in _PACKAGES},
        "git": git_info(),
        "code_sha256": code_sha256(),
        "variables": numerics_variables(),
        "device": {
            "name": config.device.name,
            "threads": config.device.threads,
            "cpu": _detect_cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            **_cuda_info(config.device.name),
        },
    }


def package_version(package: str) -> str | None:
    """Return the installed version, or None; of torch with its build, which its metadata may lack."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numerics_variables() -> dict[str, str]:
    """The environment variables that can change what comes out of a training, by name; never a secret."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_NUMERICS_PREFIXES)
        and not _SECRET_NAME.search(name)
        and not _URL_CREDENTIALS.search(value)
    }


def _detect_cpu_name() -> str:
    try:
        return parse_cpu_name(Path("/proc/cpuinfo").read_text()) or platform.processor()
    except OSError:
        return platform.processor()


def parse_cpu_name(cpuinfo: str) -> str | None:
    """What /proc/cpuinfo calls the first processor, with its numbers: a virtual machine may call all of a
    maker's the same, and libraries choose their kernels by the numbers."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name")
    keys = ("cpu family", "model", "stepping")
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in keys if key in facts]
    return f"{name} ({', '.join(numbers)})" if name and numbers else name


def _cuda_info(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {}
    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "gpu": properties.name,
        "gpu_bytes": properties.total_memory,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch has no types for it
    }
