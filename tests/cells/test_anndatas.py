"AnnData wherever it lies gives what anndata itself reads: on disk, backed, a view, a modality; X, layers and raw."
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata.io import write_elem
from conftest import refused, toy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mix_geneformer.cells.containers import open_container
from mix_geneformer.cells.counts import read_counts

TYPES = [*"int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 bool >f4 >f8 >i4 >u2".split()]


def all_of(found):
    "Every count of a container, whichever way it gives rows"
    n, _ = found.matrix.shape
    some = [found.matrix[a:min(a+7, n)] for a in range(0, n, 7)]
    return np.vstack([x.toarray() if sp.issparse(x) else np.asarray(x) for x in some]).astype(float)


def told(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


# --- types and layouts ----------------------------------------------------------------------------------------------

@given(data=st.data())
def test_number_types_and_layouts_on_disk(data, tmp_path):
    dtype, kind = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(["csr_matrix", "csc_matrix", "array"]))
    shape = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    x = data.draw(arrays(np.int64, shape, elements=st.integers(0, 100))).astype(dtype)
    how = data.draw(st.sampled_from([{}, dict(compression="gzip", chunks=True), dict(compression="lzf", chunks=True)]))
    index = data.draw(st.sampled_from(["int32", "int64", "uint32", ">i4"]))
    with h5py.File(tmp_path/"cells.h5ad", "w") as f:
        for k, n in (("obs", shape[0]), ("var", shape[1])):
            write_elem(f, k, pd.DataFrame(index=[f"{k}{i}" for i in range(n)]))
        if kind == "array": f.create_dataset("X", data=x, **how)
        else:
            some = (sp.csr_matrix if kind == "csr_matrix" else sp.csc_matrix)(x.astype(float))
            for k, t in (("data", dtype), ("indices", index), ("indptr", index)):
                f.create_dataset(f"X/{k}", data=getattr(some, k).astype(t), **how)
            f["X"].attrs["shape"] = shape
        f["X"].attrs["encoding-type"], f["X"].attrs["encoding-version"] = kind, "0.1.0"
    np.testing.assert_array_equal(all_of(open_container(tmp_path/"cells.h5ad")), x.astype(float))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()], ids=["csr", "csc", "dense"])
def test_zarr_stores(tmp_path, version, kind):
    a, before = toy(n=50), ad.settings.zarr_write_format
    a.raw, a.layers["double"] = a, a.X*2
    b = a[:, 5:].copy()
    b.X = kind(b.X)
    ad.settings.zarr_write_format = version
    told(lambda: b.write_zarr(tmp_path/"cells.zarr"))
    ad.settings.zarr_write_format = before
    for layer, expected in ((None, b.X), ("double", b.layers["double"]), ("raw", a.X)):
        found = open_container(tmp_path/"cells.zarr", layer)
        expected = expected.toarray() if sp.issparse(expected) else expected
        np.testing.assert_array_equal(all_of(found), expected)
        assert found.obs.cell_type.tolist() == a.obs.cell_type.tolist()
        assert found.var.index.tolist() == (a if layer == "raw" else b).var_names.tolist()


def test_a_zarr_store_that_was_copied_in_part(tmp_path):
    told(lambda: toy(n=200).write_zarr(tmp_path/"cells.zarr"))
    group = zarr.open_group(tmp_path/"cells.zarr", mode="r")
    for k in ("data", "indices"):
        chunk = tmp_path/"cells.zarr"/"X"/k/group["X"][k].metadata.encode_chunk_key((0,))
        away = chunk.rename(tmp_path/"away")
        refused(lambda: open_container(tmp_path/"cells.zarr"), "chunks of the sparse matrix are missing", "fetch")
        away.rename(chunk)
    open_container(tmp_path/"cells.zarr")


@pytest.mark.parametrize("kind", [np.matrix, sp.csr_array, sp.csc_array, np.ma.asarray, lambda x: x.astype(object),
                                  lambda x: x.astype(">f4"), np.asfortranarray], ids=str)
def test_matrices_in_memory(kind):
    x = toy(n=50).X.toarray()
    a = ad.AnnData(x*.5, toy(n=50).obs.copy(), toy(n=50).var.copy(), layers=dict(counts=kind(x)))
    for of in (a, a[10:30], a[[7, 3, 5]], a[:, ::2]):
        part = ad.AnnData(x, a.obs, a.var)[of.obs_names, of.var_names].X
        np.testing.assert_array_equal(all_of(open_container(of, "counts")), part)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize("rows", [slice(3, 9), [5, 2, 8], np.arange(24) % 3 == 0], ids=["slice", "list", "mask"])
