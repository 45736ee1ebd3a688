"Every verb and command reads the same counts from X, a layer or raw, by any name, and refuses what is no counts"
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import refused, toy

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.classification.prediction import predict
from mix_geneformer.embedding import embed
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.classifier import classifier_from
from mix_geneformer.label_transfer import transfer
from mix_geneformer.perturbation.verb import perturb

QUIET = dict(device="cpu", progress=False)
AB = dict(state="cell_type", start="a", goal="b", n_boot=5, **QUIET)


@pytest.fixture(scope="module")
def types(model_dir, tmp_path_factory):
    "A classifier with random weights"
    loaded, out = load_model(model_dir, "cpu"), tmp_path_factory.mktemp("types")/"types"
    return save_model(classifier_from(loaded.model, ["a", "b"]), loaded.vocab, out)


VERBS = dict(
    read_counts=lambda a, m, t, **k: read_counts(a, verbose=False, **k).X.toarray(),
    gene_medians=lambda a, m, t, **k: gene_medians(a, **k).to_numpy(),
    build=lambda a, m, t, **k: Vocabulary.build(a, **k).frame["median"].to_numpy(),
    encode_cells=lambda a, m, t, **k: encode_cells(a, Vocabulary.load(m), 24, **k).values,
    tokenize=lambda a, m, t, **k: np.concatenate(
        tokenize(a, Vocabulary.load(m), context=24, progress=False, **k)["input_ids"][:]),
    embed=lambda a, m, t, **k: embed(a.copy(), m, **QUIET, **k).obsm["X_mix_geneformer"],
    predict=lambda a, m, t, **k: predict(a.copy(), t, **QUIET, **k).obs.mix_geneformer_score.to_numpy(),
    perturb=lambda a, m, t, **k: perturb(a.copy(), m, max_cells=4, **AB, **k).cosine_shift.to_numpy(),
    transfer=lambda a, m, t, **k: transfer(a.copy(), toy("mouse"), label="cell_type", rounds=0, progress=False,
                                           target_layer="X", **k).obs.mix_geneformer_score.to_numpy())


def elsewhere():
    "The cells with their counts in a layer and in `raw`, and logarithms in X"
    a = toy()
    a.layers["counts"], a.raw = a.X.copy(), a
    a.X = a.X.log1p()
    return a


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_a_layer_or_raw_gives_what_X_gives(verb, model_dir, types):
    "And X, which holds no counts, is refused with the argument that works"
    def f(a, **k): return VERBS[verb](a, model_dir, types, **k)
    whole = f(toy())
    for layer in ("counts", "raw"): np.testing.assert_array_equal(f(elsewhere(), layer=layer), whole)
    refused(lambda: f(elsewhere()), "not whole numbers", "layer='counts'")


@pytest.mark.filterwarnings("ignore")
def test_transfer_reads_its_target_from_a_layer_of_its_own():
    m = toy("mouse")
    m.layers["spliced"], m.X = m.X.copy(), m.X.log1p()
    def score(target, **k):
        found = transfer(elsewhere(), target, label="cell_type", rounds=0, progress=False, layer="raw", **k)
        return found.obs.mix_geneformer_score.to_numpy()
    np.testing.assert_array_equal(score(m, target_layer="spliced"), score(toy("mouse"), target_layer="X"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("species", [("human", "mouse"), ("Homo sapiens", "Mus musculus")])
def test_transfer_looks_at_counts_whatever_obs_says(species):
    "A column `species` neither lets logarithms in nor keeps symbols from being mapped"
    sides = [toy("human"), toy("mouse")]
    def labels(h, m):
        return transfer(h, m, label="cell_type", rounds=0, progress=False).obs.mix_geneformer_label.tolist()
    expected = labels(*[a.copy() for a in sides])
    for a, name in zip(sides, species):
        a.obs["species"] = name
        a.var_names = a.var.symbol.astype(str)
    assert labels(*[a.copy() for a in sides]) == expected
    for a in sides: a.X = a.X.log1p()
    refused(lambda: labels(*sides), "not whole numbers")


@pytest.mark.filterwarnings("ignore")
def test_genes_to_perturb_are_named_as_in_files(model_dir):
    gene, symbol = toy().var_names[4], toy().var.symbol.iloc[4]
    for name in (f"{gene}.7", f" {symbol} ", symbol, gene):
        assert perturb(toy(), model_dir, genes=[name], max_cells=4, **AB).ensembl_id.tolist() == [gene]


@pytest.mark.parametrize("layer", ["counts", "raw"])
def test_commands_take_the_layer_too(layer, model_dir, types, tmp_path):
    "The vectors of mgf_embed, and the types of mgf_predict, are those of the verbs"
    elsewhere().write_h5ad(tmp_path/"cells.h5ad")
    for command, model in (("mgf_embed", model_dir), ("mgf_predict", types)):
        out = tmp_path/f"{command}.h5ad"
        args = [tmp_path/"cells.h5ad", model, out, "--layer", layer, "--device", "cpu"]
        done = subprocess.run([Path(sys.executable).parent/command, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = ad.read_h5ad(out)
        if command == "mgf_embed":
            np.testing.assert_allclose(found.obsm["X_mix_geneformer"], VERBS["embed"](toy(), model, None), atol=1e-6)
        else:
            expected = predict(toy(), model, **QUIET).obs.mix_geneformer_label.astype(str)
            pd.testing.assert_series_equal(found.obs.mix_geneformer_label.astype(str), expected, check_names=False)
