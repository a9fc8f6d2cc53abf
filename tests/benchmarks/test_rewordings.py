import json


def test_what_is_asked_in_other_words_is_answered_by_kind(benchmark, tmp_path, capsys):
    found = benchmark.main(["--max_questions", "300", "--output_dir", str(tmp_path)])
    assert set(found["by_kind"]) == {"color", "shape", "is color", "is shape", "is both"}
    assert found["accuracy"] > 0.95
    assert found == json.loads((tmp_path / "rewordings.json").read_text())
    assert f"{found['accuracy']:.4f} of {found['questions']}" in capsys.readouterr().out
