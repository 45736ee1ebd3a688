"A programme that is planted in real counts is all that changes, and a classifier that learnt it gives it back"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused, toy

from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import vocabulary_from_medians
from mix_geneformer.classification.finetuning import finetune
from mix_geneformer.encoder.checkpoints import save_model
from mix_geneformer.encoder.model import build_model
from mix_geneformer.perturbation.edits import POSITIONS
from mix_geneformer.perturbation.evidence import differential
from mix_geneformer.perturbation.planted import orders, plant, recovery, scaled_counts
from mix_geneformer.perturbation.verb import perturb

@pytest.fixture(scope="module")
def cells(): return toy(n=60)


@pytest.mark.parametrize("factor", [0, .25, 1, 3])
def test_counts_stay_counts(factor):
    x = np.random.default_rng(0).poisson(8, (500, 20))
    y = scaled_counts(x, factor, np.random.default_rng(1))
    assert y.dtype.kind == "i" and (y >= 0).all() and not y[x == 0].any()
    assert y.sum() == pytest.approx(factor * x.sum(), rel=.02)


def test_only_the_programme_of_half_of_the_cells_changes(cells):
    bed, x = plant(cells, 6, 5., least=.1, most=1, seed=2), cells.X.toarray()
    changed, half = bed.X.toarray() != x, bed.obs.planted.eq("planted").to_numpy()
    assert half.sum() == 30 and bed.var.planted.sum() == 6 and changed[:, bed.var.planted][half].mean() > .4
    assert not changed[~half].any() and not changed[:, ~bed.var.planted].any()
    assert (plant(cells, 6, 5., least=.1, most=1, seed=3).var.planted != bed.var.planted).any()
    refused(lambda: plant(cells, 60), "60 are to be planted")


def test_recall_counts_what_is_found():
    t = recovery(dict(a=list("abcd"), b=list("dcba")), ["a", "d"], at=(1, 2, 3)).set_index("ranking")
    assert t.loc["a", "recall at 1"] == .5 and t.loc["b", "recall at 3"] == .5
    assert t.loc["a", "auroc"] == .5 and t.loc["chance", "recall at 2"] == .5


def test_a_planted_programme_is_recovered(tmp_path):
    "A classifier trained to tell the halves apart, on hand-made cells: what it learnt is what was planted"
    bed = plant(toy(n=300, genes=40, seed=5), 5, 20., least=.1, most=1, seed=0)
    vocab = vocabulary_from_medians({"human": pd.Series(1., index=bed.var_names)})
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=64)
    start = save_model(build_model(vocab, **shape), vocab, tmp_path / "start", dict(pool="mean"))
    data = tokenize(bed, vocab, tmp_path / "tokens", 64, keep=["planted"], progress=False)
    fine = finetune(data, start, "planted", tmp_path / "fine", epochs=6, batch_size=16, learning_rate=2e-3,
                    warmup_steps=10, device="cpu", progress=False)
    assert fine.metrics["accuracy"] > .65
    where, planted = dict(state="planted", start="planted", goal="unplanted"), bed.var_names[bed.var.planted]
    few = dict(max_cells=40, progress=False, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = [perturb(bed, fine.path, positions=p, **few, **where) for p in POSITIONS]
    t = recovery(orders(*both, differential(bed, **where)), planted, at=(5, 10)).set_index("ranking")
    assert t.loc["differential expression", "recall at 10"] == 1
    assert t.loc["cosine_shift, keep", "auroc"] > .8
