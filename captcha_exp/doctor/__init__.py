"""Check a machine's setup: `collect_info` queries it, `run_checks` turns the results into findings.

The queries use torch, NVML, psutil and MLflow, and one that fails does not affect the others. The checks are
pure functions of `MachineInfo`, so a test can simulate hardware that is not available.
"""

from captcha_exp.doctor.checks import run_checks as run_checks
from captcha_exp.doctor.collect import collect_info as collect_info
from captcha_exp.doctor.machine_info import Finding as Finding
from captcha_exp.doctor.machine_info import MachineInfo as MachineInfo
