"A run that was killed, repeated, or spread over two processes is the same run."
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import FISHES as N
from conftest import TINY, files_under, fish, fish_cells, refused, toy
from handmade import cut
from programmes import MIXED, studies_corpus
from trained import RUN, Killed, die_at, log, same, weights

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder import checkpoints
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.files import InputError
from mix_geneformer.pretraining import pretrain

@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return pretrain(corpus, tmp_path_factory.mktemp("whole") / "model", checkpoint_every=4, **RUN)


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
    assert sorted(p.name for p in tmp_path.glob(".model.*.work/step-*")) == ["step-3", "step-6.partial"]
    assert same(pretrain(corpus, tmp_path / "model", checkpoint_every=3, **RUN), whole) and [
        p.name for p in tmp_path.iterdir()
    ] == ["model"]


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


def test_one_seed_gives_one_model(corpus, whole, tmp_path):
    # checkpoints or none, folder or Dataset
    again = pretrain(corpus, tmp_path/"again", **RUN)
    assert same(again, whole) and log(again) == log(whole)
    assert same(pretrain(load_corpus(corpus), tmp_path/"dataset", **RUN), whole)
    other = pretrain(corpus, tmp_path/"other", **{**RUN, "seed": 1})
    assert not same(other, whole) and log(other)[0]["loss"] != log(whole)[0]["loss"]
    torch.manual_seed(99), np.random.seed(99)                                        # what ran before does not matter
    assert same(pretrain(corpus, tmp_path/"later", **RUN), whole)


def test_the_same_again_is_reused(corpus, whole, monkeypatch):
    stamp = (whole/"model.safetensors").stat().st_mtime_ns
    count = die_at(monkeypatch, [])
    assert (
        pretrain(corpus, whole, checkpoint_every=99, **RUN) == whole
        and count[0] == 0
        and (whole / "model.safetensors").stat().st_mtime_ns == stamp
    )
    refused(lambda: pretrain(corpus, whole, **{**RUN, "temperature": .1}), "holds another run's result")


def test_log_and_card(corpus, whole):
    rows, training = log(whole), load_model(whole, "cpu").training
    assert [r["step"] for r in rows] == [10, 12] and [r["epoch"] for r in rows] == [1, 1]
    assert all(math.isfinite(v) for r in rows for v in r.values()) and set(rows[0]) == {
        "step",
        "epoch",
        "learning_rate",
        "loss",
        "mlm",
        "simcse",
        "alignment",
        "uniformity",
    }
    for r in rows: assert abs(r["loss"] - r["mlm"] - r["simcse"]) < 1e-4
    assert 0 < rows[0]["learning_rate"] < 1e-3 and rows[1]["learning_rate"] < 1e-9  # a cosine that ends at nothing
    assert (
        training["cells"] == 48
        and training["steps"] == 12
        and training["cells_seen"] == 96
        and training["species"] == "human+mouse"
        and training["vocabulary"] == load_model(whole, "cpu").vocab.hash
    )
    metrics = json.loads((whole/"metrics.json").read_text())
    assert metrics["loss"] == rows[-1]["loss"] and "human and mouse" in (whole/"README.md").read_text()


def test_training_learns(corpus, tmp_path):
    rows = log(
        pretrain(
            corpus,
            tmp_path / "model",
            **{**RUN, "hidden_size": 32, "batch_size": 24, "epochs": 40, "learning_rate": 1e-2},
        )
    )
    # log(80) = 4.4 without knowing the species, log(40) = 3.7 with it
    assert rows[0]["mlm"] > 4.2 and rows[-1]["mlm"] < 4
    assert rows[-1]["simcse"] < .3 * rows[0]["simcse"]


