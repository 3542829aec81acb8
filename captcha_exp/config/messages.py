"""Error messages of a config: the key, the value, the valid values, the closest valid key.

Keys, values and files of conf/ that were renamed are answered with their new names.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

MAX_NAMED = 4  # keys that a hint names
RENAMED_KEYS = {  # old key or group -> new one
    "card": "gpu",
    "gpu.others_mib": "gpu.other_processes_mib",
    "gpu.fp16_speed": "gpu.fp16_speedup",
    "gpu.bf16_speed": "gpu.bf16_speedup",
    "data.pattern": "data.filename_pattern",
    "data.on_bad": "data.on_invalid",
    "device.resident_limit_mib": "device.preload_limit_mib",
    "sweep.train_unfit": "sweep.run_over_budget",
    "augment.shift": "augment.translate",
    "augment.slant": "augment.shear",
    "augment.warp": "augment.elastic",
    "augment.colour": "augment.color_jitter",
    "augment.invert": "augment.invert_p",
    "augment.ramp": "augment.warmup_fraction",
    "train.evaluation_batch_size": "train.eval_batch_size",
    "train.optimizer_kernel": "train.optimizer_impl",
    "train.stop_after_minutes": "train.max_minutes",
    "train.chance_after_steps": "train.sanity_check_steps",
}
ABBREVIATIONS = {"lr": "train.learning_rate", "wd": "train.weight_decay", "bs": "train.batch_size"}
RENAMED_BOUNDS = {"least": "min", "most": "max"}  # last part of the keys of a GPU's figures
RENAMED_VALUES = {  # (key or group, old value or file of conf/) -> new one
    ("train.optimizer_impl", "loop"): "for_loop",
    ("data.on_invalid", "refuse"): "error",
    ("train", "few"): "small_data",
    ("train", "constant"): "constant_lr",
}


def format_errors(
    error: ValidationError,
    raw: Any,
    schema: dict[str, Any],
    raw_overrides: Mapping[str, str],
    group: str = "",
) -> list[str]:
    """Return one line per invalid key: the key, the value as it was written, the valid values.

    `group` is the prefix of the keys of `raw` in the whole config, as in "gpu." for a GPU file.
    """
    known = sorted(_leaves(schema, schema))
    lines: dict[str, str] = {}
    missing: set[str] = set()
    renamed_keys: set[str] = set()
    for item in error.errors(include_url=False):
        path, value, rule = _locate(item["loc"], raw, schema)
        key = ".".join(path)
        shown = key if isinstance(value, Mapping) else f"{key}={format_raw_value(key, value, raw_overrides)}"
        shown = shown.removeprefix("=")  # the whole config
        match item["type"]:
            case "missing":
                missing.add(key)
                line = f"{key}: is missing; write {_describe_allowed(rule, schema)}"
            case _ if new_name := renamed(group + key, value):
                renamed_keys.add(_new_key(group + key).removeprefix(group))
                line = f"{shown}: was renamed to {new_name.removeprefix(group)}"
            case "unexpected_keyword_argument":
                other = _other_choice(path, schema)
                line = f"{shown}: unknown key; {other or _closest_key(path, known)}"
            case "secret":
                line = f"{key}: {item['msg']}"  # without the value: terminals are logged
            case "value_error":
                line = f"{shown}: {item['ctx']['error']}".removeprefix(": ")  # of the whole config
            case "union_tag_invalid" | "union_tag_not_found":
                tag = rule["discriminator"]["propertyName"]
                given = value.get(tag) if isinstance(value, Mapping) else value
                choices = ", ".join(rule["discriminator"]["mapping"])
                key = f"{key}.{tag}"
                line = f"{key}={format_raw_value(key, given, raw_overrides)}: must be one of {choices}"
            case _ if not isinstance(value, Mapping) and (leaves := _leaves(rule, schema, f"{key}.")):
                text = format_raw_value(key, value, raw_overrides)
                line = f"{shown}: is a group of keys; {_closest_setting(leaves, value, text, schema)}"
            case _:
                line = f"{shown}: must be {_describe_allowed(rule, schema)}{_yaml_hint(value, rule)}"
        lines.setdefault(key, line)
    for key in missing & renamed_keys:  # present under its old name
        del lines[key]
    return list(lines.values())


def renamed(key: str, value: Any) -> str | None:
    """Return the new name of a key, value or file of an earlier version as KEY or KEY=VALUE.

    Return None if neither the key nor the value was renamed.
    """
    new_key = _new_key(key)
    if isinstance(value, str) and (new_key, value) in RENAMED_VALUES:
        return f"{new_key}={RENAMED_VALUES[new_key, value]}"
    return None if new_key == key else new_key


def _new_key(key: str) -> str:
    """Replace each part of a key that was renamed."""
    parts: list[str] = []
    for part in key.split("."):
        name = ".".join([*parts, part])
        parts = RENAMED_KEYS.get(name, name).split(".")
    if parts[0] == "gpu" and len(parts) == 3:
        parts[2] = RENAMED_BOUNDS.get(parts[2], parts[2])
    return ".".join(parts)


def format_raw_value(key: str, value: Any, raw_overrides: Mapping[str, str]) -> str:
    """Return a value as typed on the command line, else as JSON."""
    return raw_overrides[key] if key in raw_overrides else json.dumps(value, ensure_ascii=False, default=repr)


def _locate(loc: tuple[int | str, ...], raw: Any, schema: dict[str, Any]) -> tuple[list[str], Any, Any]:
    """Return the path of the key, its value in the raw config, and its part of the schema.

    pydantic adds the tags of unions to the location; they are not part of the key.
    """
    path: list[str] = []
    value, rule = raw, schema
    for part in loc:
        rule = _drop_null(_deref(rule, schema), schema)
        if "discriminator" in rule and part in rule["discriminator"]["mapping"]:
            rule = {"$ref": rule["discriminator"]["mapping"][part]}
        elif isinstance(part, int) or "properties" not in rule:
            break  # inside a list or a union of plain values: report the whole key
        else:
            path.append(str(part))
            value = value.get(part) if isinstance(value, Mapping) else None
            rule = rule["properties"].get(part, {})
    return path, value, _deref(rule, schema)


def _deref(rule: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    target: dict[str, Any] = schema["$defs"][rule["$ref"].rsplit("/", 1)[1]] if "$ref" in rule else rule
    return target


def _drop_null(rule: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the group of keys in a rule that also allows null, else the rule."""
    groups = [_deref(choice, schema) for choice in rule.get("anyOf", [])]
    return next((group for group in groups if "properties" in group), rule)


