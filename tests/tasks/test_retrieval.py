"""What counts captions where Trainer counts rows."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from trainers import (
    Recorder,
    assert_a_plain_trainer_is_refused_to_evaluate,
    evaluate_in_folds,
    make_retrieval_trainer,
)

from hivilt.data.captions import CaptionDataset
from processes import launch


def all_similarities(trainer, captioned):
    """Cosines of embeddings and fused similarities of all pairs, (5, 9) each, pair by pair from the raw inputs."""
    model, processor = trainer.model.eval(), trainer.processing_class
    cosines, fused = torch.zeros(5, 9), torch.zeros(5, 9)
    captions = [caption for one in captioned for caption in one.captions]
    with torch.no_grad():
        for i, one in enumerate(captioned):
            for t, caption in enumerate(captions):
                inputs = processor(images=[one.image], text=[caption], return_tensors="pt")
                outputs = model(**inputs)
                cosines[i, t] = outputs.image_embeds[0] @ outputs.text_embeds[0]
                texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
                fused[i, t] = model.score(model.encode_images(inputs["pixel_values"]), texts)[0]
    return cosines, fused


@pytest.mark.checklist("10")
@pytest.mark.parametrize(("rerank_k", "batch_size"), [(0, 5), (2, 5), (20, 2)])
def test_rankings_are_those_of_all_pairs_scored_one_by_one(tmp_path, captioned, rerank_k, batch_size):
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k, per_device_eval_batch_size=batch_size)
    found = trainer.predict(trainer.eval_dataset)
    cosines, fused = all_similarities(trainer, captioned)
    # The same caption of two images gives the same scores but for the last bits, which must not decide.
    cosines, fused = cosines.double().round(decimals=5), fused.double().round(decimals=5)
    scores = trainer.model.ranking_score(cosines, fused)
    for name, cosine, score in (("image_to_text", cosines, scores), ("text_to_image", cosines.t(), scores.t())):
        for query, ranked in enumerate(found.predictions[name].tolist()):
            first = sorted(range(cosine.shape[1]), key=lambda c, q=query, m=cosine: (-m[q, c], c))
            head = sorted(first[:rerank_k], key=lambda c, q=query, m=score: (-m[q, c], first.index(c)))
            assert ranked == head + first[rerank_k:], (name, query)
    assert "test_fused_mean_recall" in found.metrics or rerank_k == 0


def test_metrics_tell_the_stages_apart(tmp_path, captioned):
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k=20)
    metrics = trainer.evaluate()
    cosines, fused = all_similarities(trainer, captioned)
    owner = torch.tensor(trainer.eval_dataset.image_of_caption)
    stages = {"embedding_": cosines, "fused_": fused, "": trainer.model.ranking_score(cosines, fused)}
    for name, scores in stages.items():
        hits = (scores.argmax(1)[:, None] == torch.arange(9)) & (owner == torch.arange(5)[:, None])
        assert metrics[f"eval_{name}image_to_text_recall@1"] == pytest.approx(hits.any(1).float().mean().item())
        hits = scores.argmax(0) == owner
        assert metrics[f"eval_{name}text_to_image_recall@1"] == pytest.approx(hits.float().mean().item())
        assert metrics[f"eval_{name}text_to_image_recall@5"] == 1
    assert metrics["eval_num_images"] == 5 and metrics["eval_num_captions"] == 9
    assert metrics["eval_num_fused_pairs"] == 45
    assert metrics["eval_loss"] > 0


@pytest.mark.checklist("10")
@pytest.mark.parametrize("fold_size", [None, 2])
def test_evaluation_encodes_images_and_captions_once_and_fuses_shortlists_only(tmp_path, captioned, fold_size):
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k=2, fold_size=fold_size)
    counts = {"vision_model": 0, "text_model": 0}
    for name in counts:
        getattr(trainer.model.base_model, name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: counts.update(
                {name: counts[name] + len(output.last_hidden_state)}
            ),
            with_kwargs=True,
        )
    metrics = trainer.evaluate()
    assert counts == {"vision_model": 5, "text_model": 9}
    # Folds of 2 images with 3 and 4 captions fuse at most all their pairs.
    assert 9 <= metrics["eval_num_fused_pairs"] <= 2 * 5 + 2 * 9 + (0 if fold_size is None else 2 * 3 + 2 * 4)


@pytest.mark.checklist("10")
def test_each_image_is_decoded_once_an_epoch_however_many_captions_it_has(tmp_path, captioned, opened):
    trainer = make_retrieval_trainer(
        tmp_path, captioned, per_device_train_batch_size=2, num_train_epochs=2, eval_strategy="no"
    )
    files = [f"{number}.png" for number in range(5)]
    trainer.train()
    assert sorted(opened) == sorted(2 * files)
    opened.clear()
    trainer.evaluate()  # with re-ranking
    assert sorted(opened) == files


@pytest.mark.parametrize("rerank_k", [0, 1, 20])
def test_folds_are_evaluated_each_by_itself(tmp_path, captioned, rerank_k):
    """Two folds of two images; the fifth image is in none."""
    trainer = make_retrieval_trainer(tmp_path, captioned, rerank_k, fold_size=2, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    alone = make_retrieval_trainer(tmp_path, captioned, rerank_k)
    folds = [alone.evaluate(CaptionDataset(captioned[start : start + 2])) for start in (0, 2)]
    whole = alone.evaluate()
    recalls = [name for name in whole if "recall" in name]
    assert len(recalls) == (14 if rerank_k == 0 else 21)
    for name in recalls:
        assert metrics[name] == whole[name]
        mean = (folds[0][name] + folds[1][name]) / 2
        assert metrics[name.replace("eval_", "eval_fold_")] == pytest.approx(mean), name
    assert metrics["eval_fold_text_to_image_recall@1"] != metrics["eval_text_to_image_recall@1"]
    assert metrics["eval_num_folds"] == 2 and metrics["eval_num_images"] == 5
    pairs = [one["eval_num_fused_pairs"] for one in (whole, *folds)]
    assert metrics["eval_num_fused_pairs"] == sum(pairs)
    assert {name for name in metrics if name not in whole} == {
        "eval_num_folds",
        "eval_fold_size",
        *(name.replace("eval_", "eval_fold_") for name in recalls),
    }


def test_folds_need_two_and_are_left_out_while_training(tmp_path, captioned):
    recorder = Recorder()
    trainer = make_retrieval_trainer(
        tmp_path, captioned, callbacks=[recorder], fold_size=2, max_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    (found,) = [log for log in recorder.logs if "eval_mean_recall" in log]
    assert not [name for name in found if "fold" in name]
    assert "eval_fold_mean_recall" in trainer.evaluate()
    trainer.fold_size = 3
    assert not [name for name in trainer.evaluate() if "fold" in name]
    with pytest.raises(ValueError, match="fold_size: expected at least 1 image, or None for no folds, got 0"):
        make_retrieval_trainer(tmp_path, captioned, fold_size=0)


def test_a_plain_trainer_trains_on_captions_and_is_refused_to_evaluate_on_them(tmp_path, captioned):
    ours = make_retrieval_trainer(tmp_path, captioned)
    assert_a_plain_trainer_is_refused_to_evaluate(tmp_path, ours, "`hivilt.tasks.retrieval.RetrievalTrainer`")


@pytest.mark.slow
def test_folds_on_two_processes(tmp_path, captioned):
    launch("trainers", 2, [str(tmp_path)])
    together = json.loads((tmp_path / "metrics.json").read_text())
    for found, expected in zip(together, evaluate_in_folds(tmp_path, captioned), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if "recall" in name or "num_" in name:
                assert found[name] == pytest.approx(value), name


def test_training_logs_both_losses_and_counts_captions(tmp_path, captioned):
    recorder = Recorder()
    trainer = make_retrieval_trainer(
        tmp_path, captioned, callbacks=[recorder], eval_strategy="no", max_steps=2, per_device_train_batch_size=5
    )
    trainer.train()
    assert trainer.num_examples_trained == 18
    for entry in recorder.logs[:2]:
        assert entry["loss"] == pytest.approx(entry["contrastive_loss"] + entry["auxiliary_loss"], abs=2e-4)


def test_chunks_train_to_the_same_weights(tmp_path, captioned):
    trained = []
    for chunk_size in (None, 2):
        trainer = make_retrieval_trainer(
            tmp_path,
            captioned,
            eval_strategy="no",
            max_steps=1,
            per_device_train_batch_size=5,
            optim="sgd",
            learning_rate=1e-3,
        )
        # Units to drop and negatives to match are drawn, and chunks draw in another order.
        trainer.model.config.auxiliary_loss_weight = 0.0
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.config.text_config.attention_probs_dropout_prob = 0.0
        trainer.contrastive_chunk_size = chunk_size
        trainer.train()
        trained.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-5, rtol=1e-5)


def test_temperatures_are_not_sharded_and_chunks_refused(tmp_path, captioned, monkeypatch):
    """With a stand-in for accelerate's plugin; tests/runs/test_recipes.py trains with the real one."""
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=False, state_dict_type="FULL_STATE_DICT")
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    trainer = make_retrieval_trainer(tmp_path, captioned)
    (whole,) = plugin.ignored_modules
    temperatures = {trainer.model.logit_scale, trainer.model.matching_logit_scale}
    assert set(whole.parameters()) == temperatures
    with pytest.raises(
        ValueError, match="contrastive_chunk_size: got 2, expected None under FSDP.*gradient_checkpoint"
    ):
        make_retrieval_trainer(tmp_path, captioned, contrastive_chunk_size=2)


def test_every_epoch_draws_other_captions(tmp_path, captioned):
    trainer = make_retrieval_trainer(
        tmp_path,
        captioned,
        captions_per_image=1,
        eval_strategy="no",
        num_train_epochs=12,
        per_device_train_batch_size=5,
    )
    drawn, collate = [], trainer.data_collator

    def recording(items):
        drawn.append(tuple(sorted(place for item in items for place in item["caption_index"])))
        return collate(items)

    trainer.data_collator = recording
    trainer.train()
    assert len(drawn) == 12 and all(len(places) == 5 for places in drawn)
    assert len(set(drawn)) > 4
    assert set().union(*drawn) == set(range(9))
