"Which cells a classifier learns from, and which are kept to judge it"
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.splits import cells_of_types, frequent_types, split_cells
from mix_geneformer.files import InputError
from mix_geneformer.missing import is_missing

@pytest.mark.parametrize("split", ["random", "donor"])
@pytest.mark.parametrize("seed", range(5))
def test_parts(split, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(["a", "b", "c"], 400, p=[.6, .3, .1])
    donors = rng.choice([f"d{i}" for i in range(7)], 400)
    given = donors if split == "donor" else None
    part = split_cells(labels, split, given, seed=seed)
    share = pd.Series(part).value_counts(normalize=True)
    assert set(part) == {"train", "valid", "test"} and len(part) == 400
    assert abs(share["valid"] / (1 - share["test"]) - .125) < .02
    if split == "random":
        assert abs(share["test"] - .2) < .01
        for t in "abc": assert abs((part[labels == t] == "test").mean() - .2) < .03  # type by type
    else:
        assert not set(donors[part == "test"]) & set(donors[part != "test"]) and share["test"] >= .2
    assert (part == split_cells(labels, split, given, seed=seed)).all()
    assert (part != split_cells(labels, split, given, seed=seed + 1)).any()


@pytest.mark.parametrize("labels,parts", [
    ([None] * 5, ["0 of 5 cells have a label", "another label="]),
    (["", np.nan, None], ["0 of 3 cells have a label"]),
    (["a"] * 9, ["1 cell type of 1", "2 are needed", "lower min_share="]),
    (["a"] * 999 + ["b"], ["1 cell type of 2", "0.5%", "1,000 cells"])])
def test_too_few_labels(labels, parts): refused(lambda: frequent_types(labels), *parts)


@pytest.mark.parametrize("species,types", [("human", 13), ("mouse", 12)])
def test_types_of_the_pancreas(species, types):
    try: pancreas = fetch("pancreas")
    except InputError as e: pytest.skip(f"the pancreas corpus is neither cached nor to be had: {e}")
    kept, dropped = frequent_types(read_counts(pancreas.files[species], verbose=False).obs[pancreas.label])
    assert "type B pancreatic cell" in kept and "Schwann cell" in dropped and len(kept) + len(dropped) == types


GAPS = [None, np.nan, pd.NA, "", " ", "nan", "NA"]


@pytest.mark.parametrize("split", ["random", "donor"])
@given(gaps=st.dictionaries(st.integers(0, 59), st.sampled_from(GAPS), max_size=25), seed=st.integers(0, 5),
       which=st.sampled_from(["labels", "donors", "both"]))
def test_cells_without_a_name_change_nothing_and_bridge_nothing(split, gaps, seed, which):
    "The parts of the others are those of the data set without these cells"
    rng = np.random.default_rng(seed)
    labels, donors = (rng.choice(x, 60).astype(object) for x in (["a", "b", "c"], ["d0", "d1", "d2", "d3"]))
    true = donors.copy()
    for i, g in gaps.items():
        if which != "donors": labels[i] = g
        if which != "labels": donors[i] = g
    part = split_cells(labels, split, donors, seed=seed)
    out = is_missing(labels) | (is_missing(donors) & (split == "donor"))
    assert ((part == "left out") == out).all()
    assert (part[~out] == split_cells(labels[~out], split, donors[~out], seed=seed)).all()
    if split == "donor": assert not set(true[part == "test"]) & set(true[np.isin(part, ["train", "valid"])])


@given(st.lists(st.sampled_from(["a", "a", "a", "b", "b", "c", *GAPS]), min_size=8, max_size=60))
def test_what_is_left_out_is_told_by_number_and_name(labels):
    n = pd.Series([v for v in labels if isinstance(v, str) and v in "abc" and v]).value_counts()
    rare = sorted(n.index[n < 3])
    if (n >= 3).sum() < 2: return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows, names, kept, dropped = cells_of_types(labels, "kind", 0, 3)
    said = " ".join(str(w.message) for w in told)
    assert dropped == rare and [labels[i] for i in rows] == names.tolist() and set(names) == set(kept)
    if len(labels) > n.sum(): assert f"{len(labels) - n.sum()} of {len(labels)} cells have no 'kind'" in said
    if rare: assert f"{len(rare)} of {len(n)} types" in said and ", ".join(f"{t} ({n[t]})" for t in rare) in said
    assert bool(told) == bool(rare or len(labels) > n.sum())
