"""What HiViLT writes, what it learns to write by, and that an image and a pair are encoded and fused once for it."""

import copy
import json
import math
import pickle

import pytest
import torch
from encoders import vision_config
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertModel,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StaticCache,
)

from hivilt import HiViLTConfig, HiViLTForConditionalGeneration, HiViLTForQuestionAnswering, generation_hivilt
from hivilt.encoders_hivilt import DECODER_FAMILIES
from hivilt.fusion_hivilt import HiViLTMemoryOutput
from tiny import (
    DECODER_CONFIGS,
    FUSIONS,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    make_captioner,
    make_config,
    make_model,
    make_tokenizer,
    with_dropout,
)

CAPTIONS = torch.tensor([[7, 8, 9, 10, 3], [11, 12, 3, -100, -100], [7, 13, 14, 3, -100], [15, 3, -100, -100, -100]])
TEXT_INDEX = torch.tensor([0, 0, 3, 4])
GENERATED_WITH = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"}
LENGTH = {"max_new_tokens": 9}


@pytest.fixture(scope="module", params=DECODER_CONFIGS)
def model(request) -> HiViLTForConditionalGeneration:
    """Not to be changed."""
    return make_captioner(request.param)


@pytest.fixture(scope="module")
def captioner() -> HiViLTForConditionalGeneration:
    """Not to be changed."""
    return make_captioner()


def rows_of(batch: dict, row: int) -> dict:
    """One text of a batch, and its image."""
    image = batch["image_index"][row]
    length = int(batch["attention_mask"][row].sum())
    return {"input_ids": batch["input_ids"][row, None, :length], "pixel_values": batch["pixel_values"][image, None]}


def unpadded(tokens: torch.Tensor, end: int) -> list[list[int]]:
    """Each row up to its first end token."""
    rows = [row.tolist() for row in tokens]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def count_rows(module: torch.nn.Module, name: str = "last_hidden_state") -> list[int]:
    """How many rows each later call of a module gives."""
    rows = []
    module.register_forward_hook(lambda module, args, output: rows.append(len(output[name])))
    return rows


# Writing


@pytest.mark.checklist("10")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_text_alone_is_written_as_in_a_batch_with_padding_and_fewer_images(num_beams, model, batch):
    written = model.generate(**batch, **LENGTH, num_beams=num_beams, eos_token_id=None)
    assert len(set(map(tuple, written.tolist()))) == 5 and (written[:, 0] == 2).all()
    # An end that some texts meet in the middle, so that rows are of different lengths.
    ends = {token for token in written[:, 2:7].flatten().tolist() if 0 < (written == token).any(dim=1).sum() < 5}
    asked = LENGTH | {"num_beams": num_beams, "eos_token_id": min(ends)}
    written = model.generate(**batch, **asked)
    alone = [model.generate(**rows_of(batch, row), **asked)[0] for row in range(5)]
    end = asked["eos_token_id"]
    assert unpadded(written, end) == [unpadded(row[None], end)[0] for row in alone]
    assert len({len(row) for row in unpadded(written, end)}) > 1


def test_without_a_cache_and_with_one_the_same_is_written(model, batch):
    assert torch.equal(model.generate(**batch, **LENGTH), model.generate(**batch, **LENGTH, use_cache=False))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_with_a_cache_of_fixed_size_the_same_is_written(num_beams, model, batch):
    asked = {**LENGTH, "num_beams": num_beams, "return_dict_in_generate": True}
    static = model.generate(**batch, **asked, cache_implementation="static", disable_compile=True)
    assert isinstance(static.past_key_values.self_attention_cache, StaticCache)
    assert torch.equal(static.sequences, model.generate(**batch, **asked).sequences)


def test_beams_find_what_is_at_least_as_likely_and_return_as_many_as_asked(model, batch):
    asked = {**LENGTH, "return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    greedy = model.generate(**batch, **asked)
    beams = model.generate(**batch, **asked, num_beams=4, num_return_sequences=2)
    assert greedy.sequences.shape == (5, 10) and beams.sequences.shape == (10, 10)
    likelihood = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True).mean(dim=1)
    best = beams.sequences_scores.view(5, 2) * 9 / 10  # transformers divides by the length, begin token included or not
    assert (best[:, 0] >= best[:, 1]).all()
    assert (beams.sequences_scores.view(5, 2)[:, 0] >= likelihood - 1e-4).sum() >= 4


