"The file a cell comes in does not change its counts; what cannot be used is refused in one sentence."
import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import DATA, ISLET, files_under, fish, fish_cells, genes_of, refused, toy
from handmade import FORMATS, SOURCES, cut, h5ad, in_no_order, loom, made_as, named, tenx_folder, tenx_h5
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.counts import as_counts, read_counts

@pytest.fixture(scope="module")
def source(): return in_no_order()


# --- one set of cells, in every format ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_counts(source, tmp_path, name):
    made, how = made_as(name, source, tmp_path)
    a, b = read_counts(made, verbose=False, **how), read_counts(source, verbose=False)
    assert (a.X != b.X).nnz == 0 and a.X.dtype == np.float32 and a.X.format == "csr" and a.var.equals(b.var)
    assert a.obs_names.tolist() == source.obs_names.tolist() and a.obs.n_counts.tolist() == b.obs.n_counts.tolist()
    assert set(a.obs.species) == {"human"}
    report = dict(species="human", n_cells=33, n_genes=40, n_matched=40, n_earlier=0, n_met=0,
                  share_of_counts=1.)
    assert a.uns["mix_geneformer"] == report
    if name.startswith(("h5ad", "loom")): assert a.obs.cell_type.astype(str).tolist() == source.obs.cell_type.tolist()


@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_dense", "loom_ids"])
def test_blocks_are_the_whole(source, tmp_path, name):
    whole, opened = read_counts(source, verbose=False), as_counts(FORMATS[name](source, tmp_path))
    for size in (1, 7, 33, 100):
        blocks = list(opened.blocks(size))
        assert [s for s, *_ in blocks] == list(range(0, 33, size)) and all(x.shape[0] <= size for _, x, _ in blocks)
        assert (sp.vstack([x for _, x, _ in blocks]) != whole.X).nnz == 0


def test_names_that_lead_to_one_gene_are_summed_cell_by_cell(tmp_path):
    "Of many cells in several blocks, some names being absent from some cells"
    a = toy(n=2500)
    names = [*a.var_names, *(g + ".1" for g in a.var_names[:7]), *(g + ".2" for g in a.var_names[3:5])]
    x = sp.hstack([a.X, a.X[:, :7], a.X[::-1, 3:5]], format="csr")
    ad.AnnData(x, var=pd.DataFrame(index=names)).write_h5ad(tmp_path/"cells.h5ad")
    expected = a.X.toarray()
    expected[:, :7] *= 2
    expected[:, 3:5] += a.X.toarray()[::-1, 3:5]
    order = np.argsort(a.var_names)
    got = read_counts(tmp_path/"cells.h5ad", verbose=False)
    assert (got.X.toarray() == expected[:, order]).all() and got.X.has_canonical_format
    assert got.X.nnz == np.count_nonzero(expected)


def test_h5ad_of_an_old_anndata(tmp_path):
    "Read like any other"
    a, p = toy(), tmp_path/"cells.h5ad"
    a.write_h5ad(p)
    with h5py.File(p, "r+") as f:
        for k in list(f["X"].attrs): del f["X"].attrs[k]
        f["X"].attrs["h5sparse_format"], f["X"].attrs["h5sparse_shape"] = "csr", a.shape
    assert (read_counts(p, verbose=False).X != read_counts(a, verbose=False).X).nnz == 0


@pytest.mark.usefixtures("only_the_known")
def test_counts_of_a_third_species(fish_table):
    fish(fish_table)
    assert as_counts(fish_cells()).species == "zebrafish"


# --- counts that cannot be used -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in SOURCES if n != "no X"])
def test_bad_counts_in_a_file(name, tmp_path):
    make, parts = SOURCES[name]
    make().write_h5ad(tmp_path/"cells.h5ad")
    line = refused(lambda: read_counts(tmp_path/"cells.h5ad", verbose=False), *parts)
    if name not in ("unknown genes", "mixed species"): assert "cells.h5ad" in line


def test_counts_that_are_all_zero():
    a = named(genes_of("human", 5), np.zeros((4, 5), np.float32))
    refused(lambda: read_counts(a, verbose=False), "0 counts in 4 cells", "pass raw counts")


