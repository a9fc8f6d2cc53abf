"""What a run does when it is told to stop, and which checkpoint it takes for the best."""

import signal
from pathlib import Path

import pytest
from trainers import make_trainer

from hivilt.training.resuming import last_checkpoint


def test_after_training_signals_are_what_they_were(tmp_path, dataset, monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGINT)
    usual = list(map(signal.getsignal, numbers))
    trainer = make_trainer(tmp_path, dataset, max_steps=1, eval_strategy="no")
    monkeypatch.setattr(trainer, "training_step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list(map(signal.getsignal, numbers)) == usual


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(times, tmp_path, dataset, capfd):
    trainer = make_trainer(tmp_path, dataset, max_steps=3, eval_strategy="no", per_device_train_batch_size=2)
    step = trainer.training_step

    def interrupted(*args):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    trainer.training_step = interrupted
    with pytest.raises(SystemExit if times == 1 else KeyboardInterrupt) as stop:
        trainer.train()
    assert "Ctrl-C: saves after this step and ends; once more ends at once" in capfd.readouterr().err
    last = last_checkpoint(tmp_path / "out")
    assert (last and Path(last).name) == ("checkpoint-1" if times == 1 else None)
    assert times == 2 or stop.value.code == 130


def test_an_evaluation_is_printed_in_two_numbers_and_kept_whole(tmp_path, dataset, capsys):
    trainer = make_trainer(tmp_path, dataset, max_steps=1, eval_strategy="steps", metric_for_best_model="accuracy")
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if "eval_" in line]
    assert printed and all("eval_accuracy" in line and "eval_top3_accuracy" not in line for line in printed)
    assert any("eval_top3_accuracy" in logs for logs in trainer.state.log_history)


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 3), ("loss", 2)])
def test_of_checkpoints_with_the_same_metric_the_smaller_loss_is_the_best(metric, best, tmp_path, dataset, monkeypatch):
    accuracies, losses = iter([0.0, 0.5, 0.5, 0.5, 0.25]), iter([5.0, 1.0, 0.75, 2.0, 0.8])
    if metric == "loss":
        losses = iter([5.0, 0.75, 0.75, 2.0, 0.8])
    saved = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, dataset, max_steps=5, metric_for_best_model=metric, **saved)
    measured = lambda *_: ([], {"accuracy": next(accuracies), "loss": next(losses)}, 17)
    monkeypatch.setattr(trainer, "measure", measured)
    trainer.train()
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == (0.5 if metric == "accuracy" else 0.75)