def test_a_model_in_training_mode_is_told_once_that_its_batch_norms_move(batch, caplog):
    config = make_config(decoder_config=DECODER_CONFIGS["gpt2"]()).to_dict() | {
        "vision_config": vision_config("resnet")
    }
    model = HiViLTForConditionalGeneration(HiViLTConfig.from_dict(config)).eval()
    model.set_decoder_tokens(make_tokenizer())
    generation_hivilt.logger.warning_once.cache_clear()
    caplog.clear()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    model.generate(**batch, **LENGTH)
    assert not caplog.records and all(model.get_buffer(name).equal(buffer) for name, buffer in before.items())
    for _ in range(2):
        model.train().generate(**batch, **LENGTH)
    (told,) = caplog.records
    assert "training mode" in told.message and "`model.eval()`" in told.message
    assert not any(model.get_buffer(name).equal(buffer) for name, buffer in before.items())


def test_samples_differ_and_a_seed_repeats_them(captioner, batch):
    asked = {**LENGTH, "do_sample": True, "num_return_sequences": 3, "temperature": 3.0}
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(captioner.generate(**batch, **asked))
    assert samples[0].shape == (15, 10) and torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2]) and len(set(map(tuple, samples[0].tolist()))) > 10


@pytest.mark.checklist("10")
def test_images_and_texts_are_encoded_once_and_their_states_stand_in_for_them(batch):
    model = make_captioner()
    images, texts = count_rows(model.model.vision_model), count_rows(model.model.text_model)
    pairs = count_rows(model.memory)
    expected = model.generate(**batch, **LENGTH, num_beams=3)
    assert (images, texts, pairs) == ([3], [5], [5])
    image_states = model.encode_images(batch["pixel_values"])
    text_states = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    index, beams = {"image_index": batch["image_index"]}, {**LENGTH, "num_beams": 3}
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(image_states=image_states, text_states=text_states, **index, **beams), expected)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    given_embeds = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    assert torch.equal(model.generate(**given_embeds, image_states=image_states, **index, **beams), expected)
    assert torch.equal(model.generate(image_states=image_states, **given, **index, **beams), expected)
    assert torch.equal(
        model.generate(given.pop("input_ids"), **given, image_states=image_states, **index, **beams), expected
    )
    feature_maps = model.get_feature_maps(batch["pixel_values"])
    token_states = model.get_token_states(batch["input_ids"], batch["attention_mask"])
    states = {"feature_maps": feature_maps, "token_states": token_states, "attention_mask": batch["attention_mask"]}
    assert torch.equal(model.generate(**states, **index, **beams), expected)


def test_what_is_encoded_writes_as_often_as_asked_and_stays_as_it_was(model, batch):
    expected = model.generate(**batch, **LENGTH, num_beams=3)
    with torch.no_grad():
        encoded = model.get_encoder()(**batch)
    kept = copy.deepcopy(encoded)
    for given in (encoded, encoded, encoded.to_tuple()):
        assert torch.equal(model.generate(encoder_outputs=given, **LENGTH, num_beams=3), expected)
        assert torch.equal(encoded.last_hidden_state, kept.last_hidden_state)
        assert torch.equal(encoded.attention_mask, kept.attention_mask)
    with torch.no_grad():
        labels = torch.randint(4, 61, (5, 6))
        torch.testing.assert_close(
            model(encoder_outputs=encoded, labels=labels).loss, model(**batch, labels=labels).loss
        )


def test_a_text_before_the_answer_is_gone_on_with(model, batch):
    written = model.generate(**batch, **LENGTH, eos_token_id=None)
    again = model.generate(**batch, decoder_input_ids=written[:, :4], max_new_tokens=6, eos_token_id=None)
    assert torch.equal(again, written)


