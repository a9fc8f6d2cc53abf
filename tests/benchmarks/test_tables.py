"""The tables of README.md and docs are those of the committed result files."""


def test_pages_hold_what_was_measured(benchmark):
    count = 0
    for path in benchmark.PAGES:
        page = path.read_text(encoding="utf-8")
        assert benchmark.fill(page) == page, path
        count += len(benchmark.TABLE.findall(page))
    assert count > 30
