"""The study on miniatures: all contestants train, none is trained twice, and intervals are what statistics books have."""

import copy
import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import Image
from transformers import (
    BertModel,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViTImageProcessorPil,
    ViTModel,
    get_scheduler,
)

from caption_miniatures import make_caption_miniature
from hivilt import (
    HiViLTForImagesAndTextClassification,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTForVisualGrounding,
)
from miniatures import make_vqa_miniature
from tiny import IMAGE_SIZE, TEXT_CONFIGS, VISION_CONFIGS, make_tokenizer

FIELDS = {
    HiViLTForQuestionAnswering: {
        "id2label": {0: "yes", 1: "no", 2: "red"},
        "problem_type": "single_label_classification",
    },
    HiViLTForRetrieval: {"num_hard_negatives": 2},
    HiViLTForVisualGrounding: {},
    HiViLTForImagesAndTextClassification: {"id2label": {0: "False", 1: "True"}, "num_images": 2},
}


@pytest.fixture
def contestants(benchmark):
    import fusion_contestants

    return fusion_contestants


@cache
def made(make, name, head):
    torch.manual_seed(0)
    return make(name, head, 30, 64, **FIELDS[head]).eval()


def build(contestants, name, head=HiViLTForQuestionAnswering):
    model = copy.deepcopy(made(contestants.make, name, head))
    torch.manual_seed(0)
    return model


def batch(num_texts=3):
    return {
        "input_ids": torch.randint(4, 30, (num_texts, 6)),
        "attention_mask": torch.ones(num_texts, 6, dtype=torch.long),
        "pixel_values": torch.randn(2, 3, 64, 64),
        "image_index": torch.arange(num_texts) % 2,
    }


def of_one_image(contestants):
    return [name for name in contestants.CONTESTANTS if name not in contestants.ON_PAIRS_ALONE]


@pytest.mark.slow
def test_all_are_of_one_size(contestants):
    names = of_one_image(contestants)
    sizes = {name: contestants.num_parameters(build(contestants, name)) for name in names}
    assert all(abs(size / sizes["HiViLT"] - 1) <= 0.005 for size in sizes.values()), sizes


