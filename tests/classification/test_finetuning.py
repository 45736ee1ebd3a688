"Fine-tuning reports on cells that nothing was chosen on, twice the same, by one process or two"
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import TINY, files_under, islet_vocab, refused, toy

from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.classification import finetuning, measures
from mix_geneformer.classification.finetuning import finetune
from mix_geneformer.classification.parts import FinetuneConfig
from mix_geneformer.classification.prediction import predict
from mix_geneformer.embedding import embed
from mix_geneformer.encoder import classifier
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.model import build_model
from mix_geneformer.encoder.states import Reader
from mix_geneformer.pretraining import pretrain
from mix_geneformer.statistics import scores

QUIET = dict(device="cpu", progress=False)
TUNE = dict(epochs=3, learning_rate=5e-3, warmup_steps=2, batch_size=8, **QUIET)


def weights(folder): return safetensors.torch.load_file(Path(folder)/"model.safetensors")


def same(a, b):
    first, second = weights(a), weights(b)
    return set(first) == set(second) and all(torch.equal(w, second[k]) for k, w in first.items())


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    return pretrain(corpus, tmp_path_factory.mktemp("pretrained")/"model", **TINY, batch_size=8, epochs=2,
                    learning_rate=1e-3, warmup_steps=3, **QUIET)


@pytest.fixture(scope="module")
def tuned(corpus, pretrained, tmp_path_factory):
    return finetune(corpus, pretrained, out=tmp_path_factory.mktemp("tuned")/"types", **TUNE)


# --- which cells, which part -------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["random", "donor"])
def test_parts_of_a_run_never_overlap(corpus, pretrained, tmp_path, split):
    result = finetune(corpus, pretrained, out=tmp_path/"types", split=split, donor="donor", species="human", **TUNE)
    ds = load_corpus(corpus)
    train, test = set(result.train_cells), set(result.predictions.cell)
    m = result.metrics
    assert not train & test and (len(train), len(test)) == (m["n_train"], m["n_test"])
    assert m["n_train"] + m["n_valid"] + m["n_test"] == 24
    if split == "donor": assert not {ds[i]["donor"] for i in test} & {ds[i]["donor"] for i in set(range(24)) - test}
    assert [ds[i]["cell_type"] for i in result.predictions.cell] == result.predictions.true.tolist()


def test_rare_types_are_dropped(vocab, pretrained, tmp_path):
    a = toy(n=24)
    a.obs["cell_type"] = ["a", "b"] * 10 + ["rare", None, "a", "b"]
    cells = tokenize(a, vocab, tmp_path/"corpus", context=24, progress=False)
    with pytest.warns(UserWarning, match=r"left out: rare \(1\)"):
        result = finetune(cells, pretrained, out=tmp_path/"types", min_share=.1, **TUNE)
    m = result.metrics
    assert m["dropped"] == ["rare"] and m["n_types"] == 2 and m["n_train"] + m["n_valid"] + m["n_test"] == 22
    assert not {20, 21} & (set(result.predictions.cell) | set(result.train_cells))


@pytest.mark.parametrize("through", ["memory", "h5ad"])
def test_cells_of_no_known_donor_never_bridge_a_split(vocab, pretrained, tmp_path, through):
    "Whatever a gap looks like, the run is that of the cells without these"
    a = toy(n=36)
    true, gap = a.obs.donor.to_numpy(), np.arange(36) % 4 == 1
    donor, kind = a.obs.donor.astype(object), a.obs.cell_type.astype(object)
    donor[gap] = [None, np.nan, "", "nan", "NA", pd.NA, " ", None, np.nan]
    kind.iloc[[2, 6]] = [None, ""]
    a.obs["donor"], a.obs["cell_type"] = donor, kind
    gap[[2, 6]] = True
    if through == "h5ad":
        a.obs["donor"] = a.obs.donor.where(a.obs.donor.notna(), None).astype("category")
        a.obs["cell_type"] = a.obs.cell_type.astype("category")
        a.write_h5ad(tmp_path/"cells.h5ad")
        a = tmp_path/"cells.h5ad"
    cells = tokenize(a, vocab, tmp_path/"corpus", context=24, progress=False)
    assert {v for i in np.flatnonzero(gap) for v in [cells[int(i)]["donor"]]} - set(true) <= {None}
    how = dict(TUNE, split="donor", donor="donor")
    with pytest.warns(UserWarning) as told: result = finetune(cells, pretrained, out=tmp_path/"types", **how)
    said = " ".join(str(w.message) for w in told)
    assert "9 of 36 cells have no 'donor' and are left out" in said and "2 of 27 cells have no 'cell_type'" in said
    test, train = result.predictions.cell.to_numpy(), np.array(result.train_cells)
    assert not set(true[test]) & set(true[train]) and not gap[test].any() and not gap[train].any()
    few = tokenize(toy(n=36)[~gap].copy(), vocab, tmp_path/"few", context=24, progress=False)
    plain = finetune(few, pretrained, out=tmp_path/"plain", **how)
    assert plain.metrics == result.metrics and np.flatnonzero(~gap)[plain.train_cells].tolist() == train.tolist()
    assert same(plain.path, result.path)