# --- species --------------------------------------------------------------------------------------------------------

def read_as(names, species): return lambda: read_counts(named(names), species, verbose=False)


def test_wrong_species():
    human = "species='mouse' was given, but 40 of 40 genes are human Ensembl IDs"
    refused(lambda: read_counts(toy("human"), "mouse", verbose=False), human, "pass species='human'")
    refused(read_as(ISLET["human"], "mouse"), "0 of 6 genes matched mouse", "'INS'")
    pig = "Unknown species 'pig'", "human, mouse", "register_species"
    refused(lambda: read_counts(toy(), "pig", verbose=False), *pig)


def test_wrong_species_that_some_symbols_fit():
    borrowed = [*ISLET["human"], "C3", "F10", "H19"]   # mouse has a C3, too
    refused(read_as(borrowed, "mouse"), "species='mouse'", "human")


def test_mixed_symbols():
    mixed = [*ISLET["human"], *ISLET["mouse"][:4]]
    refused(read_as(mixed, None), "more than one species", "split the file by species")


# --- files ----------------------------------------------------------------------------------------------------------

def test_paths_that_cannot_be_read(tmp_path):
    refused(lambda: read_counts(tmp_path/"gone.h5ad"), "gone.h5ad does not exist", "check the path")
    (tmp_path/"cells.csv").write_text("x")
    refused(lambda: read_counts(tmp_path/"cells.csv"), "cells.csv has the unknown ending '.csv'", "pass .h5ad, .loom")
    assert files_under(tmp_path) == ["cells.csv"]


@pytest.mark.parametrize("share", [0, .01, .5, .95])
def test_truncated_h5ad(tmp_path, share):
    p = tmp_path/"cells.h5ad"
    toy().write_h5ad(p)
    cut(p, share)
    cause = f"cells.h5ad ({p.stat().st_size:,} bytes) cannot be read as .h5ad"
    refused(lambda: read_counts(p), cause, "cut off", "fetch or write it again")


@pytest.mark.parametrize("ending", [".h5ad", ".loom", ".h5"])
def test_files_that_are_something_else(tmp_path, ending):
    p = tmp_path/f"cells{ending}"
    p.write_text("these are not counts\n" * 99)
    refused(lambda: read_counts(p), f"{p.name} (2,079 bytes) cannot be read", "of another kind")


@pytest.mark.parametrize("ending", [".h5ad", ".loom", ".h5"])
def test_hdf5_files_of_another_kind(tmp_path, ending):
    p = tmp_path/f"cells{ending}"
    with h5py.File(p, "w") as f: f["something"] = np.arange(3)
    refused(lambda: read_counts(p), p.name)


CUT = [("matrix.mtx.gz", .5), ("matrix.mtx.gz", 0), ("barcodes.tsv.gz", .5), ("features.tsv.gz", .5)]


@pytest.mark.parametrize("name,share", CUT)
def test_truncated_10x_folder(tmp_path, name, share):
    out = tenx_folder(3)(toy(), tmp_path)
    cut(out/name, share)
    refused(lambda: read_counts(out), "filtered")


def test_empty_folder(tmp_path):
    refused(lambda: read_counts(tmp_path), "holds no counts (no matrix.mtx among 0 names: none)", "pass a 10x folder")


def test_damage_inside_a_file(tmp_path):
    p = tmp_path/"cells.h5ad"
    toy().write_h5ad(p, compression="gzip")
    with h5py.File(p) as f: chunk = f["X/data"].id.get_chunk_info(0)
    data = bytearray(p.read_bytes())
    data[chunk.byte_offset:chunk.byte_offset + chunk.size] = bytes(chunk.size)
    p.write_bytes(data)
    refused(lambda: read_counts(p), "cells.h5ad", "cannot be read")


BAD_CELLS = [("indices", 5, 40), ("indices", 5, -1), ("indptr", 3, 10**6), ("indptr", 0, 1), ("indptr", -1, 10**6)]