@pytest.mark.slow
@torch.no_grad()
def test_padding_and_other_questions_change_nothing(contestants):
    for name in of_one_image(contestants):
        model, inputs = build(contestants, name), batch()
        expected = model(**inputs).logits
        padded = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 3))}
        padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3))
        torch.testing.assert_close(model(**padded).logits, expected, atol=2e-5, rtol=1e-4)
        alone = {key: value[1:2] for key, value in inputs.items()} | {"image_index": torch.tensor([0])}
        torch.testing.assert_close(model(**alone).logits, expected[1:2], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_vilt_on_groups_is_vilt(contestants):
    model, inputs = build(contestants, "ViLT"), batch()
    model.vilt.embeddings.position_embeddings.normal_()
    logits = model(**inputs).logits
    index = inputs.pop("image_index")
    inputs["pixel_values"] = inputs["pixel_values"][index]
    torch.testing.assert_close(logits, ViltForQuestionAnswering.forward(model, **inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vilt_for_pairs_scores_as_vilt(contestants):
    model, inputs = build(contestants, "ViLT", HiViLTForRetrieval), batch()
    model.vilt.embeddings.position_embeddings.normal_()
    inputs["attention_mask"][1, 4:] = 0
    images = model.encode_images(inputs["pixel_values"])
    texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    pairs = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    alike = {name: inputs[name][index] for name, index in zip(("pixel_values", "input_ids"), pairs, strict=True)}
    alike["attention_mask"] = inputs["attention_mask"][pairs[1]]
    expected = ViltForImageAndTextRetrieval.forward(model, **alike).logits.squeeze(1)
    torch.testing.assert_close(model.score(images, texts, *pairs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_all_learn_to_match_pairs(contestants):
    sizes = {}
    for name in of_one_image(contestants):
        model, inputs = build(contestants, name, HiViLTForRetrieval).train(), batch()
        sizes[name] = contestants.num_parameters(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            loss = model(**inputs, image_ids=torch.tensor([5, 7])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        idle = [parameter for parameter, value in model.named_parameters() if value.grad is None]
        assert losses[-1] < losses[0] and not idle, (name, losses, idle)
    assert all(abs(size / sizes["HiViLT"] - 1) <= 0.005 for size in sizes.values()), sizes


@pytest.mark.slow
def test_image_and_question_decide_and_all_weights_train(contestants):
    for name in of_one_image(contestants):
        model, inputs = build(contestants, name), batch()
        logits = model(**inputs).logits
        changed = {
            "pixel_values": torch.randn(2, 3, 64, 64),
            "input_ids": inputs["input_ids"].flip(1),
        }
        for key, value in changed.items():
            assert (model(**{**inputs, key: value}).logits - logits).abs().max() > 1e-5, (name, key)
        model.train()
        loss = model(**inputs, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None]
        assert loss.isfinite() and not idle, (name, idle)


# Those of the table of drawn scenes, without the ones that only train for longer or shorter.
FINDERS = ("HiViLT", "late fusion (CLIP)", "ViLT", "co-attention (METER)", "single stream (VisualBERT)")


def test_finders_are_of_one_size_with_one_head_and_train_whole(contestants):
    models = {name: build(contestants, name, HiViLTForVisualGrounding).train() for name in FINDERS}
    labels = [{"boxes": torch.tensor([[0.5, 0.5, 0.25, 0.5]])}, {"boxes": torch.zeros(0, 4)}] * 2
    sizes, heads = {}, {}
    for name, model in models.items():
        sizes[name] = contestants.num_parameters(model)
        outputs = model(**batch(4), labels=labels)
        outputs.loss.backward()
        idle = [parameter for parameter, value in model.named_parameters() if value.grad is None]
        assert outputs.logits.shape == (4, 64) and outputs.loss.isfinite() and not idle, (name, idle)
        heads[name] = [tuple(weight.shape) for weight in model.row_head.parameters()]
    assert all(abs(size / sizes["HiViLT"] - 1) <= 0.005 for size in sizes.values()), sizes
    assert all(heads[name] == heads["HiViLT"] for name in FINDERS if name != "ViLT")
    assert [shape[0] for shape in heads["ViLT"]] == [shape[0] for shape in heads["HiViLT"]]


@torch.no_grad()
def test_finders_take_each_text_with_its_own_image_and_padding_changes_nothing(contestants):
    for name in FINDERS:
        model, inputs = build(contestants, name, HiViLTForVisualGrounding), batch()
        expected = model(**inputs)
        states = model.encode_images(pixel_values=inputs["pixel_values"])
        texts = {key: inputs[key] for key in ("input_ids", "attention_mask", "image_index")}
        torch.testing.assert_close(model(**texts, image_states=states).logits, expected.logits, atol=1e-5, rtol=1e-5)
        padded = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 3))}
        padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 3))
        torch.testing.assert_close(model(**padded).logits, expected.logits, atol=2e-5, rtol=1e-4)
        alone = {key: value[1:2] for key, value in inputs.items()} | {"image_index": torch.tensor([0])}
        torch.testing.assert_close(model(**alone).pred_boxes, expected.pred_boxes[1:2], atol=2e-5, rtol=1e-4)
        # Of each image the rows are its own, and the text decides.
        for key, value in {"pixel_values": torch.randn(2, 3, 64, 64), "input_ids": inputs["input_ids"].flip(1)}.items():
            changed = model(**{**inputs, key: value}).logits
            assert (changed - expected.logits).abs().amax(dim=1).min() > 1e-5, (name, key)


@torch.no_grad()
def test_vision_rows_of_a_dual_encoder_have_not_met_the_text(contestants):
    inputs = batch(4)
    for name in FINDERS:
        model = build(contestants, name, HiViLTForVisualGrounding)
        stages = model(**inputs, output_hidden_states=True).hidden_states
        other = model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)}, output_hidden_states=True).hidden_states
        if name != "ViLT":  # which has one stage, and records none
            rows = [(stages[0][:, :64] - other[0][:, :64]).abs().max() > 1e-6]
            assert rows == [name != "late fusion (CLIP)"], name


