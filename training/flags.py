"""Flags of a command line, from words or from a file of settings; what is wrong with them is told by their names."""

import argparse
import difflib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

# YAML's words for true and false that transformers does not know.
_ON_OFF = {"on": "true", "off": "false"}


class Parser(HfArgumentParser):
    """Raises `ValueError` for what is wrong, naming the flag and the nearest that there is; argparse would print all
    flags and end the process."""

    def __init__(self, *args, **kwargs):
        self.flags: dict[str, argparse.Action] = {}  # by name, without dashes
        super().__init__(*args, **kwargs)
        # Of the flags, those that take names with values.
        self.mappings = {
            name for kind in self.dataclass_types for name, hint in get_type_hints(kind).items() if "dict" in str(hint)
        }
        self.register("type", string_to_bool, lambda text: string_to_bool(_ON_OFF.get(text.lower(), text)))

    def add_argument(self, *names, **options) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if names[0] == f"--{action.dest}":  # and not --no_..., of what is on by default
            self.flags[action.dest] = action
        return action

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-") and word.strip("-")]
        if flags:
            raise ValueError("; ".join(f"{flag} is no flag{self.nearest(flag)}" for flag in flags))
        if unknown and is_settings_file(unknown[0]):
            raise ValueError(f"{unknown[0]}: a settings file stands alone; put the other flags into it.")
        if unknown:
            raise ValueError(f"{unknown[0]!r}: expected a flag such as --output_dir, or its values; --help lists them.")
        for name in self.mappings:
            value = getattr(parsed, name)
            if isinstance(value, str) and value.startswith("{"):  # else transformers takes it for a file
                read_mapping(name, value)
        return parsed

    def nearest(self, flag: str) -> str:
        """What to say after the name of a flag that there is not; with dashes if it has some."""
        name = flag.lstrip("-").replace("-", "_").lower()
        longer = [known for known in self.flags if len(name) > 3 and known.endswith(f"_{name}")]
        near = difflib.get_close_matches(name, self.flags, cutoff=0.8) or longer
        near = near or difflib.get_close_matches(name, self.flags)
        dashes = "--" if flag.startswith("-") else ""
        return f"; did you mean {dashes}{near[0]}?" if near else "; --help lists all."

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message))


class _Settings(yaml.SafeLoader):
    """YAML whose words are words, as in YAML 1.2: `no` is Norwegian and `010` is not eight. Nothing stands there twice."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.constructor.ConstructorError(problem=f"{key.value} twice", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _words, _begins in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Settings.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_words})$"), _begins)


def read_mapping(name: str, text: str) -> Any:
    """What the JSON says that is given to the flag `name`; `ValueError` if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON such as '{{\"name\": 8}}', got {text!r} ({error}).") from error


def is_settings_file(word: str) -> bool:
    """Whether a word of the command line names a file that flags are read from."""
    return not word.startswith("-") and word.lower().endswith((".json", ".yaml", ".yml"))


def flags_in_file(path: Path, parser: Parser | None = None) -> list[str]:
    """The flags that a JSON or YAML file of names and values stands for, so that values are read as those of flags, as
    they are written; null is a flag that is not given. Without a `parser`, which knows the flags, nothing is checked.

    Raises:
        ValueError: it is neither JSON nor YAML, a flag is unknown or stands there twice, or a value is none of a flag.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); save it as UTF-8.") from error
    settings = (_json_settings if path.suffix.lower() == ".json" else _yaml_settings)(text, path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected names of flags with their values, got a {type(settings).__name__}.")
    flags = []
    for name, value in settings.items():
        if parser is not None:
            _check_setting(name, value, parser, path)
        if value is None or value == []:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
        # What begins with a dash would pass for a flag.
        flags += [f"--{name}={values[0]}"] if values[0].startswith("-") else [f"--{name}", *values]
    return flags


def _json_settings(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise ValueError(f"{path}: {name} stands there twice.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: is not JSON ({error.msg}).") from error


def _yaml_settings(text: str, path: Path) -> Any:
    def read(node: yaml.Node, value: Any) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [read(one, element) for one, element in zip(node.value, value, strict=True)]
        # Numbers as they are written; true, false, null and what is within a mapping as what they mean.
        return node.value if isinstance(value, str | int | float) and not isinstance(value, bool) else value

    try:
        settings, node = yaml.load(text, _Settings), yaml.compose(text, _Settings)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{path}, line {mark.line + 1}: is not YAML ({error.problem or error.context}).") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML ({error}).") from error
    if not isinstance(settings, dict):
        return {} if settings is None else settings
    return {key.value: read(one, settings[name]) for (key, one), name in zip(node.value, settings, strict=True)}


def _check_setting(name: str, value: Any, parser: Parser, path: Path) -> None:
    action = parser.flags.get(name.replace("-", "_"))
    if action is None:
        raise ValueError(f"{path}: {name} is no flag{parser.nearest(name)}")
    is_bool, several = action.type is string_to_bool, action.nargs == "+"
    expected = "true or false" if is_bool else "one value or a list of them" if several else "one value"
    if isinstance(value, list) and (not several or not value and action.default):
        raise ValueError(f"{path}: {name}: expected {expected}, got a list of {len(value)}.")
    if isinstance(value, dict) and name not in parser.mappings:
        raise ValueError(f"{path}: {name}: expected {expected}, got names with values.")
    for one in value if isinstance(value, list) else [value]:
        if isinstance(value, list) and (one is None or isinstance(one, list | dict)):
            raise ValueError(f"{path}: {name}: expected plain values in its list, got {json.dumps(one)}.")
        if isinstance(one, bool) and not is_bool:
            raise ValueError(f"{path}: {name}: expected {expected}, got {json.dumps(one)}; quote it if it is a word.")
        if one == "None":
            raise ValueError(f"{path}: {name}: got None; leave it out, or write null.")