def test_species_and_losses_can_be_chosen(corpus, tmp_path):
    human = pretrain(corpus, tmp_path/"human", species="human", **RUN)
    assert load_model(human, "cpu").training["cells"] == 24 and load_model(human, "cpu").training["species"] == "human"
    assert set(log(pretrain(corpus, tmp_path / "mlm", **{**RUN, "simcse_weight": 0.0, "max_steps": 2}))[0]) == {
        "step",
        "epoch",
        "learning_rate",
        "loss",
        "mlm",
    }
    row = log(pretrain(corpus, tmp_path/"cross", **{**RUN, "cross_species_weight": .5, "max_steps": 2}))[0]
    assert abs(row["loss"] - row["mlm"] - row["simcse"] - .5 * row["cross_species"]) < 1e-4


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
    assert (
        speed["cells_per_s"] > 0
        and abs(speed["cells_per_s"] / speed["steps_per_s"] - 8) < 1e-6
        and 0 <= speed["padding"] < 0.5
        and 0 < speed["mfu"] < 1.5
    )
    said = capsys.readouterr().out
    assert all(word in said for word in ("tokens/s", "cells/s", "padding", "MFU"))


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


RUNS = dict(
    eq3=STILL,
    symmetric=dict(STILL, symmetric=True, pool="first"),
    mlm=dict(STILL, simcse_weight=0.0),
    budget=dict(STILL, batch_tokens=200),
)


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    "Models that two processes made together"
    folder = tmp_path_factory.mktemp("two")
    (folder/"run.py").write_text(TWO)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    cmd = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        folder / "run.py",
        corpus,
        folder,
        json.dumps(RUNS),
    ]
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
        # softmax ignores it: its gradient is rounding alone
        if k.endswith("key.bias"): continue
        torch.testing.assert_close(weights(two/name)[k], w, rtol=0, atol=1e-5, msg=lambda m: f"{k}: {m}")
    fresh = pretrain(corpus, tmp_path/"fresh", **{**RUNS[name], "max_steps": 1, "learning_rate": 1e-12})
    # there is something to compare
    assert max(float((w - weights(fresh)[k]).abs().max()) for k, w in weights(one).items()) > 1e-3
    assert sorted(files_under(two/name)) == sorted(files_under(one))


SMALL = dict(TINY, num_hidden_layers=1, max_steps=2, device="cpu", progress=False)


@pytest.mark.parametrize("setting", [dict(hiden_size=3), dict(config=dict(lr=.1))])
def test_unknown_settings(corpus, model_dir, tmp_path, setting):
    name = "hiden_size" if "hiden_size" in setting else "lr"
    refused(lambda: pretrain(corpus, tmp_path/"model", device="cpu", progress=False, **setting),
        f"1 unknown settings ({name})", "the settings are hidden_size, num_hidden_layers")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    "setting,parts",
    [
        (dict(hidden_size=10, num_attention_heads=4), ["hidden_size=10", "remainder 2"]),
        (dict(max_steps=0, epochs=0), ["0 optimiser steps", "raise epochs"]),
        (dict(pool="max"), ["pool='max'"]),
    ],
)
def test_settings_that_cannot_be(corpus, tmp_path, setting, parts):
    refused(lambda: pretrain(corpus, tmp_path/"model", **{**SMALL, **setting}), *parts)
    assert not (tmp_path/"model").exists()


def test_loss_that_is_not_a_number(corpus, tmp_path):
    refused(
        lambda: pretrain(corpus, tmp_path / "model", **{**SMALL, "learning_rate": 1e30, "max_steps": 20, "epochs": 20}),
        "The loss is",
        "lower learning_rate",
    )
    assert not (tmp_path/"model").exists()


def test_a_species_that_the_corpus_has_not(corpus, tmp_path, model_dir):
    refused(lambda: pretrain(corpus, tmp_path/"m", species="pig", **SMALL), "0 pig cells", "human, mouse")
    assert files_under(tmp_path) == []