def test_backed_views(tmp_path, kind, rows):
    a = toy()
    a.X, a.raw, a.layers["double"] = kind(a.X), a, a.X*2
    a.write_h5ad(tmp_path/"cells.h5ad", compression="gzip")
    backed = ad.read_h5ad(tmp_path/"cells.h5ad", backed="r")
    for layer in (None, "double", "raw"):
        expected = all_of(open_container(a, layer))
        np.testing.assert_array_equal(all_of(open_container(backed, layer)), expected)
        np.testing.assert_array_equal(all_of(open_container(backed[rows], layer)), expected[rows])
        np.testing.assert_array_equal(all_of(open_container(backed[rows].to_memory(), layer)), expected[rows])
    backed.file.close()


# --- where the counts are -------------------------------------------------------------------------------------------

def with_raw():
    "Normalised values of some genes, and the counts of all in `raw`"
    a = toy()
    b = a[:, ::3].copy()
    b.raw, b.X = a, b.X.log1p()
    return a, b


def test_raw_has_genes_of_its_own(tmp_path):
    a, b = with_raw()
    b.write_h5ad(tmp_path/"cells.h5ad")
    told(lambda: b.write_zarr(tmp_path/"cells.zarr"))
    backed = ad.read_h5ad(tmp_path/"cells.h5ad", backed="r")
    for source in (b, tmp_path/"cells.h5ad", tmp_path/"cells.zarr", backed):
        got = read_counts(source, layer="raw", verbose=False)
        assert (got.X != read_counts(a, verbose=False).X).nnz == 0
        refused(lambda: open_container(source, "spliced"), "(layers: raw)", "pass layer='raw'")
    part = read_counts(b[4:9], layer="raw", verbose=False)
    assert (part.X != read_counts(a[4:9].copy(), verbose=False).X).nnz == 0


def test_a_layer_called_raw_is_a_layer(tmp_path):
    a, b = with_raw()
    b.layers["raw"] = b.X*2
    b.write_h5ad(tmp_path/"cells.h5ad")
    for source in (b, tmp_path/"cells.h5ad"):
        np.testing.assert_array_equal(all_of(open_container(source, "raw")), b.layers["raw"].toarray())


def test_without_x(tmp_path):
    a = toy()
    a.layers["counts"], a.X = a.X, None
    a.write_h5ad(tmp_path/"cells.h5ad")
    for source in (a, tmp_path/"cells.h5ad"):
        refused(lambda: open_container(source), "has no X (layers: counts)", "pass layer='counts'")
        assert open_container(source, "counts").matrix.shape == a.shape


# --- of 2018 --------------------------------------------------------------------------------------------------------

def coded(values):
    "Categories as anndata 0.6 wrote them: numbers, and what they mean"
    c = pd.Categorical(values)
    return c.codes, np.array(c.categories, "S40")


def old_h5ad(a, path, raw=False):
    "As anndata 0.6 wrote it"
    types, categories = coded(a.obs.cell_type)
    obs = np.zeros(a.n_obs, dtype=[("index", "S40"), ("cell_type", "i1"), ("donor", "S9"), ("age", "f4")])
    obs["index"], obs["cell_type"], obs["donor"], obs["age"] = a.obs_names, types, a.obs.donor, np.arange(a.n_obs)
    var = np.zeros(a.n_vars, dtype=[("index", "S40"), ("gene_ids", "S40"), ("cell_type", "i4")])
    var["index"], var["gene_ids"], var["cell_type"] = a.var.symbol, a.var_names, np.arange(a.n_vars)+9
    with h5py.File(path, "w") as f:
        f["obs"], f["var"], f["uns/cell_type_categories"] = obs, var[:10] if raw else var, categories
        for k, x in (("raw.X", a.X), ("X", a.X[:, :10]*.5)) if raw else [("X", a.X)]:
            x = x.tocsr()
            for t in ("data", "indices", "indptr"): f[f"{k}/{t}"] = getattr(x, t)
            f[k].attrs["h5sparse_format"], f[k].attrs["h5sparse_shape"] = "csr", x.shape
        if raw: f["raw.var"] = var
    return path


