"The user's cells go out whole, in memory and from file to file: every slot is what it was, the result stands beside."
import shutil
import tracemalloc
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import read_elem, write_elem
from conftest import refused, toy
from handmade import FORMATS, made_as
from hypothesis import given, settings
from hypothesis import strategies as st

from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.classification.confidence import COLUMNS
from mix_geneformer.classification.prediction import predict
from mix_geneformer.embedding import embed, umap
from mix_geneformer.encoder.checkpoints import load_model, save_model
from mix_geneformer.encoder.classifier import classifier_from
from mix_geneformer.outputs import LABELS, Result, add, check_names, endings_for, whole, write_result

N = 24


def assert_equal(a, b):
    "Values, types and storage are the same, slot by slot"
    if isinstance(b, ad.AnnData):
        for slot in ("X", "obs", "var", "layers", "obsm", "varm", "obsp", "varp", "uns"):
            assert_equal(getattr(a, slot), getattr(b, slot))
    elif isinstance(b, pd.DataFrame): pd.testing.assert_frame_equal(a, b)
    elif hasattr(b, "items"):
        assert set(a) == set(b)
        for name in b: assert_equal(a[name], b[name])
    elif sp.issparse(b):
        assert a.format == b.format and a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a.toarray(), b.toarray())
    elif b is None or isinstance(b, str): assert a == b
    else:
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype or "T" in (a.dtype.kind, b.dtype.kind)   # zarr has a text type of its own
        np.testing.assert_array_equal(a, b)


def result(width=3):
    "One of each kind that verbs give"
    label = pd.Categorical.from_codes(np.arange(N) % 3 - 1, ["a", "b"])
    return Result(dict(model="m", tokens=2.5), dict(zip(LABELS, (label, np.linspace(0, 1, N, dtype=np.float32)))),
                  dict(X_mix_geneformer=np.arange(N*width, dtype=np.float32).reshape(N, width),
                       mix_geneformer_transfer=pd.DataFrame(np.eye(N, 2), columns=["a", "b"])))


# --- cells with everything that an AnnData can hold -------------------------------------------------------------------

rng = np.random.default_rng(0)
SLOTS = dict(   # name: puts something odd into the cells
    layers=lambda a: a.layers.update(dense=rng.normal(size=a.shape), ints=a.layers["counts"].astype(np.int64).tocsc()),
    raw=lambda a: setattr(a, "raw", ad.AnnData(
        sp.random(N, a.n_vars + 5, .3, "csr", np.float32, rng), a.obs[[]].copy(),
        pd.DataFrame(dict(more=range(a.n_vars + 5)), index=[*a.var_names, *"vwxyz"]))),
    obsm=lambda a: a.obsm.update(X_pca=rng.normal(size=(N, 4)), X_umap=rng.normal(size=(N, 2)),
                                 few=sp.eye(N, 3, format="csr"),
                                 table=pd.DataFrame(dict(p=rng.normal(size=N), q="x"), index=a.obs_names)),
    varm=lambda a: a.varm.update(PCs=rng.normal(size=(a.n_vars, 4))),
    obsp=lambda a: a.obsp.update(connectivities=sp.random(N, N, .1, "csr", random_state=rng)),
    varp=lambda a: a.varp.update(links=sp.eye(a.n_vars, format="csr")),
    uns=lambda a: a.uns.update(cell_type_colors=np.array(["#ff0000", "#00ff00"]), log1p=dict(base=None), empty={}, n=3,
                               deep=dict(er=dict(x=np.arange(3), text="mine", table=pd.DataFrame(dict(a=[1, 2]))))),
    obs=lambda a: a.obs.__setitem__(["flag", "n", "holes", "text", "grade", "species", "length"], pd.DataFrame(dict(
        flag=np.arange(N) % 2 == 0, n=np.arange(N), holes=np.where(np.arange(N) % 3, np.nan, 1.), text="t",
        grade=pd.Categorical(np.array(list("lmh"))[np.arange(N) % 3], list("lmhx"), ordered=True),
        species="mine", length=7), index=a.obs_names)),
    var=lambda a: a.var.__setitem__("kept", np.arange(a.n_vars) % 2 == 0),
    bare=lambda a: setattr(a, "var", a.var[[]]),
    names=lambda a: (setattr(a.obs.index, "name", "barcode"), setattr(a.var.index, "name", "gene")),
    notes=lambda a: a.uns.update(mix_geneformer=dict(earlier="result")))
