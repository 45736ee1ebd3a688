"""Counts of every number type, layout and size, in memory and on disk, against a ranking and medians by numpy alone."""
import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import GENES

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.vocabulary import vocabulary_from_medians

NAMES = sorted(GENES)
TYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
         "float64", ">i4", ">u2", ">i8", ">f4", ">f8"]
UNKNOWN_TO_SCIPY = "float16", ">i4", ">u2", ">i8", ">f4", ">f8"
LAYOUTS = dict(dense=np.asarray, csr=sp.csr_matrix, csc=sp.csc_matrix, csr_array=sp.csr_array, csc_array=sp.csc_array)
# below and above: 512 (a block of sentences), 1,024 (a block of counts), 4,096 (the ranking by pairs)
SIZES = 30, 513, 1025, 4095, 4096, 4700


def largest(kind):
    "The largest count that is drawn: what the type holds, and float16 tells apart"
    kind = np.dtype(kind)
    if kind.kind == "b": return 1
    return {"float16": 2048}.get(kind.name) or (min(np.iinfo(kind).max, 2**24) if kind.kind in "iu" else 2**24)


def drawn(kind, n, share_of_large, seed):
    "Counts, most of them small; large ones are those that pairs of counts and genes do not hold"
    rng, most = np.random.default_rng(seed), largest(kind)
    x = np.minimum(rng.poisson(2, (n, len(NAMES))), most)
    at = rng.random(x.shape) < share_of_large
    x[at] = np.minimum(np.exp(rng.uniform(0, np.log(most+1), at.sum())).astype(np.int64), most)
    x[np.arange(n), rng.integers(0, len(NAMES), n)] += x.sum(1) == 0 # no empty cell
    return x


def expected(x):
    "Medians and sentences, by numpy"
    share = x/x.sum(1, keepdims=True)*1e4
    medians = np.array([np.median(c[c > 0]) if (c > 0).any() else np.nan for c in share.T])
    return medians, [[g for g in np.lexsort((np.arange(len(r)), -r/medians)) if r[g] > 0] for r in x]


def held(x, kind, layout):
    "Counts of a type in a layout; scipy has no float16 and none of the other byte order"
    sparse = layout != "dense"
    return LAYOUTS[layout](x.astype(np.float64 if sparse and kind in UNKNOWN_TO_SCIPY else kind))


def agree(source, x):
    "What is made of a source is what numpy makes of its counts"
    medians, sentences = expected(x)
    found = gene_medians(source)
    np.testing.assert_array_equal(found.reindex(NAMES).to_numpy(), medians)
    v = vocabulary_from_medians(dict(human=found))
    tokens, _ = v.columns(NAMES, "human")
    assert (np.diff(tokens[tokens >= 0]) > 0).all() # as the names go, so that ties do too
    got = encode_cells(source, v)
    assert [got[i].tolist() for i in range(len(x))] == [tokens[s].tolist() for s in sentences]
    whole = read_counts(source, verbose=False)
    assert (whole.to_df().reindex(columns=NAMES).to_numpy() == x).all()


def cells(matrix): return ad.AnnData(matrix, pd.DataFrame(index=[f"c{i}" for i in range(matrix.shape[0])]),
                                     pd.DataFrame(index=NAMES))


def check_in_memory(kind, layout, n, large, seed):
    "The counts are read rightly, and are left as they are"
    x = drawn(kind, n, large, seed)
    a = cells(held(x, kind, layout))
    before = a.X.copy()
    agree(a, x)
    assert a.X.dtype == before.dtype and not (a.X != before).sum()


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=2, deadline=None)
@given(layout=st.sampled_from(list(LAYOUTS)), large=st.sampled_from([0, .02, .5]), seed=st.integers(0, 2**16))
def test_in_memory(kind, layout, large, seed):
    for n in (40, 4100): check_in_memory(kind, layout, n, large, seed)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TYPES), st.sampled_from(list(LAYOUTS)), st.sampled_from(SIZES), st.sampled_from([0, .02, .5]),
       st.integers(0, 2**16))
def test_many_in_memory(kind, layout, n, large, seed): check_in_memory(kind, layout, n, large, seed)


def written(x, kind, layout, path):
    "An .h5ad whose values are stored in a type, whether scipy knows it or not"
    cells(held(x, np.float64, layout)).write_h5ad(path)
    with h5py.File(path, "r+") as f:
        at = "X" if layout == "dense" else "X/data"
        values, attrs = f[at][:], dict(f[at].attrs)
        del f[at]
        f.create_dataset(at, data=values.astype(kind)).attrs.update(attrs)
    return path


@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
@pytest.mark.parametrize("kind", TYPES)
def test_on_disk(kind, layout, tmp_path):
    x = drawn(kind, 40, .02, 7)
    path = written(x, kind, layout, tmp_path/"a.h5ad")
    agree(path, x), agree(ad.read_h5ad(path, backed="r"), x)


@pytest.mark.parametrize("kind", ["int8", "uint16", ">f4"])
def test_many_on_disk(kind, tmp_path):
    x = drawn(kind, 4100, .02, 7)
    agree(written(x, kind, "csr", tmp_path/"a.h5ad"), x)


@pytest.mark.parametrize("kind", ["int32", "int64", "uint64", "float32", "float64"])
def test_large_counts_are_exact(kind):
    "float32 tells whole numbers apart up to 2^24"
    x = np.array([[2**24, 1, 0], [2**25+4, 2**24+2, 3], [5, 2**28, 1]], dtype=np.int64)
    if kind != "float32": x[0, 0] += 1
    a = ad.AnnData(x.astype(kind), var=pd.DataFrame(index=NAMES[:3]))
    got = read_counts(a, verbose=False)
    assert (got.to_df()[list(NAMES[:3])].to_numpy().astype(np.int64) == x).all()
    assert got.obs.n_counts.tolist() == x.sum(1).tolist()


def test_sums_of_names_that_lead_to_one_gene_are_exact():
    names = pd.DataFrame(index=[NAMES[0], f"{NAMES[0]}.3", NAMES[1]])
    a = ad.AnnData(np.array([[2**24-1, 2, 1]], dtype=np.float32), var=names)
    assert read_counts(a, verbose=False).to_df()[NAMES[0]].tolist() == [2**24+1]


@pytest.mark.parametrize("kind", ["int64", "uint64", "float64"])
def test_counts_that_float64_cannot_tell_apart_are_refused(kind):
    a = ad.AnnData(np.array([[2**53, 1]], dtype=kind), var=pd.DataFrame(index=NAMES[:2]))
    for read in (gene_medians, read_counts): refused(lambda: read(a), "counts from 2^53 on", "pass raw counts")