@pytest.mark.parametrize("raw", [False, True])
def test_compound_tables(tmp_path, raw):
    a = toy()
    p = old_h5ad(a, tmp_path/"cells.h5ad", raw)
    got = read_counts(p, layer="raw" if raw else None, verbose=False)
    assert (got.X != read_counts(a, verbose=False).X).nnz == 0
    own = told(lambda: ad.read_h5ad(p))   # anndata's own reading
    assert got.obs.cell_type.tolist() == a.obs.cell_type.tolist() == own.obs.cell_type.tolist()
    assert got.obs.cell_type.dtype == "category" and got.obs.donor.tolist() == a.obs.donor.tolist()
    found = open_container(p, "raw" if raw else None)
    assert found.var.cell_type.tolist() == list(range(9, 9+a.n_vars))   # of the same name, and no category


def test_a_single_category_and_a_missing_one(tmp_path):
    a = toy()
    a.obs["cell_type"] = ["beta"]*23+[None]
    found = open_container(old_h5ad(a, tmp_path/"cells.h5ad"))
    assert found.obs.cell_type.tolist()[:23] == ["beta"]*23 and found.obs.cell_type.isna().tolist() == [False]*23+[True]


# --- modalities -----------------------------------------------------------------------------------------------------

def h5mu(path, obs=None, **modalities):
    with h5py.File(path, "w") as f:
        for k, a in modalities.items(): write_elem(f, f"mod/{k}", a)
        write_elem(f, "obs", toy().obs[[]] if obs is None else obs)
    return path


def prot(): return ad.AnnData(np.ones((24, 2), np.float32), toy().obs[[]].copy(), pd.DataFrame(index=["CD3", "CD19"]))


@pytest.mark.parametrize("name", ["rna", "RNA", "gex", "Gene Expression"])
def test_the_modality_with_the_genes(tmp_path, name):
    p = h5mu(tmp_path/"cells.h5mu", prot=prot(), **{name: toy()})
    for path in (p, p/name):
        got = read_counts(path, verbose=False)
        assert (got.X != read_counts(toy(), verbose=False).X).nnz == 0


def test_modalities_of_no_known_name(tmp_path):
    p = h5mu(tmp_path/"cells.h5mu", one=toy(), two=prot())
    refused(lambda: open_container(p), "no modality 'rna' (of 2: one, two)", f"such as '{p}/one'")
    assert open_container(f"{p}/one").matrix.shape == toy().shape
    refused(lambda: open_container(f"{p}/three"), "no modality 'three' (of 2: one, two)", "pass one of those")
    alone = h5mu(tmp_path/"alone.h5mu", cells=toy())
    assert open_container(alone).matrix.shape == toy().shape


def test_what_is_known_of_cells_whatever_the_modality(tmp_path):
    common = pd.DataFrame({"sorted": pd.Categorical(["x", "y"]*15), "rna:donor": "copy", "donor": "other"},
                          index=[*toy().obs_names[::-1], *"abcdef"])   # more cells, in another order
    obs = open_container(h5mu(tmp_path/"cells.h5mu", common, rna=toy())).obs
    assert obs.index.tolist() == toy().obs_names.tolist() and obs.donor.tolist() == toy().obs.donor.tolist()
    assert list(obs) == ["cell_type", "donor", "sorted"]
    assert obs.sorted.tolist() == common.sorted[obs.index].tolist()


def test_layers_of_a_modality(tmp_path):
    a, b = with_raw()
    p = h5mu(tmp_path/"cells.h5mu", rna=b, prot=prot())
    np.testing.assert_array_equal(all_of(open_container(p, "raw")), a.X.toarray())
    refused(lambda: open_container(p, "counts"), "cells.h5mu has no layer 'counts' (layers: raw)")


class Mu:
    "As MuData is in memory"
    def __init__(self, **mod): self.mod, self.obs, self.obs_names = mod, toy().obs.assign(batch="b"), toy().obs_names


def test_mudata_in_memory():
    found = open_container(Mu(prot=prot(), rna=toy()))
    np.testing.assert_array_equal(all_of(found), toy().X.toarray())
    assert found.obs.batch.tolist() == ["b"]*24
    refused(lambda: open_container(Mu(one=toy(), two=toy())), "The MuData has no modality 'rna'", "mdata.mod['one']")