def test_writing_goes_on_from_a_cache_that_goes_with_what_it_holds(model, batch):
    asked = {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(**batch, **asked, max_new_tokens=9)
    begun = model.generate(**batch, **asked, max_new_tokens=4)
    assert begun.past_key_values.get_seq_length() == 4
    for tokens, got in ((None, "none"), (begun.sequences[:, -1:], "1")):
        with pytest.raises(ValueError, match=f"`past_key_values` hold 4 tokens.*`decoder_input_ids`.*got {got}"):
            model.generate(**batch, past_key_values=begun.past_key_values, decoder_input_ids=tokens)
    cached = {"past_key_values": begun.past_key_values, "decoder_input_ids": begun.sequences}
    rest = model.generate(**batch, **asked, **cached, max_new_tokens=5)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(rest.logits, whole.logits[4:], atol=1e-3, rtol=1e-3)


def test_tokens_looked_up_in_the_text_change_nothing_and_an_assistant_is_refused(model, batch):
    alone = {**rows_of(batch, 0), **LENGTH, "eos_token_id": None}
    alone["decoder_input_ids"] = torch.tensor([[2, 7, 8, 9, 7, 8]])  # after which 9 and 7 are looked up
    model, read = copy.deepcopy(model), []
    model.decoder.register_forward_hook(lambda module, args, output: read.append(output.logits.shape[1]))
    expected = model.generate(**alone)
    assert read == [6] + [1] * 8
    read.clear()
    assert torch.equal(model.generate(**alone, prompt_lookup_num_tokens=2), expected)
    assert read[0] == 8
    with pytest.raises(ValueError, match="`assistant_model` cannot be used.*`prompt_lookup_num_tokens`"):
        model.generate(**alone, assistant_model=make_captioner(seed=1))


def test_without_a_text_every_image_meets_the_prompt_which_is_encoded_once(batch):
    model = make_captioner()
    texts = count_rows(model.model.text_model)
    images, prompt = batch["pixel_values"], torch.tensor([[2, 5, 6, 3]])
    expected = model.generate(prompt.repeat(3, 1), pixel_values=images, **LENGTH)
    assert torch.equal(model.generate(pixel_values=images, **LENGTH), expected)
    assert texts == [3, 1] and len(set(map(tuple, expected.tolist()))) == 3
    index = torch.tensor([2, 0, 2, 1])
    assert torch.equal(model.generate(pixel_values=images, image_index=index, **LENGTH), expected[index])
    states = model.encode_images(images)
    assert torch.equal(model.generate(image_states=states, image_index=index, **LENGTH), expected[index])
    with torch.no_grad():
        learnt = model(pixel_values=images, labels=CAPTIONS, text_index=torch.tensor([0, 0, 2, 1]))
        written = model(
            input_ids=prompt.repeat(3, 1), pixel_values=images, labels=CAPTIONS, text_index=torch.tensor([0, 0, 2, 1])
        )
    torch.testing.assert_close(learnt.logits, written.logits)
    model.config.prompt_ids = None
    with pytest.raises(ValueError, match="no text: give `input_ids`.*prompt_ids"):
        model.generate(pixel_values=images)


# What the decoder attends to


@pytest.mark.parametrize("fusion", ["dense", "three stages", "sparse", "without local", "without global"])
def test_memory_is_every_stages_rows_and_the_two_global_ones_normalised_and_projected(fusion, batch):
    model = make_captioner(**FUSIONS[fusion])
    with torch.no_grad():
        encoded = model.get_encoder()(**batch)
        outputs = model.model(**batch, output_hidden_states=True)
        kinds = [*(outputs.hidden_states or [outputs.local_fusion_state])]
        kinds.append(torch.stack([outputs.vision_global_state, outputs.text_global_state], dim=1))
        expected, masks = [], []
        for kind, norm, projection in zip(kinds, model.memory.norms, model.memory.projections, strict=True):
            rows = (kind - kind.mean(-1, keepdim=True)) / (kind.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            expected.append((rows * norm.weight + norm.bias) @ projection.weight.t() + projection.bias)
            masks.append(torch.ones(kind.shape[:2]))
            if kind is not kinds[-1]:
                masks[-1][:, -7:] = batch["attention_mask"]
    torch.testing.assert_close(encoded.last_hidden_state, torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4)
    assert torch.equal(encoded.attention_mask.float(), torch.cat(masks, dim=1))
    assert list(encoded) == ["last_hidden_state", "attention_mask"]


def test_padding_of_texts_is_not_attended_to(model, batch):
    with torch.no_grad():
        encoded = model.get_encoder()(**batch)
        labels = torch.randint(4, 61, (5, 6))
        expected = model(encoder_outputs=encoded, labels=labels).logits
        assert (encoded.attention_mask == 0).any()
        spoiled = encoded.last_hidden_state.masked_fill(encoded.attention_mask[..., None] == 0, 100.0)
        found = model(encoder_outputs=HiViLTMemoryOutput(spoiled, encoded.attention_mask), labels=labels).logits
    torch.testing.assert_close(found, expected)


# Learning


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss_is_the_mean_cost_of_each_token_after_those_before_it(label_smoothing, model, batch):
    model.config.label_smoothing = label_smoothing
    try:
        with torch.no_grad():
            outputs = model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX)
            shared = model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX, num_items_in_batch=torch.tensor(50))
    finally:
        model.config.label_smoothing = 0.0
    costs = []
    for row, (caption, text) in enumerate(zip(CAPTIONS.tolist(), TEXT_INDEX.tolist(), strict=True)):
        tokens = [token for token in caption if token != -100]
        with torch.no_grad():
            alone = (
                model(**rows_of(batch, text), decoder_input_ids=torch.tensor([[2, *tokens[:-1]]])).logits[0].double()
            )
        for place, token in enumerate(tokens):
            torch.testing.assert_close(outputs.logits[row, place], alone[place].float(), atol=1e-3, rtol=1e-4)
            total = math.log(sum(math.exp(score) for score in alone[place].tolist()))
            nll = [total - score for score in alone[place].tolist()]
            costs.append((1 - label_smoothing) * nll[token] + label_smoothing * sum(nll) / len(nll))
    assert len(costs) == 14
    torch.testing.assert_close(outputs.loss.double(), torch.tensor(sum(costs) / 14).double(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(shared.loss.double(), torch.tensor(sum(costs) / 50).double(), atol=1e-3, rtol=1e-4)
    assert outputs.past_key_values is None and outputs.encoder_last_hidden_state.shape[0] == 5


def test_several_captions_of_a_pair_are_one_fusion_and_the_gradients_of_many(batch):
    model = with_dropout(make_captioner(), 0.0).train()
    pairs = count_rows(model.memory)
    model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    repeated = {name: batch[name][TEXT_INDEX] for name in ("input_ids", "attention_mask", "image_index")}
    model(**repeated, pixel_values=batch["pixel_values"], labels=CAPTIONS).loss.backward()
    assert pairs == [5, 4]
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name)


@pytest.mark.checklist("5")
def test_gradients_do_not_depend_on_how_a_batch_is_divided(batch):
    model = with_dropout(make_captioner(), 0.0).train()
    assert model.accepts_loss_kwargs
    count = (CAPTIONS != -100).sum()
    parts = [(slice(0, 1), slice(0, 5)), (slice(1, 4), slice(0, 4))]
    model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for rows, places in parts:
        labels = {"labels": CAPTIONS[rows, places], "text_index": TEXT_INDEX[rows]}
        model(**batch, **labels, num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        scale = float(whole[name].abs().max())
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "own levels"])  # where some layers are not read
def test_every_parameter_learns(fusion, batch):
    model = make_captioner(**FUSIONS[fusion]).train()
    model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
