"""What stands in a file of data, as it was written: text files of every kind, and what one cell may hold.

| file | read as |
|---|---|
| any text file | UTF-8, with a byte order mark or without; lines end in any of the usual ways |
| `.csv`, `.tsv` | comma, semicolon, tab or bar, whichever comes first in the header; every cell is text, "None" and "007" too |
| `.json` | a list of objects, alone or under "data"; or one object a line |
| `.jsonl`, `.ndjson` | one object a line; or a list of them |

| cell | read as |
|---|---|
| text | itself, without blanks around it, in Unicode's composed form (NFC); empty: not known |
| whole number, 2.0 | "2": in a table, a column of whole numbers with gaps holds them as 2.0 |
| other number, `Decimal` | its digits |
| `True`, `False` | "true", "false" |
| date, time | as Python writes it: "2026-11-28" |
| `None`, NaN, NaT | not known |
| list, array | each of its cells |
| object | what stands under the one key that the column knows, a text, a list or a list of objects |
| text that is a list or an object, as pandas and `json` write one into a cell | what it says |

Everything else is refused with its row, its column and the way out.
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
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from hivilt.processing_hivilt import well_formed

# In the header the first of these separates cells.
_HEADER = re.compile(r'(?:"(?:[^"]|"")*+"|[^",;\t|\r\n])*+([,;\t|])')
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

# How None, NaN and their like look as text; as text of a file they are answers like any other.
_UNKNOWN = frozenset(("None", "nan", "NaN", "NaT", "<NA>"))
# What begins so is meant as a list or an object; where it cannot be read as one, it is no answer either.
_MEANT_AS_LIST = re.compile(r"""\[\s*(?:['"{]|nan\b|None\b|null\b)|\{\s*['"]|array\(""")


def read_text(path: str | os.PathLike, what: str = "") -> str:
    """A text file, without its byte order mark; line ends are as they stand there.

    Args:
        path: the file.
        what: what to call it in messages; default: its name.

    Raises:
        ValueError: it is not UTF-8, or holds NUL characters, as UTF-16 does; names the line and the way out.
    """
    content, what = Path(path).read_bytes(), what or Path(path).name
    if content.startswith(_UTF16):
        raise ValueError(f"{what}: is UTF-16, not UTF-8; save it as UTF-8 (a spreadsheet calls it 'CSV UTF-8').")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{what}: is not UTF-8 (line {line}: {error}); save it as UTF-8 (a spreadsheet calls it 'CSV UTF-8'), or "
            f"convert it: iconv -f WINDOWS-1252 -t UTF-8."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{what}, line {line}: holds a NUL character, so it is damaged, UTF-16 or no text; save it as UTF-8 text."
        )
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text, however they end. Not `str.splitlines`, which also cuts at signs that texts may hold."""
    return re.split(r"\r\n|\n|\r", text)


def parse_json(text: str, where: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """What a text says in JSON.

    Args:
        text: the JSON.
        where: what to call it in messages.
        object_hook: may shorten its objects, as `json.loads` does, where memory is short; objects that name a key twice
            are then not looked for.

    Raises:
        ValueError: it is not JSON, or an object names a key twice.
    """
    try:
        return json.loads(
            text, object_hook=object_hook, object_pairs_hook=None if object_hook is not None else _object_of
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON ({error}).") from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object names {_twice(key for key, _ in pairs)!r} twice; drop one")
    return found


def _twice(names: Iterator[str] | list[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def read_json_rows(path: Path) -> Any:
    """What a JSON file holds, or the list of what its lines hold.

    Raises:
        ValueError: it is neither.
    """
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    by_line = path.suffix.lower() != ".json"
    # A list in a file of lines, and lines in a file of a list: what both begin with tells.
    if by_line and lines and lines[0][1].lstrip().startswith("["):
        by_line = False
    elif not by_line and len(lines) > 1 and _is_object(lines[0][1]):
        by_line = True
    if by_line:
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
    text, name = read_text(path), path.name
    found = _HEADER.match(text.lstrip())
    delimiter = found[1] if found else ","
    # Else a quote after a blank would be part of the text, and the separators in it would separate.
    blanks = re.search(rf'{re.escape(delimiter)} +"(?!")', text) is not None
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=blanks)
    header, rows = None, []
    limit = csv.field_size_limit(2**31 - 1)
    try:
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{name}, line {line}: the quotes do not pair up ({error}). A cell that holds {delimiter!r}, a line "
                    'break or a quote stands in quotes, and a quote in it is written twice: "a 5"" disk, red".'
                ) from error
            if cells is None:
                return rows
            if not any(map(str.strip, cells)):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header, f"{name}, line {line}")
            elif len(cells) != len(header):
                raise ValueError(
                    f"{name}, line {line}: has {len(cells)} cells, but the header names {len(header)} columns "
                    f"({', '.join(header)}); the row begins {reprlib.repr(cells)}. Put a text that holds {delimiter!r} in "
                    "quotes, and fill up what is missing."
                )
            else:
                rows.append(dict(zip(header, cells, strict=True)))
    finally:
        csv.field_size_limit(limit)


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

    Args:
        value: the cell.
        where: what to call it in messages, which go on with "should hold".
        expected: what it should hold, likewise.
        numbers: `False` takes text alone.

    Raises:
        CellError: it holds anything else.
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
    """The single values of a cell that may hold a list or objects, in order; for `scalar_text`.

    Args:
        value: the cell.
        where: what to call it in messages.
        keys: where an object has its value, its list, or the objects of its list. One with none or several of these is
            among the values, for `scalar_text` to refuse.

    Raises:
        ValueError: it is a text that looks like a list and is none.
    """
    return list(_flatten(_as_list(value, where) if isinstance(value, str) else value, keys))


def _flatten(value: Any, keys: Collection[str]) -> Iterator[Any]:
    if hasattr(value, "tolist") and not isinstance(value, np.generic):
        value = value.tolist()  # an array of any library
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _flatten(one, keys)
    elif isinstance(value, Mapping) and len(there := [key for key in keys if key in value]) == 1:
        yield from _flatten(value[there[0]], keys)
    else:
        yield value


def _as_list(text: str, where: str) -> Any:
    """The list or object that pandas or `json` wrote into a cell; any other text as it is."""
    bare = text.strip()
    if bare[:1] + bare[-1:] not in ("[]", "{}", "()") and not bare.startswith("array("):
        return text
    for parse in (json.loads, _parse_literal):
        try:
            found = parse(bare)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) or isinstance(found, (tuple, dict)) and found:
            return found
    if _MEANT_AS_LIST.match(bare):
        raise ValueError(
            f"{where}: looks like a list, but cannot be read as one: {reprlib.repr(bare)}. Write it as JSON: "
            '["red", "dark red"].'
        )
    return text


def _parse_literal(text: str) -> Any:
    found = ast.literal_eval(text)
    # ['red' 'blue'], as numpy writes an array, would be one text to Python.
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    strings = sum(token.type == tokenize.STRING for token in tokens)
    constants = sum(
        isinstance(node, ast.Constant) and isinstance(node.value, str)
        for node in ast.walk(ast.parse(text, mode="eval"))
    )
    if strings != constants:
        raise ValueError("texts without commas between")
    return found
