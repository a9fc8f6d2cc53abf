"""What stands in a file of data, as it was written: text files of every kind, and what one cell may hold.

`docs/data.md` has the rules in two tables. What is not in them is refused with its row, its column and the way out.
"""

import ast
import csv
import datetime
import io
import json
import math
import os
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from hivilt.processing_hivilt import well_formed

# What comes first in the header, a comma, semicolon, tab or bar, separates cells.
_HEADER = re.compile(r'(?:"(?:[^"]|"")*+"|[^",;\t|\r\n])*+([,;\t|])')

# How None, NaN and their like look as text; as text of a file they are answers like any other.
_UNKNOWN = frozenset(("None", "nan", "NaN", "NaT", "<NA>"))
# What begins so is meant as a list or an object; where it cannot be read as one, it is no answer either.
_MEANT_AS_LIST = re.compile(r"""\[\s*(?:['"{]|nan\b|None\b|null\b|[-+.\d]+\s+[-+.\d])|\{\s*['"]|array\(""")


def read_text(path: str | os.PathLike, what: str = "") -> str:
    """A text file, without its byte order mark; line ends are as they stand there. Messages call it `what`, or by its name.

    Raises:
        ValueError: it is not UTF-8, or holds NUL characters, as UTF-16 does; names the way out.
    """
    content, what = Path(path).read_bytes(), what or Path(path).name
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{what}: is not UTF-8 (line {line}: {error}); save it as UTF-8 (a spreadsheet calls it 'CSV UTF-8'), or "
            f"convert it: iconv -f WINDOWS-1252 (or UTF-16) -t UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{what}: holds a NUL character, so it is damaged, UTF-16 or no text; save it as UTF-8 text.")
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text, however they end. Not `str.splitlines`, which also cuts at signs that texts may hold."""
    return re.split(r"\r\n|\n|\r", text)


def parse_json(text: str, where: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """What a text, called `where` in messages, says in JSON.

    `object_hook` may shorten its objects, as `json.loads` does; objects that name a key twice are then not looked for.

    Raises:
        ValueError: it is not JSON, or an object names a key twice.
    """
    hook = {"object_pairs_hook": _object_of} if object_hook is None else {"object_hook": object_hook}
    try:
        return json.loads(text, **hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {f'is not JSON ({error})' if text.strip() else 'is empty'}.") from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError(f"an object names {_twice(key for key, _ in pairs)!r} twice; drop one")
    return read


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def read_json_rows(path: Path) -> Any:
    """What a JSON file holds, or the list of what its lines hold.

    Raises:
        ValueError: it is neither.
    """
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    # What it begins with tells a list from an object a line, whatever the ending.
    if lines and _is_object(lines[0][1]) and (len(lines) > 1 or path.suffix.lower() != ".json"):
        return [parse_json(line, f"{path.name}, line {number}") for number, line in lines]
    rows = parse_json(text, path.name)
    return rows["data"] if isinstance(rows, dict) and "data" in rows else rows


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; every cell is text as it is written. Rows without any text are left out.

    Raises:
        ValueError: a row has more or fewer cells than the header, a column has no name or the name of another, or a
            quote is never closed; names the line.
    """
    text = read_text(path)
    first = _HEADER.match(text.lstrip())
    delimiter = first[1] if first else ","
    # Else a quote after a blank would be part of the text, and the separators in it would separate.
    blanks = re.search(rf'{re.escape(delimiter)} +"(?!")', text) is not None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=blanks)
    header, rows, line = None, [], 1
    try:
        for cells in reader:
            where, line = f"{path.name}, line {line}", reader.line_num + 1
            if not any(map(str.strip, cells)):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header, where)
            elif len(cells) != len(header):
                raise ValueError(
                    f"{where}: has {len(cells)} cells, but the header names {len(header)} columns ({', '.join(header)}); "
                    f"the row begins {reprlib.repr(cells)}. Put a text that holds {delimiter!r} in quotes, and fill up "
                    "what is missing."
                )
            else:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{path.name}, line {line}: the quotes do not pair up ({error}). A cell that holds {delimiter!r}, a line "
            'break or a quote stands in quotes, and a quote in it is written twice: "a 5"" disk, red".'
        ) from error
    return rows


