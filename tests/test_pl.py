"Results as pictures: axes are returned, given ones are used, text of vector files stays text."
import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import refused

import mix_geneformer as mgf
from mix_geneformer import pl

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def table():
    n, shift = 60, np.sort(RNG.normal(size=60))[::-1]
    return pd.DataFrame(dict(symbol=[f"G{i}" for i in range(n)], ensembl_id=[f"E{i}" for i in range(n)],
                             cosine_shift=shift, fdr=RNG.random(n), ci_low=shift-.1, ci_high=shift+.1))


@pytest.fixture
def drawn(table):
    "Each picture that can be drawn into given axes"
    kind, goals = np.repeat(["a", "b", "c"], 20), pd.concat([table.assign(goal=g) for g in "xy"])
    types = pd.DataFrame(dict(type=["a", "b"], expected_accuracy=[.9, .5], accuracy=[.8, np.nan], cells=[9, 2]))
    obs = pd.DataFrame(dict(kind=kind), index=map(str, range(60)))
    cells = ad.AnnData(obs=obs, obsm=dict(X_umap=RNG.normal(size=(60, 2))))
    return dict(
        confusion=lambda ax: pl.confusion(kind, kind[::-1], ax=ax), expected=lambda ax: pl.expected(types, ax=ax),
        bars=lambda ax: pl.expected(types, true="none", ax=ax), volcano=lambda ax: pl.volcano(table, ["G3"], ax=ax),
        ranked=lambda ax: pl.ranked_shifts(table, dict(a=["E5"]), ax=ax),
        sets=lambda ax: pl.gene_sets(goals, dict(a=["G1"]), ax=ax),
        umap=lambda ax: pl.umap(cells, "kind", ax=None if ax is None else [ax])[0])


@pytest.mark.parametrize("name", ["confusion", "expected", "bars", "volcano", "ranked", "sets", "umap"])
def test_axes_are_returned_and_given_ones_used(drawn, name, tmp_path):
    def settings(): return {k: v for k, v in dict(mpl.rcParams).items() if k != "backend"}
    before = settings()
    alone = drawn[name](None)
    assert isinstance(alone, plt.Axes) and alone.has_data()
    assert settings() == before
    fig, (mine, other) = plt.subplots(1, 2)
    assert drawn[name](mine) is mine and not other.has_data()
    svg = pl.save(alone, tmp_path/"a.svg").read_text()
    assert "<text" in svg
    assert pl.save(fig, tmp_path/"a.pdf").stat().st_size > 1000


def test_a_notebook_still_shows_what_comes_after():
    mpl.interactive(True)
    pl.confusion(["a", "b"], ["a", "b"])
    assert mpl.is_interactive()
    mpl.interactive(False)


def test_what_is_marked_is_found_by_symbol_and_id(table):
    ax = pl.volcano(table, dict(one=["G3"], two=["E7", "E99", None]), n_names=0)
    assert sorted(t.get_text() for t in ax.texts) == ["G3", "G7"]
    assert [len(c.get_offsets()) for c in ax.collections] == [60, 1, 1]


def test_names_stand_apart_and_within(table):
    ax = pl.ranked_shifts(table.assign(cosine_shift=1e-9*table.cosine_shift), dict(all=table.symbol[:12]), n_names=0)
    at = sorted(t.get_position()[1] for t in ax.texts)
    low, high = ax.get_ylim()
    assert len(at) == 12 and np.diff(at).min() > .05*(high-low)


def test_confusion_counts_rows():
    ax = pl.confusion(["a", "a", "b", "c"], ["a", "b", "b", "a"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a  (2)", "b  (1)", "c  (1)"]
    assert sorted(t.get_text() for t in ax.texts) == ["100", "100", "50", "50"]
    same = pl.confusion(pd.crosstab(pd.Series(list("aabc")), pd.Series(list("abba"))))
    assert [t.get_text() for t in same.texts] == [t.get_text() for t in ax.texts]


def test_refusals(table, tmp_path):
    refused(lambda: pl.volcano(table.drop(columns="fdr")), "lacks fdr", "`perturb`")
    refused(lambda: pl.expected(table), "lacks type, expected_accuracy")
    refused(lambda: pl.gene_sets(table, {}), "lacks goal")
    refused(lambda: pl.confusion([]), "0 pairs of types")
    refused(lambda: pl.umap(ad.AnnData(np.zeros((3, 1))), "kind"), "run mgf.umap(adata)")
    refused(lambda: pl.save(plt.subplots()[1], tmp_path/"a.jpg"), "pass a name that ends in .svg")


def test_the_namespace_is_lazy(): assert mgf.pl is pl and "pl" in dir(mgf)