STORED = dict(csr=sp.csr_matrix, csc=sp.csc_matrix, dense=lambda x: x.toarray(), none=None)


def mine(slots=SLOTS, stored="csr", by_symbol=True):
    a = toy()
    a.layers["counts"] = a.X.copy()
    a.X = None if stored == "none" else STORED[stored](a.X.log1p())
    if by_symbol: a.var_names = a.var.symbol.astype(str)
    a.var.index.name = None
    for name in slots: SLOTS[name](a)
    return a


def without_result(a, before):
    "The cells, less what the result has put there"
    a = a.copy()
    for name in LABELS: del a.obs[name]
    for name in ("X_mix_geneformer", "mix_geneformer_transfer"): del a.obsm[name]
    notes = a.uns.pop("mix_geneformer")
    assert dict(notes) == {**before.uns.get("mix_geneformer", {}), "model": "m", "tokens": 2.5}
    if "mix_geneformer" in before.uns: a.uns["mix_geneformer"] = before.uns["mix_geneformer"]
    return a


def has_result(a):
    r = result()
    np.testing.assert_array_equal(a.obsm["X_mix_geneformer"], r.obsm["X_mix_geneformer"])
    assert_equal(a.obs[list(LABELS)], pd.DataFrame(r.obs, index=a.obs_names))
    types = a.obsm["mix_geneformer_transfer"]
    assert types.index.equals(a.obs_names) and types.shape == (N, 2)


@given(st.sets(st.sampled_from(list(SLOTS))), st.sampled_from(list(STORED)), st.booleans())
@settings(max_examples=25)
def test_every_slot_survives_from_file_to_file(tmp_path_factory, slots, stored, by_symbol):
    tmp_path = tmp_path_factory.mktemp("slots")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine(slots, stored, by_symbol).write_h5ad(tmp_path/"mine.h5ad")
        before = ad.read_h5ad(tmp_path/"mine.h5ad")
        raw = (tmp_path/"mine.h5ad").read_bytes()
        counts = as_counts(tmp_path/"mine.h5ad", layer="counts")
        after = ad.read_h5ad(write_result(counts, result(), tmp_path/"new.h5ad"))
    assert (tmp_path/"mine.h5ad").read_bytes() == raw
    has_result(after)
    assert_equal(without_result(after, before), before)
    assert type(after.X) is type(before.X) and (after.raw is None) == (before.raw is None)
    if before.raw is not None:
        for slot in ("X", "var"): assert_equal(getattr(after.raw, slot), getattr(before.raw, slot))
    assert list(after.obs) == [*before.obs, *LABELS] and after.obs_names.name == before.obs_names.name


@given(st.sets(st.sampled_from(list(SLOTS))), st.sampled_from(list(STORED)))
@settings(max_examples=25)
def test_every_slot_survives_in_memory(slots, stored):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = mine(slots, stored)
        before = a.copy()
        given_back = add(whole(as_counts(a, layer="counts")), result())
    assert given_back is a
    has_result(a)
    assert_equal(without_result(a, before), before)


def test_what_anndata_does_not_know_stays(tmp_path):
    mine().write_h5ad(tmp_path/"a.h5ad")
    with h5py.File(tmp_path/"a.h5ad", "r+") as f:
        f["of_another_tool/x"], f.attrs["note"] = np.arange(3), "kept"
    write_result(as_counts(tmp_path/"a.h5ad", layer="counts"), result(), tmp_path/"b.h5ad")
    with h5py.File(tmp_path/"b.h5ad") as f: assert f.attrs["note"] == "kept" and len(f["of_another_tool/x"]) == 3