def test_damaged_corpus(corpus, tmp_path):
    bad = shutil.copytree(corpus, tmp_path/"corpus")
    cut(next(bad.glob("data-00000*.arrow")), .3)
    refused(lambda: pretrain(bad, tmp_path/"model", **SMALL),
        "cannot be opened as a tokenised corpus", "tokenise again")
    (bad/"state.json").unlink()
    refused(lambda: load_corpus(bad), "state.json is missing")
    assert not (tmp_path/"model").exists()


@pytest.mark.parametrize("orthologs", ["separate", "shared", "tied"])
def test_a_model_reads_all_three(fish_table, tmp_path, orthologs):
    "From counts to vectors; with shared tokens and equal medians a renamed cell is the same sentence"
    from mix_geneformer.encoder.states import Reader
    fish(fish_table)
    cells = [toy("human", genes=N), toy("mouse", genes=N, seed=1), fish_cells()]
    vocab = Vocabulary.build(cells, orthologs)
    corpus = tokenize(cells, vocab, tmp_path / "corpus", TINY["context"], progress=False)
    assert sorted(set(corpus["species"][:])) == ["human", "mouse", "zebrafish"]
    loaded = load_model(
        pretrain(corpus, tmp_path / "model", batch_size=8, max_steps=2, device="cpu", progress=False, **TINY),
        device="cpu",
    )
    assert Vocabulary.load(tmp_path / "model") == vocab
    x = Reader(loaded).vectors(encode_cells(fish_cells(), vocab, TINY["context"]))
    assert x.shape == (24, TINY["hidden_size"]) and np.isfinite(x).all()


def test_corpora_that_cannot_be(vocab, tmp_path):
    refused(
        lambda: pretrain(tokenize(toy(n=1), vocab, progress=False), tmp_path / "model", **SMALL), "1 cells are too few"
    )
    human = tokenize(toy(), Vocabulary.build([toy()]), progress=False)
    refused(
        lambda: pretrain(human, tmp_path / "model", cross_species_weight=0.5, **SMALL),
        "0 pairs of orthologs",
        "orthologs='separate'",
    )
    assert not (tmp_path/"model").exists()


def test_anothers_output_is_kept(corpus, model_dir):
    before = {p: p.stat().st_mtime_ns for p in model_dir.iterdir()}
    refused(lambda: pretrain(corpus, model_dir, **SMALL), "holds another run's result",
        "pass another out= or remove it")
    assert {p: p.stat().st_mtime_ns for p in model_dir.iterdir()} == before


def test_a_corpus_that_is_not_there(tmp_path):
    refused(lambda: pretrain(tmp_path/"gone", tmp_path/"m", **SMALL), "is not a tokenised corpus")
    assert files_under(tmp_path) == []


def test_the_order_of_arguments_stays(corpus, tmp_path):
    "Scripts pass species and device by their place: a new argument comes behind them"
    config = {k: v for k, v in SMALL.items() if k not in ("device", "progress")}
    out = pretrain(corpus, tmp_path / "model", config, None, "cpu", progress=False)
    assert {w.dtype for w in weights(out).values()} == {torch.float32}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    return studies_corpus(tmp_path_factory.mktemp("studies") / "corpus")


def test_pretrain_says_whether_it_has_learnt(studies, tmp_path):
    said = {}
    for init, steps, rate in ("random", 2, 0.0), ("coexpression", 60, 3e-3):
        out = pretrain(studies, tmp_path / init, **dict(MIXED, init=init, max_steps=steps, learning_rate=rate))
        said[init] = json.loads((out / "metrics.json").read_text())
        assert said[init]["verdict"] in (out / "README.md").read_text()
    assert not said["random"]["learnt"] and said["coexpression"]["learnt"]
    assert {r["study"] for r in said["coexpression"]["kept_apart"]} == {"a", "b", "mean over studies"}


