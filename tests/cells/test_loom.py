"Loom files in the dialects of their writers."
import h5py
import numpy as np
import pytest
from conftest import refused, toy
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.containers import open_container
from mix_geneformer.cells.counts import read_counts

TEXT = dict(utf8=lambda v: np.array(v, dtype=object), fixed=lambda v: np.array([str(x).encode() for x in v]))


def written(path, x, rows, cols, spelt="utf8", groups=("layers", "row_graphs", "col_graphs"), **layers):
    "A loom file of these attributes; `x` as it is to stand there"
    with h5py.File(path, "w") as f:
        f["matrix"] = x
        for k, v in layers.items(): f[f"layers/{k}"] = v
        for k in groups: f.require_group(k)
        for kind, attrs in (("row_attrs", rows), ("col_attrs", cols)):
            for k, v in attrs.items():
                text = np.asarray(v).dtype.kind in "OU"
                dtype = h5py.string_dtype() if text and spelt == "utf8" else None
                f.create_dataset(f"{kind}/{k}", data=TEXT[spelt](v) if text else v, dtype=dtype)
    return path


@given(data=st.data())
def test_dialects(data, tmp_path):
    a = toy(n=data.draw(st.integers(1, 60)))
    ids = data.draw(st.sampled_from(["Accession", "ensembl_id", "gene_ids", "ENSEMBL_ID"]))
    symbols = data.draw(st.sampled_from(["Gene", "gene_symbols", "GeneName", "Symbol"]))
    cells = data.draw(st.sampled_from(["CellID", "obs_names", "cell_names", "cellid", "barcode"]))
    dtype = data.draw(st.sampled_from(["int16", "uint32", "float32", "float64", ">f4", "float16"]))
    spelt, turned = data.draw(st.sampled_from(list(TEXT))), data.draw(st.booleans()) and a.n_obs != a.n_vars
    x = a.X.toarray().astype(dtype)
    rows, cols = {"chr": np.arange(40), symbols: a.var.symbol}, {cells: a.obs_names, "donor": a.obs.donor}
    if data.draw(st.booleans()): rows[ids] = a.var_names
    groups = data.draw(st.sampled_from([(), ("layers", "row_graphs", "col_graphs")]))
    p = written(tmp_path/"cells.loom", x if turned else x.T, rows, cols, spelt, groups)
    found = open_container(p)
    np.testing.assert_array_equal(found.matrix[0:a.n_obs], a.X.toarray())
    assert found.obs.index.tolist() == a.obs_names.tolist() and found.obs.donor.tolist() == a.obs.donor.tolist()
    said = found.var.reset_index()   # all that is said of the genes
    assert set(said) == set(rows) and all(said[k].tolist() == list(rows[k]) for k in rows)
    assert found.var.index.name == (ids if ids in rows else symbols)


def test_genes_that_lack_an_accession_are_found_by_their_symbol(tmp_path):
    a = toy()
    half = [i if n % 2 else "" for n, i in enumerate(a.var_names)]
    rows = dict(Gene=a.var.symbol, Accession=half)
    p = written(tmp_path/"cells.loom", a.X.toarray().T, rows, dict(CellID=a.obs_names))
    assert (read_counts(p, verbose=False).X != read_counts(a, verbose=False).X).nnz == 0


@pytest.mark.parametrize("spelt", TEXT)
def test_text_is_spelt_as_its_writer_meant_it(tmp_path, spelt):
    a, said = toy(), "M&#252;ller&amp;co" if spelt == "fixed" else "Müller&co"
    cols = dict(CellID=a.obs_names, who=np.array([said]*24, dtype=object))
    p = written(tmp_path/"cells.loom", a.X.toarray().T, dict(Gene=a.var.symbol), cols, spelt)
    assert set(open_container(p).obs.who) == {"Müller&co"}


def test_layers(tmp_path):
    a = toy()
    x = a.X.toarray().T
    rows, cols = dict(Gene=a.var.symbol), dict(CellID=a.obs_names)
    p = written(tmp_path/"cells.loom", x*.5, rows, cols, spliced=x, unspliced=x*2)
    np.testing.assert_array_equal(open_container(p, "unspliced").matrix[3:9], 2*x.T[3:9])
    refused(lambda: open_container(p, "raw"), "no layer 'raw' (layers: spliced, unspliced)", "pass layer='spliced'")


def test_without_attributes(tmp_path):
    "Cells without names are numbered; genes without names are nobody's; a file without the groups is no loom"
    a = toy()
    x, rows, cols = a.X.toarray().T, dict(Gene=a.var.symbol), dict(CellID=a.obs_names)
    p = written(tmp_path/"cells.loom", x, rows, {}, groups=["col_attrs"])
    assert read_counts(p, verbose=False).obs_names.tolist() == [str(i) for i in range(24)]
    p = written(tmp_path/"none.loom", x, {}, cols, groups=["row_attrs"])
    refused(lambda: open_container(p), "names its genes in none of 0 row attributes (none)", "add one called")
    for k, p in (("row", written(tmp_path/"a.loom", x, {}, cols)), ("col", written(tmp_path/"b.loom", x, rows, {}))):
        refused(lambda: open_container(p), "cannot be read as .loom (", f"{k}_attrs")


def test_tables_that_fit_neither_way(tmp_path):
    a = toy()
    p = written(tmp_path/"cells.loom", a.X.toarray().T, dict(Gene=a.var.symbol[:-1]), dict(CellID=a.obs_names))
    refused(lambda: open_container(p), "a matrix of 24 x 40, but tables of 24 cells and 39 genes")


def test_attributes_of_several_numbers_stay_with_the_cells_and_genes(tmp_path):
    from mix_geneformer.cells.counts import as_counts
    from mix_geneformer.outputs import check_names, whole
    a = toy()
    umap, loading = np.arange(48.).reshape(24, 2), np.ones((40, 3))
    p = written(tmp_path/"cells.loom", a.X.toarray().T, dict(Accession=a.var_names, PCs=loading),
                dict(CellID=a.obs_names, X_umap=umap))
    counts = as_counts(p)
    found = whole(counts)
    assert (found.obsm["X_umap"] == umap).all() and (found.varm["PCs"] == loading).all()
    refused(lambda: check_names(counts, obsm=["X_umap"]), "obsm['X_umap']", "is there already (1 of 1)")
