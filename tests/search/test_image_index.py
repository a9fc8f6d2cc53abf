"""A folder of images that is indexed, cut off, changed, searched and asked."""

import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hivilt import (
    HiViLTForConditionalGeneration,
    HiViLTForQuestionAnswering,
    HiViLTForRetrieval,
    HiViLTModel,
    HiViLTProcessor,
)
from hivilt.search import Hit, ImageAnswer, ImageIndex
from hivilt.search.image_index import fingerprint
from tiny import FUSIONS, TEXT_CONFIGS, VISION_CONFIGS, make_image, make_model, make_processor

COLORS = ["red", "blue", "green", "yellow", "black", "white", "orange", "purple", "gray", "pink", "brown", "cyan"]
TEXTS = ["red circle", "is there a blue square in the image?", "what color is the shape?", "two", "a red and blue"]


class TestFingerprint:
    @pytest.mark.parametrize(("vision", "text"), [("vit", "bert"), ("swin", "t5"), ("convnext", "clip")])
    def test_survives_saving_and_loading(self, tmp_path, vision, text):
        assert vision in VISION_CONFIGS and text in TEXT_CONFIGS
        model, processor = make_model(HiViLTForRetrieval, vision=vision, text=text), make_processor()
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded = HiViLTForRetrieval.from_pretrained(tmp_path), HiViLTProcessor.from_pretrained(tmp_path)
        assert fingerprint(*loaded) == fingerprint(model, processor)

    def test_tells_weights_settings_and_levels_apart(self):
        processor = make_processor()
        model = make_model(HiViLTForRetrieval)
        other_weight = make_model(HiViLTForRetrieval)
        with torch.no_grad():
            other_weight.visual_projection.weight[0, 0] += 1e-3
        other_size = make_processor()
        other_size.image_processor.image_mean = [0.4, 0.5, 0.5]
        other_levels = make_model(HiViLTForRetrieval, vision_levels=[1, 2])
        prints = [fingerprint(model, processor), fingerprint(other_weight, processor)]
        prints += [fingerprint(model, other_size), fingerprint(other_levels, processor)]
        assert len(set(prints)) == 4
        assert fingerprint(make_model(HiViLTForRetrieval), make_processor()) == prints[0]

    def test_tells_half_precision_apart_that_holds_the_same_numbers(self):
        model = make_model(HiViLTForRetrieval).half()
        assert fingerprint(model, make_processor()) != fingerprint(model.float(), make_processor())


def make_images(folder):
    """Twelve images in three folders, in several formats; and what is no image, hidden, or a loop of links."""
    for number, color in enumerate(COLORS):
        suffix = [".png", ".jpg", ".WEBP"][number % 3]
        path = folder / ["", "Größe", "a/日本"][number // 4] / f"{color}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(color).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    make_image("red").save(folder / ".hidden" / "red.png")
    make_image("red").save(folder / ".red.png")
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    return folder


@pytest.fixture
def images(tmp_path):
    """Those of `make_images`, to change."""
    return make_images(tmp_path / "images")


def make_counting_model():
    """Its `encoded` holds the number of images of each call."""
    model = make_model(HiViLTForRetrieval, weight_scale=8.0)
    model.encoded = []
    encode = model.model.encode_images
    model.model.encode_images = lambda x, **kwargs: model.encoded.append(len(x)) or encode(x, **kwargs)
    return model


@pytest.fixture
def model():
    """One of its own for each test, to count in."""
    return make_counting_model()


def build(images, model, **kwargs):
    output_dir = kwargs.pop("output_dir", images.parent / "index")
    return ImageIndex.build(images, model, make_processor(), output_dir, **{"batch_size": 2, "shard_size": 4, **kwargs})


def names(index):
    return index.dataset["image"][:]


def embeddings(index):
    return np.array(index.dataset["embedding"][:], dtype=np.float32)


def files_of(images):
    paths = [path for path in images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".webp")]
    return sorted(p.relative_to(images).as_posix() for p in paths if "/." not in str(p) and "loop" not in p.parts)