def test_finding_is_told_by_kind(benchmark, tmp_path, monkeypatch):
    few = {"max_train_samples": 20, "max_predict_samples": 4}
    trial = replace(benchmark.TRIALS["Scenes"], arguments=few, evaluations=1)
    monkeypatch.setitem(benchmark.TRIALS, "Scenes", trial)
    flags = ["--tasks", "Scenes", "--contestants", "HiViLT", "--seeds", "1", "--epochs", "1"]
    results = benchmark.main([*flags, "--learning_rates", "1e-3", "--output_dir", str(tmp_path)])
    (run,) = results["runs"].values()
    measures = ["accuracy@0.5", "relation", "attribute", "several", "none", "target accuracy"]
    assert list(run["test"]) == measures and run["curve"][-1] == [1.0, run["validation"]]
    head = "| accuracy@0.5 | beside HiViLT | relation | attribute | several | none | target accuracy |"
    assert head in benchmark.table(results)


# Those of the tables of pairs, likewise.
JUDGES = ("HiViLT", "late fusion (CLIP)", "ViLT", "co-attention (METER)", "text only", "one image only")
PAIRS = torch.tensor([[0, 1], [1, 0], [0, 0]])


def test_judges_of_pairs_are_of_one_size_and_see_what_they_say(contestants):
    sizes, other = {}, torch.randn(2, 3, 64, 64)
    for name in JUDGES:
        model, inputs = build(contestants, name, HiViLTForImagesAndTextClassification), batch()
        inputs["image_index"] = PAIRS
        sizes[name] = contestants.num_parameters(model)
        with torch.no_grad():
            logits = model(**inputs).logits
            seen = model(**{**inputs, "pixel_values": other}).logits
            second = model(**{**inputs, "pixel_values": torch.stack([inputs["pixel_values"][0], other[1]])}).logits
            turned = model(**{**inputs, "image_index": PAIRS.flip(1)}).logits
            words = model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)}).logits
        changed = [(one - logits).abs().amax(dim=1) > 1e-6 for one in (seen, second, turned, words)]
        # Of the first pair, the second, and the one of the same image twice, which turns into itself.
        expected = {"text only": ([0, 0, 0], [0, 0, 0], [0, 0, 0]), "one image only": ([1, 1, 1], [0, 1, 0], [1, 1, 0])}
        expected = expected.get(name, ([1, 1, 1], [1, 1, 0], [1, 1, 0]))
        assert [one.int().tolist() for one in changed] == [*expected, [1, 1, 1]], name
        loss = model.train()(**inputs, labels=torch.tensor([0, 1, 1])).loss
        loss.backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None]
        assert loss.isfinite() and not idle, (name, idle)
    assert all(abs(size / sizes["HiViLT"] - 1) <= 0.005 for size in sizes.values()), sizes