def test_a_copy_takes_no_memory_of_the_size_of_the_file(tmp_path):
    n, genes = 4000, 2000
    with h5py.File(tmp_path/"a.h5ad", "w") as f:
        ad.io.write_elem(f, "/", ad.AnnData(obs=pd.DataFrame(index=map(str, range(n))), var=toy().var, layers=dict(
            counts=sp.csr_matrix(np.eye(n, 40, dtype=np.float32)))))
        f.create_dataset("of_another_tool", data=np.ones((n, genes)), compression="gzip")   # 64 MB
    counts = as_counts(tmp_path/"a.h5ad", layer="counts")
    r = Result({}, obsm=dict(X_mix_geneformer=np.zeros((n, 2), np.float32)))
    tracemalloc.start()
    write_result(counts, r, tmp_path/"b.h5ad")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8e6, f"{most:,} bytes"


# --- two results ------------------------------------------------------------------------------------------------------

def test_two_results_stand_beside_each_other(tmp_path):
    mine().write_h5ad(tmp_path/"a.h5ad")
    one, two = result(), result()
    one.obs, two.obsm, two.note = {}, {}, dict(classifier="types")
    write_result(as_counts(tmp_path/"a.h5ad", layer="counts"), one, tmp_path/"b.h5ad")
    write_result(as_counts(tmp_path/"b.h5ad", layer="counts"), two, tmp_path/"c.h5ad")
    c = ad.read_h5ad(tmp_path/"c.h5ad")
    has_result(c)
    assert dict(c.uns["mix_geneformer"]) == dict(earlier="result", model="m", tokens=2.5, classifier="types")


def test_an_earlier_result_makes_way_and_that_is_said(tmp_path):
    a = add(mine(), result())
    a.write_h5ad(tmp_path/"a.h5ad")
    for source in (a, tmp_path/"a.h5ad"):
        counts = as_counts(source, layer="counts")
        with pytest.warns(UserWarning, match=r"obsm\['X_mix_geneformer'\] .* the new result takes its place"):
            check_names(counts, obsm=["X_mix_geneformer"])
        with pytest.warns(UserWarning, match="mix_geneformer_label.* the new result takes its place"):
            check_names(counts, obs=LABELS)
        refused(lambda counts=counts: check_names(counts, obsm=["X_pca"]), "obsm['X_pca']", "pass another name")
        refused(lambda counts=counts: check_names(counts, obs=["flag"]), "obs['flag']", "pass another name")
    write_result(as_counts(tmp_path/"a.h5ad", layer="counts"), result(5), tmp_path/"b.h5ad")
    b = ad.read_h5ad(tmp_path/"b.h5ad")
    assert b.obsm["X_mix_geneformer"].shape == (N, 5) and list(b.obs).count(LABELS[0]) == 1


# --- other containers -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [k for k in FORMATS if k not in ("backed", "memory")])
def test_any_container_becomes_the_same_cells_with_a_result(kind, tmp_path):
    path, how = made_as(kind, toy(), tmp_path)
    counts = as_counts(path, **how)
    after = ad.read_h5ad(write_result(counts, result(), tmp_path/"new.h5ad"))
    has_result(after)
    assert after.shape == toy().shape
    now, then = (read_counts(source, verbose=False, **how).to_df() for source in (after, path))
    pd.testing.assert_frame_equal(now, then)
    opened = whole(as_counts(path, **how))
    assert list(opened.obs_names) == list(after.obs_names) and list(opened.var) == list(after.var)


def test_a_loom_brings_its_layers(tmp_path):
    path, _ = made_as("loom_ids", toy(), tmp_path)
    with h5py.File(path, "r+") as f: f["layers/spliced"] = toy().X.toarray().T*2
    for layer in (None, "spliced"):
        a = whole(as_counts(path, layer=layer))
        assert (a.X != toy().X).nnz == 0 if sp.issparse(a.X) else (a.X == toy().X.toarray()).all()
        np.testing.assert_array_equal(a.layers["spliced"], toy().X.toarray()*2)


