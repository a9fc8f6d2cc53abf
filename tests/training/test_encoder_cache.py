import itertools
import json
import logging
import multiprocessing
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BertModel, TrainerCallback, TrainingArguments, ViTImageProcessorPil, ViTModel

from hivilt import HiViLTForRetrieval
from hivilt.data.augmentation import Augmentation
from hivilt.data.captions import CaptionCollator, CaptionDataset, CaptionedImage, read_caption_table
from hivilt.data.reasoning import ReasoningCollator, ReasoningDataset, Statement
from hivilt.run_retrieval import main as run_retrieval
from hivilt.run_vqa import main as run_vqa
from hivilt.tasks.retrieval import RetrievalTrainer
from hivilt.training.encoder_cache import EncoderCache, StateStore
from processes import launch
from tiny import TEXT_CONFIGS, VISION_CONFIGS, make_image, make_model, make_processor

COLORS = ("red", "blue", "green", "white", "yellow", "purple", "orange", "cyan")
FUSION = {"hidden_size": 20, "num_attention_heads": 4, "num_fusion_stages": 2, "fusion_intermediate_size": 22}


@pytest.fixture
def examples(tmp_path):
    """Ten images in files, with one to three captions each."""
    found = []
    for number in range(10):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        make_image(COLORS[number % 8], size=(31, 23 + number)).save(path)
        words = " ".join(["red", "blue", "circle"][: 1 + number % 3])
        captions = tuple(f"{start} {words}" for start in ("a", "the", "two")[: 1 + number % 3])
        found.append(CaptionedImage(str(number), str(path), captions))
    return found


@pytest.fixture
def model():
    model = make_model(HiViLTForRetrieval, weight_scale=4.0)
    model.freeze("vision")
    model.freeze("text")
    return model.train()


def fill(folder, examples, model, processor, **more):
    """A cache of a training split, and what its collator makes of the whole split."""
    dataset = CaptionDataset(examples, seed=0)
    cache = EncoderCache(folder, **{name: more.pop(name) for name in ("max_bytes", "dtype") if name in more})
    cache.add(dataset, model, processor, batch_size=3, progress=False, **more)
    collator = CaptionCollator(processor, more.get("augmentation"), encoder_cache=cache)
    batch = collator([dataset[place] for place in range(len(dataset))])
    batch.pop("caption_index")
    return cache, batch


def plain(examples, processor):
    batch = CaptionCollator(processor)([CaptionDataset(examples)[place] for place in range(len(examples))])
    batch.pop("caption_index")
    return batch


