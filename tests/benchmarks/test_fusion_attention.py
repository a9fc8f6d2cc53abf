"""One image of a tiny checkpoint, and a question that nobody asked."""

import pytest
from PIL import Image

from hivilt import HiViLTForQuestionAnswering
from hivilt.data.sort_of_clevr import write
from tiny import make_model, make_processor


@pytest.fixture
def flags(tmp_path):
    write(tmp_path / "data", {"train": 1, "test": 1})
    make_model(HiViLTForQuestionAnswering).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    return ["--checkpoint", str(tmp_path / "model"), "--data_dir", str(tmp_path / "data")]


def test_draws_where_a_question_looks(benchmark, flags, tmp_path, capsys):
    path = tmp_path / "attention.png"
    benchmark.main([*flags, "--output", str(path)])
    assert capsys.readouterr().out.split() == [str(path)]
    Image.open(path).verify()


def test_a_question_that_is_not_asked(benchmark, flags, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*flags, "--question", "why"])
    assert "question: no test question begins with 'why'" in capsys.readouterr().err
