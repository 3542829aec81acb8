"""What is wrong with a machine's set-up, and what to do: `gather` looks, `findings` judges.

Looking touches torch, NVML, psutil and MLflow and survives the failure of each; judging touches nothing,
so that machines which nobody has here can be played in a test.
"""

from captcha_exp.doctor.checks import run_checks as run_checks
from captcha_exp.doctor.collect import collect_info as collect_info
from captcha_exp.doctor.machine_info import Finding as Finding
from captcha_exp.doctor.machine_info import MachineInfo as MachineInfo