@torch.no_grad()
def test_vilt_on_pairs_is_vilt(contestants):
    model, inputs = build(contestants, "ViLT", HiViLTForImagesAndTextClassification), batch()
    model.vilt.embeddings.position_embeddings.normal_()
    logits = model(**{**inputs, "image_index": PAIRS}).logits
    inputs["pixel_values"] = inputs["pixel_values"][PAIRS]
    del inputs["image_index"]
    expected = ViltForImagesAndTextClassification.forward(model, **inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_flops_are_those_of_all_epochs_of_a_curriculum(benchmark):
    few = {"max_train_samples": 60, "max_predict_samples": 36, "first_epochs": 1}
    data = benchmark.read(replace(benchmark.TRIALS["Pairs"], arguments=few), None)
    sizes = {"vocab_size": len(data.processor.tokenizer), "image_size": 64}
    model = benchmark.make("late fusion (CLIP)", head=data.task.model_class, **sizes, **data.fields)
    flops = []
    for epoch in (1, 0):
        data.train.set_epoch(epoch)
        flops.append(benchmark.flops_in_epoch(model, data, 8))
    later, earlier = flops
    assert earlier != later
    assert benchmark.flops_per_image(model, data, 4) == pytest.approx((earlier + 3 * later) / 4)
    assert benchmark.flops_per_image(model, data, 0.5) == pytest.approx(earlier)
    assert data.train.epoch == 0


def test_judging_is_told_by_kind(benchmark, tmp_path, monkeypatch):
    few = {"max_train_samples": 60, "max_predict_samples": 36, "first_epochs": 0}
    trial = replace(benchmark.TRIALS["Pairs"], arguments=few, evaluations=1)
    monkeypatch.setitem(benchmark.TRIALS, "Pairs", trial)
    flags = ["--tasks", "Pairs", "--contestants", "one image only", "--seeds", "1", "--epochs", "1"]
    results = benchmark.main([*flags, "--learning_rates", "1e-3", "--output_dir", str(tmp_path)])
    (run,) = results["runs"].values()
    kinds = ["one", "both", "neither", "same", "more"]
    assert list(run["test"]) == ["accuracy", *kinds] and run["curve"][-1] == [1.0, run["validation"]]
    assert f"| accuracy | beside HiViLT | {' | '.join(kinds)} |" in benchmark.table(results)


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(benchmark, tmp_path, capsys):
    from hivilt.data.sort_of_clevr import write

    write(tmp_path / "data", {"train": 6, "test": 2})
    flags = ["--tasks", "Sort-of-CLEVR", "--data_dir", f"sort-of-clevr={tmp_path / 'data'}", "--epochs", "1"]
    flags += ["--learning_rates", "1e-3", "2e-3", "--output_dir", str(tmp_path / "out")]
    searched = benchmark.main([*flags, "--contestants", "HiViLT", "--seeds"])
    assert len(searched["searched"]) == 2 and not searched["runs"]
    first = benchmark.main([*flags, "--contestants", "HiViLT", "--seeds", "1"])
    assert first["searched"] == json.loads(json.dumps(searched["searched"]))
    assert len(first["searched"]) == 2 and list(first["runs"]) == ["Sort-of-CLEVR | HiViLT | 1"]
    capsys.readouterr()
    results = benchmark.main([*flags, "--contestants", "HiViLT", "late fusion (CLIP)", "--seeds", "1", "2"])
    printed = capsys.readouterr().out
    assert "Sort-of-CLEVR | HiViLT | 1:" not in printed and "Sort-of-CLEVR | HiViLT | 2:" in printed
    for found in (first, results):
        found["kept"] = json.dumps(found["runs"]["Sort-of-CLEVR | HiViLT | 1"])
    assert results.pop("kept") == first["kept"]
    assert len(results["searched"]) == 4 and len(results["runs"]) == 4

    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    assert str(tmp_path) not in path.read_text()
    Image.open(path.with_suffix(".png")).verify()
    assert benchmark.table(results) in printed and "| relational | beside HiViLT |" in printed
    for run in results["runs"].values():
        assert set(run["test"]) == {"accuracy", "relational", "non-relational"}
        assert run["steps"] == 2 and run["curve"][-1] == [1.0, run["validation"]]


@pytest.mark.slow
def test_the_same_seed_trains_the_same(benchmark, tmp_path):
    from hivilt.data.sort_of_clevr import write

    write(tmp_path, {"train": 4, "test": 1})
    runs = [benchmark.train("Sort-of-CLEVR", tmp_path, "HiViLT", 1e-3, seed, 2, tests=True) for seed in (1, 1, 2)]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1] and runs[0]["curve"] != runs[2]["curve"]