def test_a_split_by_donor_without_donors_is_refused(vocab, pretrained, tmp_path):
    a = toy()
    a.obs["donor"] = None
    cells = tokenize(a, vocab, tmp_path/"corpus", context=24, progress=False)
    refused(lambda: finetune(cells, pretrained, out=tmp_path/"types", split="donor", donor="donor", **TUNE),
            "0 of 24 cells have a donor in 'donor'", "split='random'")
    finetune(cells, pretrained, out=tmp_path/"types", split="random", donor="donor", **TUNE)


# --- the epoch, the numbers --------------------------------------------------------------------------------------

def test_the_epoch_is_picked_on_the_valid_part_alone(corpus, pretrained, tmp_path, monkeypatch):
    "The test part is looked at once, after the epoch was picked; the classifier is that epoch's"
    looked, states, made, planned = [], [], [], iter([.5, .9, .9, .2])
    real_map, real_scores = Reader.map, measures.scores
    real_classifier = classifier.classifier_from

    def seen(self, fn, sentences, *a, **k):
        looked.append(len(sentences))
        states.append({n: w.clone() for n, w in made[0].state_dict().items()})
        return real_map(self, fn, sentences, *a, **k)

    def scores(*a):
        s = real_scores(*a)
        return {**s, "accuracy": next(planned)} if len(looked) < 5 else s
    monkeypatch.setattr(finetuning, "classifier_from", lambda *a: made.append(real_classifier(*a)) or made[-1])
    monkeypatch.setattr(Reader, "map", seen)
    monkeypatch.setattr(measures, "scores", scores)
    result = finetune(corpus, pretrained, out=tmp_path/"types", **{**TUNE, "epochs": 4, "test_share": .4})
    m = result.metrics
    assert looked[:5] == [m["n_valid"]] * 4 + [m["n_test"]] and m["n_valid"] != m["n_test"]
    assert looked[5:] == [m["n_train"], m["n_valid"]+m["n_test"]]                    # who judges it, afterwards
    assert m["best_epoch"] == 2 and m["valid_accuracy"] == .9                        # the first of equals
    saved = weights(tmp_path/"types")
    assert all(torch.equal(saved[k], w) for k, w in states[1].items())
    assert any(not torch.equal(saved[k], w) for k, w in states[3].items())


def test_metrics_are_those_of_the_predictions(tuned):
    p, m = tuned.predictions, tuned.metrics
    assert m["accuracy"] == (p.true == p.predicted).mean() and m["n_types"] == 2
    assert len(p) == m["n_test"] and p.score.between(.5, 1).all()
    assert m["macro_f1"] == scores(p.true, p.predicted)["macro_f1"] and m["majority"] <= 1
    log = load_model(tuned.path, "cpu").training["log"]
    valid = [r["valid_accuracy"] for r in log if "valid_accuracy" in r]
    assert len(valid) == 3 and m["best_epoch"] == int(np.argmax(valid)) + 1 and m["valid_accuracy"] == max(valid)
    assert all(math.isfinite(v) for r in log for v in r.values())


def test_finetuning_twice_is_the_same_and_once_is_enough(corpus, pretrained, tuned, tmp_path, monkeypatch):
    again = finetune(corpus, pretrained, out=tmp_path/"types", **TUNE)
    assert same(again.path, tuned.path) and again.metrics == tuned.metrics
    assert again.predictions.equals(tuned.predictions) and again.train_cells == tuned.train_cells
    monkeypatch.setattr(finetuning, "fit", lambda *a, **k: pytest.fail("trained again"))
    kept = finetune(corpus, pretrained, out=tmp_path/"types", **TUNE)
    assert kept.metrics == tuned.metrics and kept.train_cells == tuned.train_cells
    pd.testing.assert_frame_equal(kept.predictions, tuned.predictions, check_dtype=False, check_exact=True)