def test_the_default_decoder_learns_captions_by_heart_and_writes_them(batch):
    torch.manual_seed(0)
    model = HiViLTForConditionalGeneration(make_config(initializer_range=None, prompt_ids=[2, 5, 3], dropout=0.0))
    model.set_decoder_tokens(make_tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    labels = CAPTIONS[:3]
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(pixel_values=batch["pixel_values"], labels=labels).loss.backward()
        optimizer.step()
    written = model.eval().generate(pixel_values=batch["pixel_values"], max_new_tokens=8, num_beams=2)
    assert unpadded(written, 3) == [[2, *row[row != -100].tolist()] for row in labels]


class Rows(Dataset):
    """Seven rows of an image, a prompt and a caption each."""

    def __init__(self, batch: dict):
        self.batch = batch

    def __len__(self) -> int:
        return 7

    def __getitem__(self, row: int) -> dict:
        text = row % 5
        names = ("input_ids", "attention_mask")
        image = self.batch["pixel_values"][self.batch["image_index"][text]]
        return {name: self.batch[name][text] for name in names} | {"pixel_values": image, "labels": CAPTIONS[row % 4]}


def test_a_trainer_learns_and_writes(tmp_path, batch):
    arguments = Seq2SeqTrainingArguments(
        **{"output_dir": tmp_path, "use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 2},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3},
        **{"predict_with_generate": True, "generation_max_length": 8, "generation_num_beams": 2, "disable_tqdm": True},
    )
    model, rows = make_captioner(), Rows(batch)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer())
    assert math.isfinite(trainer.train().training_loss)
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.decoder_start_token_id) == (3, 2, 2)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 7 and math.isfinite(predicted.metrics["test_loss"])
    alone = model.generate(**{k: v[None] for k, v in rows[6].items()}, max_length=8, num_beams=2)[0].tolist()
    assert [t for t in predicted.predictions[6].tolist() if t] == [t for t in alone if t]
    trainer.args.predict_with_generate = False
    logits = trainer.predict(rows).predictions
    assert logits.shape == (7, 5, 61)


