"""Record versions, code, and machine of a run: everything that can make two runs differ."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from captcha_exp.config import Config
from captcha_exp.runs.source_code import code_sha256, git_info
from captcha_exp.runtime.cpu_name import detect_cpu_name

_PACKAGES = (
    *("torch", "numpy", "pillow", "captcha", "wheezy.captcha"),  # compute the images and the numbers
    *("hydra-core", "omegaconf", "pydantic", "safetensors", "mlflow"),  # check and store values
)
_NUMERICS_PREFIXES = (
    # Kernel selection in torch and NumPy, and in the libraries that they call.
    *("ATEN_", "TORCH", "PYTORCH_", "NPY_"),
    *("ONEDNN_", "DNNL_", "MKL_", "MKLDNN_", "OPENBLAS_", "BLIS_", "VECLIB_"),
    *("OMP_", "GOMP_", "KMP_"),  # threading
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32_OVERRIDE"),
    *("GLIBC_TUNABLES", "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_"),  # which math library is loaded
    *("FREETYPE_PROPERTIES", "PYTHONHASHSEED"),  # glyph rendering; order of sets
)
_SECRET_NAME = re.compile(r"(?i)token|secret|passw|pwd|credential|auth|_key($|_)")
_URL_CREDENTIALS = re.compile(r"://[^/]*@")  # user:password in a URL


def collect_environment(config: Config) -> dict[str, Any]:
    """Return the content of environment.json for a resolved config."""
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
            "cpu": detect_cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            **_cuda_info(config.device.name),
        },
    }


def package_version(package: str) -> str | None:
    """Return the installed version, or None; for torch with the build tag, which its metadata may lack."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numerics_variables() -> dict[str, str]:
    """Return the environment variables that can change the numerics of a training, without secrets."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_NUMERICS_PREFIXES)
        and name != "TORCHINDUCTOR_CACHE_DIR"  # torch sets it, when a process builds its first optimizer
        and not _SECRET_NAME.search(name)
        and not _URL_CREDENTIALS.search(value)
    }


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
