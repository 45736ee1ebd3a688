"""`layer=` is the AnnData's in every verb: counts in a layer or in `raw` give what the same counts give in X, and X and
layers stay as they are."""
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import refused, toy

from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.classification.finetuning import finetune
from mix_geneformer.classification.prediction import predict
from mix_geneformer.embedding import embed
from mix_geneformer.label_transfer import transfer
from mix_geneformer.perturbation.evidence import differential
from mix_geneformer.perturbation.planted import plant
from mix_geneformer.perturbation.verb import perturb, perturbed_embeddings

STATES = dict(state="cell_type", start="a", goal="b", device="cpu")
MANY = dict(model=None, rounds=0, genes="all", progress=False)


def held(where, species="human", seed=0):
    "Counts in X, in a layer or in raw, a log-normalised matrix in front of them"
    a = toy(species, n=60, seed=seed)
    counts = a.copy()
    if where == "X": return a
    a.X = a.X.log1p()
    if where == "raw": a.raw = counts
    else: a.layers["counts"] = counts.X
    return a


@pytest.fixture(scope="module")
def types(model_dir, tmp_path_factory):
    "A classifier of the two types"
    out = tmp_path_factory.mktemp("types")
    tokenize(held("X"), Vocabulary.load(model_dir), out/"cells", context=24, progress=False)
    return finetune(out/"cells", model_dir, out=out/"types", max_steps=2, device="cpu", progress=False).path


def as_text(rows): return [str(list(r)) for r in rows]


VERBS = dict(
    read_counts=lambda a, model, types, **k: read_counts(a, verbose=False, **k).to_df().to_numpy(),
    encode_cells=lambda a, model, types, **k: as_text(
        np.split((s := encode_cells(a, Vocabulary.load(model), **k)).values, s.offsets[1:-1])),
    tokenize=lambda a, model, types, **k: as_text(
        tokenize(a, Vocabulary.load(model), progress=False, **k)["input_ids"][:]),
    tokenize_by_a_client=lambda a, model, types, **k: as_text(
        tokenize(a, Vocabulary.load(model), progress=False, client=ThreadPoolExecutor(1), **k)["input_ids"][:]),
    vocabulary=lambda a, model, types, **k: Vocabulary.build([a], **k).hash,
    gene_medians=lambda a, model, types, **k: gene_medians(a, **k).to_numpy(),
    embed=lambda a, model, types, **k: embed(a, model, device="cpu", progress=False, **k).obsm["X_mix_geneformer"],
    predict=lambda a, model, types, **k: predict(a, types, device="cpu", progress=False, **k).obs.mix_geneformer_score,
    perturb=lambda a, model, types, **k: perturb(a, model, **STATES, n_boot=3, progress=False, **k).cosine_shift,
    perturbed_embeddings=lambda a, model, types, **k: perturbed_embeddings(
        a, model, list(toy().var_names[:2]), **STATES, **k).obsm["X_mix_geneformer"],
    differential=lambda a, model, types, **k: differential(a, state="cell_type", start="a", goal="b", **k).score,
    plant=lambda a, model, types, **k: plant(a, n_genes=3, most=1., **k).to_df().to_numpy())


def parts(a): return {name: m.copy() for name, m in dict(a.layers, X=a.X).items()}


@pytest.mark.parametrize("where", ["counts", "raw"])
@pytest.mark.parametrize("verb", VERBS)
def test_counts_elsewhere_give_what_they_give_in_x(verb, where, model_dir, types, tmp_path):
    run, a = VERBS[verb], held(where)
    before, expected = parts(a), run(held("X"), model_dir, types)
    np.testing.assert_array_equal(run(a, model_dir, types, layer=where), expected)
    assert set(before) == set(parts(a)) and all((before[n] != m).nnz == 0 for n, m in parts(a).items())
    if where == "raw" and verb.startswith("perturb"): return # the same door
    held(where).write_h5ad(tmp_path/"a.h5ad")
    np.testing.assert_array_equal(run(tmp_path/"a.h5ad", model_dir, types, layer=where), expected)


@pytest.mark.parametrize("verb", VERBS)
def test_the_number_of_an_encoders_layer_is_refused(verb, model_dir, types):
    refused(lambda: VERBS[verb](held("X"), model_dir, types, layer=1), "layer=1 is no name", "emb_layer=")


@pytest.mark.parametrize("source", ["X", "counts", "raw"])
@pytest.mark.parametrize("target", ["X", "counts", "raw"])
def test_transfer_takes_either_side_from_where_it_is(source, target):
    expected = transfer(held("X"), held("X", "mouse", 1), **MANY).obsm["mix_geneformer_transfer"].to_numpy()
    a, b = held(source), held(target, "mouse", 1)
    for cells in (a, b): cells.obs["species"] = "someone's own"
    before = parts(b)
    found = transfer(a, b, layer=source, target_layer=None if source == target else target, **MANY)
    assert found is b and all((before[n] != m).nnz == 0 for n, m in parts(b).items())
    assert set(b.obs.species) == {"someone's own"}
    np.testing.assert_array_equal(found.obsm["mix_geneformer_transfer"].to_numpy(), expected)


def test_transfer_of_normalised_counts_is_refused():
    for sides in ((held("raw"), held("X", "mouse", 1)), (held("X"), held("raw", "mouse", 1))):
        for cells in sides: cells.obs["species"] = "human"
        refused(lambda: transfer(*sides, **MANY), "not whole numbers", "pass layer='raw'")


def test_symbols_and_ids_are_one(model_dir):
    def symbols(a):
        obs, var = a.obs.assign(species="Homo sapiens"), pd.DataFrame(index=a.var.symbol.to_numpy())
        return ad.AnnData(a.X, obs, var)
    ids = [held("X"), held("X", "mouse", 1)]
    expected = transfer(*ids, **MANY).obsm["mix_geneformer_transfer"].to_numpy()
    found = transfer(*map(symbols, ids), **MANY).obsm["mix_geneformer_transfer"].to_numpy()
    np.testing.assert_array_equal(found, expected)


def test_a_source_that_is_opened_already():
    c = as_counts(held("X"))
    assert as_counts(c) is c
    refused(lambda: as_counts(c, layer="counts"), "opened already", "layer='counts'")


@pytest.mark.parametrize("kind", ["uint8", "int8", "int64", "float64", ">f4", "float16", "bool"])
def test_types_change_no_vector_and_no_shift(kind, model_dir, types):
    a = held("X")
    if kind == "bool": a.X = (a.X > 0).astype(np.float32)
    b = a.copy()
    b.X = b.X.toarray().astype(kind)
    for verb in ("embed", "predict", "perturb", "differential"):
        np.testing.assert_array_equal(*(VERBS[verb](x.copy(), model_dir, types) for x in (a, b)))
    c = ad.AnnData(sp.csc_matrix(a.X), a.obs, a.var)
    np.testing.assert_array_equal(*(VERBS["embed"](x.copy(), model_dir, types) for x in (a, c)))