def test_without_captions_and_with_labels_of_another_kind_it_says_what_to_give(captioner, batch, caplog):
    for labels, said in (
        (CAPTIONS.float(), "`labels` must be integers"),
        (CAPTIONS[0], "`labels` must be integers"),
        (CAPTIONS[:, :0], "`labels` must be integers"),
        (CAPTIONS + 55, "`labels` must lie in 0..60"),
        (torch.cat([torch.full((4, 1), 2), CAPTIONS], 1), "`labels` begin with the begin token"),
        (torch.full((4, 40), 7), "`labels` asks for 40 tokens.*`gpt2` decoder has positions for 24"),
    ):
        with pytest.raises(ValueError, match=said):
            captioner(**batch, labels=labels, text_index=TEXT_INDEX)
    with pytest.raises(ValueError, match="4 captions cannot be paired with 5 texts: give `text_index`"):
        captioner(**batch, labels=CAPTIONS)
    with pytest.raises(ValueError, match="`text_index` must lie in 0..4"):
        captioner(**batch, labels=CAPTIONS, text_index=TEXT_INDEX + 1)
    with pytest.raises(ValueError, match="captions as `labels`.*`decoder_input_ids`.*`model.config.label_smoothing`"):
        captioner(**batch)
    with pytest.raises(ValueError, match="did you mean `text_index`"):
        captioner(**batch, labels=CAPTIONS, texts_index=TEXT_INDEX)
    none = torch.full((4, 5), -100)
    for items in (None, 0, torch.tensor(0)):
        nothing = captioner(**batch, labels=none, text_index=TEXT_INDEX, num_items_in_batch=items).loss
        assert nothing == 0 and nothing.requires_grad


def test_a_begin_token_that_is_the_end_token_too_is_refused_before_words_alone(batch):
    captioner = make_captioner()
    captioner.config.bos_token_id = captioner.config.decoder_start_token_id = end = captioner.config.eos_token_id
    begun = torch.cat([torch.full((4, 1), end), CAPTIONS], 1)
    with pytest.raises(ValueError, match="`labels` begin with the begin token"):
        captioner(**batch, labels=begun, text_index=TEXT_INDEX)
    empty = torch.full_like(CAPTIONS, -100)
    empty[:, 0] = end
    assert captioner(**batch, labels=empty, text_index=TEXT_INDEX).loss > 0


def test_beginnings_of_several_lengths_are_refused(captioner, batch):
    begun = torch.tensor([[0, 2, 7], [2, 7, 8], [2, 7, 8], [2, 7, 8], [2, 7, 8]])
    with pytest.raises(ValueError, match="`decoder_attention_mask` has zeros.*one length"):
        captioner.generate(**batch, decoder_input_ids=begun, decoder_attention_mask=(begun > 0).long())


# What cannot be written


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"num_beams": 0}, "`num_beams` must be at least 1, got 0"),
        ({"max_new_tokens": 25}, "`max_new_tokens` asks for 25 tokens, but this `gpt2` decoder has positions for 24"),
        ({"max_length": 26}, "`max_length` asks for 25 tokens"),
        ({"input_ids": torch.full((5, 30), 7), "attention_mask": None}, "30 tokens, but this `bert` encoder takes 24"),
        ({"image_index": None}, "3 images cannot be paired with 5 texts"),
        ({"image_idx": torch.zeros(5).long()}, "not used by the model: .'image_idx'"),
        ({"inputs": torch.zeros(3, 3, 20, 20)}, "first argument of `generate` are `input_ids`.*`pixel_values=`"),
        ({"inputs": torch.full((5, 3), 7)}, "`input_ids` are given twice"),
        (
            {"encoder_outputs": HiViLTMemoryOutput(torch.zeros(5, 3, 16), torch.ones(5, 3))},
            "`encoder_outputs` or `input_ids`",
        ),
        ({"image_states": "given"}, "`pixel_values` or `image_states`"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(asked, said, captioner, batch):
    calls = count_rows(captioner.decoder, "logits")
    given = batch | asked
    if given.get("image_states") == "given":
        given["image_states"] = captioner.encode_images(batch["pixel_values"])
    with pytest.raises(ValueError, match=said):
        captioner.generate(**given)
    assert calls == []


def test_encoder_outputs_without_a_mask_are_refused(captioner):
    with pytest.raises(ValueError, match="`encoder_outputs` must be what `model.get_encoder"):
        captioner.generate(encoder_outputs=(torch.zeros(5, 3, 16),))


def test_the_longest_text_that_fits_is_written(captioner, batch):
    assert captioner.generate(**batch, max_new_tokens=24, eos_token_id=None).shape == (5, 25)


def test_a_model_without_tokens_says_how_it_gets_them(batch):
    model = HiViLTForConditionalGeneration(make_config())
    for call in (lambda: model.generate(**batch), lambda: model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX)):
        with pytest.raises(ValueError, match=r"model.set_decoder_tokens\(tokenizer\)"):
            call()


