"""The plain baselines of `bench/published.py` give what the library gives: a benchmark compares two ways to the same
result"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, toy

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.encoder.batches import LabelledBatches, MaskedBatches
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.encoder.classifier import classifier_from
from mix_geneformer.encoder.losses import Objective
from mix_geneformer.encoder.model import build_model
from mix_geneformer.encoder.states import Reader, cell_budget
from mix_geneformer.encoder.train import parameter_groups
from mix_geneformer.perturbation.verb import perturb

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import published

CONTEXT = TINY["context"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def files(both, tmp_path_factory):
    "The toy counts on disk as the published tokeniser wants them: Ensembl IDs in a column of var, totals in obs"
    found = {}
    for a, species in zip(both, ("human", "mouse")):
        a = a.copy()
        a.var["ensembl_id"], a.obs["n_counts"] = a.var_names.astype(str), np.asarray(a.X.sum(1)).ravel()
        found[species] = tmp_path_factory.mktemp("counts") / f"{species}.h5ad"
        a.write_h5ad(found[species])
    return found


@pytest.fixture()
def model(vocab):
    "Tiny, without dropout, weights large enough to tell cells apart"
    torch.manual_seed(1)
    m = build_model(vocab, **TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return m


def rows_of(sentences, cells, **more):
    return [dict(input_ids=sentences[i][:CONTEXT].tolist(), **{k: v[i] for k, v in more.items()}) for i in cells]


def same_gradients(a, b, module):
    "Both losses agree to 1e-6, every gradient to 1e-5"
    ga, gb = (
        {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(
                module.named_parameters(), torch.autograd.grad(l, list(module.parameters()), allow_unused=True)
            )
        }
        for l in (a, b)
    )
    assert abs(float((a - b).detach())) < 1e-6 * max(1, abs(float(a.detach())))
    assert any(g.abs().max() > 1e-3 for g in ga.values())
    for n in ga:
        assert torch.allclose(ga[n], gb[n], atol=1e-5, rtol=1e-5), n


# --- tokens and batches ------------------------------------------------------------------------------------------


def test_a_cell_is_ranked_by_value_then_token():
    assert published.rank(np.array([1.0, 3.0, 3.0, 2.0]), np.array([4, 5, 7, 9]), exact=True).tolist() == [5, 7, 9, 4]


@pytest.mark.parametrize("context", [2048, 7])
@pytest.mark.parametrize("species", ["human", "mouse"])
def test_tokens(species, context, files, vocab, tmp_path):
    theirs = published.tokenize(
        files[species], vocab, species, tmp_path / "theirs", context, keep=["cell_type"], chunk=10, exact=True
    )
    ours = tokenize(files[species], vocab, tmp_path / "ours", context=context, keep=["cell_type"], progress=False)
    for k in ("input_ids", "length", "cell_type"):
        assert theirs[k][:] == ours[k][:], k
    assert datasets.load_from_disk(str(tmp_path / "theirs"))["input_ids"][:] == theirs["input_ids"][:]


def test_the_timed_tokens_differ_among_ties_alone(files, vocab, tmp_path):
    "The published normalisation rounds and its sort leaves ties open: the same genes in an order of the same values"
    import anndata as ad

    a = ad.read_h5ad(files["human"])
    tokens, medians = vocab.columns(a.var["ensembl_id"].to_numpy(object), "human")
    value = a.X.toarray().astype(float) / medians
    where = {t: i for i, t in enumerate(tokens)}
    found = [
        published.tokenize(files["human"], vocab, "human", tmp_path / str(e), exact=e)["input_ids"][:]
        for e in (False, True)
    ]
    for i, (timed, exact) in enumerate(zip(*found)):
        assert sorted(timed) == sorted(exact)
        np.testing.assert_allclose([value[i, where[t]] for t in timed], [value[i, where[t]] for t in exact], rtol=1e-12)


def test_masked_batches_hide_the_same_cells(corpus, vocab):
    sentences = sentences_of(load_corpus(corpus))
    batches, cells = MaskedBatches(sentences, vocab, 8, CONTEXT), np.arange(3, 11)
    torch.manual_seed(0)
    ours, theirs = batches.collate(cells, 0), published.MaskedCollator(vocab)(rows_of(sentences, cells))
    assert torch.equal(ours["attention_mask"].bool(), theirs["attention_mask"].bool())
    ours = published.dense(ours)
    plain = [torch.where(b["labels"] != -100, b["labels"], b["input_ids"]) for b in (ours, theirs)]
    assert torch.equal(*plain)
    pads = ~theirs["attention_mask"].bool()
    assert (theirs["labels"][pads] == -100).all() and (theirs["input_ids"][pads] == 0).all()


def test_masking_shares(vocab):
    torch.manual_seed(0)
    rows = [dict(input_ids=np.random.default_rng(i).permutation(np.arange(2, 42)).tolist()) for i in range(500)]
    batch, true = published.MaskedCollator(vocab)(rows), published.pad(rows)["input_ids"]
    chosen = batch["labels"] != -100
    hidden, kept = batch["input_ids"][chosen] == vocab.mask_token_id, batch["input_ids"][chosen] == true[chosen]
    assert (
        abs(chosen.float().mean() - 0.15) < 0.01
        and abs(hidden.float().mean() - 0.8) < 0.02
        and abs(kept.float().mean() - 0.1) < 0.02
    )
    assert torch.equal(batch["input_ids"][~chosen], true[~chosen])


def test_labelled_batches(corpus, vocab):
    sentences = sentences_of(load_corpus(corpus))
    labels, cells = np.arange(len(sentences)) % 3, np.arange(5, 17)
    ours = LabelledBatches(sentences, vocab, 12, CONTEXT, labels).collate(cells, 0)
    theirs = published.LabelledCollator(vocab)(rows_of(sentences, cells, label=labels.tolist()))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k].long(), theirs[k].long()) for k in ours)


def test_the_loader_brings_every_cell_once(corpus, vocab):
    data = load_corpus(corpus).select_columns(["input_ids"])
    batches = list(published.loader(data, [len(r) for r in data["input_ids"][:]], published.MaskedCollator(vocab), 5))
    got = [torch.where(b["labels"] != -100, b["labels"], b["input_ids"])[b["attention_mask"].bool()] for b in batches]
    assert sum(len(b["labels"]) for b in batches) == len(data)
    assert sorted(torch.cat(got).tolist()) == sorted(t for r in data["input_ids"][:] for t in r)


# --- losses and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool,symmetric", [("first", True), ("mean", False), ("mean", True), ("first", False)])
def test_pretraining_loss(pool, symmetric, model, corpus, vocab):
    batch = MaskedBatches(sentences_of(load_corpus(corpus)), vocab, 6, CONTEXT).collate(np.arange(4, 40, 6), 0)
    ours = Objective(model.train(), pool=pool, symmetric=symmetric)(**batch)["loss"]
    same_gradients(
        published.pretraining_loss(model, published.dense(batch), pool=pool, symmetric=symmetric), ours, model
    )


def test_contrast_in_plain_loops():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    cos = lambda x, y: float(x @ y / x.norm() / y.norm())
    eq3 = -np.mean(
        [
            np.log(np.exp(cos(a[i], b[i]) / 0.05) / sum(np.exp(cos(a[i], b[j]) / 0.05) for j in range(3)))
            for i in range(3)
        ]
    )
    z = [*a, *b]
    nt = -np.mean(
        [
            np.log(
                np.exp(cos(z[i], z[(i + 3) % 6]) / 0.05)
                / sum(np.exp(cos(z[i], z[j]) / 0.05) for j in range(6) if j != i)
            )
            for i in range(6)
        ]
    )
    assert abs(float(published.contrast(a, b, symmetric=False)) - eq3) < 1e-9
    assert abs(float(published.contrast(a, b)) - nt) < 1e-9


def test_classification_loss(model, corpus, vocab):
    torch.manual_seed(2)
    net = classifier_from(model, ["a", "b", "c"]).train()
    sentences = sentences_of(load_corpus(corpus))
    batch = LabelledBatches(sentences, vocab, 6, CONTEXT, np.arange(len(sentences)) % 3).collate(np.arange(0, 36, 6), 0)
    same_gradients(published.classification_loss(net, batch), net(**batch)["loss"], net)


def test_a_step_is_a_step(model, corpus, vocab):
    "One AdamW step by `train_step` leaves the weights that the same step written out leaves"
    import copy

    batch = MaskedBatches(sentences_of(load_corpus(corpus)), vocab, 4, CONTEXT).collate(np.arange(4), 0)
    twin = copy.deepcopy(model)
    make = lambda m: torch.optim.AdamW(parameter_groups(m, 0.01), lr=1e-3)
    published.train_step(lambda: published.pretraining_loss(model, published.dense(batch)), make(model))
    optimiser = make(twin)
    Objective(twin, pool="first", symmetric=True)(**batch)["loss"].backward()
    optimiser.step()
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


# --- embeddings and perturbation ---------------------------------------------------------------------------------


def test_embeddings(corpus, model_dir):
    loaded, sentences = load_model(model_dir, "cpu"), sentences_of(load_corpus(corpus))
    rows = [sentences[i].tolist() for i in range(len(sentences))]
    theirs = published.embed(loaded.model, rows, 7, emb_layer=-1).numpy()
    np.testing.assert_allclose(Reader(loaded, cell_budget(loaded, 7)).vectors(sentences), theirs, atol=1e-5)


@pytest.mark.parametrize("positions", ["shift", "keep"])
def test_shifts(positions, both, model_dir):
    loaded, a = load_model(model_dir, "cpu"), both[0]
    kinds = a.obs["cell_type"].to_numpy()
    rows = {
        k: [
            s.tolist()
            for s in (encode_cells(a[kinds == k], loaded.vocab, loaded.context)[i] for i in range((kinds == k).sum()))
        ]
        for k in "ab"
    }
    table = perturb(
        a,
        loaded,
        "delete",
        state="cell_type",
        start="a",
        goal="b",
        positions=positions,
        min_cells=1,
        n_boot=2,
        progress=False,
        device="cpu",
    )
    genes = loaded.vocab.lookup(table["ensembl_id"].tolist(), "human")
    found = pd.DataFrame(
        published.perturb(loaded.model, rows["a"], rows["b"], genes, positions=positions, emb_layer=-1),
        columns=["cell", "gene", "shift", "to_origin"],
    )
    theirs = found.groupby("gene")["shift"].agg(["mean", "size"]).loc[genes]
    assert (theirs["size"].to_numpy() == table["n_cells"].to_numpy()).all()
    np.testing.assert_allclose(table["cosine_shift"].to_numpy(), theirs["mean"].to_numpy(), atol=1e-6)
    assert (found["to_origin"] < 1 + 1e-6).all() and found["to_origin"].min() < 1


# --- the bench itself ----------------------------------------------------------------------------------------------


def run(script, *args, folder, **env):
    r = subprocess.run(
        [sys.executable, str(BENCH / script), *args],
        cwd=folder,
        env=dict(os.environ, OMP_NUM_THREADS="1", **env),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "A folder of counts for MGF_BENCH_DATA"
    folder = tmp_path_factory.mktemp("toys")
    for species, seed in (("human", 0), ("mouse", 1)):
        toy(species, n=30, genes=150, seed=seed).write_h5ad(folder / f"{species}.h5ad")
    return folder


def test_bench_quick(toys, tmp_path):
    run(
        "run.py",
        "--quick",
        "--only",
        "tokenise_raw,train_512,collate_mlm_8",
        "--out",
        str(tmp_path / "results"),
        folder=tmp_path,
        MGF_BENCH_DATA=str(toys),
    )
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        "collate_mlm_8.csv",
        "machine.json",
        "tokenise_raw.csv",
        "train_512.csv",
    ]
    for path in (tmp_path / "results").glob("*.csv"):
        t = pd.read_csv(path)
        assert {"contender", "metric", "unit", "median", "low", "high", "ratio", "n", "equal"} <= set(t), path.name
        assert (
            t["contender"].iloc[0] == "published"
            and {"wall", "cpu"} <= set(t["metric"])
            and t["contender"].nunique() > 1
        )
        assert (t["low"] <= t["median"]).all() and (t["median"] <= t["high"]).all() and t["median"].gt(0).all()
        assert (t.loc[t["contender"] == "published", "ratio"] == 1).all() and t["equal"].str.len().gt(0).all()
    about = json.loads((tmp_path / "results" / "machine.json").read_text())
    assert {"cpu", "cores", "threads", "versions", "commit", "date", "command", "data_sha256"} <= set(about)


def test_scaling_quick(toys, tmp_path):
    run(
        "scaling.py",
        "--quick",
        "--out",
        str(tmp_path / "results"),
        "--figures",
        str(tmp_path / "figures"),
        folder=tmp_path,
        MGF_BENCH_DATA=str(toys),
    )
    assert (tmp_path / "figures" / "scaling.png").stat().st_size > 1000
    t = pd.read_csv(tmp_path / "results" / "scaling.csv")
    assert set(t["axis"]) == {"cells", "length", "vocabulary", "perturbations"} and t["seconds"].gt(0).all()
    fits = pd.read_csv(tmp_path / "results" / "scaling_fit.csv")
    assert (
        set(fits["stage"]) == set(t["stage"]) and fits["exponent"].notna().all() and fits["why"].str.len().gt(20).all()
    )
    assert pd.read_csv(tmp_path / "results" / "budget.csv")["hours"].gt(0).all()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_gpu_bench_runs_without_one(toys, tmp_path):
    run("gpu.py", "--prepare", str(tmp_path / "cells.npz"), folder=tmp_path, MGF_BENCH_DATA=str(toys))
    run(
        "gpu.py",
        "--cells",
        str(tmp_path / "cells.npz"),
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path / "gpu"),
        folder=tmp_path,
    )
    found = {f.stem: pd.read_csv(f) for f in (tmp_path / "gpu").glob("*.csv")}
    assert (
        set(found) == {"equality", "training", "head", "loop", "embedding", "perturbation"}
        and (tmp_path / "gpu" / "profile.txt").stat().st_size > 1000
    )
    assert (
        found["equality"]["ok"].all()
        and found["training"]["attention"].nunique() == 2
        and found["training"]["compile"].nunique() == 2
    )
    for name in ("training", "embedding", "perturbation"):
        assert found[name]["seconds"].gt(0).all(), name
