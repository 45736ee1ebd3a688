"What cannot be used is refused in one sentence (cause, number, remedy), and nothing half-written stays behind"

import json

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import ISLET, TINY, files_under, genes_of, refused, toy
from handmade import SOURCES, cut, named, spoilt_late

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.classification.prediction import predict
from mix_geneformer.embedding import embed, umap
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.classifier import classifier_from
from mix_geneformer.encoder.model import build_model
from mix_geneformer.perturbation.verb import perturb
from mix_geneformer.statistics import transfer_scores

QUIET, SMALL = (
    dict(device="cpu", progress=False),
    dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        context=24,
        max_steps=2,
        device="cpu",
        progress=False,
    ),
)


# --- counts ------------------------------------------------------------------------------------------------------


VERBS = {
    "read_counts": lambda a, **k: read_counts(a, verbose=False),
    "Vocabulary.build": lambda a, **k: Vocabulary.build([a]),
    "tokenize": lambda a, vocab, out, **k: tokenize(a, vocab, out, progress=False),
    "embed": lambda a, model_dir, **k: embed(a, model_dir, **QUIET),
    "predict": lambda a, classifier_dir, **k: predict(a, classifier_dir, **QUIET),
    "perturb": lambda a, model_dir, **k: perturb(a, model_dir, state="cell_type", start="a", goal="b", **QUIET),
}


@pytest.fixture(scope="module")
def classifier_dir(model_dir, tmp_path_factory):
    loaded = load_model(model_dir, "cpu")
    return save_model(
        classifier_from(loaded.model, ["a", "b"]), loaded.vocab, tmp_path_factory.mktemp("classifier") / "types"
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", SOURCES)
def test_bad_counts(name, verb, vocab, model_dir, classifier_dir, tmp_path):
    make, parts = SOURCES[name]
    # the states are looked for first
    if verb == "perturb" and name in ("no cells", "no genes", "unknown genes", "mixed species", "no X"):
        parts = []
    refused(
        lambda: VERBS[verb](
            make(), vocab=vocab, model_dir=model_dir, classifier_dir=classifier_dir, out=tmp_path / "out"
        ),
        *parts,
    )
    assert files_under(tmp_path) == []


def test_all_zero_counts(vocab):
    a = named(genes_of("human", 5), np.zeros((4, 5), np.float32))
    refused(lambda: Vocabulary.build([a]), "0 human genes have a median")
    refused(lambda: encode_cells(a, vocab), "4 of 4 cells have no gene of the vocabulary", "filter them out")
    refused(lambda: tokenize(a, vocab, progress=False), "All 4 cells", "lack any gene of the vocabulary")


def test_some_cells_without_a_gene_of_the_vocabulary(vocab, tmp_path, model_dir):
    a = toy()
    x = a.X.toarray()
    x[[2, 7]] = 0
    a.X = sp.csr_matrix(x)
    refused(lambda: encode_cells(a, vocab), "2 of 24 cells have no gene of the vocabulary")
    # a vector for every cell that has one, and a missing one for the others, said aloud
    with pytest.warns(UserWarning, match="2 of 24 cells"):
        missing = np.isnan(embed(a, model_dir, **QUIET).obsm["X_mix_geneformer"]).all(1)
    assert np.flatnonzero(missing).tolist() == [2, 7]
    # a corpus leaves them out, and says how many
    assert len(tokenize(a, vocab, tmp_path / "corpus", progress=False)) == 22
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text())["shards"][0]["n_empty"] == 2


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_bad_values_late_in_a_large_source_leave_no_corpus(vocab, tmp_path, kind):
    a, out = spoilt_late(), tmp_path / "out"
    if kind == "file":
        a.write_h5ad(tmp_path / "cells.h5ad")
        a = tmp_path / "cells.h5ad"
    refused(lambda: tokenize(a, vocab, out, progress=False), "values that are not whole numbers, the first 0.5")
    refused(lambda: load_corpus(out), "is not a tokenised corpus")
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_refused_tokenisation_leaves_the_folder_as_it_was(vocab, tmp_path):
    spoilt_late().write_h5ad(tmp_path / "cells.h5ad")
    refused(lambda: tokenize(tmp_path / "cells.h5ad", vocab, tmp_path / "out", progress=False))
    assert files_under(tmp_path) == ["cells.h5ad"]
    assert len(tokenize(toy(), vocab, tmp_path / "out", progress=False)) == 24  # the corrected input may go there


# --- species -----------------------------------------------------------------------------------------------------


def test_a_species_that_the_model_does_not_know(tmp_path):
    v = Vocabulary.build([toy("human")])
    m = save_model(build_model(v, **TINY), v, tmp_path / "model")
    for call in (
        lambda: embed(toy("mouse"), m, **QUIET),
        lambda: encode_cells(toy("mouse"), v),
        lambda: tokenize(toy("mouse"), v, tmp_path / "out", progress=False),
        lambda: perturb(toy("mouse"), m, state="cell_type", start="a", goal="b", **QUIET),
    ):
        refused(call, "The vocabulary has 0 mouse genes (only human)", "made with mouse cells")


