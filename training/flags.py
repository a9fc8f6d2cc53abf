"""Flags of a command line, from words or from a file of settings; what is wrong with them is told by their names."""

import argparse
import difflib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser


class Parser(HfArgumentParser):
    """Raises `ValueError` for what is wrong, naming the flag and the nearest that there is; argparse would print all
    flags and end the process."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            raise ValueError("; ".join(f"{flag} is no flag{_nearest(flag, vars(parsed))}" for flag in flags))
        if unknown:
            raise ValueError(
                f"{unknown[0]!r}: expected a flag such as --output_dir, or its values; a settings file stands alone. --help "
                "lists all flags."
            )
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in vars(parsed).items():
            if isinstance(value, str) and value.startswith("{") and "dict" in str(hints.get(name)):
                read_mapping(name, value)
        return parsed

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
        known = {f"--{field.name}": field for kind in self.dataclass_types for field in fields(kind)}
        flag, _, what = said.partition(": ")
        if switch := re.fullmatch("Truthy value expected: got (.*) but expected one of .*", what, re.DOTALL):
            longer = [name for name, field in known.items() if name.startswith(f"{flag}_") and field.type is int]
            hint = f"; did you mean {longer[0]}?" if longer else "."
            said = f"{flag}: got {switch[1]!r}, but it is a switch: expected nothing after it, or true or false{hint}"
        elif re.fullmatch("expected (at least )?one argument", what):
            meaning = known[flag].metadata.get("help", "").replace("%%", "%") if flag in known else ""
            said = f"{flag}: got no value, expected one. {meaning}".rstrip()
        raise ValueError(said)


def _nearest(flag: str, known: Iterable[str]) -> str:
    """What to say after the name of a flag that there is not."""
    name = flag.lstrip("-").replace("-", "_").lower()
    longer = [one for one in known if len(name) > 3 and one.endswith(f"_{name}")]
    near = difflib.get_close_matches(name, known, cutoff=0.8) or longer or difflib.get_close_matches(name, known)
    return f"; did you mean --{near[0]}?" if near else "; --help lists all."


def read_mapping(name: str, text: str) -> Any:
    """What the JSON says that is given to the flag `name`; `ValueError` if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON such as '{{\"name\": 8}}', got {text!r} ({error}).") from error


def is_settings_file(word: str) -> bool:
    """Whether a word of the command line names a file that flags are read from."""
    return not word.startswith("-") and word.lower().endswith((".json", ".yaml", ".yml"))


class _AsWritten(yaml.BaseLoader):
    """YAML whose words and numbers are text as it is written: `no` is Norwegian and `010` is not eight."""

    def construct_scalar(self, node):
        is_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL", "None")
        return None if is_null else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        names = [yaml.BaseLoader.construct_scalar(self, name) for name, _ in node.value]
        return _once(zip(names, (self.construct_object(value, deep=True) for _, value in node.value), strict=True))


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    settings = {}
    for name, value in pairs:
        if name in settings:
            raise ValueError(f"{name} stands there twice")
        settings[name] = value
    return settings


def _meant(value: Any) -> Any:
    """What is written within a mapping, as JSON has it: 1e-6 is a number and False is false."""
    if isinstance(value, dict):
        return {name: _meant(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_meant(one) for one in value]
    with suppress(ValueError, AttributeError):
        return json.loads(value.lower())
    return value


def flags_in_file(path: Path, parser: Parser | None = None) -> list[str]:
    """The flags that a JSON or YAML file of names and values stands for, as they are written; null and an empty list are
    flags that are not given. Without a `parser`, which knows the flags, nothing is checked.

    Raises:
        ValueError: it is neither JSON nor YAML, a flag is unknown or stands there twice, or a value is none of a flag.
        OSError: the file cannot be read.
    """
    try:
        text, is_json = path.read_text(encoding="utf-8-sig"), path.suffix.lower() == ".json"
        settings = json.loads(text, object_pairs_hook=_once) if is_json else yaml.load(text, _AsWritten) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"expected names of flags with their values, got a {type(settings).__name__}")
        flags = []
        for name, value in settings.items():
            if isinstance(value, dict):
                value = json.dumps(value if is_json else _meant(value))
            values = value if isinstance(value, list) else [] if value is None else [value]
            words = [one if isinstance(one, str) else json.dumps(one) for one in values]
            if "--" in words:  # argparse drops it
                raise ValueError(f"{name}: `--` is no value")
            if words:  # a single value may begin with a dash
                flags += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
        if parser is not None:
            parser.parse_args(flags)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    return flags