def test_finetuning_learns_and_predicts_the_other_species(corpus, pretrained, tmp_path):
    "Two kinds of cells that every second gene tells apart"
    result = finetune(corpus, pretrained, out=tmp_path/"types", **{**TUNE, "epochs": 40, "learning_rate": 1e-2})
    assert result.metrics["accuracy"] > .9 and result.metrics["macro_f1"] > .9
    for species in ("human", "mouse"):
        a = predict(toy(species, seed=7), result.path, **QUIET)
        assert (a.obs.mix_geneformer_label.astype(str) == a.obs.cell_type).mean() > .9
        assert a.obs.mix_geneformer_score.between(.5, 1).all()


# --- as people need it --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step,every", [(3, 2), (8, 3), (11, 1)])
def test_a_killed_fine_tuning_is_the_one_that_was_never_killed(corpus, pretrained, tmp_path, monkeypatch, step, every):
    "Dropout, order, optimiser, log and the epoch picked so far go on where they were"
    how = dict(TUNE, class_weight="balanced", patience=2, checkpoint_every=every)
    whole, calls = finetune(corpus, pretrained, out=tmp_path/"whole", **how), [0]
    real = classifier.CellClassifier.forward

    def forward(self, *a, **k):
        calls[0] += 1
        if calls[0] == step: raise KeyboardInterrupt
        return real(self, *a, **k)
    monkeypatch.setattr(classifier.CellClassifier, "forward", forward)
    with pytest.raises(KeyboardInterrupt): finetune(corpus, pretrained, out=tmp_path/"killed", **how)
    assert len(list(tmp_path.glob(".killed.*.work/step-*"))) == 1 and not (tmp_path/"killed").exists()
    again = finetune(corpus, pretrained, out=tmp_path/"killed", **how)
    kept = (step-1)//every*every
    assert calls[0] - step == 3*math.ceil(whole.metrics["n_train"]/8 - .99) - kept or whole.metrics["epochs"] < 3
    assert same(again.path, whole.path) and again.metrics == whole.metrics
    assert load_model(again.path, "cpu").training["log"] == load_model(whole.path, "cpu").training["log"]
    assert not list(tmp_path.glob(".*.work"))


def test_a_run_that_gets_no_better_ends(corpus, pretrained, tmp_path, monkeypatch):
    planned, real = iter([.5, .9, .4, .9, .95]), measures.scores
    monkeypatch.setattr(measures, "scores", lambda *a: {**real(*a), "accuracy": next(planned, 0)})
    m = finetune(corpus, pretrained, out=tmp_path/"types", **{**TUNE, "epochs": 9, "patience": 2}).metrics
    assert (m["best_epoch"], m["epochs"], m["valid_accuracy"]) == (2, 4, .9)


def test_frozen_layers_stay_and_the_others_learn(corpus, pretrained, tmp_path):
    begun = weights(pretrained)
    for n in (0, 1):
        made = weights(finetune(corpus, pretrained, out=tmp_path/str(n), freeze_layers=n, **TUNE).path)
        still = {k for k, w in begun.items() if k in made and torch.equal(w, made[k])}
        frozen = {k for k in made if k.startswith(("bert.embeddings", "bert.encoder.layer.0."))} & set(begun)
        assert frozen <= still if n else not {k for k in frozen if k.endswith("weight")} & still
        assert not any(k.startswith("bert.encoder.layer.1.") and k.endswith("weight") for k in still)


def test_rare_types_weigh_as_much_and_common_ones_can_be_capped(vocab, pretrained, tmp_path):
    a = toy(n=48)
    a = a[(a.obs.cell_type == "a") | (np.arange(48) % 4 == 1)].copy()
    cells = tokenize(a, vocab, tmp_path/"corpus", context=24, progress=False)
    plain = finetune(cells, pretrained, out=tmp_path/"plain", **TUNE)
    even = finetune(cells, pretrained, out=tmp_path/"even", class_weight="balanced", **TUNE)
    few = finetune(cells, pretrained, out=tmp_path/"few", max_per_type=4, **TUNE)
    assert not same(plain.path, even.path) and plain.train_cells == even.train_cells
    taught = a.obs.cell_type.iloc[few.train_cells].value_counts()
    assert taught.max() == 4 and set(few.train_cells) < set(plain.train_cells)
    assert few.predictions.cell.tolist() == plain.predictions.cell.tolist()   # what is measured on stays


def test_metrics_say_how_right_each_type_is(tuned):
    p, m = tuned.predictions, json.loads((tuned.path/"metrics.json").read_text())
    assert [row["type"] for row in m["per_type"]] == m["confusion"]["types"] == ["a", "b"]
    counts = np.array(m["confusion"]["counts"])
    assert counts.sum() == len(p) and counts.trace() == (p.true == p.predicted).sum()
    for i, row in enumerate(m["per_type"]):
        assert row["cells"] == counts[i].sum() and row["recall"] == pytest.approx(counts[i, i]/counts[i].sum())
    assert tuned.confusion.to_numpy().tolist() == m["confusion"]["counts"]
    assert np.mean(tuned.per_type.f1) == pytest.approx(m["macro_f1"])