# A loop of one's own


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_those_without_the_cache(side, tmp_path, examples, model, processor):
    processor.tokenizer.padding_side = side
    cache, batch = fill(tmp_path / "cache", examples, model, processor)
    assert "pixel_values" not in batch and {"feature_maps", "token_states", "input_ids"} <= batch.keys()
    assert cache.summary()["vision"]["encoded"] == 10
    assert cache.summary()["text"]["encoded"] == len({text for one in examples for text in one.captions})
    found = []
    for one in (batch, plain(examples, processor)):
        torch.manual_seed(0)
        model.zero_grad()
        model(**one).loss.backward()
        found.append([model(**one).loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for cached, computed in zip(*found, strict=True):
        torch.testing.assert_close(cached, computed, atol=1e-5, rtol=1e-5)


def test_a_second_run_encodes_nothing(tmp_path, examples, model, processor, caplog):
    fill(tmp_path / "cache", examples, model, processor)

    def fail(*_):
        raise AssertionError("an encoder ran")

    model.model.vision_model.register_forward_hook(fail)
    model.model.text_model.register_forward_hook(fail)
    with caplog.at_level(logging.INFO, "hivilt"):
        cache, batch = fill(tmp_path / "cache", examples, model, processor)
    assert model(**batch).loss.isfinite()
    assert [one["encoded"] for one in cache.summary().values()] == [0, 0]
    assert "vision: 10 from the cache, 0 of them encoded now; " in caplog.text


def test_images_that_statements_share_are_encoded_once(tmp_path, examples, model, processor):
    pairs = [(examples[n], examples[(n + 1) % 4]) for n in range(4)]
    statements = [
        Statement(str(n), tuple(one.image for one in pair), tuple(one.image_id for one in pair), "a red circle", "True")
        for n, pair in enumerate(pairs)
    ]
    dataset, cache = ReasoningDataset(statements, seed=0), EncoderCache(tmp_path / "cache")
    cache.add(dataset, model, processor, batch_size=3, progress=False)
    assert {part: found["encoded"] for part, found in cache.summary().items()} == {"vision": 4, "text": 1}
    labels = {"False": 0, "True": 1}
    batch = ReasoningCollator(processor, labels, encoder_cache=cache)([dataset[0]])
    usual = ReasoningCollator(processor, labels)([dataset[0]])
    assert "pixel_values" not in batch and batch["image_index"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    expected = model.model.get_feature_maps(usual["pixel_values"])
    for cached, computed in zip(batch["feature_maps"], expected, strict=True):
        torch.testing.assert_close(cached, computed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["vision weights", "text weights", "processor", "an image", "the files' names"])
def test_what_changed_is_encoded_again_and_nothing_else(change, tmp_path, examples, model, processor):
    fill(tmp_path / "cache", examples, model, processor)
    expected = {"vision": 0, "text": 0}
    if change == "vision weights":
        with torch.no_grad():
            model.model.vision_model.layernorm.weight[3] += 0.5
        expected["vision"] = 10
    elif change == "text weights":
        with torch.no_grad():
            model.model.text_model.embeddings.word_embeddings.weight[7] += 0.5
        expected["text"] = len({text for one in examples for text in one.captions})
    elif change == "processor":
        processor.image_processor.image_mean = [0.1, 0.2, 0.3]
        expected["vision"] = 10
    elif change == "an image":
        make_image("cyan", size=(31, 23)).save(examples[0].image)
        expected["vision"] = 1
    else:
        examples = [one._replace(image=shutil.move(one.image, one.image + ".png")) for one in examples]
    cache, batch = fill(tmp_path / "cache", examples, model, processor)
    assert {part: found["encoded"] for part, found in cache.summary().items()} == expected
    model.eval()
    torch.testing.assert_close(
        model(**batch).logits_per_image, model(**plain(examples, processor)).logits_per_image, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_bytes_for_nearly_the_same_scores(dtype, tmp_path, examples, model, processor):
    whole, _ = fill(tmp_path / "whole", examples, model, processor)
    half, batch = fill(tmp_path / "half", examples, model, processor, dtype=dtype)
    assert {states.dtype for states in (*batch["feature_maps"], batch["token_states"])} == {getattr(torch, dtype)}
    saved = whole.summary()["vision"]["bytes"] - half.summary()["vision"]["bytes"]
    assert saved == pytest.approx(2 * sum(tensor.numel() for tensor in batch["feature_maps"]), rel=0.05)
    model.eval()
    expected = model(**plain(examples, processor)).image_embeds
    torch.testing.assert_close(model(**batch).image_embeds, expected, atol=0.02, rtol=0.02)
    with torch.no_grad():
        model.model.vision_model.layernorm.weight.mul_(1e6)
    if dtype == "float16":
        with pytest.raises(
            ValueError, match="cache_dtype: float16 holds numbers up to 65,504, but the encoder gives [1-9],"
        ):
            fill(tmp_path / "half", examples, model, processor, dtype=dtype)
    else:
        fill(tmp_path / "half", examples, model, processor, dtype=dtype)


@pytest.mark.parametrize("first", [True, False])
def test_models_with_and_without_local_fusion_share_a_folder(first, tmp_path, examples, processor):
    for local in (first, not first):
        model = make_model(HiViLTForRetrieval, use_local_fusion=local)
        model.freeze("vision")
        model.freeze("text")
        _, batch = fill(tmp_path / "cache", examples, model, processor)
        # Without it the coarsest level alone is read.
        assert len(batch["feature_maps"]) == (2 if local else 1)
        assert model.train()(**batch).loss.isfinite()


def test_images_in_a_table_come_from_the_cache_also_in_worker_processes(tmp_path, model, processor):
    table = Dataset.from_dict(
        {
            "image": [make_image(color, size=(30, 20 + row)) for row, color in enumerate(COLORS)],
            "caption": [f"a {color}" for color in COLORS],
        }
    )
    dataset = CaptionDataset(read_caption_table(table), seed=0)
    cache = EncoderCache(tmp_path / "cache")
    cache.add(dataset, model, processor, progress=False)
    assert cache.summary()["vision"]["encoded"] == 8
    # Pickled as for a worker that is spawned.
    dataset, collator = pickle.loads(pickle.dumps((dataset, CaptionCollator(processor, None, cache))))
    (batch,) = DataLoader(dataset, 8, collate_fn=collator, num_workers=1, multiprocessing_context="fork")
    expected = plain_maps(model, dataset.examples, processor)
    for found, wanted in zip(batch["feature_maps"], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_only_what_is_frozen_as_a_whole_is_cached(tmp_path, examples, processor):
    model = make_model(HiViLTForRetrieval)
    assert fill(tmp_path / "cache", examples, model, processor)[0].summary() == {}
    model.freeze("vision", num_layers=2)
    # Frozen by hand, it still has its dropout in training.
    model.model.text_model.requires_grad_(False)
    cache, batch = fill(tmp_path / "cache", examples, model, processor)
    assert cache.summary() == {} and "pixel_values" in batch
    model.freeze("vision")
    model.model.vision_model.layernorm.weight.requires_grad_(True)
    assert fill(tmp_path / "cache", examples, model, processor)[0].summary() == {}
    model.freeze("text")
    assert [*fill(tmp_path / "cache", examples, model, processor)[0].summary()] == ["text"]


@pytest.mark.parametrize("flip, cached", [(None, {"text"}), ("skip", {"text"}), ("swap", set())])
def test_augmented_images_are_not_cached_and_it_is_said(flip, cached, tmp_path, examples, model, processor, caplog):
    augmentation = Augmentation(random_crop=0.5, random_flip=flip)
    logging.Logger.info_once.cache_clear()
    with caplog.at_level(logging.INFO, "hivilt"):
        cache, batch = fill(tmp_path / "cache", examples, model, processor, augmentation=augmentation)
    assert "pixel_values" in batch and set(cache.summary()) == cached
    assert "vision: not cached in training, since augmentation changes it each time." in caplog.text
    # What is evaluated on is never augmented.
    cache.add(CaptionDataset(examples), model, processor, augmentation=augmentation, progress=False)
    collator = CaptionCollator(processor, augmentation, cache)
    assert "feature_maps" in collator([CaptionDataset(examples)[0]])
    assert "pixel_values" in collator([CaptionDataset(examples, seed=0)[0]])


@pytest.mark.parametrize("how", [{}, {"parts": ("text",)}, {"augmentation": Augmentation(random_flip="skip")}], ids=str)
def test_a_cache_refuses_another_encoder_and_gives_nothing_of_the_first(how, tmp_path, examples, model, processor):
    cache, _ = fill(tmp_path / "cache", examples, model, processor)
    with torch.no_grad():
        model.model.vision_model.layernorm.weight[3] += 0.5
    with pytest.raises(
        ValueError, match="model: its vision encoder is another than that of the data sets added before"
    ):
        cache.add(CaptionDataset(examples, seed=0), model, processor, progress=False, **how)
    assert "pixel_values" in CaptionCollator(processor, encoder_cache=cache)([CaptionDataset(examples)[0]])


def test_a_cache_that_served_a_frozen_encoder_gives_nothing_once_it_trains(tmp_path, examples, model, processor):
    cache, _ = fill(tmp_path / "cache", examples, model, processor)
    unfrozen = make_model(HiViLTForRetrieval)
    unfrozen.freeze("text")
    unfrozen.model.text_model.load_state_dict(model.model.text_model.state_dict())
    cache.add(CaptionDataset(examples), unfrozen, processor, progress=False)
    batch = CaptionCollator(processor, encoder_cache=cache)([CaptionDataset(examples)[0]])
    assert "pixel_values" in batch and "token_states" in batch


@pytest.mark.parametrize("part, name", [("vision", "feature_maps"), ("text", "token_states")])
def test_a_model_whose_encoder_trains_refuses_states_that_would_teach_it_nothing(
    part, name, tmp_path, examples, model, processor
):
    _, batch = fill(tmp_path / "cache", examples, model, processor)
    trains = make_model(HiViLTForRetrieval)
    trains.freeze({"vision": "text", "text": "vision"}[part])
    with pytest.raises(ValueError, match=f"`{name}` carry no gradient, but the {part} encoder trains"):
        trains.train()(**batch)
    assert trains.eval()(**batch, return_loss=True).loss.isfinite()


def test_states_that_carry_a_gradient_train_their_encoder(examples, processor):
    model = make_model(HiViLTForRetrieval).train()
    batch = plain(examples, processor)
    maps = model.get_feature_maps(batch.pop("pixel_values"))
    model(feature_maps=maps, **batch).loss.backward()
    assert model.model.vision_model.layernorm.weight.grad.any()


def test_an_image_that_was_written_over_since_is_encoded_anew(tmp_path, examples, model, processor):
    cache, _ = fill(tmp_path / "cache", examples, model, processor)
    collator = CaptionCollator(processor, encoder_cache=cache)
    assert "feature_maps" in collator([CaptionDataset(examples)[0]])
    make_image("cyan", size=(31, 40)).save(examples[0].image)
    assert "pixel_values" in collator([CaptionDataset(examples)[0]])


def test_an_encoder_with_an_adapter_is_not_cached(tmp_path, examples, model, processor):
    from peft import LoraConfig, get_peft_model

    targets = r".*vision_model\..*(query|q_proj)"
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.requires_grad_(False)
    cache, batch = fill(tmp_path / "cache", examples, model, processor)
    assert [*cache.summary()] == ["text"] and "pixel_values" in batch


def test_an_image_that_cannot_be_opened_is_named(tmp_path, examples, model, processor):
    (tmp_path / "images/4.png").write_bytes((tmp_path / "images/4.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="4.png.*is not a readable image"):
        fill(tmp_path / "cache", examples, model, processor)


# Files


def encode(keys):
    for place in map(int, keys):
        yield torch.full((1 + place % 3, 2), float(place)), torch.full((2, 3), -float(place))


def fill_store(store, keys, encode=encode):
    store.fill(dict(zip(keys, keys, strict=True)), encode, 4)


def assert_holds(store, keys):
    for key, (first, second) in zip(keys, store.read(keys), strict=True):
        assert first.eq(float(key)).all() and len(first) == 1 + int(key) % 3 and second.eq(-float(key)).all()


@given(st.data())
@settings(max_examples=25)
def test_whatever_order_and_stops_each_item_is_encoded_once_and_found(data):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, "store")
        encoded = []
        for _ in range(data.draw(st.integers(1, 4), "runs")):
            keys = [*map(str, data.draw(st.lists(st.integers(0, 30), unique=True), "keys"))]
            stop = data.draw(st.none() | st.integers(0, 10), "killed after")

            def encode_some(keys, stop=stop):
                for count, item in enumerate(encode(keys)):
                    if count == stop:
                        raise KeyboardInterrupt
                    yield item
                encoded.extend(keys)

            store = StateStore(folder, torch.float32)
            try:
                fill_store(store, keys, encode_some)
            except KeyboardInterrupt:
                continue
            assert_holds(store, data.draw(st.permutations(keys), "read"))
        assert len(encoded) == len(set(encoded))
        assert not [*folder.glob("*.new")] and not [*folder.glob(".*.new")]


def test_a_file_that_was_cut_off_is_encoded_again(tmp_path, caplog):
    keys = [*map(str, range(10))]
    fill_store(StateStore(tmp_path, torch.float32), keys)
    broken = sorted(tmp_path.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:-7])
    (tmp_path / "other.safetensors").write_bytes(b"no such file")
    store = StateStore(tmp_path, torch.float32)
    assert f"{broken} cannot be read" in caplog.text and "other.safetensors" in caplog.text
    for encoded in (True, False):  # the file is whole again
        fill_store(store, keys)
        assert_holds(store, keys)
        assert bool(store.num_encoded) == encoded
        store = StateStore(tmp_path, torch.float32)


def test_workers_that_find_the_cache_deleted_encode_images_themselves(tmp_path, examples, model, processor):
    cache, _ = fill(tmp_path / "cache", examples, model, processor)
    sent = pickle.dumps(CaptionCollator(processor, encoder_cache=cache))  # as to a spawned worker
    shutil.rmtree(tmp_path / "cache")
    batch = pickle.loads(sent)([CaptionDataset(examples)[0]])
    assert "pixel_values" in batch and "token_states" not in batch


def test_others_may_read_what_one_wrote(tmp_path):
    (tmp_path / "plain").touch()
    fill_store(StateStore(tmp_path / "cache", torch.float32), [*map(str, range(10))])
    (mode,) = {path.stat().st_mode for path in (tmp_path / "cache").iterdir()}
    assert mode == (tmp_path / "plain").stat().st_mode


def test_whoever_deletes_it_while_a_run_trains_takes_nothing_from_the_run(tmp_path):
    keys = [*map(str, range(10))]
    store = StateStore(tmp_path / "cache", torch.float32)
    fill_store(store, keys)
    shutil.rmtree(tmp_path / "cache")
    assert_holds(store, keys)


def test_two_that_fill_it_at_once_share_the_work(tmp_path):
    keys = [*map(str, range(40))]
    stores = [StateStore(tmp_path, torch.float32) for _ in range(2)]
    threads = [threading.Thread(target=fill_store, args=(store, keys)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(store.num_encoded for store in stores) == 40
    for store in stores:
        assert_holds(store, keys)
    assert not [*tmp_path.glob("*.lock")]


def test_a_part_that_another_process_encodes_is_waited_for(tmp_path):
    keys, begun, goes_on = [*map(str, range(4))], threading.Event(), threading.Event()

    def slowly(keys):
        begun.set()
        goes_on.wait()
        return encode(keys)

    other = StateStore(tmp_path, torch.float32)
    thread = threading.Thread(target=fill_store, args=(other, keys, slowly))
    thread.start()
    begun.wait()
    threading.Timer(0.2, goes_on.set).start()
    store = StateStore(tmp_path, torch.float32)
    fill_store(store, keys)
    thread.join()
    assert (other.num_encoded, store.num_encoded) == (4, 0)
    assert_holds(store, keys)


def test_one_that_was_killed_has_left_all_that_it_finished(tmp_path):
    keys = [*map(str, range(12))]

    def slowly(keys):
        for item in encode(keys):
            time.sleep(0.05)
            yield item

    fork = multiprocessing.get_context("fork")
    other = fork.Process(target=fill_store, args=(StateStore(tmp_path, torch.float32), keys, slowly))
    other.start()
    while len([*tmp_path.glob("*.safetensors")]) < 2:
        assert other.is_alive()
        time.sleep(0.01)
    other.kill()
    other.join()
    store = StateStore(tmp_path, torch.float32)
    fill_store(store, keys)
    assert store.num_encoded == 4
    assert_holds(store, keys)


def test_where_there_is_no_room_nothing_is_written_and_all_is_encoded_each_time(
    tmp_path, examples, model, processor, caplog
):
    cache, batch = fill(tmp_path / "cache", examples, model, processor, max_bytes=20_000)
    vision = 10 * 4 * sum(states[0].numel() for states in plain_maps(model, examples, processor))
    assert f"vision: {vision / 1e9:.3g} GB are to come, but" in caplog.text and "--cache_gb" in caplog.text
    assert not [*(tmp_path / "cache").glob("vision-*/*.safetensors")]
    assert "pixel_values" in batch and model(**batch).loss.isfinite()


def plain_maps(model, examples, processor):
    with torch.no_grad():
        return model.get_feature_maps(plain(examples, processor)["pixel_values"])


def test_a_full_disk_stops_the_cache_and_not_the_run(tmp_path, examples, model, processor, caplog):
    # As the system says it: nothing can be written below a file.
    (tmp_path / "file").write_text("a file")
    _, batch = fill(tmp_path / "file" / "cache", examples, model, processor)
    assert caplog.text.count("so what is missing is encoded in every epoch") == 2  # vision, text
    assert "pixel_values" in batch and model(**batch).loss.isfinite()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype: expected one of float32, float16, bfloat16, got 'int8'"):
        EncoderCache(dtype="int8")


# The scripts


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    ViTModel(VISION_CONFIGS["vit"]()).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(folder / "vit")
    BertModel(TEXT_CONFIGS["bert"]()).save_pretrained(folder / "bert")
    make_processor().tokenizer.save_pretrained(folder / "bert")
    return ["--vision_model", str(folder / "vit"), "--text_model", str(folder / "bert"), "--freeze", "vision", "text"]


def flags(out, encoders, *more):
    return [
        *(*encoders, "--output_dir", str(out), "--fusion", json.dumps(FUSION), "--use_cpu", "--disable_tqdm", "true"),
        *("--num_train_epochs", "2", "--logging_steps", "1", "--learning_rate", "0.01", "--warmup_steps", "0"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", *more),
    ]


def rows(tmp_path, examples, key, make):
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"image": one.image, **make(one)}) for one in examples]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return [
        part for split in ("train", "validation", "test") for part in (f"--{split}_file", f"{tmp_path}/{split}.jsonl")
    ]


def history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [one[name] for one in log for name in ("loss", "grad_norm", "eval_loss") if name in one]


@pytest.mark.parametrize("task", ["retrieval", pytest.param("vqa", marks=pytest.mark.slow)])
def test_scripts_train_alike_with_and_without_it(task, tmp_path, examples, encoders):
    if task == "vqa":
        main, answers = run_vqa, ("yes", "no")
        data = rows(
            tmp_path,
            examples,
            task,
            lambda one: {"question": f"is it {one.captions[0]}", "answer": answers[int(one.image_id) % 2]},
        )
        more = []
    else:
        main, more = run_retrieval, ["--rerank_k", "3"]
        data = rows(tmp_path, examples, task, lambda one: {"caption": list(one.captions)})
    cached = ["--cache_dir", str(tmp_path / "cache")]
    results = {
        name: main([*data, *flags(tmp_path / name, encoders, *more, *how)])
        for name, how in {"without": ["--no_encoder_cache"], "first": cached, "second": cached}.items()
    }
    assert "encoder_cache" not in results["without"]
    assert {part: found["encoded"] for part, found in results["first"]["encoder_cache"].items()}["vision"] == 10
    assert [found["encoded"] for found in results["second"]["encoder_cache"].values()] == [0, 0]
    expected = history(tmp_path / "without")
    assert len(expected) > 10
    for name in ("first", "second"):
        assert history(tmp_path / name) == pytest.approx(expected, abs=1e-5)
        assert results[name]["test"]["loss"] == pytest.approx(results["without"]["test"]["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_encode_each_image_once_and_train_as_without(tmp_path, examples, encoders):
    data = rows(tmp_path, examples, "retrieval", lambda one: {"caption": list(one.captions)})
    more = ["--rerank_k", "3", "--per_device_train_batch_size", "2"]
    for name, how in {"with": ["--cache_dir", str(tmp_path / "cache")], "without": ["--no_encoder_cache"]}.items():
        launch("hivilt.run_retrieval", 2, [*data, *flags(tmp_path / name, encoders, *more, *how)])
    assert history(tmp_path / "with") == pytest.approx(history(tmp_path / "without"), abs=1e-5)
    stored = [name for path in (tmp_path / "cache").glob("vision-*/*.safetensors") for name in load_file(path)]
    assert len({name.partition(".")[0] for name in stored}) == 10 and len(set(stored)) == len(stored)


def make_trainer(folder, model, collator, examples, cache=None, **more):
    args = {"max_steps": 1, "per_device_eval_batch_size": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(folder / "out", remove_unused_columns=False, **{**args, **more})
    data = CaptionDataset(examples, seed=0)
    return RetrievalTrainer(model, args, collator, data, data, processing_class=collator.processor, encoder_cache=cache)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_the_collator_of_a_trainer_with_a_cache_serves_a_model_that_trains_its_encoders(
    tmp_path, examples, model, processor
):
    collator = CaptionCollator(processor)
    make_trainer(tmp_path, model, collator, examples, EncoderCache(tmp_path / "cache")).train()
    unfrozen = make_model(HiViLTForRetrieval)
    before = weights(unfrozen)
    make_trainer(tmp_path, unfrozen, collator, examples, learning_rate=0.1).train()
    changed = {name for name, value in unfrozen.named_parameters() if not torch.equal(value, before[name])}
    assert any("vision_model" in name for name in changed) and any("text_model" in name for name in changed)


def test_mixed_precision_caches_what_encoders_give_in_full_precision(tmp_path, examples, model, processor):
    collator = CaptionCollator(processor)
    trainer = make_trainer(tmp_path, model, collator, examples, EncoderCache(tmp_path / "cache"), bf16=True)
    trainer.evaluate()
    batch, given = trainer.data_collator([CaptionDataset(examples)[0]]), plain(examples[:1], processor)
    with torch.no_grad():
        maps = model.get_feature_maps(given["pixel_values"])
        tokens = model.get_token_states(given["input_ids"], given["attention_mask"])
    for found, expected in zip((*batch["feature_maps"], batch["token_states"]), (*maps, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_that_the_user_gave_the_collator_is_the_trainers_and_knows_its_model(
    tmp_path, examples, model, processor
):
    cache = EncoderCache(tmp_path / "cache")
    make_trainer(tmp_path, model, CaptionCollator(processor, encoder_cache=cache), examples).train()
    assert cache.summary()["vision"]["encoded"] == 10
    other = make_model(HiViLTForRetrieval)
    other.freeze("vision")
    with torch.no_grad():
        other.model.vision_model.layernorm.weight[3] += 0.5
    with pytest.raises(ValueError, match="model: its vision encoder is another"):
        make_trainer(tmp_path, other, CaptionCollator(processor, encoder_cache=cache), examples).train()


@pytest.mark.slow  # torch waits five seconds when it lets such workers go
def test_evaluation_with_workers_that_stay_reads_nothing_of_an_encoder_that_trains_since(
    tmp_path, examples, model, processor
):
    found = []
    for cache in (EncoderCache(tmp_path / "cache"), None):
        model.model.vision_model.requires_grad_(False)
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        trainer = make_trainer(tmp_path, model, CaptionCollator(processor), examples, cache, **workers)
        losses = [trainer.evaluate()["eval_loss"]]
        model.model.vision_model.requires_grad_(True)
        with torch.no_grad():
            model.model.vision_model.layernorm.weight[3] += 2
        losses.append(trainer.evaluate()["eval_loss"])
        with torch.no_grad():
            model.model.vision_model.layernorm.weight[3] -= 2
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[1][0] - found[1][1]) > 1e-3


def test_frozen_weights_that_a_callback_changes_end_the_run_at_its_next_evaluation(
    tmp_path, examples, model, processor
):
    class Change(TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **kwargs):
            if state.epoch == 2:
                with torch.no_grad():
                    model.model.vision_model.layernorm.weight[3] += 2

    trainer = make_trainer(
        tmp_path,
        model,
        CaptionCollator(processor),
        examples,
        EncoderCache(tmp_path / "cache"),
        **{"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch"},
    )
    trainer.add_callback(Change)
    with pytest.raises(ValueError, match="model: its vision encoder is another"):
        trainer.train()
    assert trainer.state.epoch == 2


def test_states_are_of_the_collators_processor(tmp_path, examples, model, processor):
    other = make_processor()
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    found = []
    for cache in (EncoderCache(tmp_path / "cache"), None):
        trainer = make_trainer(tmp_path, model, CaptionCollator(processor), examples, cache)
        trainer.processing_class = other
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_noise_at_the_embeddings_leaves_no_text_to_a_cache_that_had_them(tmp_path, examples, model, processor):
    cache, batch = fill(tmp_path / "cache", examples, model, processor)
    assert "token_states" in batch
    trainer = make_trainer(tmp_path, model, CaptionCollator(processor), examples, cache, neftune_noise_alpha=5.0)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "token_states" not in batch and "feature_maps" in batch


def test_ctrl_c_while_it_encodes_ends_at_once_and_the_next_run_goes_on(tmp_path, examples, model, processor):
    calls = itertools.count(1)

    def interrupt(*_):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    def train():
        cache = EncoderCache(tmp_path / "cache")
        return make_trainer(tmp_path, model, CaptionCollator(processor), examples, cache).train(), cache.summary()

    model.model.vision_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train()
    _, summary = train()
    assert summary["vision"]["encoded"] == 10


def test_a_run_that_goes_on_uses_the_checkpoints_encoder(tmp_path, examples, encoders):
    """A small new encoder, frozen as it was drawn: another seed would draw another, but the checkpoint's is what runs."""
    data = rows(tmp_path, examples, "retrieval", lambda one: {"caption": list(one.captions)})
    new = ["--freeze", "vision", "--image_size", "32"]
    more = ["--rerank_k", "0", "--cache_dir", str(tmp_path / "cache")]
    more += ["--save_strategy", "epoch", "--eval_strategy", "epoch"]
    run_retrieval([*data, *flags(tmp_path / "out", new, *more)])
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{steps[-1]}")
    goes_on = ["--resume_from_checkpoint", "last"]
    resumed = run_retrieval([*data, *flags(tmp_path / "out", new, *more, *goes_on, "--seed", "7")])
    assert resumed["encoder_cache"]["vision"]["encoded"] == 0
