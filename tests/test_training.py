"A run that was killed, repeated, or spread over two processes is the same run"
import copy, json, math, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from conftest import TINY, files_under, refused, toy
from mix_geneformer.encoder import checkpoints
from mix_geneformer.encoder.batches import MaskedBatches, prefetched
from mix_geneformer.statistics import scores
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.encoder.losses import Objective
from mix_geneformer.encoder.model import build_model, compile_parts
from mix_geneformer.pretraining import pretrain
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.storage import load_corpus

RUN = dict(TINY, batch_size=8, epochs=2, learning_rate=1e-3, warmup_steps=3, device="cpu", progress=False)   # 6 steps an epoch, 12 in all


class Killed(BaseException): "As a kill: nothing catches it"


def weights(folder): return safetensors.torch.load_file(Path(folder)/"model.safetensors")
def log(folder): return json.loads((Path(folder)/"training.json").read_text())["log"]
def same(a, b): return set(weights(a)) == set(weights(b)) and all(torch.equal(w, weights(b)[k]) for k, w in weights(a).items())


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory): return pretrain(corpus, tmp_path_factory.mktemp("whole")/"model", checkpoint_every=4, **RUN)


def die_at(monkeypatch, calls):
    "The objective raises at these calls, counted over all runs; returns the count"
    real, count = Objective.forward, [0]

    def forward(self, *a, **k):
        count[0] += 1
        if count[0] in calls: raise Killed
        return real(self, *a, **k)
    monkeypatch.setattr(Objective, "forward", forward)
    return count


# --- killed, and called again ------------------------------------------------------------------------------------

@pytest.mark.parametrize("step,checkpoint_every,left", [(3, 4, 0), (7, 4, 4), (7, 6, 6), (12, 1, 11), (10, 4, 8)])
def test_resumed_is_uninterrupted(corpus, whole, tmp_path, monkeypatch, step, checkpoint_every, left):
    "Dropout, masks, order, optimiser, schedule and log go on where they were"
    with monkeypatch.context() as m:
        die_at(m, [step])
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=checkpoint_every, **RUN)
    assert not (tmp_path/"model").exists()
    assert [p.name for p in tmp_path.glob(".model.*.work/step-*")] == ([f"step-{left}"] if left else [])
    with monkeypatch.context() as m:
        count = die_at(m, [])
        out = pretrain(corpus, tmp_path/"model", checkpoint_every=checkpoint_every, **RUN)
    assert count[0] == 12 - left                                                     # it did not begin again
    assert same(out, whole) and log(out) == log(whole) and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_killed_many_times(corpus, whole, tmp_path, monkeypatch):
    die_at(monkeypatch, [3, 6, 9, 14])
    for _ in range(4):
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=1, **RUN)
    assert same(pretrain(corpus, tmp_path/"model", checkpoint_every=1, **RUN), whole)


