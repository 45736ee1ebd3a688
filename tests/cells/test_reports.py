"What was read of cells stands beside their own columns, and replaces none."
import numpy as np
import pandas as pd
import pytest
from conftest import toy
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.conserved import species_of
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.reports import put_beside, read_column
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary

def odd():
    "Cells whose own columns bear the names that the library uses"
    a = toy(n=6)
    a.obs["species"] = pd.Categorical(["strain A", "strain B", None]*2)
    a.obs["n_counts"] = [1, 2, 3, 4, 5, np.nan]
    a.obs["length"] = ["long", "short", "long"]*2
    a.obs["input_ids"] = list("uvwxyz")
    return a


def test_own_columns_stay():
    a = odd()
    with pytest.warns(UserWarning, match="stays") as told: r = read_counts(a, verbose=False)
    pd.testing.assert_frame_equal(r.obs[list(a.obs)], a.obs)
    assert sum("stays" in str(w.message) for w in told) == 2
    assert set(read_column(r.obs, "species")) == {"human"} == {species_of(r)}
    assert (read_column(r.obs, "n_counts") == a.X.sum(1).A1).all()
    again = read_counts(r, verbose=False)
    pd.testing.assert_frame_equal(again.obs, r.obs)


def test_columns_that_say_the_same_are_the_librarys(recwarn):
    r = read_counts(toy(), verbose=False)
    assert list(read_counts(r, verbose=False).obs) == list(r.obs)
    assert "species" in r.obs and not [c for c in r.obs if c in ("mix_geneformer_species", "mix_geneformer_n_counts")]
    assert not [w for w in recwarn if "stays" in str(w.message)]


@given(st.lists(st.one_of(st.none(), st.just("human"), st.text(max_size=4)), min_size=1, max_size=5))
def test_a_column_is_never_replaced(values):
    obs = pd.DataFrame(dict(species=pd.Series(values, dtype=object)))
    before = obs.species.copy()
    put_beside(obs, species="human")
    pd.testing.assert_series_equal(obs["species"], before)
    assert set(read_column(obs, "species")) == {"human"}


def test_a_corpus_keeps_columns_whose_names_it_has_taken():
    a = odd()
    v = Vocabulary.build(a)
    with pytest.warns(UserWarning, match="columns input_ids as obs_input_ids, length as obs_length, species as obs_sp"):
        d = tokenize(a, v, progress=False)
    assert set(d["species"][:]) == {"human"} and d["obs_species"][:3] == ["strain A", "strain B", None]
    assert d["obs_length"][:] == a.obs.length.tolist() and d["obs_input_ids"][:] == list("uvwxyz")
    with pytest.warns(UserWarning, match="columns length as obs_length"):
        assert set(tokenize(a, v, keep=["length"], progress=False).column_names) == {
            "input_ids", "length", "species", "obs_length"}
    plain = tokenize(read_counts(toy(n=6), verbose=False), v, progress=False)
    assert "obs_species" not in plain.column_names
