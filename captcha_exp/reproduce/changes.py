"""Find the changes since the run was trained: versions, code, machine, environment variables."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from captcha_exp.config import flatten_mapping
from captcha_exp.reproduce.reference import ReferenceRun, RunResult
from captcha_exp.runs.fields import ABSENT, changed_values, to_short_text
from captcha_exp.runtime.text import preview

Affects: TypeAlias = Literal["nothing", "images", "numbers"]
Role: TypeAlias = Literal["cause", "suspect", "ruled_out"]

IMAGE_PACKAGES = ("pillow", "captcha", "wheezy.captcha")
IMAGE_KEYS = (
    *(f"packages.{name}" for name in IMAGE_PACKAGES),
    "dependencies.*",
    "variables.FREETYPE_PROPERTIES",
)
"""keys of the environment that affect the images only; * is any text"""

NO_EFFECT_KEYS = (
    *("name", "tracking.*", "sweep.*", "gpu.*"),  # naming, reporting and planning
    *("data.cache", "data.workers", "data.path"),  # where images come from; the images are compared
    *("device.preload_limit_mib", "device.vram_budget_mib"),  # where images are kept; the memory limit
    *("train.checkpoint_every", "train.max_minutes", "train.on_oom", "train.sanity_check_steps"),
    # These packages store or validate values, but compute none; the values themselves are compared.
    *("packages.mlflow", "packages.hydra-core", "packages.omegaconf"),
    *("packages.pydantic", "packages.safetensors"),
    *("variables.*_NUM_THREADS", "device.cores"),  # device.threads is the number used
    "variables.ATEN_CPU_CAPABILITY",  # acts through device.cpu_capability
    *("device.gpu_bytes", "host"),
)
"""keys of the config and the environment that do not affect results"""

NO_EFFECT_CODE = (
    *("captcha_exp/cli/", "captcha_exp/doctor/", "captcha_exp/reproduce/", "captcha_exp/sweep/"),
    *("captcha_exp/tracking/", "captcha_exp/runtime/console.py", "captcha_exp/model/predict.py"),
    *("captcha_exp/report/figures.py", "conf/"),
)
"""path prefixes of code that does not affect results; the saved config has all values taken from conf/"""

ENVIRONMENT_GROUPS = ("packages", "dependencies", "python", "device", "variables", "platform", "host")
"""groups of the environment that are compared; the platform includes the version of the C library"""

DEVICE_KEYS = ("cpu", "cpu_capability", "cores", "gpu", "gpu_capability", "gpu_bytes", "cuda", "cudnn")
"""keys of the device in environment.json that are compared; the others are config keys"""


@dataclass(frozen=True)
class Change:
    """One difference between the reference run and the rerun, other than in the results."""

    name: str
    before: Any
    after: Any
    affects: Affects
    """which results it may change"""
    is_input: bool = False
    """whether it is an input of the run: a config key, an image or a label"""
    role: Role = "ruled_out"
    """in the difference of the results"""

    @property
    def values(self) -> tuple[str, str]:
        """Both values as text; empty for a change that has only a name."""
        if self.before is self.after is None:
            return "", ""
        return to_short_text(self.before), to_short_text(self.after)

    def describe(self) -> str:
        """Return the name and values, as in "seed 0 -> 1"."""
        before, after = self.values
        return f"{self.name} {before} -> {after}" if before or after else self.name

    def to_json(self) -> dict[str, Any]:
        """Return the entry of reproduction.json."""
        return {"name": self.name, "before": self.before, "after": self.after, "role": self.role}


def from_config(changes: Mapping[str, tuple[Any, Any]]) -> list[Change]:
    """Return a change for each changed config key."""
    return [Change(key, *pair, effect_of(key), is_input=True) for key, pair in changes.items()]


def effect_of(key: str) -> Affects:
    """Return which results a change of this key of the config or the environment may affect."""
    if any(fnmatchcase(key, pattern) for pattern in IMAGE_KEYS):
        return "images"
    return "nothing" if any(fnmatchcase(key, pattern) for pattern in NO_EFFECT_KEYS) else "numbers"


def from_interruptions(reference: ReferenceRun) -> list[Change]:
    """Return the environment changes across interruptions of the reference run."""
    return [
        Change(f"on resume: {key}", before, after, effect_of(key))
        for resumption in reference.info.resumed
        for key, (before, after) in resumption.changed.items()
    ]


def from_environment(reference: RunResult, rerun: RunResult) -> list[Change]:
    """Return all changes in code.json, environment.json and the provenance of the images, the code first."""
    changed = changed_values(_flat_environment(reference), _flat_environment(rerun))
    return _code_changes(reference, rerun) + [
        Change(key.removeprefix("packages."), *pair, effect_of(key)) for key, pair in changed.items()
    ]


def _flat_environment(result: RunResult) -> dict[str, Any]:
    """Return `group.key` -> value; also the versions of the libraries that render and decode the images."""
    libraries = result.dataset.get("provenance", {}).get("dependencies", {})
    device = result.environment.get("device") or {}
    groups = {group: result.environment.get(group) for group in ENVIRONMENT_GROUPS} | {
        "dependencies": {name: libraries[name] for name in libraries if name not in IMAGE_PACKAGES},
        "device": {name: device.get(name) for name in DEVICE_KEYS},
    }
    return {key: ABSENT if value in (None, {}) else value for key, value in flatten_mapping(groups).items()}


# -- code ----------------------------------------------------------------------------------------------------


def changed_files(reference: RunResult, current_code: Mapping[str, str]) -> list[str]:
    """List the source files that differ, those that affect results first."""
    changed = changed_values(reference.code_hashes, current_code)
    return sorted(changed, key=lambda name: (name.startswith(NO_EFFECT_CODE), name))


def _code_changes(reference: RunResult, rerun: RunResult) -> list[Change]:
    files = changed_files(reference, rerun.code_hashes)
    pair = describe_code(reference.environment), describe_code(rerun.environment)
    if files:
        no_effect = all(name.startswith(NO_EFFECT_CODE) for name in files)
        return [Change(f"code ({preview(files)})", *pair, affects="nothing" if no_effect else "numbers")]
    # Identical files at another commit are the same code.
    return [] if pair[0] == pair[1] else [Change("commit", *pair, affects="nothing")]


def describe_code(environment: Mapping[str, Any]) -> str:
    """Return the commit of the code, or its version without one."""
    git = environment.get("git") or {}
    commit = str(git.get("commit") or "")[:8]
    if not commit:
        return f"version {environment.get('captcha_exp') or 'unknown'}"
    return f"{commit} with uncommitted changes" if git.get("dirty") else commit