@pytest.mark.parametrize("key,at,value", BAD_CELLS)
def test_damaged_rows(source, tmp_path, key, at, value):
    p = h5ad(sp.csr_matrix)(source, tmp_path)
    with h5py.File(p, "r+") as f:
        table = f[f"X/{key}"]
        table[at if at >= 0 else len(table) - 1] = value
    refused(lambda: read_counts(p, verbose=False), "cells.h5ad", "cannot be read", "fetch or write it again")


# --- layers ---------------------------------------------------------------------------------------------------------

def test_unknown_layer(tmp_path):
    a = toy()
    a.layers["raw"] = a.X.copy()
    said = "has no layer 'counts' (layers: raw)", "pass layer='raw'"
    refused(lambda: read_counts(a, layer="counts"), "The AnnData", *said)
    p = tmp_path/"cells.h5ad"
    a.write_h5ad(p)
    refused(lambda: read_counts(p, layer="counts"), "cells.h5ad", *said)


@pytest.mark.parametrize("write", [loom("Accession"), tenx_h5], ids=["loom", "tenx"])
def test_unknown_layer_of_other_formats(tmp_path, write):
    p = write(toy(), tmp_path)
    refused(lambda: read_counts(p, layer="spliced"), "no layer 'spliced'")


# --- real files -----------------------------------------------------------------------------------------------------

@pytest.fixture
def shared(request):
    path = DATA/f"{request.param}.h5ad"
    if not path.is_file(): pytest.skip(f"{path.name} is not on this machine")
    return path


@pytest.mark.filterwarnings("ignore:.*was written without encoding metadata")
@pytest.mark.parametrize("shared", ["mouse_spleen_jaitin", "mouse_kidney_tabulamuris"], indirect=True)
def test_duplicate_ids_of_real_files_are_summed(shared):
    counts, raw = as_counts(shared), ad.read_h5ad(shared)[:50]
    ids = raw.var.ensembl_id[raw.var.ensembl_id.ne("")]
    twice = ids[ids.duplicated()].unique()
    x, _ = counts.block(0, 50)
    assert len(twice) > 3
    for g in twice:
        summed = x[:, counts.ensembl_ids.tolist().index(g)].toarray().ravel()
        assert (summed >= raw[:, ids.index[ids == g]].X.toarray().sum(1)).all()


@pytest.mark.filterwarnings("ignore:.*was written without encoding metadata")
@pytest.mark.parametrize("shared", ["human_pbmc_kang_ifnb"], indirect=True)
def test_conditions_of_donors(shared):
    obs = as_counts(shared).obs
    per_donor = obs.groupby("donor", observed=True).condition.nunique()
    assert obs.condition.nunique() == 2 and per_donor.drop("ambiguous", errors="ignore").eq(2).all()


# --- rows that are no genes -----------------------------------------------------------------------------------------

@given(st.integers(0, 2**16), st.lists(st.integers(0, 63), min_size=1, max_size=8))
def test_rows_that_are_no_genes_leave_counts_and_totals(seed, at):
    "Wherever they stand, whatever their values: the genes are read as if the others were not there"
    a, rng = toy(), np.random.default_rng(seed)
    x, names, kinds = a.X.toarray(), list(a.var_names), ["Gene Expression"] * a.n_vars
    for i in at:
        i = min(i, len(names))
        x = np.insert(x, i, rng.poisson(50, len(x)) + .5, axis=1)  # not even whole
        names.insert(i, rng.choice(["CD4", "INS", "ENSG00000254647", "chr1:10-200"]))
        kinds.insert(i, "Antibody Capture")
    b = ad.AnnData(sp.csr_matrix(x), a.obs.copy(), pd.DataFrame(dict(feature_types=kinds), index=names))
    with pytest.warns(UserWarning, match=f"{len(at)} of {len(names)} rows are no human genes"):
        got = read_counts(b, verbose=False)
    want = read_counts(a, verbose=False)
    assert (got.X != want.X).nnz == 0 and (got.obs.n_counts == want.obs.n_counts).all()
    assert got.uns["mix_geneformer"] == want.uns["mix_geneformer"]