def _check_header(header: list[str], where: str) -> None:
    if "" in header:
        raise ValueError(
            f"{where}: column {header.index('') + 1} of the header has no name; name it or drop it. (pandas writes its "
            "index so: to_csv(..., index=False).)"
        )
    if (twice := _twice(header)) is not None:
        raise ValueError(f"{where}: the header names {twice!r} twice; rename or drop one.")


def clean(text: str) -> str:
    """A text without blanks around it, in Unicode's composed form, and without halves of surrogate pairs."""
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", well_formed(text)).strip()


class CellError(TypeError, ValueError):
    """A cell holds a kind of thing that its column cannot."""


def scalar_text(value: Any, where: str, expected: str = "text or a number", numbers: bool = True) -> str:
    """A cell with one text, number, truth value, date or time in it, as text; empty: not known.

    Raises:
        CellError: it holds anything else, or, without `numbers`, anything but text: "`where` should hold `expected`".
    """
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, np.floating):
        value = float(str(value))  # the shortest digits that mean it: float32's 0.1 is 0.1
    elif isinstance(value, np.generic) and not isinstance(value, np.datetime64):
        value = value.item()
    if value is None or str(value) in _UNKNOWN:
        return ""
    if numbers:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value) if value.is_integer() else value)
        if isinstance(value, Decimal) and value.is_finite():
            return format(value, "f")
        if isinstance(value, (int, datetime.date, datetime.time, np.datetime64)):
            return str(value)
    raise CellError(
        f"{where} should hold {expected}, got {type(value).__name__} {reprlib.repr(value)}; write it as text."
    )


def cell_values(value: Any, where: str, keys: Collection[str]) -> list[Any]:
    """The single values of a cell, called `where` in messages, that may hold a list or objects, in order.

    An object has its value, its list, or the objects of its list under one of `keys`. With none or several of these it is
    among the values, for `scalar_text` to refuse.

    Raises:
        ValueError: it is a text that looks like a list and is none.
    """
    parsed = as_list(value, where) if isinstance(value, str) else value
    if isinstance(value, str) and isinstance(parsed, tuple) and all(isinstance(part, (int, float)) for part in parsed):
        parsed = value  # (12,500) is an amount, and (0, 1) an interval
    return list(_flatten(parsed, keys))


def _flatten(value: Any, keys: Collection[str]) -> Iterator[Any]:
    if hasattr(value, "tolist") and not isinstance(value, np.generic):
        value = value.tolist()  # an array of any library
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flatten(part, keys)
    elif isinstance(value, Mapping) and len(there := [key for key in keys if key in value]) == 1:
        yield from _flatten(value[there[0]], keys)
    else:
        yield value


def as_list(text: str, where: str) -> Any:
    """The list or object that pandas or `json` wrote into a cell; any other text as it is."""
    bare = text.strip()
    if bare[:1] + bare[-1:] not in ("[]", "{}", "()") and not bare.startswith("array("):
        return text
    for parse in (json.loads, _parse_literal):
        try:
            value = parse(bare)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) or isinstance(value, (tuple, dict)) and value:
            return value
    if _MEANT_AS_LIST.match(bare):
        raise ValueError(
            f"{where}: looks like a list, but cannot be read as one: {reprlib.repr(bare)}. Write it as JSON: "
            '["red", "dark red"].'
        )
    return text


def _parse_literal(text: str) -> Any:
    # ['red' 'blue'], as numpy writes an array, would be one text to Python.
    if re.search(r"""['"]\s+['"]""", text):
        raise ValueError("texts without commas between")
    return ast.literal_eval(text)
