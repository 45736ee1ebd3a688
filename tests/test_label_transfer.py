"Labels across species: the statistics against loops written out, the views, species tokens and pooled medians"
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from bothsides import sides
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression

from mix_geneformer.cells.conserved import shared_counts
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.medians import gene_medians
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.label_transfer import (
    TransferConfig,
    learn_both,
    species_entropy,
    transfer,
    transfer_views,
)

SHARED = Path(__file__).parent.parent.parent/"shared"/"data"


def test_without_rounds_it_is_logistic_regression():
    source, target = sides()
    views, _ = transfer_views(source, target, None, TransferConfig(genes="all"))
    (known, asked, C), = views
    plain = LogisticRegression(C=C, max_iter=200, class_weight="balanced").fit(known, source.obs.cell_type.astype(str))
    np.testing.assert_allclose(learn_both(views, source.obs.cell_type, rounds=0), plain.predict_proba(asked), atol=1e-6)


@pytest.mark.parametrize("rounds", [0, 3])
def test_the_order_of_the_target_does_not_matter(rounds):
    source, target = sides()
    order = np.random.default_rng(0).permutation(target.n_obs)
    learn = lambda t: learn_both(transfer_views(source, t)[0], source.obs.cell_type, rounds).to_numpy()
    p, q = learn(target), learn(target[order].copy())
    np.testing.assert_allclose(q, p[order], atol=2e-2)   # the sparse solver stops at a tolerance
    assert (q.argmax(1) == p[order].argmax(1)).all()


def test_entropy_of_species_is_written_out():
    rng = np.random.default_rng(0)
    x, species = rng.normal(size=(60, 3)), np.array(["human", "mouse", "pig"])[rng.integers(0, 3, 60)]
    near = np.argsort(((x[:, None]-x[None])**2).sum(-1), 1)[:, :20]
    plain = np.mean([entropy([np.mean(species[r] == s) for s in ("human", "mouse", "pig")])/np.log(3) for r in near])
    assert species_entropy(x, species, 20) == pytest.approx(plain)


def test_pooled_medians_are_those_of_all_cells():
    human, mouse = sides()
    own, pooled = (Vocabulary.build([human, mouse], "shared", medians=m).frame for m in ("species", "pooled"))
    a, b, genes = shared_counts(human, mouse)
    share = lambda x, a: sp.csr_matrix(sp.diags(1e4/np.asarray(a.X.sum(1)).ravel()) @ x)
    both = sp.vstack([share(a, human), share(b, mouse)]).tocsc()
    for i in (0, 7, 39):
        want = np.median(both[:, i].data)
        found = pooled[pooled.ensembl_id.isin(genes.iloc[i])]["median"].to_numpy()
        np.testing.assert_allclose(found, [want, want], rtol=1e-6)
    assert own.drop(columns="median").equals(pooled.drop(columns="median"))
    refused(lambda: gene_medians([human, mouse]), "2 species")


@pytest.mark.parametrize("given, message", [
    (dict(label="kind"), "no column 'kind'"), (dict(genes="some"), "'conserved' or 'all'"), (dict(share=0), "share=0"),
    (dict(model="here"), "pass both"), (dict(min_agreement=1.), "0 of 40 shared genes")])
def test_refuses(given, message):
    source, target = sides()
    refused(lambda: transfer(source, target, progress=False, **given), message)


def test_types_of_one_cell_are_left_out_and_told():
    "Every type of two cells or more is kept, one of a single cell goes, and cells without a label go; all by name"
    source, target = sides(300)
    kind = source.obs.cell_type.astype(object)
    kind.iloc[:6] = ["lonely", "rare", "rare", None, np.nan, "nan"]
    source.obs["cell_type"] = kind
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = transfer(source, target.copy(), progress=False)
    said = [str(w.message) for w in told if w.category is UserWarning]
    assert said[0].startswith("3 of 300 cells have no 'cell_type'") and "1 of 4 types" in said[1]
    assert said[1].endswith("left out: lonely (1).")
    assert all(w.filename == __file__ for w in told if str(w.message) in said)
    p = found.obsm["mix_geneformer_transfer"]
    assert found.uns["mix_geneformer"]["dropped"] == ["lonely"] and list(p.columns) == ["a", "b", "rare"]
    assert np.allclose(p.sum(1), 1)
    with pytest.warns(UserWarning, match=r"2 of 4 types .*lonely \(1\), rare \(2\)"):
        found = transfer(source, target, min_share=.01, progress=False)
    assert found.uns["mix_geneformer"]["dropped"] == ["lonely", "rare"]


@settings(max_examples=8)
@given(st.dictionaries(st.integers(0, 59), st.sampled_from([None, np.nan, "", "NA"]), min_size=1, max_size=20))
def test_cells_without_a_label_teach_nothing(gaps):
    "The result is that of the source without these cells"
    source, target = sides(60)
    kind = source.obs.cell_type.astype(object)
    for i, g in gaps.items(): kind.iloc[i] = g
    source.obs["cell_type"] = kind
    few = source[[i for i in range(60) if i not in gaps]].copy()
    a, b = (transfer(s, target.copy(), genes="all", progress=False) for s in (source, few))
    pd.testing.assert_frame_equal(a.obsm["mix_geneformer_transfer"], b.obsm["mix_geneformer_transfer"])
    views = transfer_views(source, target, None, TransferConfig(genes="all"))[0]
    pd.testing.assert_frame_equal(learn_both(views, kind), b.obsm["mix_geneformer_transfer"].reset_index(drop=True))


@pytest.mark.skipif(not (SHARED/"mouse_spleen_jaitin.h5ad").exists(),
                    reason="../shared/data with blood and spleen is not here")
def test_blood_cells_find_their_kind_in_the_other_species():
    "Cells of another tissue than the tables': B cells and dendritic cells of human blood and mouse spleen"
    def cells(name, groups):
        a = read_counts(SHARED/f"{name}.h5ad", verbose=False)
        a.obs["group"] = a.obs.cell_type.astype(str).map(groups)
        return a[a.obs.group.notna()].copy()

    def right(**how):
        found = transfer(human, mouse.copy(), "group", progress=False, **how)
        return (found.obs.mix_geneformer_label.astype(str) == found.obs.group).mean()
    human = cells("human_pbmc_10x3k", {"B": "B", "Dendritic": "DC", "NK": "NK"})
    groups = {"B cell": "B", "GC B cell": "B", "CD8+ DC": "DC", "CD8- DC": "DC", "pDC": "DC", "NK cell": "NK"}
    mouse = cells("mouse_spleen_jaitin", groups)
    assert right() > .8 and right() >= right(genes="all", rounds=0)