# The decoder's tokens


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer()._tokenizer, **special)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, (2, 3, 0)),
        (
            {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "red", "sep_token": "blue", "pad_token": "[PAD]"},
            (2, 3, 0),
        ),
        ({"eos_token": "[SEP]", "pad_token": "[PAD]"}, (0, 3, 0)),
        ({"bos_token": "[SEP]", "eos_token": "[SEP]"}, (3, 3, 3)),
    ],
    ids=["BERT", "both", "T5", "GPT-2"],
)
def test_tokens_to_begin_to_end_and_to_pad_with_are_the_tokenizers(special, expected):
    model = make_model(HiViLTForConditionalGeneration)
    model.set_decoder_tokens(word_tokenizer(**special))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    for config in (model.config, model.generation_config):
        assert tuple(getattr(config, name) for name in names) == (*expected, expected[0])
    shifted = model.prepare_decoder_input_ids_from_labels(CAPTIONS[:2])
    start, _, pad = expected
    assert shifted.tolist() == [[start, 7, 8, 9, 10], [start, 11, 12, 3, pad]]


def test_tokenizers_that_do_not_fit_are_refused_by_name():
    model = make_captioner("bart")
    with pytest.raises(ValueError, match="no token that texts end .*`eos_token` or `sep_token`"):
        model.set_decoder_tokens(word_tokenizer(bos_token="[CLS]", pad_token="[PAD]"))
    with pytest.raises(ValueError, match="no token that texts begin"):
        model.set_decoder_tokens(word_tokenizer(eos_token="[SEP]"))
    with pytest.raises(ValueError, match="pads with 1, but the decoder was made for 0.*`pad_token_id=1`"):
        model.set_decoder_tokens(word_tokenizer(bos_token="[CLS]", eos_token="[SEP]", pad_token="[UNK]"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{index}" for index in range(61)])
    with pytest.raises(ValueError, match=r"tokens, but the decoder 61.*resize_token_embeddings"):
        model.set_decoder_tokens(tokenizer)


def test_more_tokens_are_the_text_encoders_and_the_decoders(batch, tmp_path):
    model = make_captioner()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    opened = HiViLTForConditionalGeneration.from_pretrained(tmp_path)
    assert opened.config.text_config.vocab_size == opened.config.decoder_config.vocab_size == 70
    assert opened(**batch, labels=CAPTIONS, text_index=TEXT_INDEX).logits.shape == (4, 5, 70)
    assert opened.get_output_embeddings().weight is opened.decoder.get_input_embeddings().weight
    model.decoder.resize_token_embeddings(80)
    with pytest.raises(ValueError, match="70 tokens and the decoder 80"):
        model.resize_token_embeddings(90)


# Checkpoints


@pytest.mark.checklist("3")
def test_a_saved_model_writes_the_same_words(model, batch, tmp_path):
    model = copy.deepcopy(model)
    model.generation_config.max_new_tokens = 7
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    expected = model.generate(**batch)
    assert expected.shape == (5, 8)
    for opened in (
        HiViLTForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
    ):
        assert type(opened) is HiViLTForConditionalGeneration
        assert torch.equal(opened.generate(**batch), expected)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["is_encoder_decoder"] and saved["architectures"] == ["HiViLTForConditionalGeneration"]
    assert saved["prompt_ids"] == [2, 5, 6, 3] and saved["decoder_config"]["is_decoder"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["num_beams"] == 2
    assert (tmp_path / "generation_hivilt.py").is_file()
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        # Its embeddings and its scores are tied, and the former has the name.
        names = list(weights.keys())
        assert sum(weights.get_slice(name).get_shape() == [61, 16] for name in names) == 1
        assert all(name.startswith(("model.", "memory.", "decoder.")) for name in names)


def test_training_starts_from_a_checkpoint_of_another_head_with_a_new_decoder(batch, tmp_path):
    answering = make_model(HiViLTForQuestionAnswering)
    answering.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["decoder_config"] is None and not saved.get("is_encoder_decoder")
    model, loading = HiViLTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith(("decoder.", "memory.")) for name in loading["missing_keys"])
    assert any(name.startswith("decoder.") for name in loading["missing_keys"])
    for name, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight, answering.model.state_dict()[name])
    assert model.config.decoder_config.model_type == "gpt2" and model.config.decoder_config.vocab_size == 61
    model = HiViLTForConditionalGeneration.from_pretrained(tmp_path, decoder_config=DECODER_CONFIGS["bert"]())
    assert model.config.decoder_config.model_type == "bert" and model.config.is_encoder_decoder
    model.set_decoder_tokens(make_tokenizer())
    assert model(**batch, labels=CAPTIONS, text_index=TEXT_INDEX).loss.isfinite()
    # And the other way round.
    model.save_pretrained(tmp_path)
    assert HiViLTForQuestionAnswering.from_pretrained(tmp_path)(**batch).logits.shape == (5, 2)


@pytest.mark.parametrize("decoder", DECODER_CONFIGS)
def test_a_pretrained_decoder_is_copied_whole_and_its_cross_attention_is_new(decoder, batch, tmp_path):
    torch.manual_seed(3)
    vision, text = VISION_CONFIGS["vit"](), make_config().text_config
    source = AutoModelForCausalLM.from_config(DECODER_CONFIGS[decoder]()).bfloat16()
    source.save_pretrained(tmp_path)
    fusion = {"hidden_size": 20, "num_attention_heads": 4, "num_fusion_stages": 2}
    model = HiViLTForConditionalGeneration.from_vision_text_pretrained(vision, text, decoder=tmp_path, **fusion)
    found, expected = model.decoder.state_dict(), source.state_dict()
    crosses = {name for name in found if "cross" in name or "encoder_attn" in name}
    assert crosses and (decoder == "bart" or not crosses & set(expected))
    for name in found.keys() - (crosses - set(expected)):
        torch.testing.assert_close(found[name], expected[name].float())
    assert model.config.decoder_config.name_or_path == tmp_path.name and not model.training
    model.set_decoder_tokens(make_tokenizer())
    assert model.generate(**batch, **LENGTH).shape[0] == 5
    weights = source.state_dict()
    lost = next(name for name in weights if name.endswith(("c_fc.weight", "intermediate.dense.weight", "fc1.weight")))
    source.save_pretrained(tmp_path, state_dict={name: weight for name, weight in weights.items() if name != lost})
    with pytest.raises(ValueError, match=f"no weights for 1 parameters of the decoder.*{lost}"):
        model.load_decoder(tmp_path)


def test_a_new_decoder_begins_with_the_words_of_a_pretrained_text_encoder_of_its_width(tmp_path):
    text = BertModel(TEXT_CONFIGS["bert"]())
    text.save_pretrained(tmp_path)
    words = text.get_input_embeddings().weight
    for width, is_taken in ((words.shape[1], True), (words.shape[1] * 2, False)):
        fusion = {"hidden_size": width, "num_attention_heads": 2, "num_fusion_stages": 1}
        model = HiViLTForConditionalGeneration.from_vision_text_pretrained(VISION_CONFIGS["vit"](), tmp_path, **fusion)
        new = model.decoder.get_input_embeddings().weight
        assert new.std().item() == pytest.approx(width**-0.5, rel=0.1)
        if is_taken:
            torch.testing.assert_close(new / new.std(), words / words.std())
        assert model.decoder.get_output_embeddings().weight is new


# The config


def test_decoders_of_the_config():
    config = HiViLTConfig(decoder_config={"model_type": "bert", "num_hidden_layers": 1})
    assert config.decoder_config.vocab_size == config.text_config.vocab_size and config.is_encoder_decoder
    assert config.get_text_config(decoder=True) is config.decoder_config
    assert config.get_text_config() is config.text_config
    for refused, why in (
        (LlamaConfig(), "a `llama` cannot be the decoder: it has no cross-attention"),
        ({"model_type": "t5"}, "a `t5` cannot be the decoder: transformers has no causal language model of it"),
        ({"model_type": "xmod"}, "a `xmod` cannot be the decoder: it has cross-attention, but has not been tested"),
    ):
        with pytest.raises(ValueError, match=f"`decoder_config`: {why}.*gpt2"):
            HiViLTConfig(decoder_config=refused)
    plain = HiViLTConfig()
    assert plain.decoder_config is None and not plain.is_encoder_decoder
    assert plain.get_text_config(decoder=True) is plain.text_config
    assert plain.with_decoder().decoder_config.hidden_size == 768 and plain.decoder_config is None
    given = GPT2Config(vocab_size=61, n_embd=16, n_head=2)
    assert HiViLTConfig(decoder_config=given).decoder_config.eos_token_id is None and not given.add_cross_attention
    with pytest.raises(StrictDataclassError, match="`prompt_ids` must be tokens of the text encoder"):
        make_config(prompt_ids=[61])
    with pytest.raises(StrictDataclassError, match="`prompt_ids` has 25 tokens, but the text encoder takes 24"):
        make_config(prompt_ids=[5] * 25)
    with pytest.raises(StrictDataclassError, match="`label_smoothing` must lie in"):
        make_config(label_smoothing=1.0)


# As any other model


@pytest.mark.checklist("7")
def test_sdpa_equals_eager_and_eager_shows_what_is_attended_to(model, batch):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.decoder.config._attn_implementation == "eager"
    labels = {"labels": CAPTIONS, "text_index": TEXT_INDEX}
    with torch.no_grad():
        expected, found = model(**batch, **labels), eager(**batch, **labels, output_attentions=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
    rows = found.encoder_last_hidden_state.shape[1]
    assert [weights.shape for weights in found.cross_attentions] == [(4, 2, 5, rows)] * 3
    assert len(found.decoder_attentions) == 3


@pytest.mark.checklist("7")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant, batch):
    model = with_dropout(make_captioner(), 0.0).train()
    inputs = batch | {"labels": CAPTIONS, "text_index": TEXT_INDEX}
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_half_precision_writes_and_learns(batch):
    model = make_captioner().to(torch.bfloat16)
    half = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    assert model.generate(**half, **LENGTH).shape[0] == 5
    loss = model(**half, labels=CAPTIONS, text_index=TEXT_INDEX).loss
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.checklist("12")
def test_adapters_of_decoder_and_fusion_learn_and_are_loaded(batch, tmp_path):
    model, labels = make_captioner(), {"labels": CAPTIONS, "text_index": TEXT_INDEX}
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=r".*\.decoder\..*\.(c_attn|q_attn)|.*\.fusion\..*\.q_proj")
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        adapted.train()(**batch, **labels).loss.backward()
        optimizer.step()
    expected = adapted.eval().generate(**batch, **LENGTH)
    assert not torch.equal(expected, model.generate(**batch, **LENGTH))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval().generate(**batch, **LENGTH), expected
    )


