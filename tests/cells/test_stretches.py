"Many cells are read a stretch at a time, and the result is the one of reading them at once."

from functools import partial

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import toy
from hypothesis import given
from hypothesis import strategies as st

import mix_geneformer as mgf
from mix_geneformer import embedding
from mix_geneformer.cells.counts import as_counts
from mix_geneformer.cells.encoding import encode_readable
from mix_geneformer.cells.rows import SomeRows
from mix_geneformer.cells.stretches import Readable
from mix_geneformer.classification import prediction
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.files import InputError
from mix_geneformer.growing import Growing
from mix_geneformer.outputs import write_result

QUIET = dict(device="cpu", progress=False)


def gappy(n=24):
    "Cells of which some are empty: the first, a few in a row, the last"
    a = toy(n=n)
    x = a.X.toarray()
    x[[0, *range(8, 14), n - 1]] = 0
    return ad.AnnData(x, a.obs, a.var)


@given(size=st.integers(1, 30))
def test_stretches_hold_what_one_reading_holds(vocab, size):
    counts = as_counts(gappy())
    sentences, rows = encode_readable(counts, vocab, 10)
    read = Readable(counts, vocab, 10, size=size)
    parts = [read.stretch(start) for start in read.starts()]
    assert np.concatenate([s.values for s, _ in parts]).tolist() == sentences.values.tolist()
    assert np.concatenate([r + start for start, (_, r) in zip(read.starts(), parts)]).tolist() == rows.tolist()
    assert (read.rows.tolist(), read.lengths.tolist()) == (rows.tolist(), sentences.lengths.tolist())
    assert read.occurs.tolist() == np.bincount(sentences.values, minlength=len(vocab)).tolist()
    assert len(read) == len(sentences)


@pytest.fixture
def in_sevens(monkeypatch):
    "Stretches of seven cells: more than one, of which one has no cell to read"
    for room in (embedding, prediction):
        monkeypatch.setattr(room, "Readable", partial(Readable, size=7))


@pytest.mark.filterwarnings("ignore:.*have no gene of the vocabulary")
def test_vectors_are_written_as_they_come(model_dir, tmp_path, in_sevens, monkeypatch):
    cells, loaded = gappy(), load_model(model_dir, "cpu")
    cells.write_h5ad(tmp_path/"a.h5ad")
    counts = as_counts(tmp_path/"a.h5ad")
    grown = embedding.cell_vectors(counts, loaded, progress=False)
    assert isinstance(grown.obsm["X_mix_geneformer"], Growing)
    monkeypatch.undo()
    at_once = embedding.cell_vectors(counts, loaded, progress=False)
    whole = at_once.obsm["X_mix_geneformer"]
    found, wanted = (write_result(counts, r, tmp_path/f"{i}.h5ad") for i, r in enumerate((grown, at_once)))
    with h5py.File(found) as f, h5py.File(wanted) as g:
        a, b = f["obsm/X_mix_geneformer"], g["obsm/X_mix_geneformer"]
        assert (a.shape, a.dtype, a.chunks, dict(a.attrs)) == (b.shape, b.dtype, b.chunks, dict(b.attrs))
    found, wanted = map(ad.read_h5ad, (found, wanted))
    np.testing.assert_allclose(found.obsm["X_mix_geneformer"], whole, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(found.obsm["X_mix_geneformer"][:, 0]), cells.X.sum(1) == 0)
    np.testing.assert_array_equal(found.obsm["X_mix_geneformer"], grown.obsm["X_mix_geneformer"].all_rows())
    assert found.uns["mix_geneformer"] == wanted.uns["mix_geneformer"]
    a, b = (pd.read_csv(write_result(counts, r, tmp_path/f"{i}.csv"), index_col=0)
            for i, r in enumerate((grown, at_once)))
    assert (list(a), list(a.index)) == (list(b), list(b.index)) and np.allclose(a, b, atol=1e-6, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*have no gene of the vocabulary")
def test_verbs_in_memory_take_the_same_way(corpus, model_dir, tmp_path, in_sevens, monkeypatch):
    cells = gappy()
    types = mgf.finetune(corpus, model_dir, out=tmp_path/"types", max_steps=2, **QUIET).path
    some = mgf.embed(cells.copy(), model_dir, **QUIET), mgf.predict(cells.copy(), types, **QUIET)
    p = prediction.class_probabilities(load_model(types, "cpu"), cells, progress=False)
    monkeypatch.undo()
    all_ = mgf.embed(cells.copy(), model_dir, **QUIET), mgf.predict(cells.copy(), types, **QUIET)
    key = "X_mix_geneformer"
    np.testing.assert_allclose(some[0].obsm[key], all_[0].obsm[key], atol=1e-6)
    assert some[1].obs.mix_geneformer_label.equals(all_[1].obs.mix_geneformer_label)
    np.testing.assert_allclose(some[1].obs.mix_geneformer_score, all_[1].obs.mix_geneformer_score, atol=1e-6)
    q = prediction.class_probabilities(load_model(types, "cpu"), cells, progress=False)
    pd.testing.assert_frame_equal(p, q, atol=1e-6)


def test_a_layer_that_the_model_lacks_is_refused_before_a_file_is_begun(model_dir, in_sevens):
    loaded = load_model(model_dir, "cpu")
    with pytest.raises(InputError, match="emb_layer"):
        embedding.cell_vectors(as_counts(toy()), loaded, emb_layer=9, progress=False)


@pytest.mark.parametrize("gap", [0, 2, 64])
def test_some_rows_of_a_matrix(gap):
    x = toy(n=40).X
    rows = np.array([0, 1, 2, 7, 9, 20, 21, 39])
    some = SomeRows(x, rows, gap)
    for start, stop in ((0, 8), (2, 5), (7, 8), (3, 3)):
        assert (some[start:stop] != x[rows[start:stop]]).nnz == 0 and some[start:stop].shape == (stop - start, 40)


def test_cells_of_a_file_are_read_as_those_of_the_table(vocab, tmp_path):
    cells, rows = gappy(), np.array([1, 2, 9, 16, 22])
    mgf.read_counts(cells, verbose=False).write_h5ad(tmp_path/"a.h5ad")  # with kept totals
    some, whole = as_counts(tmp_path/"a.h5ad").taking(rows), as_counts(cells)
    assert list(some.obs.index) == list(cells.obs_names[rows])
    x, totals = some.block(0, 5)
    y, wanted = whole.block(0, cells.n_obs)
    assert (x != y[rows]).nnz == 0 and totals.tolist() == wanted[rows].tolist()