def test_killed_while_a_checkpoint_is_written(corpus, whole, tmp_path, monkeypatch):
    "The last whole checkpoint is used, the torn one is not"
    real, count = Accelerator.save_state, []

    def save(self, folder, *a, **k):
        count.append(1)
        real(self, folder, *a, **k)
        if len(count) == 2:
            next(Path(folder).glob("*.safetensors")).write_bytes(b"torn")
            raise Killed
    with monkeypatch.context() as m:
        m.setattr(Accelerator, "save_state", save)
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=3, **RUN)
    assert sorted(p.name for p in tmp_path.glob(".model.*.work/*")) == ["step-3", "step-6.partial"]
    assert same(pretrain(corpus, tmp_path/"model", checkpoint_every=3, **RUN), whole) and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_killed_while_the_model_is_written(corpus, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(checkpoints, "_card", lambda *a: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=4, **RUN)
    assert not (tmp_path/"model").exists()
    with monkeypatch.context() as m:
        count = die_at(m, [])
        assert same(pretrain(corpus, tmp_path/"model", checkpoint_every=4, **RUN), whole) and count[0] == 4


def test_other_settings_do_not_take_over_a_killed_run(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        die_at(m, [7])
        with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=4, **RUN)
        count = die_at(m, [])
        out = pretrain(corpus, tmp_path/"model", checkpoint_every=4, **{**RUN, "seed": 1})
        assert count[0] == 12 and load_model(out, "cpu").training["seed"] == 1


# --- the same run twice ------------------------------------------------------------------------------------------

def test_one_seed_gives_one_model(corpus, whole, tmp_path):
    again = pretrain(corpus, tmp_path/"again", **RUN)                                # checkpoints or none, folder or Dataset
    assert same(again, whole) and log(again) == log(whole)
    assert same(pretrain(load_corpus(corpus), tmp_path/"dataset", **RUN), whole)
    other = pretrain(corpus, tmp_path/"other", **{**RUN, "seed": 1})
    assert not same(other, whole) and log(other)[0]["loss"] != log(whole)[0]["loss"]
    torch.manual_seed(99), np.random.seed(99)                                        # what ran before does not matter
    assert same(pretrain(corpus, tmp_path/"later", **RUN), whole)


def test_the_same_again_is_reused(corpus, whole, monkeypatch):
    stamp = (whole/"model.safetensors").stat().st_mtime_ns
    count = die_at(monkeypatch, [])
    assert pretrain(corpus, whole, checkpoint_every=99, **RUN) == whole and count[0] == 0 and (whole/"model.safetensors").stat().st_mtime_ns == stamp
    refused(lambda: pretrain(corpus, whole, **{**RUN, "temperature": .1}), "holds another run's result")


def test_log_and_card(corpus, whole):
    rows, training = log(whole), load_model(whole, "cpu").training
    assert [r["step"] for r in rows] == [10, 12] and [r["epoch"] for r in rows] == [1, 1]
    assert all(math.isfinite(v) for r in rows for v in r.values()) and set(rows[0]) == {"step", "epoch", "learning_rate", "loss", "mlm", "simcse", "alignment", "uniformity"}
    for r in rows: assert abs(r["loss"] - r["mlm"] - r["simcse"]) < 1e-4
    assert 0 < rows[0]["learning_rate"] < 1e-3 and rows[1]["learning_rate"] < 1e-9   # a cosine that ends at nothing
    assert training["cells"] == 48 and training["steps"] == 12 and training["cells_seen"] == 96 and training["species"] == "human+mouse" and training["vocabulary"] == load_model(whole, "cpu").vocab.hash
    metrics = json.loads((whole/"metrics.json").read_text())
    assert metrics["loss"] == rows[-1]["loss"] and "human and mouse" in (whole/"README.md").read_text()


def test_training_learns(corpus, tmp_path):
    rows = log(pretrain(corpus, tmp_path/"model", **{**RUN, "hidden_size": 32, "batch_size": 24, "epochs": 40, "learning_rate": 1e-2}))
    assert rows[0]["mlm"] > 4.2 and rows[-1]["mlm"] < 4                             # log(80) = 4.4 without knowing the species, log(40) = 3.7 with it
    assert rows[-1]["simcse"] < .3 * rows[0]["simcse"]


def test_species_and_losses_can_be_chosen(corpus, tmp_path):
    human = pretrain(corpus, tmp_path/"human", species="human", **RUN)
    assert load_model(human, "cpu").training["cells"] == 24 and load_model(human, "cpu").training["species"] == "human"
    assert set(log(pretrain(corpus, tmp_path/"mlm", **{**RUN, "simcse_weight": 0., "max_steps": 2}))[0]) == {"step", "epoch", "learning_rate", "loss", "mlm"}
    row = log(pretrain(corpus, tmp_path/"cross", **{**RUN, "cross_species_weight": .5, "max_steps": 2}))[0]
    assert abs(row["loss"] - row["mlm"] - row["simcse"] - .5 * row["cross_species"]) < 1e-4


# --- fast ways ---------------------------------------------------------------------------------------------------

def test_a_token_budget_resumes(corpus, tmp_path, monkeypatch):
    "Steps per epoch vary with a budget: a checkpoint knows epoch and place"
    budget = {**RUN, "batch_tokens": 130, "epochs": 3}
    whole = pretrain(corpus, tmp_path/"whole", **budget)
    assert log(whole)[-1]["step"] > 9
    for die in (5, 5):
        with monkeypatch.context() as m:
            die_at(m, [die])
            with pytest.raises(Killed): pretrain(corpus, tmp_path/"model", checkpoint_every=3, **budget)
    out = pretrain(corpus, tmp_path/"model", checkpoint_every=3, **budget)
    assert same(out, whole) and log(out) == log(whole)


def test_speed_is_told(corpus, tmp_path, capsys):
    out = pretrain(corpus, tmp_path/"model", **{**RUN, "progress": True})
    speed = json.loads((out/"training.json").read_text())["speed"]
    assert speed["cells_per_s"] > 0 and abs(speed["cells_per_s"] / speed["steps_per_s"] - 8) < 1e-6 and 0 <= speed["padding"] < .5 and 0 < speed["mfu"] < 1.5
    said = capsys.readouterr().out
    assert all(word in said for word in ("tokens/s", "cells/s", "padding", "MFU"))


def test_prefetched_batches_are_the_batches(corpus, vocab):
    batches = MaskedBatches(sentences_of(load_corpus(corpus)), vocab, 8, 24, seed=1)
    for a, b in zip(batches.epoch(1), prefetched(batches.epoch(1)), strict=True): assert all(torch.equal(a[k], b[k]) for k in a)
    def broken(): yield 1; raise RuntimeError("disk gone")
    with pytest.raises(RuntimeError, match="disk gone"): list(prefetched(broken()))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_parts_give_the_same_step(vocab):
    torch.manual_seed(0)
    net = build_model(vocab, **{**TINY, "num_hidden_layers": 1}, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    twin = copy.deepcopy(net)
    compile_parts(twin)
    batch = next(MaskedBatches(encode_cells(toy(), vocab, 24), vocab, 6, 24).epoch(0))
    found = []
    for n in (net, twin):
        out = Objective(n)(**batch)
        out["loss"].backward()
        found.append((float(out["loss"].detach()), [p.grad for p in n.parameters() if p.grad is not None]))
    assert abs(found[0][0] - found[1][0]) < 1e-5 and all(float((a - b).abs().max()) < 1e-5 for a, b in zip(found[0][1], found[1][1]))
    assert set(net.state_dict()) == set(twin.state_dict())                           # compiled or not, a checkpoint has the same names


# --- two processes -----------------------------------------------------------------------------------------------

TWO = """
import json, sys
from mix_geneformer.encoder import train
from mix_geneformer.pretraining import pretrain
corpus, out, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, settings in runs.items(): pretrain(corpus, f"{out}/{name}", **settings)
import torch.distributed as dist
if dist.is_initialized(): dist.barrier(); dist.destroy_process_group()
"""
STILL = dict(RUN, hidden_dropout_prob=0., attention_probs_dropout_prob=0., max_steps=8)
RUNS = dict(eq3=STILL, symmetric=dict(STILL, symmetric=True, pool="first"), mlm=dict(STILL, simcse_weight=0.), budget=dict(STILL, batch_tokens=200))


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    "Models that two processes made together"
    folder = tmp_path_factory.mktemp("two")
    (folder/"run.py").write_text(TWO)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    cmd = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder/"run.py", corpus, folder, json.dumps(RUNS)]
    done = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(corpus, two, tmp_path, name):
    "SimCSE's candidates come from both, MLM is averaged over the masked positions of both, and the log over both"
    one = pretrain(corpus, tmp_path/"model", **RUNS[name])
    a, b = pd.DataFrame(log(one)), pd.DataFrame(log(two/name))
    columns = [c for c in a if c not in ("alignment", "uniformity")]
    np.testing.assert_allclose(b[columns], a[columns], rtol=1e-5, atol=1e-5)
    for k, w in weights(one).items():
        if k.endswith("key.bias"): continue                                          # softmax ignores it: its gradient is rounding alone
        torch.testing.assert_close(weights(two/name)[k], w, rtol=0, atol=1e-5, msg=lambda m: f"{k}: {m}")
    fresh = pretrain(corpus, tmp_path/"fresh", **{**RUNS[name], "max_steps": 1, "learning_rate": 1e-12})
    assert max(float((w - weights(fresh)[k]).abs().max()) for k, w in weights(one).items()) > 1e-3   # there is something to compare
    assert sorted(files_under(two/name)) == sorted(files_under(one))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_that_two_processes_cannot_share(corpus, vocab, batch_size):
    batches = MaskedBatches(sentences_of(load_corpus(corpus)), vocab, batch_size, 24)
    refused(lambda: next(batches.epoch(0, rank=1, world=2)), f"batch_size={batch_size}", "2 processes")
    refused(lambda: list(MaskedBatches(sentences_of(load_corpus(corpus)), vocab, 8, 24, batch_tokens=30).epoch(0, rank=1, world=2)), "batch_tokens=30", "2 processes")


# --- scores ------------------------------------------------------------------------------------------------------

def test_scores_by_hand():
    s = scores(["a", "a", "a", "b", "c"], ["a", "a", "b", "b", "x"])
    f1 = [2 * 1 * (2/3) / (1 + 2/3), 2 * .5 * 1 / 1.5, 0.]                            # x is in nobody's truth: no type of its own
    assert s == dict(accuracy=.6, macro_f1=pytest.approx(sum(f1) / 3), n_cells=5, n_types=3)