# --- genes -------------------------------------------------------------------------------------------------------


def test_genes_outside_the_vocabulary(vocab, model_dir):
    refused(
        lambda: vocab.lookup(["NOPE", "ALSO"]),
        "2 of 2 genes are not in the vocabulary (NOPE, ALSO)",
        "human or mouse symbols or Ensembl IDs",
    )
    refused(
        lambda: perturb(toy(), model_dir, state="cell_type", start="a", goal="b", genes=["NOPE"], **QUIET),
        "1 of 1 genes",
        "NOPE",
    )
    foreign = named(ISLET["human"])
    refused(
        lambda: encode_cells(foreign, vocab),
        "0 of 6 genes of the AnnData are in the vocabulary",
        "built from such cells",
    )


# --- labels ------------------------------------------------------------------------------------------------------


def test_states_that_are_not_there(model_dir):
    p = lambda **k: perturb(toy(), model_dir, **{**dict(state="cell_type", start="a", goal="b"), **QUIET, **k})
    refused(lambda: p(state="disease"), "disease")
    refused(lambda: p(start="gamma"), "gamma")
    refused(lambda: p(goal="gamma"), "gamma")
    refused(lambda: p(mode="explode"), "explode")


def test_no_shared_types():
    refused(
        lambda: transfer_scores(["a", "b"], ["x", "y"], ["x", "y"]),
        "0 of 2 cell types are known to the classifier (x, y",
        "name the types alike",
    )


# --- models ------------------------------------------------------------------------------------------------------


# --- settings ----------------------------------------------------------------------------------------------------


def test_other_choices():
    refused(
        lambda: Vocabulary.build([toy()], orthologs="merged"),
        "orthologs='merged' is none of 3 choices",
        "'separate', 'shared' or 'tied'",
    )
    refused(lambda: umap(toy()), "obsm has no 'X_mix_geneformer' (of 0: none)", "run embed() first")


def test_anothers_output_is_kept(tmp_path, both, vocab):
    (tmp_path / "notes.txt").write_text("mine")
    refused(lambda: tokenize(list(both), vocab, tmp_path, progress=False), "holds 1 files of something else")
    assert files_under(tmp_path) == ["notes.txt"]


# --- files -------------------------------------------------------------------------------------------------------


def test_missing_paths(vocab, model_dir, classifier_dir, tmp_path):
    gone = tmp_path / "gone.h5ad"
    for call in (
        lambda: read_counts(gone),
        lambda: tokenize(gone, vocab, tmp_path / "o", progress=False),
        lambda: Vocabulary.build([gone]),
        lambda: embed(gone, model_dir, **QUIET),
        lambda: predict(gone, classifier_dir, **QUIET),
        lambda: perturb(gone, model_dir, state="s", start="a", goal="b", **QUIET),
    ):
        refused(call, "gone.h5ad does not exist", "check the path")
    refused(lambda: load_corpus(tmp_path / "gone"), "is not a tokenised corpus", "tokenize()")
    refused(lambda: Vocabulary.load(tmp_path / "gone"), "is not there")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.95])
def test_truncated_h5ad(tmp_path, vocab, share):
    toy().write_h5ad(tmp_path / "cells.h5ad")
    cut(tmp_path / "cells.h5ad", share)
    tokenise = lambda: tokenize(tmp_path / "cells.h5ad", vocab, tmp_path / "out", progress=False)
    cause = f"cells.h5ad ({(tmp_path / 'cells.h5ad').stat().st_size:,} bytes) cannot be read as .h5ad"
    refused(tokenise, cause, "cut off", "fetch or write it again")
    assert files_under(tmp_path) == ["cells.h5ad"]


def test_damage_inside_a_file(tmp_path, vocab):
    p = tmp_path / "cells.h5ad"
    toy().write_h5ad(p, compression="gzip")
    with h5py.File(p) as f:
        chunk = f["X/data"].id.get_chunk_info(0)
    data = bytearray(p.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    p.write_bytes(data)
    refused(lambda: tokenize(p, vocab, tmp_path / "out", progress=False), "cells.h5ad", "cannot be read")
    assert files_under(tmp_path) == ["cells.h5ad"]


@pytest.mark.parametrize("name,content", [("gone.pkl", None), ("cut.json", "{"), ("list.json", "[1, 2]")])
def test_dictionaries_that_are_none(tmp_path, name, content):
    if content:
        (tmp_path / name).write_text(content)
    refused(lambda: Vocabulary.from_geneformer(tmp_path / name, tmp_path / name), name)


def test_cut_card_of_a_corpus(both, vocab, tmp_path):
    tokenize(list(both), vocab, tmp_path / "corpus", progress=False)
    cut(tmp_path / "corpus" / "corpus.json", 0.5)
    refused(lambda: tokenize(list(both), vocab, tmp_path / "corpus", progress=False), "corpus.json")