@pytest.mark.parametrize("setting,parts", [
    (dict(class_weight="equal"), ["class_weight='equal' is none of 2 choices", "'balanced' or None"]),
    (dict(max_per_type=0), ["max_per_type=0 leaves nothing to train", "1 or more"]),
    (dict(patience=0), ["patience=0 leaves nothing to train"]),
    (dict(freeze_layers=9), ["freeze_layers=9", "2 layers of the encoder", "pass 0 to 2"]),
    (dict(freeze_layers=-1), ["freeze_layers=-1"])])
def test_settings_that_mean_nothing(corpus, model_dir, tmp_path, setting, parts):
    refused(lambda: finetune(corpus, model_dir, out=tmp_path/"types", **QUIET, **setting), *parts)
    assert files_under(tmp_path) == []


def test_a_run_that_asks_for_nothing_new_is_still_known():
    "The settings that came later change no fingerprint of before"
    assert list(FinetuneConfig().told()) == ["split", "epochs", "max_steps", "batch_size", "learning_rate",
                                             "warmup_steps", "weight_decay", "min_share", "test_share", "valid_share",
                                             "pool", "seed", "test_donors"]


# --- two processes -----------------------------------------------------------------------------------------------

TWO = """
import json, sys
from mix_geneformer.classification.finetuning import finetune
corpus, model, out, settings = sys.argv[1:]
finetune(corpus, model, out=out, **json.loads(settings))
import torch.distributed as dist
if dist.is_initialized(): dist.barrier(); dist.destroy_process_group()
"""


def two_processes(folder, *args):
    "Run `TWO` under torchrun"
    (folder/"run.py").write_text(TWO)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder/"run.py"]
    done = subprocess.run(list(map(str, [*run, *args])), capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]


def test_fine_tuning_by_two_processes_is_that_by_one(corpus, tmp_path):
    still = dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)   # each process draws its own dropout
    start = pretrain(corpus, tmp_path/"model", **TINY, **still, batch_size=8, max_steps=8, learning_rate=1e-3, **QUIET)
    settings = dict(epochs=2, batch_size=8, learning_rate=1e-3, warmup_steps=1, **QUIET)
    two_processes(tmp_path, corpus, start, tmp_path/"two", json.dumps(settings))
    one = finetune(corpus, start, out=tmp_path/"one", **settings)
    found, made, begun = weights(tmp_path/"two"), weights(one.path), weights(start)
    for k, w in made.items():
        if k.endswith("key.bias"): continue   # softmax ignores it: rounding alone
        torch.testing.assert_close(found[k], w, rtol=0, atol=1e-5, msg=lambda m: f"{k}: {m}")
    assert max(float((begun[k] - w).abs().max()) for k, w in made.items() if k in begun) > 1e-3
    a, b = json.loads((tmp_path/"two"/"metrics.json").read_text()), one.metrics
    assert set(a) == set(b) and all(a[k] == (pytest.approx(v) if isinstance(v, float) else v) for k, v in b.items())


# --- what is refused ---------------------------------------------------------------------------------------------

def test_finetuning_without_what_it_needs(corpus, model_dir, tmp_path):
    given = dict(label="cell_type", out=tmp_path/"types", epochs=1, **QUIET)
    tune = lambda **k: finetune(corpus, model_dir, **{**given, **k})
    refused(lambda: tune(label="celltype"), "has no column 'celltype' (of 5: ", "cell_type", "pass label=")
    refused(lambda: tune(split="donor"), "split='donor' needs the donors' column", "pass donor=")
    refused(lambda: tune(split="donor", donor="animal"), "has no column 'animal'", "pass donor=")
    refused(lambda: tune(split="thirds"), "split='thirds' is none of 2 choices", "'random' or 'donor'")
    refused(lambda: tune(split="donor", donor="species", species="human"),
            "at least 2 donors, 1 found", "use split='random'")
    refused(lambda: tune(label="species", species="human"), "1 cell type of 1", "2 are needed")
    refused(lambda: tune(test_share=0.), "The test part has 0 of 48 cells")
    refused(lambda: tune(valid_share=0.), "The valid part has 0 of 48 cells")
    refused(lambda: tune(pool="max"), "pool='max' is none of 2 choices")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("setting,parts", [
    (dict(species="pig"), ["0 pig cells"]),
    (dict(hiden_size=3), ["1 unknown settings (hiden_size)", "learning_rate"]),
    (dict(config=dict(lr=.1)), ["1 unknown settings (lr)", "learning_rate"])])
