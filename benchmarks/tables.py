"""Writes the tables of the committed result files into README.md and the pages of docs.

    python benchmarks/tables.py

`<!-- peers-amd-epyc.json: goals_table -->` in a page, up to `<!-- end -->`, holds what `goals_table` of peers.py makes of
that file in benchmarks/results.
"""

import importlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("benchmarks", "scaling", "fusion", "photographs", "captioning", "grounding", "reasoning", "search")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
TABLE = re.compile(r"<!-- ((\w+)[\w-]*\.json): (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(page: str) -> str:
    """A page's text with its tables as the result files have them."""

    def table(match: re.Match) -> str:
        file, benchmark, function = match.groups()
        results = json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))
        made = getattr(importlib.import_module(benchmark), function)(results)
        return f"<!-- {file}: {function} -->\n{made}\n<!-- end -->"

    return TABLE.sub(table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
