"""Text files and cells, as people and programs write them."""

import csv
import datetime
import io
import json
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivilt.data.cells import CellError, cell_values, clean, read_csv, read_json_rows, read_text, scalar_text

HEADER = "image,question,answer\n"
ROW = {"image": "a.png", "question": "what?", "answer": "red"}
KEYS = ("answer", "answers", "text")

# Text that a file can hold: no halves of surrogate pairs, and no NUL, which is refused.
written = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


def texts(value):
    return [scalar_text(one, "toy, row 1") for one in cell_values(value, "toy, row 1", KEYS)]


def file(tmp_path, name, content, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


# Files


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_any_line_ends_are_read(tmp_path, kind, end, mark):
    lines = {
        "rows.jsonl": ["", json.dumps(ROW), "", json.dumps(ROW), ""],
        "rows.json": ["[", json.dumps(ROW) + ",", json.dumps(ROW), "]", ""],
        "rows.csv": [HEADER.strip(), "a.png,what?,red", "", "a.png,what?,red", ""],
    }
    path = file(tmp_path, kind, mark + end.join(lines[kind]))
    assert (read_csv if kind.endswith("csv") else read_json_rows)(path) == [ROW, ROW]


@pytest.mark.parametrize("content", [json.dumps([ROW, ROW]), json.dumps([ROW, ROW], indent=2)])
def test_a_list_in_a_file_of_lines_is_read(tmp_path, content):
    assert read_json_rows(file(tmp_path, "rows.jsonl", "\ufeff\n" + content)) == [ROW, ROW]


def test_lines_in_a_file_of_a_list_are_read(tmp_path):
    assert read_json_rows(file(tmp_path, "rows.json", f"{json.dumps(ROW)}\r\n\r\n{json.dumps(ROW)}\r\n")) == [ROW, ROW]
    with pytest.raises(ValueError, match="rows.json, line 3: is not JSON"):
        read_json_rows(file(tmp_path, "rows.json", f'{json.dumps(ROW)}\n\n{{"image": \n'))


def test_line_separators_inside_texts_end_no_line(tmp_path):
    row = {"question": "a\u2028b\x85c\x1ed"}
    assert read_json_rows(file(tmp_path, "rows.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_a_key_twice_in_an_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl, line 2: .*names 'answer' twice"):
        read_json_rows(file(tmp_path, "rows.jsonl", '{"answer": 1}\n{"answer": "red", "answer": "blue"}'))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "answers.txt", "settings.yaml"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n".encode("utf-16"), "is not UTF-8 .line 1: .*save it as UTF-8 .*UTF-16"),
        ("a\nb\n".encode("utf-16-le"), "holds a NUL character, .* UTF-16 .*save it as UTF-8"),
        ("a\ngr\xfc\xdfe\n".encode("latin-1"), "is not UTF-8 .line 2: .*save it as UTF-8"),
    ],
)
def test_a_file_in_another_encoding_is_refused_with_the_way_out(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_text(file(tmp_path, name, content))


# CSV


def csv_rows(tmp_path, content):
    return read_csv(file(tmp_path, "rows.csv", content))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_delimiter_of_a_spreadsheet_is_found(tmp_path, delimiter):
    stream = io.StringIO(newline="")
    rows = [
        ["image", "question", "answer"],
        ["a.png", "red, blue; or\tgreen | grey?", "5,5"],
        ["b.png", '5" disk?', ""],
    ]
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    assert csv_rows(tmp_path, stream.getvalue()) == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_other_signs_in_the_header_do_not_mislead(tmp_path):
    (row,) = csv_rows(tmp_path, '"image; or ""path"", of it",answer (yes;no;maybe)\na.png,yes\n')
    assert row == {'image; or "path", of it': "a.png", "answer (yes;no;maybe)": "yes"}


def test_quotes_after_a_blank_are_quotes(tmp_path):
    assert csv_rows(tmp_path, '"image", "question", "answer"\n"a.png", "what, now?", "red"\n') == [
        ROW | {"question": "what, now?"}
    ]
    (row,) = csv_rows(tmp_path, f'{HEADER}a.png,"he said, ""what?""", red\n')
    assert row == ROW | {"question": 'he said, "what?"', "answer": " red"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,what,red\nb.png,red, or blue?,red\n", "rows.csv, line 3: has 4 cells, but the header names 3 columns"),
        ("a.png,what,red\n\nb.png,what\n", "rows.csv, line 4: has 2 cells, but the header names 3 columns"),
        ('a.png,"what?,red\nb.png,who,blue\n', "rows.csv, line 2: the quotes do not pair up .unexpected end of data"),
        ('a.png,"what\nnow",red\nb.png,"who"?,blue\n', "rows.csv, line 4: the quotes do not pair up"),
        ('a.png,"say \\"what\\"",red\n', "rows.csv, line 2: the quotes do not pair up .*written twice"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        csv_rows(tmp_path, HEADER + content)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,question,answer,answer", "rows.csv, line 1: the header names 'answer' twice"),
        ("image,question,answer, answer ", "rows.csv, line 1: the header names 'answer' twice"),
        (",image,question,answer", "rows.csv, line 1: column 1 of the header has no name; .*index=False"),
        ("image,question,answer,", "rows.csv, line 1: column 4 of the header has no name"),
    ],
)
def test_a_header_that_loses_cells_is_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        csv_rows(tmp_path, f"{header}\na.png,what?,red,blue\n")


def test_empty_rows_of_a_spreadsheet_are_left_out(tmp_path):
    assert csv_rows(tmp_path, f"\n{HEADER}a.png,what?,red\n,,\n , ,\n\n,,,,,\n") == [ROW]


def test_blanks_around_the_names_of_columns_do_no_harm(tmp_path):
    assert csv_rows(tmp_path, "image, question , answer\na.png,what?,red\n") == [ROW]


@given(st.lists(st.tuples(written, written).filter(lambda row: any(map(str.strip, row)))))
def test_every_text_that_csv_writes_comes_back_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "cells.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("image", "answer"), *rows])
    assert [tuple(row.values()) for row in read_csv(path)] == rows


@settings(max_examples=30)
@given(st.lists(st.dictionaries(written, st.none() | st.booleans() | st.integers() | written), min_size=2))
def test_every_object_that_json_writes_comes_back_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        for name, content in (("cells.jsonl", "\n".join(lines)), ("cells.json", f"[{','.join(lines)}]")):
            (folder / name).write_bytes(content.encode())
            assert read_json_rows(folder / name) == rows


# Cells


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("  red \n", ["red"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("half \ud800 a pair", ["half \N{REPLACEMENT CHARACTER} a pair"]),
        ("None", ["None"]),
        ("nan", ["nan"]),
        ("007", ["007"]),
        ("1.50", ["1.50"]),
        ("TRUE", ["TRUE"]),
        (True, ["true"]),
        (np.False_, ["false"]),
        (2, ["2"]),
        (2.0, ["2"]),
        (-0.0, ["0"]),
        (2.5, ["2.5"]),
        (np.float32(0.1), ["0.1"]),
        (np.float32(2), ["2"]),
        (np.int64(7), ["7"]),
        (np.str_("red"), ["red"]),
        (Decimal("1.50"), ["1.50"]),
        (Decimal("1E+2"), ["100"]),
        (datetime.date(2026, 11, 28), ["2026-11-28"]),
        (datetime.datetime(2026, 11, 28, 17, 30), ["2026-11-28 17:30:00"]),
        (np.datetime64("2026-11-28"), ["2026-11-28"]),
        (None, [""]),
        (float("nan"), [""]),
        (np.float32("nan"), [""]),
        (np.datetime64("NaT"), [""]),
        (Decimal("NaN"), [""]),
        ([], []),
        (["red", None, 3], ["red", "", "3"]),
        (("red", ["dark red"]), ["red", "dark red"]),
        (np.array(["red", "blue"]), ["red", "blue"]),
        ({"text": "red"}, ["red"]),
        ({"answer": "red", "answer_id": 1}, ["red"]),
        ({"answer": None}, [""]),
        ({"answers": [{"answer": "red", "answer_confidence": "yes"}, {"answer": "pink"}]}, ["red", "pink"]),
        ({"answer": ["red", "pink"], "answer_id": [1, 2]}, ["red", "pink"]),
        ({"text": ["red"], "answer_start": [3]}, ["red"]),
        ([{"answer": "red"}, {"text": "pink"}], ["red", "pink"]),
        ("['red', 'dark, red']", ["red", "dark, red"]),
        ('["red", null, true]', ["red", "", "true"]),
        ("[\"it's\", 'red']", ["it's", "red"]),
        ("('red', 'blue')", ["red", "blue"]),
        ("[1, 2]", ["1", "2"]),
        ("[]", []),
        ("[{'answer': 'red', 'answer_id': 1}]", ["red"]),
        ("{'text': 'red'}", ["red"]),
        ("[unclear]", ["[unclear]"]),
        ("(none)", ["(none)"]),
        ("(12,500)", ["(12,500)"]),
        ("(0, 1)", ["(0, 1)"]),
        ("[sic] red", ["[sic] red"]),
        ("{}", ["{}"]),
        ("()", ["()"]),
    ],
)
def test_cells_in_every_form(value, wanted):
    assert texts(value) == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"red", "should hold text or a number, got bytes b'red'; write it as text"),
        (float("inf"), "got float inf"),
        ({"ids": ["red"], "weights": [1.0]}, "got dict {'ids'"),
        ({"answer": "red", "text": "pink"}, "got dict"),
        ({}, "got dict {}"),
        ([["red"], {"red"}], "got set {'red'}"),
        (1j, "got complex 1j"),
        ("['red' 'blue']", r"looks like a list, but cannot be read as one: .* Write it as JSON: \[\"red\""),
        ("['red' ... 'blue']", "looks like a list"),
        ("array(['red', 'blue'], dtype=object)", "looks like a list"),
        ("[1 2 3]", "looks like a list"),
        ("['red', nan]", "looks like a list"),
    ],
)
def test_a_cell_of_another_kind_is_refused_with_its_row(value, message):
    with pytest.raises(ValueError, match=f"toy, row 1.*{message}"):
        texts(value)


def test_a_cell_of_another_kind_is_a_type_error_too():
    with pytest.raises(TypeError):
        scalar_text(b"red", "toy")
    with pytest.raises(CellError, match="toy should hold a name, got int 3"):
        scalar_text(3, "toy", "a name", numbers=False)


@given(written)
def test_a_text_stays_as_it_is_but_for_its_ends_and_its_form(text):
    assert scalar_text(text, "toy") == clean(text) == clean(clean(text))
    assert clean(text).strip() == clean(text)


# A blank text between quotes looks as what lies between two texts of numpy, and is refused.
@given(st.lists(written.filter(lambda text: text.strip() and "'" not in text)))
def test_lists_of_texts_that_programs_write_into_cells_are_read(listed):
    wanted = [clean(text) for text in listed]
    assert texts(json.dumps(listed)) == wanted
    assert texts(json.dumps(listed, ensure_ascii=False)) == wanted
    assert texts(str(listed)) == wanted