def test_a_killed_run_of_mixed_studies_is_the_run_that_was_never_killed(studies, tmp_path, monkeypatch):
    how = dict(
        MIXED, init="coexpression", max_steps=14, schedule="warmup_stable_decay", decay_steps=4, checkpoint_every=5
    )
    whole = pretrain(studies, tmp_path / "whole", **how)
    step, n = torch.optim.AdamW.step, [0]

    def dies(self, *a, **k):
        n[0] += 1
        if n[0] == 9:
            raise KeyboardInterrupt
        return step(self, *a, **k)

    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(studies, tmp_path / "killed", **how)
    again = pretrain(studies, tmp_path / "killed", **how)
    a, b = (load_model(p, "cpu") for p in (whole, again))
    for k, v in a.model.state_dict().items():
        assert torch.equal(v, b.model.state_dict()[k]), k
    drop = lambda log: [{k: v for k, v in r.items()} for r in log]
    assert drop(a.training["log"]) == drop(b.training["log"])


def test_a_longer_run_is_the_shorter_one_until_it_falls(studies, tmp_path):
    "The level schedule: what was learnt before the fall does not depend on the length of the run."
    logs = []
    for steps in 14, 24:
        how = dict(MIXED, max_steps=steps, schedule="warmup_stable_decay", decay_steps=4)
        out = pretrain(studies, tmp_path / str(steps), **how)
        logs.append(
            [r for r in json.loads((out / "training.json").read_text())["log"] if r["step"] <= 10 and "loss" in r]
        )
    assert logs[0] == logs[1] and logs[0]


def test_half_precision_halves_the_file(studies, tmp_path):
    how = dict(MIXED, max_steps=1)
    made = [pretrain(studies, tmp_path / str(h), half=h, **how) for h in (False, True)]
    size = [os.path.getsize(folder / "model.safetensors") for folder in made]
    assert size[1] < size[0] * 0.6
    m = load_model(tmp_path / "True", "cpu").model
    assert next(m.parameters()).dtype == torch.float32


def test_one_goes_on_from_a_model(studies, tmp_path):
    first = pretrain(studies, tmp_path / "first", **dict(MIXED, init="coexpression", max_steps=60))
    more = pretrain(studies, tmp_path / "more", **dict(MIXED, init=str(first), max_steps=2, learning_rate=1e-6))
    gained = [json.loads((p / "metrics.json").read_text())["kept_apart"][-1]["gained"] for p in (first, more)]
    assert gained[1] == pytest.approx(gained[0], abs=0.02)


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(init="nowhere"), "init='nowhere' is none of 3 choices"),
        (dict(studies_apart=("lung",)), "1 of 1 studies to keep apart are not there"),
        (dict(batch_tokens=300), "batch_tokens=300 and study_power=0.5 are 2 ways"),
    ],
)
def test_bad_settings_get_a_sentence(studies, tmp_path, how, said):
    with pytest.raises(InputError, match=said):
        pretrain(studies, tmp_path / "x", **dict(MIXED, max_steps=1, **how))
    assert not (tmp_path / "x").exists()


def test_cells_of_no_known_donor_are_left_out_where_donors_are_held_out(vocab, tmp_path):
    a = toy(n=36)
    donor = a.obs.donor.astype(object)
    donor.iloc[[1, 8, 20]] = [None, "nan", ""]
    a.obs["donor"] = donor
    few = a[[i for i in range(36) if i not in (1, 8, 20)]].copy()
    cells, plain = (tokenize(x, vocab, tmp_path/n, context=24, progress=False) for x, n in ((a, "a"), (few, "few")))
    how = dict(RUN, max_steps=3, held_out=.2)
    with pytest.warns(UserWarning, match="3 of 36 cells are left out, .* 0 have no 'study', 3 no 'donor'"):
        one = pretrain(cells, tmp_path/"one", **how)
    two = pretrain(plain, tmp_path/"two", **how)
    assert same(one, two) and [r.get("loss") for r in log(one)] == [r.get("loss") for r in log(two)]
    three = json.loads((pretrain(cells, tmp_path/"three", **dict(how, held_out=0))/"training.json").read_text())
    assert three["cells"] == 36 and three["species"] == "human" and three["seen"]["species"] == ["human"]