@pytest.mark.slow
def test_equal_flops_are_fewer_or_more_steps(benchmark, contestants, tmp_path):
    from hivilt.data.sort_of_clevr import write

    write(tmp_path, {"train": 4, "test": 1})
    others = contestants.AT_EQUAL_FLOPS.items()
    names = {name for equal, other in others for name in (equal, other, equal.split(", ")[0])}
    trained = {name: benchmark.train("Sort-of-CLEVR", tmp_path, name, 1e-3, 1, 12, tests=False) for name in names}
    assert trained["ViLT"]["flops"] > 5 * trained["HiViLT"]["flops"]
    for equal, other in contestants.AT_EQUAL_FLOPS.items():
        usual = trained[equal.split(",")[0]]
        assert trained[equal]["flops"] == pytest.approx(trained[other]["flops"])
        assert usual["steps"] == trained[other]["steps"] == 12
        assert trained[equal]["steps"] == math.ceil(12 * trained[other]["flops"] / usual["flops"])


TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_fusion_stages": 2, "fusion_intermediate_size": 64}
ON_LEVELS = {"vision_levels": [1, 3], "vision_strides": [2, 1]}


@pytest.mark.parametrize("head", [HiViLTForQuestionAnswering, pytest.param(HiViLTForRetrieval, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_on_frozen_encoders_the_rest_is_of_one_size_and_trains_whole(contestants, head):
    encoders = contestants.Encoders(VISION_CONFIGS["vit"](), TEXT_CONFIGS["bert"](), {**TINY, **ON_LEVELS})
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(5, 61, (3, 6), generator=generator),
        "attention_mask": torch.ones(3, 6, dtype=torch.long),
        "image_index": torch.arange(3) % 2,
    }
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    teaching = {"labels": torch.arange(3)} if head is HiViLTForQuestionAnswering else {"image_ids": torch.arange(2)}
    names = contestants.contestants_of(frozen=True, pairs=False)
    assert len(names) == 13 and not {"ViLT", "ViLT, HiViLT's FLOPs"} & {*names}
    sizes = {}
    for name in names:
        model = contestants.make(name, head, 61, IMAGE_SIZE, encoders, **FIELDS[head]).train()
        sizes[name] = contestants.num_parameters(model)
        states = {
            "feature_maps": model.get_feature_maps(pixels),
            "token_states": model.get_token_states(inputs["input_ids"], inputs["attention_mask"]),
        }
        loss = model(**inputs, **states, **teaching).loss
        loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        wanted = {name for name, _ in model.named_parameters() if not name.startswith(ENCODERS)}
        assert loss.isfinite() and trained == wanted, (name, trained ^ wanted)
    assert all(abs(size / sizes["HiViLT"] - 1) <= 0.01 for size in sizes.values()), sizes


ENCODERS = ("model.vision_model.", "model.text_model.")


def test_what_cannot_be_made_on_frozen_encoders(benchmark, contestants, tmp_path, capsys):
    encoders = contestants.Encoders(VISION_CONFIGS["vit"](), TEXT_CONFIGS["bert"](), TINY)
    narrow = contestants.Encoders(encoders.vision, encoders.text, {**TINY, "fusion_intermediate_size": 1})
    with pytest.raises(ValueError, match="fusion_intermediate_size: got 1, with which HiViLT trains .* make it larger"):
        contestants.make("co-attention (METER)", HiViLTForRetrieval, 61, IMAGE_SIZE, narrow)
    with pytest.raises(ValueError, match="encoders: ViLT reads pixels and words and has no encoders"):
        contestants.make("ViLT", HiViLTForRetrieval, 61, IMAGE_SIZE, encoders)
    flags = ["--tasks", "Flickr8k", "--data_dir", f"flickr8k={tmp_path}", "--contestants", "ViLT"]
    with pytest.raises(SystemExit):
        benchmark.main([*flags, *save_encoders(tmp_path)])
    assert "contestants: those that read pixels are left out" in capsys.readouterr().err


def save_encoders(folder):
    """Tiny encoders in folders of their own; gives the flags that name them and their cache."""
    torch.manual_seed(0)
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(folder / "vision")
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder / "vision")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    models = ["--vision_model", str(folder / "vision"), "--text_model", str(folder / "text")]
    return [*models, "--fusion", json.dumps({**TINY, **ON_LEVELS}), "--cache_dir", str(folder / "cache")]


@pytest.mark.slow
def test_photographs_are_encoded_once_for_all_contestants(benchmark, tmp_path, capsys):
    make_caption_miniature("flickr8k", tmp_path / "flickr8k")
    # The test split is not read.
    for name in (tmp_path / "flickr8k" / "Flickr_8k.testImages.txt").read_text().split():
        next((tmp_path / "flickr8k").rglob(name)).unlink()
    flags = ["--tasks", "Flickr8k", "--data_dir", f"flickr8k={tmp_path / 'flickr8k'}", "--seeds", "1"]
    flags += ["--epochs", "4", "--learning_rates", "1e-3", "--output_dir", str(tmp_path / "out")]
    flags += save_encoders(tmp_path)

    def encoded():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}

    benchmark.main([*flags, "--contestants", "HiViLT"])
    before = encoded()
    benchmark.main([*flags, "--contestants", "co-attention (METER)"])
    assert before and encoded() == before
    results = benchmark.main([*flags, "--contestants", "one stage"])
    # It reads the coarsest level alone.
    assert encoded().items() > before.items() and len({*(tmp_path / "cache").glob("vision-*")}) == 2
    columns = ["mean recall", "image to text recall@1", "text to image recall@1"]
    assert [list(run["test"]) for run in results["runs"].values()] == [columns] * 3
    assert [run["steps"] for run in results["runs"].values()] == [4] * 3
    # Pairs are fused in training, and counted.
    ours, other, _ = (run["flops"] for run in results["runs"].values())
    assert ours < other
    printed = capsys.readouterr().out
    assert "| mean recall | beside HiViLT | image to text recall@1 | beside HiViLT |" in printed


