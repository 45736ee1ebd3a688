"A run that is looked at while it learns: rows once, whatever befell it, and no trace of it in the result."
import pandas as pd
import pytest
import torch
from conftest import refused
from trained import RUN, Killed, die_at, log, same

from mix_geneformer.classification.finetuning import finetune
from mix_geneformer.encoder import watching
from mix_geneformer.encoder.watching import Watcher
from mix_geneformer.pretraining import pretrain

LONG = dict(RUN, epochs=6)   # 36 steps


def table(folder, name="steps"): return pd.read_csv(folder/"watched"/f"{name}.csv")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory): return pretrain(corpus, tmp_path_factory.mktemp("whole")/"model", **LONG)


def test_what_is_watched(whole):
    t = table(whole)
    assert t.step.tolist() == [10, 20, 30, 36]
    assert {"epoch", "learning_rate", "loss", "mlm", "simcse", "cells_per_s", "tokens_per_s", "padding",
            "memory_gib"} == set(t)-{"step", "alignment", "uniformity"}
    assert t.loss.tolist() == pytest.approx([r["loss"] for r in log(whole)]) and (t.memory_gib > .1).all()
    assert (t.cells_per_s[1:] > 0).all() and t.padding[1:].between(0, .9).all()
    assert not any("memory_gib" in r or "cells_per_s" in r for r in log(whole))


@pytest.mark.parametrize("deaths", [[25], [14, 16, 29], [3]])
def test_a_killed_run_has_no_row_twice(corpus, whole, tmp_path, monkeypatch, deaths):
    with monkeypatch.context() as m:
        die_at(m, deaths)
        for _ in deaths:
            with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=6, **LONG)
    out = pretrain(corpus, tmp_path/"model", checkpoint_every=6, **LONG)
    assert same(out, whole) and log(out) == log(whole)
    assert table(out).step.tolist() == [10, 20, 30, 36] and table(out).loss.tolist() == table(whole).loss.tolist()


def test_the_loss_of_cells_kept_apart(corpus, tmp_path):
    out = pretrain(corpus, tmp_path/"model", **dict(RUN, held_out=.2))
    t = table(out, "epochs")
    assert t.epoch.tolist() == [0, 1] and t.held_out.notna().all()


def test_a_fine_tuning_is_watched(corpus, whole, tmp_path):
    finetune(corpus, whole, out=tmp_path/"types", epochs=2, batch_size=4, device="cpu", progress=False, min_share=0)
    assert len(table(tmp_path/"types", "epochs")) == 2 and table(tmp_path/"types").loss.notna().all()


def test_a_torn_line_and_one_of_other_columns(tmp_path):
    watcher = Watcher(tmp_path)
    watcher.tell("steps", dict(step=10, loss=1.))
    watcher.tell("steps", dict(step=20, loss=2., more=3.))
    with open(tmp_path/"watched"/"steps.csv", "a") as f: f.write("3")
    Watcher(tmp_path, step=30).tell("steps", dict(step=40, more=4.))
    t = table(tmp_path)
    assert t.step.tolist() == [10, 20, 40] and t.more.tolist()[1:] == [3., 4.] and t.loss.tolist()[:2] == [1., 2.]


def test_tensorboard(corpus, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with monkeypatch.context() as m:
        die_at(m, [25])
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=6, tensorboard=True, **LONG)
    out = pretrain(corpus, tmp_path/"model", checkpoint_every=6, tensorboard=True, **LONG)
    board = EventAccumulator(str(out/"watched")).Reload()
    assert [e.step for e in board.Scalars("steps/loss")] == [10, 20, 30, 36]
    assert [e.value for e in board.Scalars("steps/loss")] == pytest.approx(table(out).loss.tolist())


def test_where_tensorboard_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "find_spec", lambda name: None)
    asked = "pip install 'mix-geneformer[watch]'"
    refused(lambda: Watcher(tmp_path, tensorboard=True), "1 package that is not here", asked)


def test_memory_is_that_of_the_process():
    assert .05 < watching.memory_used(torch.device("cpu")) < 64
