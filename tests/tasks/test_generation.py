"""What a model is told before it writes; tests of both tasks measure how it learns."""

import pytest

from hivilt.tasks.arguments import CaptioningArguments, VQAArguments
from hivilt.tasks.generation import prepare_to_write
from tiny import DECODER_CONFIGS, make_captioner, make_processor


def prepare(args, trains, **config):
    decoder = DECODER_CONFIGS["gpt2"]()
    decoder.n_positions = 32
    model = make_captioner(decoder_config=decoder)
    model.generation_config.update(**config)
    prepare_to_write(model, make_processor(), args, trains)
    return model.generation_config


@pytest.mark.parametrize(("args", "length"), [(CaptioningArguments(), 32), (VQAArguments(generate=True), 10)])
def test_a_new_model_searches_by_three_beams_for_words_alone(args, length):
    config = prepare(args, trains=True)
    assert (config.num_beams, config.max_new_tokens, config.min_new_tokens) == (3, length, 1)
    # Padding, unknown and begin; it may end.
    assert config.suppress_tokens == [0, 1, 2] and config.eos_token_id == 3
    assert (args.num_beams, args.max_new_tokens) == (3, length)


def test_a_checkpoint_searches_as_it_did_unless_told_otherwise():
    args = CaptioningArguments(num_beams=2)
    config = prepare(args, trains=False, num_beams=5, max_new_tokens=7, no_repeat_ngram_size=2)
    assert (config.num_beams, config.max_new_tokens) == (args.num_beams, args.max_new_tokens) == (2, 7)
    assert config.no_repeat_ngram_size == args.no_repeat_ngram_size == 2
    assert prepare(CaptioningArguments(no_repeat_ngram_size=0), False, no_repeat_ngram_size=2).no_repeat_ngram_size == 0
    assert config.suppress_tokens is None


def test_more_tokens_than_the_decoder_has_places_for_are_refused_before_training():
    with pytest.raises(
        ValueError, match="`max_new_tokens` asks for 5000 tokens, but this `gpt2` decoder has positions for"
    ):
        prepare(CaptioningArguments(max_new_tokens=5000), trains=True)