def test_questions_about_photographs_are_answered_once(benchmark, tmp_path):
    make_vqa_miniature("daquar", tmp_path / "daquar")
    flags = ["--tasks", "DAQUAR", "--data_dir", f"daquar={tmp_path / 'daquar'}", "--contestants", "HiViLT"]
    flags += ["--seeds", "1", "--epochs", "5", "--learning_rates", "1e-3", "--output_dir", str(tmp_path / "out")]
    results = benchmark.main([*flags, *save_encoders(tmp_path)])
    (run,) = results["runs"].values()
    assert not results["searched"] and list(run["test"]) == ["accuracy"]
    assert run["steps"] == 5 and len(run["curve"]) == 5 and run["learning_rate"] == 1e-3


def test_encoders_that_are_not_there(benchmark, tmp_path, capsys):
    flags = ["--tasks", "DAQUAR", "--data_dir", f"daquar={tmp_path}", "--vision_model", str(tmp_path / "none")]
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    told = capsys.readouterr().err
    assert "vision_model: there is no folder" in told and "runs/encoders_without_hub.py" in told


def test_a_rate_that_is_held_falls_in_the_last_share_of_the_steps(benchmark):
    task = benchmark.Trial("sort-of-clevr", 75, 1, 8, decay=0.25)
    arguments = task.schedule(40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []
    scheduler = get_scheduler(
        arguments["lr_scheduler_type"], optimizer, 4, 40, scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"]
    )
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[4:31] == [1.0] * 27 and rates[:5] == sorted(rates[:5]) and rates[30:] == sorted(rates[30:])[::-1]
    assert rates[0] < 0.5 and 0.5 < rates[34] < 0.9 and rates[39] < 0.1 and optimizer.param_groups[0]["lr"] < 1e-6


def test_images_that_are_read_once_make_the_batches_of_the_collator(benchmark, tmp_path):
    from hivilt.data.sort_of_clevr import write

    write(tmp_path, {"train": 4, "test": 1})
    train = benchmark.read(benchmark.TRIALS["Sort-of-CLEVR"], tmp_path).train
    expected = train.collator([benchmark.VQAImages.__getitem__(train, place) for place in (2, 0)])
    for _ in range(2):
        joined = benchmark.join([train[2], train[0]])
        assert joined.keys() == expected.keys() and next(iter(joined)) == "input_ids"
        assert all(torch.equal(joined[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_training_that_fails_loses_no_other(benchmark, tmp_path, monkeypatch, capsys):
    from hivilt.data.sort_of_clevr import write

    write(tmp_path / "data", {"train": 4, "test": 1})
    whole = benchmark.train

    def train(task, data_dir, contestant, learning_rate, *rest):
        if contestant == "late fusion (CLIP)" and learning_rate == 2e-3:
            raise RuntimeError("out of memory")
        return whole(task, data_dir, contestant, learning_rate, *rest)

    monkeypatch.setattr(benchmark, "train", train)
    flags = ["--tasks", "Sort-of-CLEVR", "--data_dir", f"sort-of-clevr={tmp_path / 'data'}", "--epochs", "1"]
    flags += ["--seeds", "1", "--contestants", "late fusion (CLIP)", "HiViLT", "--learning_rates", "1e-3", "2e-3"]
    flags += ["--output_dir", str(tmp_path)]
    with pytest.raises(RuntimeError, match=r"1 trainings failed .* late fusion .* \| 0.002"):
        benchmark.main(flags)
    assert "out of memory" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert list(found["runs"]) == ["Sort-of-CLEVR | HiViLT | 1"] and len(found["searched"]) == 3


def test_summary_by_hand(benchmark):
    def run(seed, accuracy):
        return {
            "seed": seed,
            "parameters": 10,
            "flops": 12,
            "learning_rate": 0.1,
            "test": {"overall": accuracy},
        }

    accuracies = {"HiViLT": (0.90, 0.92, 0.94), "ViLT": (0.80, 0.83, 0.86)}
    runs = {f"a task | {name} | {n}": run(n, a) for name, of in accuracies.items() for n, a in enumerate(of)}
    rows = benchmark.summary({"runs": runs})["a task"]
    assert rows["HiViLT"]["flops"] == 12 and rows["HiViLT"]["difference"] == {}
    # 4.303 standard errors of 0.02 / sqrt(3).
    assert math.isclose(rows["HiViLT"]["accuracy"]["overall"]["interval"], 4.303 * 0.02 / 3**0.5, rel_tol=1e-3)
    difference = rows["ViLT"]["difference"]["overall"]
    assert math.isclose(difference["mean"], -0.09) and math.isclose(
        difference["interval"], 4.303 * 0.01 / 3**0.5, rel_tol=1e-3
    )
    assert "| ViLT | 0.00 M | 0.0 | 83.0 ± 7.5 | -9.0 ± 2.5 |" in benchmark.table({"runs": runs})
    assert math.isnan(benchmark.interval([0.5]))


def test_curves_are_those_of_the_runs_and_before_them_of_the_best_search(benchmark):
    def run(seed, validation):
        return {"seed": seed, "validation": validation}

    results = {
        "runs": {"a task | HiViLT | 1": run(1, 0.9)},
        "searched": {
            "a task | HiViLT | 0.1": run(0, 1.0),
            "a task | ViLT | 0.1": run(0, 0.5),
            "a task | ViLT | 0.2": run(0, 0.7),
            "a task | ViLT | 0.4": run(0, 0.6),
        },
    }
    assert benchmark.curves(results) == {"a task": {"HiViLT": [run(1, 0.9)], "ViLT": [run(0, 0.7)]}}


@pytest.mark.parametrize("wrong", ["sort-of-clevr", "clever=folder", "sort-of-clevr="])
def test_a_folder_that_is_not_named_well(benchmark, wrong, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--data_dir", wrong])
    assert "data_dir: expected BENCHMARK=FOLDER with one of easy-vqa" in capsys.readouterr().err


def test_data_that_must_be_given(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--tasks", "easy-VQA", "Sort-of-CLEVR"])
    assert "give sort-of-clevr=FOLDER" in capsys.readouterr().err
