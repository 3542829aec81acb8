"""Test that the compiler stub is removed completely, in a process that has not imported the compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import sys
import torch
from captcha_exp.runtime.compiler import DYNAMO_MODULE, without_compiler

def step():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    return weight
"""


def run_code(code: str) -> str:
    """Return the output of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", STEP + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_optimizer_step_does_not_import_the_compiler() -> None:
    code = "with without_compiler():\n    step()\nprint(DYNAMO_MODULE in sys.modules, 'sympy' in sys.modules)"
    assert run_code(code) == "False False"


@pytest.mark.long
def test_afterwards_the_real_compiler_can_be_imported_and_excludes_the_optimizer() -> None:
    code = """
with without_compiler():
    step()
step()
import torch._dynamo
print(sys.modules[DYNAMO_MODULE].__file__.endswith("__init__.py"))
excluded = torch.compiler.disable(step)
print(excluded is not step, getattr(excluded, "_torchdynamo_disable", False))
inner = torch.optim.AdamW.step.__wrapped__ if hasattr(torch.optim.AdamW.step, "__wrapped__") else None
disabled = [getattr(each, "__dynamo_disable", None) for each in vars(torch.optim.Optimizer).values()]
print(all(getattr(each, "_torchdynamo_disable", False) for each in disabled if each is not None))
weight = step()
print(float(weight.detach()[0]) < 1)
"""
    assert run_code(code).splitlines() == ["True", "True True", "True", "True"]


@pytest.mark.long
@pytest.mark.parametrize("error", [False, True])
def test_the_stub_is_removed(error: bool) -> None:
    code = f"""
function = lambda: None
try:
    with without_compiler():
        wrapped = torch._compile._disable_dynamo(function)
        wrapped()
        marked = hasattr(function, "__dynamo_disable")
        if {error}:
            raise KeyError
except KeyError:
    pass
print(marked, hasattr(function, "__dynamo_disable"), DYNAMO_MODULE in sys.modules)
"""
    assert run_code(code) == "True False False"


@pytest.mark.long
def test_an_imported_compiler_is_not_replaced() -> None:
    code = """
import torch._dynamo
with without_compiler():
    print(sys.modules[DYNAMO_MODULE] is torch._dynamo)
print(sys.modules[DYNAMO_MODULE] is torch._dynamo)
"""
    assert run_code(code).split() == ["True", "True"]


@pytest.mark.long
def test_any_other_attribute_imports_the_real_compiler() -> None:
    code = """
with without_compiler():
    print(sys.modules[DYNAMO_MODULE].is_compiling.__module__ != "captcha_exp.runtime.compiler")
print(DYNAMO_MODULE in sys.modules)
"""
    assert run_code(code).split() == ["True", "True"]
