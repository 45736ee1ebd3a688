"Which cells a classifier learns from, and which are kept to judge it"
import numpy as np
import pandas as pd
import pytest
from conftest import refused

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.splits import frequent_types, split_cells
from mix_geneformer.files import InputError

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
