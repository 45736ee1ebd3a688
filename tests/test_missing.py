"What is no name: every shape that a gap takes, in memory and through files"
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mix_geneformer.missing import MISSING_WORDS, is_missing, names_of, tell_missing

GAPS = [None, np.nan, float("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), " ", "\t", " nan ", *sorted(MISSING_WORDS)]
NAMES = ["beta", "none", "Na", "unknown", "0", "d 1", "nano", "NAN cell", "False"]
column = st.lists(st.one_of(st.sampled_from(NAMES), st.sampled_from(GAPS)), max_size=30)


def holders(values):
    "The same column in everything that holds one"
    text = [None if is_missing([v])[0] else v for v in values]
    yield values
    yield np.array([*values, None], dtype=object)[:-1]
    yield pd.Series([*values, None], dtype=object)[:-1]
    yield pd.Series(text, dtype="string")
    yield pd.Categorical(text)
    yield pd.Series(pd.Categorical(["nan" if t is None else t for t in text]))
    yield pd.Series(text, dtype=object).astype("category").cat.add_categories("never")


@given(column)
def test_a_gap_is_a_gap_whatever_holds_it(values):
    want = [v if isinstance(v, str) and v in NAMES else None for v in values]
    for held in holders(values):
        assert is_missing(held).tolist() == [w is None for w in want]
        assert names_of(held).tolist() == want


@settings(max_examples=20)
@given(column)
def test_files_keep_gaps_as_gaps(tmp_path, values):
    names = names_of(values)
    empty = [n or "" for n in names]
    obs = pd.DataFrame(dict(empty=empty, written=pd.Series(names).astype(str), kind=pd.Categorical(names)))
    obs.index = obs.index.astype(str)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.AnnData(obs=obs).write_h5ad(tmp_path/"cells.h5ad")
        found = ad.read_h5ad(tmp_path/"cells.h5ad").obs
    for c in obs: assert names_of(found[c]).tolist() == names.tolist()
    obs.to_csv(tmp_path/"cells.csv")
    for c in obs: assert names_of(pd.read_csv(tmp_path/"cells.csv")[c]).tolist() == names.tolist()


@given(st.lists(st.one_of(st.none(), st.integers(-5, 10**9)), max_size=20))
def test_whole_numbers_are_named_alike_with_and_without_gaps(values):
    "pandas makes fractions of whole numbers beside a gap: a donor stays the same donor"
    want = [None if v is None else str(v) for v in values]
    assert names_of(pd.Series(values, dtype="float64" if None in values else "int64")).tolist() == want
    assert names_of(pd.Series(values, dtype="Int64")).tolist() == want
    assert names_of(pd.Series(values, dtype="float64").astype("category")).tolist() == (
        want if None in values else [str(float(v)) for v in values])


@pytest.mark.parametrize("values", [[1.5, 2.], [0, 1], [True, False], ["a", "b"], np.array(["a", "b"])])
def test_whole_columns_read_as_pandas_writes_them(values):
    assert names_of(values).tolist() == pd.Series(list(values)).astype(str).tolist()


def test_gaps_are_told_from_the_line_that_called():
    with pytest.warns(UserWarning, match="1 of 3 cells have no 'donor' and are left out") as told:
        tell_missing(is_missing(["a", "", "b"]), "donor")
    assert told[0].filename == __file__