def _leaves(rule: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every key of a group as `prefix` + `key` -> its rule; of a single value, nothing."""
    rule = _drop_null(_deref(rule, schema), schema)
    leaves: dict[str, Any] = {}
    for choice in rule.get("oneOf", []):
        leaves |= _leaves(choice, schema, prefix)
    for key, inner in rule.get("properties", {}).items():
        leaves |= _leaves(inner, schema, f"{prefix}{key}.") or {f"{prefix}{key}": inner}
    return leaves


def _closest_setting(leaves: Mapping[str, Any], value: Any, text: str, schema: dict[str, Any]) -> str:
    """Return a hint with the keys of a group that allow a value which was given to the group."""
    settings = [f"{key}={text}" for key, rule in leaves.items() if _allows(rule, value, schema)]
    if 0 < len(settings) <= MAX_NAMED:
        return f"did you mean {' or '.join(settings)}?"
    return f"set one of {', '.join(leaves)}"


def _allows(rule: dict[str, Any], value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a rule for a single value allows this one."""
    rule = _deref(rule, schema)
    if "anyOf" in rule:
        return any(_allows(choice, value, schema) for choice in rule["anyOf"])
    if "const" in rule or "enum" in rule:
        return value in rule.get("enum", [rule.get("const")])
    types = {"string": str, "integer": int, "number": int | float, "boolean": bool, "array": list}
    expected = types.get(rule.get("type", ""))
    if expected is None or not isinstance(value, expected) or isinstance(value, bool) > (expected is bool):
        return False
    if isinstance(value, str):
        return re.search(rule.get("pattern", ""), value) is not None
    return isinstance(value, list | bool) or rule.get("minimum", value) <= value <= rule.get("maximum", value)


def _other_choice(path: list[str], schema: dict[str, Any]) -> str:
    """Return a hint with the choice of the group that has a key; "" if none has, or several do."""
    if len(path) != 2:
        return ""
    group = _deref(schema["properties"].get(path[0], {}), schema)
    mapping = group.get("discriminator", {}).get("mapping", {})
    having = [name for name, target in mapping.items() if path[1] in _leaves({"$ref": target}, schema)]
    return f"it is a key of {path[0]}={having[0]}; add that" if len(having) == 1 else ""


def _closest_key(path: list[str], known: list[str]) -> str:
    """Return a hint with the most similar key, first in the same group, then anywhere."""
    group = ".".join(path[:-1])
    known = [key for key in known if key != ".".join(path)]  # valid only with another choice of this group
    if len(path) == 1:
        if path[0] in ABBREVIATIONS:
            return f"did you mean {ABBREVIATIONS[path[0]]}?"
        known = sorted({*known, *(key.partition(".")[0] for key in known)})  # and the groups
    siblings = [key for key in known if key.rpartition(".")[0] == group]
    for candidates in (siblings, known):
        names = {key.rpartition(".")[2]: key for key in candidates}
        if close := difflib.get_close_matches(path[-1], names, n=1, cutoff=0.7):
            return f"did you mean {names[close[0]]}?"
    return f"valid keys: {', '.join(siblings or known)}"


def _describe_allowed(rule: dict[str, Any], schema: dict[str, Any]) -> str:
    """Describe the values that a schema allows."""
    text = " ".join(rule.get("description", "").split())  # the field's description may span two lines
    meaning = f" ({text})" if text and "type" in rule else ""
    for union in ("anyOf", "oneOf"):
        if union in rule:
            choices = " or ".join(_describe_allowed(_deref(choice, schema), schema) for choice in rule[union])
            return f"{choices} ({text})" if text else choices
    if "const" in rule:
        return str(rule["const"]) + meaning
    if "enum" in rule:
        return "one of " + ", ".join(map(str, rule["enum"])) + meaning
    kind = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text of this form" if "pattern" in rule else "text",
        "boolean": "true or false",
        "array": "a list",
        "null": "null",
    }.get(rule.get("type", ""), "a group of keys")
    limits = [
        f"{phrase} {rule[limit]}"
        for limit, phrase in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
            ("minItems", "minimum length"),
            ("maxItems", "maximum length"),
        )
        if limit in rule
    ]
    if "items" in rule:
        limits.insert(0, f"each {_describe_allowed(rule['items'], schema)}")
    return ", ".join([kind, *limits]) + meaning


def _yaml_hint(value: Any, rule: dict[str, Any]) -> str:
    """Return a hint to quote a text that YAML parsed as another type, else an empty string."""
    if rule.get("type") == "string" and isinstance(value, bool | int | float | list | None):
        return (
            f"; YAML parsed it as {type(value).__name__} {value!r}: quote the text, "
            "in a file as '0123', on the command line as \"key='0123'\""
        )
    return ""
