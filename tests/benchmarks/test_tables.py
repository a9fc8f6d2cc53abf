"""The tables of README and of the pages of docs are what the committed result files say."""

import re

import pytest


@pytest.mark.parametrize("page", ["README.md", "benchmarks.md", "scaling.md", "fusion.md", "photographs.md"])
def test_pages_show_what_was_measured(benchmark, page):
    (path,) = (path for path in benchmark.PAGES if path.name == page)
    text = path.read_text(encoding="utf-8")
    assert benchmark.TABLE.findall(text)
    assert benchmark.fill(text) == text


def test_a_table_is_replaced_and_the_rest_is_left(benchmark):
    (file,) = (path.name for path in (benchmark.ROOT / "benchmarks" / "results").glob("sparse_accuracy-*.json"))
    page = f"above\n<!-- {file}: table -->\n| old |\n<!-- end -->\nbetween\n<!-- a comment -->\n<!-- end -->\n"
    filled = benchmark.fill(page)
    assert re.fullmatch(
        r"above\n<!-- \S+: table -->\n\| trained \| .*\|\n<!-- end -->\nbetween\n<!-- a comment -->\n<!-- end -->\n",
        filled,
        re.DOTALL,
    )
    assert "old" not in filled and benchmark.fill(filled) == filled
