"""Mistakes of a config in words: the key, the value, what is allowed, the nearest spelling."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError


def format_errors(
    error: ValidationError, raw: Any, schema: dict[str, Any], raw_overrides: Mapping[str, str]
) -> list[str]:
    """One line for each key that has a mistake: the key, the value as it was written, what is allowed."""
    known = sorted(set(_schema_keys(schema, schema)))
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path, value, rule = _locate(item["loc"], raw, schema)
        key = ".".join(path)
        shown = key if isinstance(value, Mapping) else f"{key}={format_raw_value(key, value, raw_overrides)}"
        match item["type"]:
            case "missing":
                line = f"{key}: is missing; write {_describe_allowed(rule, schema)}"
            case "unexpected_keyword_argument":
                line = f"{shown}: there is no such key; {_closest_key(path, known)}"
            case "secret":
                line = f"{key}: {item['msg']}"  # without the value: terminals are logged
            case "value_error":
                line = f"{shown}: {item['ctx']['error']}"
            case "union_tag_invalid" | "union_tag_not_found":
                tag = rule["discriminator"]["propertyName"]
                given = value.get(tag) if isinstance(value, Mapping) else value
                choices = ", ".join(rule["discriminator"]["mapping"])
                key = f"{key}.{tag}"
                line = f"{key}={format_raw_value(key, given, raw_overrides)}: must be one of {choices}"
            case _:
                line = f"{shown}: must be {_describe_allowed(rule, schema)}{_yaml_hint(value, rule)}"
        lines.setdefault(key, line)
    return list(lines.values())


def format_raw_value(key: str, value: Any, raw_overrides: Mapping[str, str]) -> str:
    """The value as the person wrote it on the command line, else as YAML would write it."""
    return raw_overrides[key] if key in raw_overrides else json.dumps(value, ensure_ascii=False, default=repr)


def _locate(loc: tuple[int | str, ...], raw: Any, schema: dict[str, Any]) -> tuple[list[str], Any, Any]:
    """The key's path, its value in the raw config, and its part of the schema.

    pydantic puts the tags of unions into the location; they are not part of the key.
    """
    path: list[str] = []
    value, rule = raw, schema
    for part in loc:
        rule = _drop_null(_deref(rule, schema), schema)
        if "discriminator" in rule and part in rule["discriminator"]["mapping"]:
            rule = {"$ref": rule["discriminator"]["mapping"][part]}
        elif isinstance(part, int) or "properties" not in rule:
            break  # inside a list or a union of plain values: the key as a whole is meant
        else:
            path.append(str(part))
            value = value.get(part) if isinstance(value, Mapping) else None
            rule = rule["properties"].get(part, {})
    return path, value, _deref(rule, schema)


def _deref(rule: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in rule:
        target: dict[str, Any] = schema["$defs"][rule["$ref"].rsplit("/", 1)[1]]
        return target
    return rule


def _drop_null(rule: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The group of keys in a rule that also allows null."""
    groups = [_deref(choice, schema) for choice in rule.get("anyOf", [])]
    return next((group for group in groups if "properties" in group), rule)


def _schema_keys(rule: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    rule = _drop_null(_deref(rule, schema), schema)
    for choice in rule.get("oneOf", []):
        yield from _schema_keys(choice, schema, prefix)
    for key, inner in rule.get("properties", {}).items():
        deeper = list(_schema_keys(inner, schema, f"{prefix}{key}."))
        yield from deeper or [f"{prefix}{key}"]


def _closest_key(path: list[str], known: list[str]) -> str:
    """The most similar key: first among its neighbours, then anywhere."""
    group = ".".join(path[:-1])
    known = [key for key in known if key != ".".join(path)]  # a key of another choice of this group
    neighbours = [key for key in known if key.rpartition(".")[0] == group]
    for candidates in (neighbours, known):
        names = {key.rpartition(".")[2]: key for key in candidates}
        if close := difflib.get_close_matches(path[-1], names, n=1, cutoff=0.7):
            return f"did you mean {names[close[0]]}?"
    return f"known are {', '.join(neighbours or known)}"


def _describe_allowed(rule: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a schema allows, in words."""
    text = " ".join(rule.get("description", "").split())  # in the code it may take two lines
    meaning = f" ({text})" if text and "type" in rule else ""
    for union in ("anyOf", "oneOf"):
        if union in rule:
            words = " or ".join(_describe_allowed(_deref(choice, schema), schema) for choice in rule[union])
            return f"{words} ({text})" if text else words
    if "const" in rule:
        return str(rule["const"]) + meaning
    if "enum" in rule:
        return "one of " + ", ".join(map(str, rule["enum"])) + meaning
    kind = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "array": "a list",
        "null": "null",
    }.get(rule.get("type", ""), "a group of keys")
    limits = [
        f"{words} {rule[limit]}"
        for limit, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
            ("minItems", "entries at least"),
            ("maxItems", "entries at most"),
        )
        if limit in rule
    ]
    if "items" in rule:
        limits.insert(0, f"each {_describe_allowed(rule['items'], schema)}")
    return ", ".join([kind, *limits]) + meaning


def _yaml_hint(value: Any, rule: dict[str, Any]) -> str:
    if rule.get("type") == "string" and isinstance(value, bool | int | float):
        return (
            f"; YAML has read {type(value).__name__} {value!r}: put the text into quotes, "
            "in a file as '0123', on a command line as \"key='0123'\""
        )
    return ""
