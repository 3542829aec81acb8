"""Find the changes since the run was trained: versions, code, machine, environment variables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import ABSENT, ReferenceRun, RunResult
from captcha_exp.runtime.console import preview

Affects: TypeAlias = Literal["nothing", "images", "numbers"]

IMAGE_PACKAGES = {"pillow", "captcha", "wheezy.captcha"}
RECORD_ONLY_PACKAGES = {"mlflow", "hydra-core", "omegaconf", "pydantic", "safetensors"}
"""packages that store or validate values but compute none; the values themselves are compared"""

NO_EFFECT_KEYS = (
    *("name", "tracking.", "sweep.", "gpu."),  # naming, reporting and planning
    *("data.cache", "data.workers", "data.path"),  # where images come from; the images are compared
    *("device.preload_limit_mib", "device.vram_budget_mib"),  # where images are kept; the memory limit
    *("train.checkpoint_every", "train.max_minutes", "train.on_oom", "train.sanity_check_steps"),
)
"""config keys, or key prefixes ending in a dot, that do not affect results"""

NO_EFFECT_CODE = (
    *("captcha_exp/cli/", "captcha_exp/doctor/", "captcha_exp/reproduce/", "captcha_exp/sweep/"),
    *("captcha_exp/tracking/", "captcha_exp/runtime/console.py", "captcha_exp/model/predict.py"),
    *("captcha_exp/report/figures.py", "conf/"),
)
"""path prefixes of code that does not affect results; the saved config has all values taken from conf/"""

DEVICE_FIELDS: dict[str, tuple[str, Affects]] = {
    "cpu": ("CPU", "numbers"),
    "cpu_capability": ("CPU capability", "numbers"),
    "cores": ("cores", "nothing"),  # device.threads is the number used
    "gpu": ("GPU", "numbers"),
    "gpu_capability": ("GPU capability", "numbers"),
    "gpu_bytes": ("GPU memory", "nothing"),
    "cuda": ("CUDA", "numbers"),
    "cudnn": ("cuDNN", "numbers"),
}
"""keys of the device in environment.json -> name and effect; its name and threads are config keys"""

EQUIVALENT_SOURCES = {"variable ATEN_CPU_CAPABILITY": "CPU capability"}
"""changes that act through another one that is compared as well"""


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
    is_headline: bool = True
    """whether the one-line verdict names it"""

    @property
    def source(self) -> str:
        """The change that it acts through."""
        return EQUIVALENT_SOURCES.get(self.name, self.name)

    @property
    def is_name_only(self) -> bool:
        """Whether it has no values, only a name."""
        return self.before is self.after is None

    def describe(self) -> str:
        """Return the name and values, as in "seed 0 -> 1"."""
        if self.is_name_only:
            return self.name
        return f"{self.name} {to_short_text(self.before)} -> {to_short_text(self.after)}"


def from_config(changes: Mapping[str, tuple[Any, Any]]) -> list[Change]:
    """Return a change for each changed config key."""
    return [
        Change(
            key,
            *pair,
            affects="nothing" if has_no_effect(key) else "numbers",
            is_input=True,
            is_headline=not key.startswith(("name", "tracking.")),
        )
        for key, pair in changes.items()
    ]


def has_no_effect(key: str) -> bool:
    """Return whether this config key does not affect results."""
    return key in NO_EFFECT_KEYS or key.startswith(tuple(k for k in NO_EFFECT_KEYS if k.endswith(".")))


def from_images(description: str) -> Change:
    """Return the change of the images with this description."""
    return Change(description, None, None, "numbers", is_input=True)


def from_record(reference: ReferenceRun) -> list[Change]:
    """Return changes to the reference run itself.

    These are files modified after the run finished, and environment changes across an interruption.
    """
    results = ("metrics.jsonl", "test.json", "dataset.json")
    changes = [
        Change(f"the run's {name}", "original", "modified", "numbers")
        for name in reference.changed_files
        if name in results
    ]
    if reference.config_file_status == "values may differ":
        changes.append(Change("the run's config.yaml", "original", "modified", "numbers"))
    for resumption in reference.info.resumed:
        for key, (before, after) in resumption.changed.items():
            changes.append(Change(f"on resume: {key}", before, after, _affects(key), is_headline=False))
    return changes


def from_environment(reference: RunResult, rerun: RunResult) -> list[Change]:
    """Return all changes in code.json, environment.json and the provenance of the images, the code first."""
    old, new = reference.environment, rerun.environment
    changes = [
        *_code_changes(reference, rerun),
        *_package_changes(old, new),
        *_dependency_changes(reference, rerun),
    ]
    if old.get("python") != new.get("python"):
        changes.append(Change("python", old.get("python"), new.get("python"), "numbers"))
    devices = _as_mapping(old.get("device")), _as_mapping(new.get("device"))
    for key, (name, affects) in DEVICE_FIELDS.items():
        before, after = (device.get(key, ABSENT) for device in devices)
        if before != after:
            changes.append(Change(name, before, after, affects, is_headline=affects != "nothing"))
    if "variables" in old:
        changes += _variable_changes(_as_mapping(old["variables"]), _as_mapping(new.get("variables")))
    # The platform includes the version of the C library.
    if old.get("platform") != new.get("platform"):
        changes.append(Change("platform", old.get("platform"), new.get("platform"), "numbers"))
    if old.get("host") != new.get("host"):
        changes.append(Change("host", old.get("host"), new.get("host"), "nothing", is_headline=False))
    return changes


def _package_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    packages = _as_mapping(old.get("packages")), _as_mapping(new.get("packages"))
    for name in dict.fromkeys([*packages[0], *packages[1]]):
        before, after = (versions.get(name) or ABSENT for versions in packages)
        if before == after:
            continue
        yield Change(name, before, after, _affects(f"packages.{name}"))


def _dependency_changes(reference: RunResult, rerun: RunResult) -> Iterator[Change]:
    """Yield changes of the native libraries that render text and decode images."""
    provenances = [_as_mapping(result.dataset.get("provenance")) for result in (reference, rerun)]
    dependencies = [_as_mapping(each.get("dependencies")) for each in provenances]
    for name in dict.fromkeys([*dependencies[0], *dependencies[1]]):
        before, after = (versions.get(name) or ABSENT for versions in dependencies)
        if before != after and name not in IMAGE_PACKAGES:
            yield Change(f"images' {name}", before, after, "images")


def _variable_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*old, *new]):
        before, after = (variables.get(name, ABSENT) for variables in (old, new))
        if before == after:
            continue
        affects = _affects(f"variables.{name}")
        yield Change(f"variable {name}", before, after, affects, is_headline=affects != "nothing")


def _affects(key: str) -> Affects:
    """Return the possible effect of a change of this key of environment.json."""
    group, _, name = key.partition(".")
    if group == "packages" and name in (*IMAGE_PACKAGES, *RECORD_ONLY_PACKAGES):
        return "images" if name in IMAGE_PACKAGES else "nothing"
    # device.threads overrides these variables.
    if group == "variables" and name.endswith("_NUM_THREADS"):
        return "nothing"
    if key == "variables.FREETYPE_PROPERTIES":
        return "images"
    return DEVICE_FIELDS.get(name, ("", "numbers"))[1] if group == "device" else "numbers"


# -- code ----------------------------------------------------------------------------------------------------


def changed_files(reference: RunResult, current_code: Mapping[str, str]) -> list[str] | None:
    """List the source files that differ, those that affect results first; None if the run has no hashes."""
    if not reference.code_hashes:
        return None
    changed = [
        name
        for name in {*reference.code_hashes, *current_code}
        if reference.code_hashes.get(name) != current_code.get(name)
    ]
    return sorted(changed, key=lambda name: (name.startswith(NO_EFFECT_CODE), name))


def _code_changes(reference: RunResult, rerun: RunResult) -> Iterator[Change]:
    files = changed_files(reference, rerun.code_hashes)
    pair = describe_code(reference.environment), describe_code(rerun.environment)
    if files:
        no_effect = all(name.startswith(NO_EFFECT_CODE) for name in files)
        yield Change(f"code ({preview(files)})", *pair, affects="nothing" if no_effect else "numbers")
    elif pair[0] != pair[1]:  # identical files at another commit are the same code
        yield Change(
            "commit", *pair, affects="numbers" if files is None else "nothing", is_headline=files is None
        )


def describe_code(environment: Mapping[str, Any]) -> str:
    """Return the commit of the code, or its version without one."""
    git = _as_mapping(environment.get("git"))
    commit = str(git.get("commit") or "")[:8]
    if not commit:
        return f"version {environment.get('captcha_exp') or 'unknown'}"
    return f"{commit} with uncommitted changes" if git.get("dirty") else commit


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def to_short_text(value: Any) -> str:
    """Return a value on one line in the notation of JSON, truncated to 100 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."
