"""The name of the CPU, with the numbers by which libraries select kernels."""

import platform
from pathlib import Path


def detect_cpu_name() -> str:
    """Return the name of the first CPU of this machine; empty if it is not known."""
    try:
        return parse_cpu_name(Path("/proc/cpuinfo").read_text()) or platform.processor()
    except OSError:
        return platform.processor()


def parse_cpu_name(cpuinfo: str) -> str | None:
    """Return name, family, model and stepping of the first CPU in the text of /proc/cpuinfo.

    A virtual machine may report the same name for different CPUs; libraries select kernels by the numbers.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name")
    keys = ("cpu family", "model", "stepping")
    numbers = [f"{key.removeprefix('cpu ')} {fields[key]}" for key in keys if key in fields]
    return f"{name} ({', '.join(numbers)})" if name and numbers else name