def test_a_zarr_store_goes_out_whole(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine().write_zarr(tmp_path/"a.zarr")
        before = ad.read_zarr(tmp_path/"a.zarr")
        after = ad.read_h5ad(write_result(as_counts(tmp_path/"a.zarr", layer="counts"), result(), tmp_path/"b.h5ad"))
    has_result(after)
    assert_equal(without_result(after, before), before)


def modality(path, name):
    with h5py.File(path) as f: return read_elem(f[f"mod/{name}"])


@pytest.fixture
def two_modalities(tmp_path):
    "MuData as mudata lays it out"
    rna, n = mine(), 4
    prot = ad.AnnData(np.ones((N, n), np.float32), rna.obs[[]].copy(), pd.DataFrame(index=[f"CD{i}" for i in range(n)]))
    with h5py.File(tmp_path/"a.h5mu", "w") as f:
        f.attrs["encoding-type"] = "MuData"
        for name, part in dict(rna=rna, prot=prot).items(): write_elem(f, f"mod/{name}", part)
        write_elem(f, "obs", pd.DataFrame(dict(all_of_them=range(N)), index=rna.obs_names))
    return tmp_path/"a.h5mu"


@pytest.mark.parametrize("inner", ["", "rna"])
def test_mudata_keeps_its_modalities(two_modalities, inner):
    path = two_modalities/inner
    assert ".h5mu" in endings_for(path)
    new = write_result(as_counts(path, layer="counts"), result(), two_modalities.with_name("b.h5mu"))
    before, after = modality(two_modalities, "rna"), modality(new, "rna")
    has_result(after)
    assert_equal(without_result(after, before), before)
    assert_equal(modality(new, "prot"), modality(two_modalities, "prot"))
    with h5py.File(new) as f: assert read_elem(f["obs"]).all_of_them.tolist() == list(range(N))
    with pytest.warns(UserWarning, match="holds 1 modality of a.h5mu, without prot: a name that ends in .h5mu"):
        new = ad.read_h5ad(write_result(as_counts(path, layer="counts"), result(), two_modalities.with_name("c.h5ad")))
    has_result(new)
    assert new.obs.all_of_them.tolist() == list(range(N))


def test_tables_of_2018_are_written_in_todays_form(tmp_path):
    a = toy()
    def text(values): return np.array([str(v).encode() for v in values], dtype="S40")
    with h5py.File(tmp_path/"old.h5ad", "w") as f:
        g = f.create_group("X")
        g.attrs["h5sparse_format"], g.attrs["h5sparse_shape"] = "csr", a.shape
        for k in ("data", "indices", "indptr"): g[k] = getattr(a.X, k)
        obs = np.zeros(N, dtype=[("index", "S40"), ("cell_type", "i1"), ("n", "f8")])
        obs["index"], obs["cell_type"], obs["n"] = text(a.obs_names), np.arange(N) % 2, np.arange(N)
        var = np.zeros(a.n_vars, dtype=[("index", "S40"), ("symbol", "S20")])
        var["index"], var["symbol"] = text(a.var_names), text(a.var.symbol)
        f["obs"], f["var"], f["uns/cell_type_categories"] = obs, var, text(["a", "b"])
        f["obsm"] = np.zeros(N, dtype=[("X_pca", "f8", (3,))])
    with pytest.warns(UserWarning, match="anndata 0.6 or before: new.h5ad holds the same in today's form"):
        new = ad.read_h5ad(write_result(as_counts(tmp_path/"old.h5ad"), result(), tmp_path/"new.h5ad"))
    has_result(new)
    assert new.obs.cell_type.tolist() == a.obs.cell_type.tolist() and new.obs.n.tolist() == list(range(N))
    assert new.obsm["X_pca"].shape == (N, 3) and new.var.symbol.tolist() == a.var.symbol.tolist()


def test_tables_of_2020_take_a_column(tmp_path):
    "anndata 0.7 kept categories in a group of their own"
    a = toy()
    a.obs = a.obs.astype("category")
    a.write_h5ad(tmp_path/"a.h5ad")
    with h5py.File(tmp_path/"a.h5ad", "r+") as f:
        obs = f["obs"]
        obs.attrs["encoding-version"] = "0.1.0"
        for name in ("cell_type", "donor"):
            codes, names = obs[name]["codes"][:], obs[name]["categories"][:]
            del obs[name]
            obs[name], obs[f"__categories/{name}"] = codes, names
            obs[name].attrs["categories"] = obs[f"__categories/{name}"].ref
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = ad.read_h5ad(tmp_path/"a.h5ad")
        after = ad.read_h5ad(write_result(as_counts(tmp_path/"a.h5ad"), result(), tmp_path/"b.h5ad"))
    assert before.obs.donor.tolist() == a.obs.donor.tolist()
    has_result(after)
    assert_equal(without_result(after, before), before)


def test_what_cannot_be_kept_whole_is_refused(tmp_path):
    mine().write_h5ad(tmp_path/"a.h5ad")
    with h5py.File(tmp_path/"a.h5ad", "r+") as f: f["uns/deep"].attrs["encoding-type"] = "of tomorrow"
    counts = as_counts(tmp_path/"a.h5ad", layer="counts")
    refused(lambda: whole(counts), "holds parts that anndata", "cannot read", "pass what read_counts() makes of it")
    write_result(counts, result(), tmp_path/"b.h5ad")   # from file to file it is
    with h5py.File(tmp_path/"b.h5ad") as f: assert f["uns/deep"].attrs["encoding-type"] == "of tomorrow"


def test_a_backed_view_is_refused_and_a_backed_file_is_not(tmp_path):
    mine().write_h5ad(tmp_path/"a.h5ad")
    a = ad.read_h5ad(tmp_path/"a.h5ad", backed="r")
    refused(lambda: whole(as_counts(a[:7], layer="counts")), "a view (7 cells) of a file that is open", ".to_memory()")
    assert whole(as_counts(a[:7].to_memory(), layer="counts")).n_obs == 7
    assert whole(as_counts(a, layer="counts")) is a


@pytest.mark.parametrize("ending, sep", [(".csv", ","), (".tsv", "\t")])
def test_a_table_is_the_result_alone(tmp_path, ending, sep):
    counts = as_counts(toy())
    labels = pd.read_csv(write_result(counts, result(), tmp_path/f"a{ending}"), sep=sep, index_col=0)
    assert list(labels) == list(LABELS) and list(labels.index) == list(toy().obs_names)
    assert labels.mix_geneformer_label.isna().sum() == 8
    r = result()
    r.obs = {}
    del r.obsm["mix_geneformer_transfer"]
    vectors = pd.read_csv(write_result(counts, r, tmp_path/f"b{ending}"), sep=sep, index_col=0)
    np.testing.assert_array_equal(vectors.to_numpy(), r.obsm["X_mix_geneformer"])


# --- the verbs --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def types(model_dir, vocab, tmp_path_factory):
    "Directory of a classifier with random weights"
    net = classifier_from(load_model(model_dir, "cpu").model, ["a", "b"])
    return save_model(net, vocab, tmp_path_factory.mktemp("types")/"types", dict(pool="mean"))


def quiet(verb, *args, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return verb(*args, device="cpu", progress=False, **how)


@pytest.mark.parametrize("verb", [embed, predict])
def test_a_path_and_an_anndata_give_the_same_whole_cells(verb, model_dir, types, tmp_path):
    model = model_dir if verb is embed else types
    a = mine()
    a.write_h5ad(tmp_path/"a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = ad.read_h5ad(tmp_path/"a.h5ad")
    in_memory, opened = (quiet(verb, source, model, layer="counts") for source in (before.copy(), tmp_path/"a.h5ad"))
    assert_equal(in_memory, opened)
    for name in COLUMNS:
        if name in opened.obs: del opened.obs[name]
    opened.obsm.pop("X_mix_geneformer", None)
    opened.uns["mix_geneformer"] = before.uns["mix_geneformer"]
    assert_equal(opened, before)


def test_vectors_are_those_of_the_mapped_counts(model_dir, tmp_path):
    a = mine()
    a.write_h5ad(tmp_path/"a.h5ad")
    plain = quiet(embed, read_counts(a, layer="counts", verbose=False), model_dir).obsm["X_mix_geneformer"]
    opened = quiet(embed, tmp_path/"a.h5ad", model_dir, layer="counts")
    np.testing.assert_array_equal(opened.obsm["X_mix_geneformer"], plain)


def with_empty_cells():
    a = mine()
    a.layers["counts"] = sp.csr_matrix(a.layers["counts"].toarray()*(np.arange(N) % 4 != 1)[:, None])
    return a, np.arange(N) % 4 == 1


def test_cells_that_are_not_read_stay_with_a_missing_value(model_dir, types):
    a, empty = with_empty_cells()
    quiet(embed, b := mine(), model_dir, layer="counts")
    with pytest.warns(UserWarning, match="6 of 24 cells have no gene of the vocabulary; they have no vector"):
        embed(a, model_dir, device="cpu", progress=False, layer="counts")
    x = a.obsm["X_mix_geneformer"]
    assert np.isnan(x[empty]).all()
    np.testing.assert_allclose(x[~empty], b.obsm["X_mix_geneformer"][~empty], atol=1e-5)
    with pytest.warns(UserWarning, match="6 of 24 cells have no gene of the vocabulary; they have no type"):
        predict(a, types, device="cpu", progress=False, layer="counts")
    assert (a.obs.mix_geneformer_label.isna() == empty).all() and (a.obs.mix_geneformer_score.isna() == empty).all()
    with pytest.warns(UserWarning, match="X_umap.* the new UMAP takes its place"): umap(a)
    assert (np.isnan(a.obsm["X_umap"]).all(1) == empty).all()


def test_cells_none_of_which_is_read_are_refused(model_dir):
    a = mine()
    a.layers["counts"] = a.layers["counts"]*0
    refused(lambda: quiet(embed, a, model_dir, layer="counts"), "24 of 24 cells", "0 counts")
    assert "X_mix_geneformer" not in a.obsm


def test_further_vectors_take_another_name(model_dir):
    a = mine()
    quiet(embed, a, model_dir, layer="counts")
    quiet(embed, a, model_dir, "X_first", pool="first", layer="counts")
    assert set(a.obsm) >= {"X_first", "X_mix_geneformer"} and a.uns["mix_geneformer"]["X_first"]["model"] == "model"
    refused(lambda: quiet(embed, a, model_dir, "X_pca", layer="counts"), "obsm['X_pca']", "pass another name")


def test_plots_of_the_users_names_work_as_before(model_dir, tmp_path):
    import matplotlib
    import scanpy as sc
    matplotlib.use("Agg")
    mine().write_h5ad(tmp_path/"a.h5ad")
    for a in (mine(), quiet(embed, tmp_path/"a.h5ad", model_dir, layer="counts")):
        name = a.var_names[3]
        for color in (name, "grade", "cell_type"):
            sc.pl.umap(a, color=color, show=False)
        assert list(a.uns["cell_type_colors"]) == ["#ff0000", "#00ff00"]
    matplotlib.pyplot.close("all")


def test_a_file_that_was_read_is_as_it_was_and_free(model_dir, tmp_path):
    a = mine()
    a.write_h5ad(tmp_path/"a.h5ad")
    before = Path(shutil.copy(tmp_path/"a.h5ad", tmp_path/"copy")).read_bytes()
    found = quiet(embed, tmp_path/"a.h5ad", model_dir, layer="counts")
    assert (tmp_path/"a.h5ad").read_bytes() == before
    found.write_h5ad(tmp_path/"a.h5ad")   # no open handle is in the way of one's own decision