@pytest.mark.slow
@pytest.mark.checklist("12")
def test_scores_of_captions_are_exported_for_any_number_of_images_texts_and_tokens(model, batch):
    model, dynamic = copy.deepcopy(model), torch.export.Dim.DYNAMIC
    model.config.return_dict = False
    inputs = batch | {"decoder_input_ids": torch.arange(30).view(5, 6) + 5, "use_cache": False}
    shapes = {name: {0: dynamic, 1: dynamic} for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    shapes |= {"pixel_values": {0: dynamic}, "image_index": {0: dynamic}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        fewer = {name: inputs[name][:3, :4] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        fewer |= {"pixel_values": batch["pixel_values"][:2], "image_index": torch.tensor([1, 0, 1]), "use_cache": False}
        for given in (inputs, fewer):
            torch.testing.assert_close(program(**given)[0], model(**given)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_every_family_of_decoders_writes_each_text_alone_as_in_a_batch(family, batch):
    sizes = {"hidden_size": 16, "d_model": 16, "num_hidden_layers": 3, "decoder_layers": 3, "num_layers": 3}
    sizes |= {"num_attention_heads": 2, "decoder_attention_heads": 2, "attention_heads": 2, "intermediate_size": 20}
    sizes |= {"decoder_ffn_dim": 20, "ffn_dim": 20, "n_embd": 16, "n_head": 2, "n_layer": 3, "embedding_size": 16}
    sizes |= {"max_position_embeddings": 40, "n_positions": 40, "vocab_size": 61, "pad_token_id": 0}
    sizes |= {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    known = set(CONFIG_MAPPING[family]().to_dict()) | set(CONFIG_MAPPING[family].attribute_map)
    model = make_captioner(decoder_config={"model_type": family, **{k: v for k, v in sizes.items() if k in known}})
    written = model.generate(**batch, **LENGTH, num_beams=2, eos_token_id=None)
    assert len(set(map(tuple, written.tolist()))) > 1
    assert torch.equal(model.generate(**batch, **LENGTH, num_beams=2, eos_token_id=None, use_cache=False), written)
    for row in range(5):
        assert torch.equal(
            model.generate(**rows_of(batch, row), **LENGTH, num_beams=2, eos_token_id=None)[0], written[row]
        )
    model.train()(**batch, labels=CAPTIONS, text_index=TEXT_INDEX).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.generation_config.to_diff_dict().keys() <= GENERATED_WITH


@pytest.mark.parametrize("place", [".", "absolute"])
def test_a_subfolder_generates_by_its_own_config_wherever_one_stands(tmp_path, monkeypatch, place):
    model = make_captioner()
    model.generation_config.update(num_beams=4, max_new_tokens=7)
    model.save_pretrained(tmp_path / "captioning")
    make_model(HiViLTForQuestionAnswering).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = "." if place == "." else tmp_path
    kept = HiViLTForConditionalGeneration.from_pretrained(folder, subfolder="captioning").generation_config
    assert (kept.num_beams, kept.max_new_tokens, kept.eos_token_id) == (4, 7, model.config.eos_token_id)