class TestBuild:
    def test_every_image_with_its_embedding_sorted_by_path(self, images, model):
        index = build(images, model, batch_size=5)
        assert names(index) == files_of(images) and len(index) == 12
        assert model.encoded == [5, 5, 2]
        for name, embedding in zip(names(index), embeddings(index), strict=True):
            inputs = make_processor()(images=images / name, return_tensors="pt")
            with torch.no_grad():
                wanted = model.get_image_features(**inputs).pooler_output[0]
            np.testing.assert_allclose(embedding, wanted, atol=1e-5)

    def test_what_is_written(self, images, model):
        build(images, model)
        output_dir = images.parent / "index"
        assert sorted(path.name for path in output_dir.iterdir()) == ["embeddings", "embeddings.faiss", "index.json"]
        info = json.loads((output_dir / "index.json").read_text())
        features = load_from_disk(output_dir / "embeddings").features
        assert features["embedding"] == List(Value("float32"), length=model.config.projection_dim)
        assert info["images"] == "../images" and info["num_images"] == 12
        assert [one["image"] for one in info["skipped"]] == ["notes.txt"]
        assert faiss.read_index(str(output_dir / "embeddings.faiss")).metric_type == faiss.METRIC_INNER_PRODUCT

    def test_an_index_of_the_time_of_pictures_is_read(self, images, model):
        build(images, model)
        path = images.parent / "index/index.json"
        info = json.loads(path.read_text().replace('"images"', '"pictures"').replace('"num_images"', '"num_pictures"'))
        del info["embeddings"]
        path.write_text(json.dumps(info))
        assert len(ImageIndex.load(path.parent, model, make_processor())) == len(build(images, model)) == 12
        assert model.encoded == [2] * 6  # nothing was done again

    def test_folder_and_index_may_move_together(self, images, model, tmp_path, caplog):
        build(images, model)
        moved = shutil.move(
            shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name} copy", symlinks=True), tmp_path
        )
        shutil.rmtree(images)
        index = ImageIndex.load(Path(moved, "index"), model, make_processor())
        assert all(hit.path.is_file() for hit in index.search("red", top_k=12))
        ImageIndex.load(tmp_path / "index", model, make_processor()).search("red", top_k=12)
        assert "12 of the 12 images found, " in caplog.text and "are gone" in caplog.text

    @pytest.mark.parametrize("stop_after", [1, 3])
    def test_an_interrupted_build_goes_on_where_it_stopped(self, images, model, stop_after, monkeypatch):
        whole = build(images, model, output_dir=images.parent / "whole")
        model.encoded.clear()
        encode = model.encode_images

        def interrupted(*args, **kwargs):
            if len(model.encoded) == stop_after:
                raise KeyboardInterrupt
            return encode(*args, **kwargs)

        monkeypatch.setattr(model, "encode_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(images, model)
        with pytest.raises(FileNotFoundError, match="goes on where it stopped"):
            ImageIndex.load(images.parent / "index", model, make_processor())

        monkeypatch.undo()
        index = build(images, model)
        assert sum(model.encoded) == 12
        assert names(index) == names(whole)
        np.testing.assert_array_equal(embeddings(index), embeddings(whole))
        assert (images.parent / "index/embeddings.faiss").read_bytes() == (
            images.parent / "whole/embeddings.faiss"
        ).read_bytes()

    def test_a_killed_process_loses_less_than_a_shard(self, images, model, tmp_path):
        def killed():
            encode, calls = model.encode_images, itertools.count(1)

            def encode_or_die(*args, **kwargs):
                if next(calls) == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return encode(*args, **kwargs)

            model.encode_images = encode_or_die
            build(images, model)

        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        index = build(images, model)
        assert sum(model.encoded) == 12 - 4
        whole = build(images, model, output_dir=tmp_path / "whole")
        np.testing.assert_array_equal(embeddings(index), embeddings(whole))

    @pytest.mark.parametrize("step", range(5))
    def test_a_rebuild_cut_off_anywhere_loses_nothing(self, images, model, monkeypatch, step):
        """Cuts before the step-th of the moves, removals and writes that put a new index in the place of an old one."""
        build(images, model)
        model.encoded.clear()
        make_image("magenta").save(images / "new.png")
        taken = []

        def cut(function):
            def wrapper(*args, **kwargs):
                taken.append(function)
                if len(taken) > step:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr("hivilt.search.image_index.os.replace", cut(os.replace))
            patch.setattr("hivilt.search.image_index.shutil.rmtree", cut(shutil.rmtree))
            with pytest.raises(KeyboardInterrupt):
                build(images, model)
        # Until the new index is in place, the old one serves.
        assert len(ImageIndex.load(images.parent / "index", model, make_processor())) == (12 if step < 3 else 13)
        index = build(images, model)
        assert len(index) == 13 and sum(model.encoded) == (2 if step == 0 else 1)
        assert index.search(images / "new.png", top_k=1)[0].path.name == "new.png"

    def test_only_what_changed_is_embedded_again(self, images, model):
        build(images, model)
        model.encoded.clear()
        make_image("magenta").save(images / "red.png")
        make_image("black").save(images / "Größe" / "another.png")
        (images / "blue.jpg").unlink()
        index = build(images, model)
        assert sum(model.encoded) == 2
        assert names(index) == files_of(images) and len(index) == 12
        (found, *_) = index.search(make_image("magenta"), top_k=1)
        assert found.path == images / "red.png" and found.score == pytest.approx(1, abs=1e-5)

    def test_an_index_within_its_folder_does_not_index_itself(self, images, model):
        for _ in range(2):
            assert len(build(images, model, output_dir=images / "index")) == 12
            make_image().save(images / "index/search.png")
        # Nor does another one index the first.
        assert len(build(images, model, output_dir=images / "another")) == 12
        skipped = json.loads((images / "another/index.json").read_text())["skipped"]
        assert [one["image"] for one in skipped] == ["notes.txt"]
        with pytest.raises(ValueError, match="^output_dir: .* is the folder of the images itself"):
            build(images, model, output_dir=images)

    def test_a_build_with_nothing_to_do_writes_nothing(self, images, model):
        build(images, model)
        before = {path: path.stat().st_mtime_ns for path in (images.parent / "index").rglob("*")}
        index = build(images, model)
        assert sum(model.encoded) == 12 and len(index) == 12
        assert {path: path.stat().st_mtime_ns for path in (images.parent / "index").rglob("*")} == before

    def test_another_kind_of_index_needs_no_embedding(self, images, model):
        flat = build(images, model).search("red circle")
        index = build(images, model, index_factory="IVF2,Flat")
        assert sum(model.encoded) == 12
        index.dataset.get_index("embedding").faiss_index.nprobe = 2
        assert index.search("red circle") == flat

    def test_another_checkpoint_embeds_anew(self, images, model):
        build(images, model)
        other = make_model(HiViLTForRetrieval, seed=1, weight_scale=8.0)
        index = build(images, other)
        assert index.search(images / "red.png", top_k=1)[0].score == pytest.approx(1, abs=1e-5)
        with pytest.raises(ValueError, match="another checkpoint"):
            ImageIndex.load(images.parent / "index", model, make_processor())

    def test_a_compiled_model_builds_and_opens_the_same_index(self, images, model):
        plain = build(images, model).search("red circle", rerank_k=4)
        model.encoded.clear()
        built = build(images, torch.compile(model))
        loaded = ImageIndex.load(images.parent / "index", torch.compile(model), make_processor())
        assert model.encoded == []
        assert built.search("red circle", rerank_k=4) == loaded.search("red circle", rerank_k=4) == plain

    def test_a_class_that_came_with_the_checkpoint_opens_the_same_index(self, images, model):
        """As the Auto classes give it where hivilt is installed, too."""
        folder = images.parent / "checkpoint"
        model.save_pretrained(folder)
        plain = build(images, model).search("red circle", rerank_k=4)
        theirs = get_class_from_dynamic_module("modeling_hivilt.HiViLTForRetrieval", folder).from_pretrained(folder)
        assert not isinstance(theirs, HiViLTForRetrieval)
        loaded = ImageIndex.load(images.parent / "index", theirs.eval(), make_processor())
        found = loaded.search("red circle", rerank_k=4)
        assert [hit.path for hit in found] == [hit.path for hit in plain]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in plain], abs=1e-5)

    @pytest.mark.parametrize("kind", [HiViLTModel, HiViLTForConditionalGeneration, HiViLTProcessor])
    def test_another_kind_of_model_is_refused(self, images, model, kind):
        index = build(images, model)
        other = make_processor() if kind is HiViLTProcessor else make_model(kind)
        for use in (
            lambda: build(images, other, output_dir=images.parent / "other"),
            lambda: ImageIndex.load(images.parent / "index", other, make_processor()),
            lambda: ImageIndex(index.dataset, images, other, make_processor()),
        ):
            with pytest.raises(
                TypeError, match=rf"^model: got a {kind.__name__}, expected .*Retrieval.* or .*Answering"
            ):
                use()
        assert not (images.parent / "other").exists()

    def test_bad_files_stop_the_build_which_keeps_what_it_has(self, images, model):
        (images / "notes.png").write_text("no image")
        with pytest.raises(ValueError, match=r"notes\.png.*--on_bad_image skip"):
            build(images, model, batch_size=1)
        done = sum(model.encoded)
        assert 0 < done < 12
        (images / "notes.png").unlink()
        assert len(build(images, model)) == 12
        assert sum(model.encoded) == 12

    def test_files_of_a_phone_that_are_no_images_are_counted_and_listed(self, images, model, caplog):
        for name in ("IMG_1.MOV", "IMG_2.dng", "clip.mpg", "a/IMG_3", "drawing.eps"):
            (images / name).write_bytes(b"no image")
        assert len(build(images, model)) == 12
        skipped = json.loads((images.parent / "index/index.json").read_text())["skipped"]
        assert {one["image"]: one["reason"] for one in skipped} == {
            "IMG_1.MOV": "files of the ending .mov are not read as images.",
            "IMG_2.dng": "files of the ending .dng are not read as images.",
            "a/IMG_3": "files without an ending are not read as images.",
            "clip.mpg": "files of the ending .mpg are not read as images.",
            "drawing.eps": "files of the ending .eps are not read as images.",
            "notes.txt": "files of the ending .txt are not read as images.",
        }
        counted = "6 of 18 files are no readable images (1 without an ending, 1 .dng, 1 .eps, 1 .mov, 1 .mpg, 1 .txt)"
        assert counted in caplog.text

    @pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif opens HEIC")
    def test_heic_images_are_listed_with_the_way_to_read_them(self, images, model, caplog):
        (images / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        build(images, model)
        first = json.loads((images.parent / "index/index.json").read_text())["skipped"][0]
        assert first["image"] == "IMG_1.HEIC" and 'pip install "hivilt[heif]"' in first["reason"]
        assert "2 of 14 files are no readable images (1 .heic, 1 .txt); " in caplog.text
        assert caplog.text.strip().endswith('lists them. HEIC opens after pip install "hivilt[heif]".')

    def test_heic_images_are_indexed_where_pillow_heif_is_installed(self, images, model):
        pytest.importorskip("pillow_heif", reason="needs the extra heif")
        make_image("red", (64, 64)).save(images / "IMG_1.HEIC")
        assert "IMG_1.HEIC" in names(build(images, model))

    def test_bad_files_are_skipped_and_listed(self, images, model):
        (images / "notes.png").write_text("no image")
        (images / "dead.png").symlink_to(images / "nowhere.png")
        os.mkfifo(images / "pipe.png")
        whole = (images / "red.png").read_bytes()
        (images / "cut.png").write_bytes(whole[: len(whole) // 2])
        index = build(images, model, on_bad_image="skip")
        assert len(index) == 12 and index.search(images / "red.png", top_k=1)[0].path.name == "red.png"
        skipped = json.loads((images.parent / "index/index.json").read_text())["skipped"]
        assert [one["image"] for one in skipped] == ["cut.png", "dead.png", "notes.png", "notes.txt", "pipe.png"]
        assert all(one["reason"] and str(images) not in one["reason"] for one in skipped)

        before = (images.parent / "index/embeddings.faiss").stat().st_mtime_ns
        model.encoded.clear()
        build(images, model, on_bad_image="skip")
        assert model.encoded == []
        assert (images.parent / "index/embeddings.faiss").stat().st_mtime_ns == before

    def test_a_folder_that_cannot_be_looked_into_is_left_out_and_told(self, images, model, caplog):
        # Root may enter every folder, but no path may be as long as this one.
        longest, deep = os.pathconf(images, "PC_PATH_MAX"), images
        while len(os.fspath(deep)) < longest - 250:
            deep /= "d" * 200
        deep.mkdir(parents=True)
        place = os.open(deep, os.O_RDONLY)
        os.mkdir("e" * 250, dir_fd=place)
        os.close(place)
        assert len(build(images, model)) == 12
        assert len(ImageIndex.load(images.parent / "index", model, make_processor())) == 12
        assert caplog.text.count("Left out: ") == 2

    @pytest.mark.parametrize("argument", ["images", "output_dir"])
    def test_a_folder_whose_name_is_no_text_is_refused(self, images, model, argument):
        named = images.parent / os.fsdecode(b"caf\xe9")
        folders = {"images": images.rename(named)} if argument == "images" else {"images": images, "output_dir": named}
        with pytest.raises(ValueError, match=rf"^{argument}: .*caf\\udce9' is no UTF-8 text; rename the folder"):
            build(**folders, model=model)
        assert model.encoded == []

    def test_nothing_to_index(self, tmp_path, model):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            build(tmp_path / "missing", model)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="no image file below"):
            build(tmp_path / "empty", model)
        (tmp_path / "empty" / "bad.png").write_text("no image")
        with pytest.raises(ValueError, match=r"none of the 1 files could be read; bad\.png"):
            build(tmp_path / "empty", model, on_bad_image="skip")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"on_bad_image": "ignore"}, "on_bad_image: got 'ignore'"),
            ({"batch_size": 0}, "batch_size: got 0"),
            ({"shard_size": 0}, "shard_size: got 0"),
            ({"index_factory": "Flattest"}, "FAISS cannot make 'Flattest'"),
            ({"index_factory": "IVF64,Flat"}, "cannot train 'IVF64,Flat' on 12 images"),
        ],
    )
    def test_bad_arguments(self, images, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            build(images, model, **arguments)

    def test_an_index_knows_its_checkpoint(self, images, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not hold an index: build one there"):
            ImageIndex.made_by(tmp_path / "index")
        build(images, model)
        with pytest.raises(ValueError, match="had not been saved; name its checkpoint"):
            ImageIndex.made_by(tmp_path / "index")
        model.save_pretrained(tmp_path / "checkpoint")
        build(images, HiViLTForRetrieval.from_pretrained(tmp_path / "checkpoint"))
        assert ImageIndex.made_by(tmp_path / "index") == str(tmp_path / "checkpoint")

    def test_dropout_is_refused_whenever_it_is_on(self, images, model):
        index, answering = build(images, model), make_answering_model()
        asked = build(images, answering, output_dir=images.parent / "asked")
        model.train()
        answering.train()
        for use in (
            lambda: build(images, model),
            lambda: ImageIndex.load(images.parent / "index", model, make_processor()),
            lambda: index.search("red"),
            lambda: index.search(images / "red.png"),
            lambda: asked.ask("red"),
        ):
            with pytest.raises(ValueError, match=r"call model.eval\(\)"):
                use()


class TestLoad:
    def test_a_loaded_index_finds_the_same_in_a_new_model(self, images, model, tmp_path):
        found = build(images, model).search("red circle", rerank_k=4)
        model.save_pretrained(tmp_path / "checkpoint")
        make_processor().save_pretrained(tmp_path / "checkpoint")
        loaded = HiViLTForRetrieval.from_pretrained(tmp_path / "checkpoint")
        processor = HiViLTProcessor.from_pretrained(tmp_path / "checkpoint")
        again = ImageIndex.load(tmp_path / "index", loaded, processor).search("red circle", rerank_k=4)
        assert [hit.path for hit in again] == [hit.path for hit in found]
        np.testing.assert_allclose([hit[1:] for hit in again], [hit[1:] for hit in found], atol=1e-6)

    def test_refuses_what_is_no_index(self, tmp_path, model):
        with pytest.raises(FileNotFoundError, match="does not hold an index: build one there"):
            ImageIndex.load(tmp_path, model, make_processor())

    @pytest.mark.parametrize("name", ["embeddings.faiss", "embeddings", "index.json"])
    def test_refuses_half_an_index_until_it_is_built_again(self, images, model, name):
        path = images.parent / "index" / name
        build(images, model)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(FileNotFoundError, match="does not hold"):
            ImageIndex.load(images.parent / "index", model, make_processor())
        assert len(build(images, model)) == 12

    def test_refuses_another_checkpoint(self, images, model):
        build(images, model)
        with pytest.raises(ValueError, match="load the checkpoint that made it.*or build the index again"):
            ImageIndex.load(images.parent / "index", make_model(HiViLTForRetrieval, seed=1), make_processor())


class TestSearch:
    @pytest.fixture(scope="class")
    def kept(self, tmp_path_factory):
        """An index that nothing changes, and its model."""
        model = make_counting_model()
        return build(make_images(tmp_path_factory.mktemp("kept") / "images"), model), model

    @pytest.fixture
    def index(self, images, model):
        index = build(images, model)
        model.encoded.clear()
        return index

    @pytest.mark.parametrize("factory", ["Flat", "IVF3,Flat", "HNSW8"])
    def test_an_image_finds_itself_first(self, images, model, factory):
        index = build(images, model, index_factory=factory)
        for name in names(index):
            (first, *_) = index.search(images / name, top_k=12)
            assert first.path == images / name
            assert first.score == first.embedding_score == pytest.approx(1, abs=1e-4)
        with Image.open(images / "blue.jpg") as image:
            assert index.search(image, top_k=1)[0].path == images / "blue.jpg"

    def test_scores_of_a_compressed_index_are_exact(self, images, model):
        exact = {hit.path: hit.score for hit in build(images, model).search("red circle", top_k=12)}
        hits = build(images, model, index_factory="PQ3x2").search("red circle", top_k=12)
        assert len(hits) == 12 and [hit.score for hit in hits] == sorted([hit.score for hit in hits], reverse=True)
        assert {hit.path: hit.score for hit in hits} == pytest.approx(exact, abs=1e-6)

    def test_an_approximate_index_may_find_fewer_or_none(self, images, model):
        index = build(images, model, index_factory="IVF4,Flat")
        assert 0 < len(index.search("red circle", top_k=12)) < 12
        lists = index.dataset.get_index("embedding").faiss_index
        lists.reset()
        assert index.search("red circle") == index.search("red circle", rerank_k=3) == []

    def test_a_text_is_ranked_by_cosine(self, kept):
        index, model = kept
        with torch.no_grad():
            embeds = model.get_text_features(**make_processor()(text=["red circle"], return_tensors="pt")).pooler_output
        cosines = embeddings(index) @ embeds[0].numpy()
        hits = index.search("red circle", top_k=5)
        assert [hit.path.relative_to(index.folder).as_posix() for hit in hits] == [
            names(index)[row] for row in np.argsort(-cosines)[:5]
        ]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:5], atol=1e-6)
        assert all(isinstance(hit, Hit) and isinstance(hit.score, float) and hit.path.is_file() for hit in hits)

    def test_gives_no_more_than_there_are(self, kept):
        index, _ = kept
        assert len(index.search("red", top_k=100)) == len(index.search("red", top_k=100, rerank_k=100)) == 12

    @pytest.mark.parametrize(("top_k", "rerank_k"), [(12, 12), (12, 5), (3, 7), (7, 3)])
    def test_reranks_with_fused_similarity(self, kept, top_k, rerank_k):
        index, model = kept
        orders = []
        for text in TEXTS:
            by_embedding = index.search(text, top_k=12)
            hits = index.search(text, top_k, rerank_k)
            assert len(hits) == top_k

            # The same similarity, from the joint inputs.
            inputs = make_processor()(images=[hit.path for hit in by_embedding], text=[text] * 12, return_tensors="pt")
            with torch.no_grad():
                images = model.encode_images(inputs["pixel_values"])
                fused = model.score(images, model.encode_texts(inputs["input_ids"], inputs["attention_mask"]))
                fused = model.ranking_score(torch.tensor([hit.embedding_score for hit in by_embedding]), fused)
            orders.append(fused[:rerank_k].argsort(descending=True).tolist() + list(range(rerank_k, 12)))
            for hit, row in zip(hits, orders[-1], strict=False):
                path, _, embedding_score = by_embedding[row]
                assert hit.path == path
                assert hit.embedding_score == pytest.approx(embedding_score, abs=1e-5)
                assert hit.score == pytest.approx(fused[row].item() if row < rerank_k else embedding_score, abs=1e-5)
        assert orders != [list(range(12))] * len(TEXTS)

    def test_an_image_is_encoded_once_however_many_queries_meet_it(self, index, model):
        index.search("red circle")
        assert model.encoded == []
        index.search("red circle", rerank_k=5)
        assert model.encoded == [5]
        first = index.search("blue square", rerank_k=12)
        assert sum(model.encoded) == 12
        assert index.search("blue square", rerank_k=12) == first
        assert sum(model.encoded) == 12

    def test_states_of_the_least_recently_used_images_are_let_go(self, index, model, monkeypatch):
        index.search("red circle", rerank_k=12)
        model.encoded.clear()
        index.search("red circle", rerank_k=12)
        assert sum(model.encoded) == 0
        monkeypatch.setattr("hivilt.search.image_index.STATES_BYTES", 0)
        best = index.search("red circle", rerank_k=12)
        model.encoded.clear()
        assert index.search("red circle", rerank_k=12) == best
        assert sum(model.encoded) == 12

    def test_a_text_that_names_a_file_is_a_text(self, index, images, model):
        assert index.search(str(images / "red.png")) == index.search(str(images / "red.png"))
        assert model.encoded == []

    def test_a_search_for_unknown_words_alone_is_told(self, kept, caplog):
        index, _ = kept
        index.search("red zebra")
        assert not caplog.records
        index.search("zebra")
        assert "'zebra' has no word that the model knows" in caplog.text

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"query": "  "}, ValueError, "query: the text is empty"),
            ({"query": Path("missing.png")}, FileNotFoundError, "missing.png"),
            ({"query": Path(__file__)}, ValueError, "not a readable image"),
            ({"query": ["red"]}, TypeError, "query: got list"),
            ({"query": "red", "top_k": 0}, ValueError, "top_k: got 0"),
            ({"query": "red", "rerank_k": -1}, ValueError, "rerank_k: got -1"),
            ({"query": make_image(), "rerank_k": 3}, ValueError, "rerank_k: an image cannot be fused"),
        ],
    )
    def test_bad_arguments(self, kept, arguments, error, message):
        with pytest.raises(error, match=message):
            kept[0].search(**arguments)

    def test_images_that_changed_since_they_were_embedded_are_told(self, index, images, caplog):
        index.search("red", top_k=12)
        assert caplog.text == ""
        make_image().resize((9, 9)).save(images / "red.png")
        index.search("red", top_k=12)
        assert "1 of the 12 images found, red.png first, are gone or have changed" in caplog.text

    def test_an_image_that_changed_is_not_re_ranked_by_what_it_is_now(self, index, images, model):
        before = {hit.path.name: hit for hit in index.search("red", top_k=12)}
        make_image().resize((9, 9)).save(images / "red.png")
        hits = index.search("red", top_k=12, rerank_k=12)
        assert hits[-1] == before["red.png"] and sum(model.encoded) == 11

    def test_embeddings_that_are_not_finite_are_refused(self, images, index, model):
        with torch.no_grad():
            model.text_projection.weight[0, 0] = math.nan
        with pytest.raises(ValueError, match="^query: its embedding is not finite"):
            index.search("red")
        broken = make_model(HiViLTForRetrieval)
        with torch.no_grad():
            broken.visual_projection.weight[0, 0] = math.nan
        with pytest.raises(ValueError, match="^images: the embedding of .* is not finite"):
            build(images, broken, output_dir=images.parent / "broken")
        answering = make_answering_model()
        asked = build(images, answering, output_dir=images.parent / "asked")
        with torch.no_grad():
            answering.classifier.bias[1] = math.nan
        with pytest.raises(ValueError, match="^ask: scores are not numbers"):
            asked.ask("two")

    def test_an_image_that_is_gone_is_told_and_not_re_ranked(self, index, images, model, caplog):
        (images / "red.png").unlink()
        assert len(index.search("red")) == 10
        hits = index.search("red", top_k=12, rerank_k=12)
        assert hits[-1].path.name == "red.png" and hits[-1].score == hits[-1].embedding_score
        assert "1 of the 12 images found, red.png first, are gone" in caplog.text and sum(model.encoded) == 11
        for hit in hits[:-1]:
            hit.path.unlink()
        assert len(index.search("red", rerank_k=3)) == 10
        index.folder = Path("f" * 999)  # to ask for such a name is an error of its own
        assert len(index.search("red", rerank_k=3)) == 10

    def test_an_index_tells_that_its_folder_has_changed_when_it_is_opened(self, index, images, model, caplog):
        load = lambda: ImageIndex.load(images.parent / "index", model, make_processor())
        load()
        assert caplog.text == ""
        (images / "red.png").unlink()
        make_image().save(images / "new.png")
        make_image().save(images / "newer.png")
        make_image().resize((9, 9)).save(next(images.glob("*.jpg")))
        load()
        assert f"2 images were added to {images}, 1 deleted and 1 changed since the index" in caplog.text

    def test_a_file_that_was_no_image_is_told_once_it_is_one(self, images, model, caplog):
        (images / "bad.png").write_text("no image")
        build(images, model, on_bad_image="skip")
        caplog.clear()
        load = lambda: ImageIndex.load(images.parent / "index", model, make_processor())
        load()
        assert caplog.text == ""
        make_image().save(images / "bad.png")
        load()
        assert f"1 images were added to {images}, 0 deleted and 0 changed" in caplog.text

    def test_an_index_of_other_images_is_not_replaced_and_one_of_moved_images_is(self, images, model):
        build(images, model)
        others = images.parent / "others"
        others.mkdir()
        # One file that both have does not make them the same.
        shutil.copy2(images / "red.png", others / "red.png")
        with pytest.raises(
            ValueError, match=r"^output_dir: .*index has an index of 12 other images, of ../images, which"
        ):
            build(others, model)
        assert len(ImageIndex.load(images.parent / "index", model, make_processor())) == 12
        moved = build(images.rename(images.parent / "moved"), model)
        assert len(moved) == 12

    def test_a_second_build_at_once_is_refused(self, images, model, monkeypatch):
        encode = model.encode_images

        def build_again(*args, **kwargs):
            monkeypatch.undo()
            with pytest.raises(ValueError, match="^output_dir: another process is building the index in .*index; wait"):
                build(images, model)
            return encode(*args, **kwargs)

        monkeypatch.setattr(model, "encode_images", build_again)
        assert len(build(images, model)) == 12
        assert sum(model.encoded) == 12 and not (images.parent / "index/shards").exists()

    def test_a_build_that_another_one_overtook_is_refused(self, images, model, monkeypatch):
        build(images, model)
        make_image("magenta").save(images / "new.png")
        disk_usage = shutil.disk_usage

        def overtaken(place):
            monkeypatch.undo()
            build(images, model)
            return disk_usage(place)

        monkeypatch.setattr(shutil, "disk_usage", overtaken)
        with pytest.raises(ValueError, match="^output_dir: another process has changed the index in .*index meanwhile"):
            build(images, model)
        assert len(ImageIndex.load(images.parent / "index", model, make_processor())) == 13
        assert len(build(images, model)) == 13 == sum(model.encoded)

    @pytest.mark.parametrize("whole", ["{}", "[]", "3", '{"name": "my page"}'])
    def test_the_file_of_another_program_is_kept(self, images, model, whole):
        path = images.parent / "index" / "index.json"
        path.parent.mkdir()
        path.write_text(whole)
        for use in (partial(build, images), partial(ImageIndex.load, path.parent, processor=make_processor())):
            with pytest.raises(
                ValueError, match=r"^output_dir: .*index\.json is not of an image index; give another output_dir"
            ):
                use(model=model)
        assert path.read_text() == whole and model.encoded == []

    @pytest.mark.parametrize(
        ("file", "damage"),
        [
            ("embeddings.faiss", lambda whole: whole[:50]),
            ("embeddings/data-00000-of-00001.arrow", lambda whole: whole[: len(whole) // 2]),
            ("embeddings/state.json", lambda whole: b""),
            ("index.json", lambda whole: whole[:40]),
            ("index.json", lambda whole: whole.replace(b'"index_factory"', b'"index_factor"')),
            ("index.json", lambda whole: whole.replace(b'"num_images": 12', b'"num_images": 13')),
        ],
    )
    def test_a_damaged_index_is_told_with_the_way_out(self, images, model, file, damage):
        build(images, model)
        path = images.parent / "index" / file
        path.write_bytes(damage(path.read_bytes()))
        opened = lambda: ImageIndex.load(images.parent / "index", model, make_processor())
        with pytest.raises(
            ValueError, match="^output_dir: the index in .*index is damaged .*; delete it and build it again"
        ):
            opened()
        shutil.rmtree(images.parent / "index")
        assert len(build(images, model)) == len(opened()) == 12


QUESTIONS = ["is there a red circle in the image?", "what color is the shape?", "two"]


def make_answering_model(seed=0, **config):
    """Its answers differ from image to image; its `passes` holds the number of images of each run of the vision encoder."""
    model = make_model(HiViLTForQuestionAnswering, seed, weight_scale=6.0, **config)
    model.passes = []
    count = lambda *given: model.passes.append(len(given[-1].last_hidden_state))
    model.base_model.vision_model.register_forward_hook(count)
    return model


def answered_from_pixels(model, folder, names, question):
    """The probabilities of all answers about each image, as one gets them without an index."""
    inputs = make_processor()(
        images=[folder / name for name in names], text=[question] * len(names), return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    return logits.sigmoid() if model.config.problem_type == "multi_label_classification" else logits.softmax(-1)


class TestKeptStates:
    def test_they_are_columns_of_the_rows_in_half_precision(self, images, model):
        index = build(images, model, keep_states=True)
        info = json.loads((images.parent / "index/index.json").read_text())
        assert info["level_shapes"] == [[5, 5, 20], [3, 3, 20]] == list(map(list, index.level_shapes))
        kept = load_from_disk(images.parent / "index/embeddings")
        assert kept.features["level_0"] == List(Value("float16"), length=500)
        for name, row in zip(names(index), kept, strict=True):
            inputs = make_processor()(images=images / name, return_tensors="pt")
            with torch.no_grad():
                levels = model.encode_images(**inputs).level_states
            for place, level in enumerate(levels):
                np.testing.assert_allclose(row[f"level_{place}"], level.flatten(), rtol=2**-10, atol=1e-4)
        np.testing.assert_allclose(embeddings(index), embeddings(build(images, model, output_dir=images.parent / "i2")))

    def test_rows_that_were_selected_are_those_that_are_asked(self, images):
        model = make_answering_model()
        index = build(images, model)
        some = ImageIndex(index.dataset.select([5, 3]), index.folder, model, make_processor(), index.level_shapes)
        wanted = {one.path: one for one in index.ask("two")}
        answers = some.ask("two")
        assert {one.path for one in answers} == {index.folder / names(index)[row] for row in (5, 3)}
        for one in answers:
            assert one.answer == wanted[one.path].answer and one.score == pytest.approx(
                wanted[one.path].score, abs=1e-5
            )

    @pytest.mark.parametrize("rerank_k", [5, 12])
    def test_re_ranking_reads_them_and_gives_the_same_order(self, images, model, rerank_k):
        plain = build(images, model, output_dir=images.parent / "plain")
        build(images, model, keep_states=True)
        index = ImageIndex.load(images.parent / "index", model, make_processor())
        for text in TEXTS:
            wanted = plain.search(text, 12, rerank_k)
            model.encoded.clear()
            hits = index.search(text, 12, rerank_k)
            assert model.encoded == []
            assert [hit.path for hit in hits] == [hit.path for hit in wanted]
            np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in wanted], atol=2e-3)

    def test_they_stay_until_they_are_not_wanted_and_come_by_encoding_anew(self, images, model):
        count = lambda **kwargs: (model.encoded.clear(), build(images, model, **kwargs), sum(model.encoded))[1:]
        blank = 1  # which tells how large states are, before anything is encoded
        assert count()[1] == 12
        assert count(keep_states=True)[1] == 12 + blank
        make_image("magenta").save(images / "new.png")
        index, encoded = count()
        assert encoded == 1 + blank and index.level_shapes and len(index) == 13
        index, encoded = count(keep_states=False)
        assert encoded == 0 and not index.level_shapes and "level_0" not in index.dataset.column_names
        assert index.search(images / "new.png", top_k=1)[0].path.name == "new.png"

    def test_they_stay_with_another_checkpoint_and_in_a_folder_that_moved(self, images, model):
        build(images, model, keep_states=True)
        other = make_model(HiViLTForRetrieval, seed=1, weight_scale=8.0)
        assert build(images, other).level_shapes
        images = images.rename(images.parent / "moved")
        assert build(images, other).level_shapes
        # An index that was asked says nothing of whether one that is searched is to have them.
        assert build(images, make_answering_model()).level_shapes
        assert not build(images, model).level_shapes

    def test_a_build_that_was_cut_off_goes_on_with_its_own_shards(self, images, model, monkeypatch):
        encode = model.encode_images

        def interrupted(*args, **kwargs):
            if sum(model.encoded) >= 7:
                raise KeyboardInterrupt
            return encode(*args, **kwargs)

        monkeypatch.setattr(model, "encode_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(images, model, keep_states=True)
        monkeypatch.undo()
        model.encoded.clear()
        assert len(build(images, model, keep_states=True)) == 12
        assert sum(model.encoded) == 1 + 12 - 6

    def test_what_has_no_room_is_told_before_anything_is_encoded(self, images):
        model = make_answering_model()
        size = 2 * (500 + 180)
        with pytest.raises(
            ValueError, match=r"^keep_states: states of 12 images take .* GB, 1,360 bytes each.*--states_gb"
        ):
            build(images, model, max_states_bytes=12 * size - 1)
        assert model.passes == [1] and not (images.parent / "index").exists()
        assert len(build(images, model, max_states_bytes=12 * size)) == 12

    def test_what_the_disk_has_no_room_for_is_told(self, images, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match=r"the disk of .* has room for 1e-06 GB"):
            build(images, make_answering_model())

    def test_numbers_too_large_for_half_precision_are_told(self, images):
        model = make_answering_model()
        with torch.no_grad():
            model.model.fusion.vision_levels[1].norm.bias[0] = 7e4
        with pytest.raises(ValueError, match="float16 holds numbers up to 65,504, but a state is 70,"):
            build(images, model)


class TestAsk:
    @pytest.fixture(scope="class")
    def asked(self, tmp_path_factory):
        """An index that nothing changes, and its model."""
        model = make_answering_model()
        return build(make_images(tmp_path_factory.mktemp("asked") / "images"), model), model

    @given(
        colors=st.lists(st.sampled_from(COLORS), min_size=1, max_size=7, unique=True),
        batch_size=st.integers(1, 4),
        at_once=st.sampled_from([1, 6000, 2**26]),
        fusion=st.sampled_from(list(FUSIONS.values())),
        question=st.sampled_from(QUESTIONS),
    )
    @settings(max_examples=12)
    def test_from_states_as_from_pixels(self, colors, batch_size, at_once, fusion, question):
        """Whatever the order, the batches and the number of images."""
        model = make_answering_model(**fusion)
        with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
            patch.setattr("hivilt.search.image_index.BYTES_AT_ONCE", at_once)
            folder = Path(place).resolve() / "images"
            folder.mkdir()
            for number, color in enumerate(colors):
                make_image(color).save(folder / f"{number}.png")
            index = build(folder, model, batch_size=batch_size)
            model.passes.clear()
            given = {answer.path.name: answer for answer in index.ask(question)}
            assert model.passes == []
            wanted = answered_from_pixels(model, folder, sorted(given), question)
        assert len(given) == len(colors)
        for row, (_, answer) in zip(wanted, sorted(given.items()), strict=True):
            label = model.config.label2id[answer.answer]
            assert answer.score == pytest.approx(row[label].item(), abs=5e-3)
            assert answer.score >= row.max().item() - 5e-3

    @pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
    def test_images_are_sorted_by_the_probability_of_their_best_or_of_a_named_answer(self, asked, kind, monkeypatch):
        index, model = asked
        monkeypatch.setattr(model.config, "problem_type", kind)
        wanted = answered_from_pixels(model, index.folder, names(index), QUESTIONS[0])
        assert len(set(wanted.argmax(-1).tolist())) > 1
        answers = index.ask(QUESTIONS[0])
        assert all(isinstance(one, ImageAnswer) and isinstance(one.score, float) for one in answers)
        assert [one.score for one in answers] == sorted([one.score for one in answers], reverse=True)
        best, rows = wanted.max(-1), {index.folder / name: row for row, name in enumerate(names(index))}
        assert {one.path for one in answers} == set(rows)
        for one in answers:
            assert one.answer == model.config.id2label[best.indices[rows[one.path]].item()]
            assert one.score == pytest.approx(best.values[rows[one.path]].item(), abs=5e-3)

        named = index.ask(QUESTIONS[0], top_k=5, answer="Answer 3")
        order = wanted[:, 3].argsort(descending=True, stable=True)[:5]
        assert [rows[one.path] for one in named] == order.tolist() and {one.answer for one in named} == {"answer 3"}
        np.testing.assert_allclose([one.score for one in named], wanted[order, 3], atol=5e-3)

    def test_answers_that_differ_in_case_alone_are_told_apart(self, images):
        index = build(images, make_answering_model(id2label=dict(enumerate(["polish", "Polish", "Two"]))))
        scores = []
        for answer in ("polish", "Polish", "two"):
            answers = index.ask("two", answer=answer)
            assert {one.answer.lower() for one in answers} == {answer.lower()}
            scores.append({one.path: one.score for one in answers})
        assert all(sum(score[path] for score in scores) == pytest.approx(1) for path in scores[0])
        with pytest.raises(ValueError, match="^answer: 'POLISH' may be 'polish' or 'Polish'; write one of them"):
            index.ask("two", answer="POLISH")

    def test_questions_are_encoded_once_each_and_images_never(self, asked):
        index, model = asked
        texts = []
        hook = model.base_model.text_model.register_forward_hook(lambda *given: texts.append(1))
        model.passes.clear()
        several = index.ask(QUESTIONS, top_k=4)
        hook.remove()
        assert model.passes == [] and len(texts) == len(QUESTIONS)
        assert several == [index.ask(question, top_k=4) for question in QUESTIONS]
        assert len({tuple(answers) for answers in several}) == len(QUESTIONS)

    def test_equal_answers_stand_by_path(self, images):
        for name in ("b.png", "a.png", "c.png"):
            shutil.copy(images / "red.png", images / name)
        index = build(images, make_answering_model())
        same = [one.path.name for one in index.ask("two") if one.path.name in ("a.png", "b.png", "c.png", "red.png")]
        assert same == ["a.png", "b.png", "c.png", "red.png"]

    def test_an_index_that_is_opened_answers_alike_and_without_the_images(self, images, caplog):
        model = make_answering_model()
        answers = build(images, model).ask(QUESTIONS[1])
        assert sorted(path.name for path in (images.parent / "index").iterdir()) == ["embeddings", "index.json"]
        for path in images.rglob("*.*"):
            path.unlink() if path.is_file() else None
        index = ImageIndex.load(images.parent / "index", model, make_processor())
        assert "12 deleted and 0 changed since the index" in caplog.text and "run_vqa.py --index" in caplog.text
        # All are told of, not those alone that are given.
        assert index.ask(QUESTIONS[1], top_k=2) == answers[:2]
        assert "12 of the 12 images, " in caplog.text

    def test_bad_images_are_left_out_and_told(self, images, caplog):
        (images / "notes.png").write_text("no image")
        index = build(images, make_answering_model(), on_bad_image="skip")
        assert len(index.ask("two")) == 12 and "2 of 14 files are no readable images" in caplog.text

    def test_the_index_of_another_checkpoint_is_told(self, images, model, caplog):
        build(images, model)
        assert "another checkpoint" not in caplog.text
        other = make_answering_model(1)
        build(images, other)
        assert "is of another checkpoint; all images are encoded again" in caplog.text and len(other.passes) > 1
        with pytest.raises(ValueError, match="made by another checkpoint"):
            ImageIndex.load(images.parent / "index", make_answering_model(), make_processor())

    def test_what_cannot_be_asked_or_searched_says_so(self, asked, images, model):
        index, answering = asked
        for arguments, message in [
            ({"questions": "red", "top_k": 0}, "top_k: got 0"),
            ({"questions": ["red", " "]}, "questions: the text is empty"),
            (
                {"questions": "red", "answer": "answer 9"},
                "answer: 'answer 9' is none of the 5 answers .*did you mean answer",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                index.ask(**arguments)
        with pytest.raises(ValueError, match="search: the index is of a HiViLTForQuestionAnswering.*run_retrieval.py"):
            index.search("red")
        with pytest.raises(ValueError, match="ask: the index is of a HiViLTForRetrieval.*run_vqa.py"):
            build(images, model, keep_states=True).ask("red")
        with pytest.raises(ValueError, match="keep_states: got False"):
            build(images, answering, keep_states=False)
        with pytest.raises(ValueError, match="ask: the index holds no states"):
            ImageIndex(Dataset.from_dict({"image": ["a.png"]}), Path(), answering, make_processor()).ask("red")
