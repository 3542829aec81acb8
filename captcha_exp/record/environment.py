"""What a run ran on: versions, code, machine. Whatever may make two runs differ is written down here."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from captcha_exp.config import Config

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


def environment(config: Config) -> dict[str, Any]:
    """The content of environment.json for a resolved config."""
    return {
        "captcha_exp": version_of("captcha-exp"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "packages": {name: version_of(name) for name in _PACKAGES},
        "git": git(),
        "device": {
            "name": config.device.name,
            "threads": config.device.threads,
            "cpu": _cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            **_cuda(config.device.name),
        },
    }


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git() -> dict[str, Any] | None:
    """Commit, branch and local changes of the checkout that the code runs from, or None."""
    here = Path(__file__)
    try:
        if _git("ls-files", "--error-unmatch", here.name) is None:
            return None  # installed: a repository around site-packages is somebody else's
        difference = _git("diff", "HEAD", "--binary") or ""
        return {
            "commit": _git("rev-parse", "HEAD"),
            "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(difference),
            "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
        }
    except OSError:
        return None  # git is not on this machine


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", *arguments],  # noqa: S607 - the git that the person uses, wherever it is
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        errors="replace",
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cuda(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {}
    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "card": properties.name,
        "card_bytes": properties.total_memory,
        "card_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch has no types for it
    }