def test_other_settings(corpus, model_dir, tmp_path, setting, parts):
    refused(lambda: finetune(corpus, model_dir, out=tmp_path/"types", **QUIET, **setting), *parts)
    assert files_under(tmp_path) == []


def test_anothers_output_is_kept(corpus, model_dir):
    before = {p: p.stat().st_mtime_ns for p in model_dir.iterdir()}
    refused(lambda: finetune(corpus, model_dir, out=model_dir, **QUIET), "holds another run's result")
    assert {p: p.stat().st_mtime_ns for p in model_dir.iterdir()} == before


def test_a_model_with_anothers_vocabulary(corpus, tmp_path):
    other = Vocabulary.build([toy("human", seed=3), toy("mouse", seed=4)])          # the same genes, other medians
    m = save_model(build_model(other, **TINY), other, tmp_path/"model")
    line = refused(lambda: finetune(corpus, m, out=tmp_path/"types", **QUIET),
                   "The corpus was tokenised with vocabulary", other.hash,
                   "tokenise the counts with the model's vocabulary")
    assert "82 tokens" in line and not (tmp_path/"types").exists()
    refused(lambda: load_model(m, "cpu", vocab=islet_vocab()), "The vocabulary has 14 tokens, the model of model 82",
            "pass the model's own vocabulary")


def test_a_pretrained_model_predicts_nothing(model_dir):
    refused(lambda: predict(toy(), model_dir, **QUIET), "pretrained model with 0 cell types", "fine-tune it first")


# --- whose cells -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def of_human_cells(corpus, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("human")/"types"
    return finetune(corpus, pretrained, out=out, species="human", **TUNE).path


def test_a_classifier_says_whose_cells_it_knows(of_human_cells, tuned, pretrained):
    seen = load_model(of_human_cells, "cpu").training["seen"]
    assert seen["species"] == ["human"]
    assert load_model(tuned.path, "cpu").training["seen"]["species"] == ["human", "mouse"]
    assert "Cells of human;" in (of_human_cells/"README.md").read_text()
    assert load_model(pretrained, "cpu").training["seen"]["species"] == ["human", "mouse"]
    assert "Cells of human and mouse;" in (pretrained/"README.md").read_text()


def test_cells_of_a_species_never_seen_are_refused_until_asked_for(of_human_cells, tuned, tmp_path):
    mice = toy("mouse", seed=1)
    line = refused(lambda: predict(mice, of_human_cells, **QUIET), "human", "mouse", "allow_species='mouse'")
    assert "mix_geneformer_label" not in mice.obs
    refused(lambda: predict(mice.copy(), of_human_cells, species="mouse", **QUIET), "allow_species='mouse'")
    asked = dict(allow_species=line.rsplit("allow_species='", 1)[1].split("'")[0])
    with pytest.warns(UserWarning, match="never seen mouse"): predict(mice, of_human_cells, **asked, **QUIET)
    assert mice.obs.mix_geneformer_label.notna().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert predict(toy(), of_human_cells, **QUIET).uns["mix_geneformer"]["share_seen"] == 1
        predict(toy("mouse", seed=1), tuned.path, **QUIET)


def test_the_command_refuses_and_takes_the_same_word(of_human_cells, tmp_path):
    toy("mouse", seed=1).write_h5ad(tmp_path/"mice.h5ad")
    def run(*more):
        args = [tmp_path/"mice.h5ad", of_human_cells, tmp_path/"labels.csv", "--device", "cpu", *more]
        command = [Path(sys.executable).parent/"mgf_predict", *args]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)
    first = run()
    assert first.returncode and "allow_species='mouse'" in first.stderr and not (tmp_path/"labels.csv").exists()
    assert run("--allow_species", "mouse").returncode == 0 and len(pd.read_csv(tmp_path/"labels.csv")) == 24


def test_an_encoder_that_never_read_a_species_says_so(corpus, vocab, tmp_path):
    one = pretrain(corpus, tmp_path/"model", **TINY, batch_size=8, max_steps=2, species="human", **QUIET)
    with pytest.warns(UserWarning, match="learnt from human cells and has never seen mouse"):
        a = embed(toy("mouse", seed=1), one, **QUIET)
    assert a.uns["mix_geneformer"]["share_seen"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert embed(toy(), one, **QUIET).uns["mix_geneformer"]["share_seen"] == 1
