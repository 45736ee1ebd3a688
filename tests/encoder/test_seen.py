"Whose cells a model has learnt from: kept with it, and asked where it is to read others"
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st

from mix_geneformer.cells.ranking import offsets_of
from mix_geneformer.cells.sentences import Sentences
from mix_geneformer.encoder import seen as room
from mix_geneformer.encoder.seen import (
    Seen,
    pack_genes,
    refuse_foreign,
    seen_before,
    seen_by,
    share_seen,
    tell_seen,
    unpack_genes,
    what_is_seen,
)

SIZE = 21
cell = st.lists(st.integers(2, SIZE - 1), min_size=1, max_size=8)


def told(cells, species="human"): return Sentences(np.concatenate(cells), offsets_of(list(map(len, cells))), species)


def model_of(labels=None, context=9, **training):
    path = SimpleNamespace(name="toy")
    return SimpleNamespace(path=path, vocab=range(SIZE), context=context, labels=labels, training=training)


def warned(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in said]


@given(st.lists(cell, min_size=1, max_size=9), st.lists(cell, min_size=1, max_size=9), st.integers(1, 8))
def test_the_share_is_counted_token_by_token(learnt, asked, context):
    seen = what_is_seen(told(learnt), SIZE, context)
    known = {t for c in learnt for t in c[:context]}
    assert seen["n_genes"] == len(known) and set(np.flatnonzero(unpack_genes(seen["genes"], SIZE))) == known
    tokens = [t for c in asked for t in c[:context]]
    want = np.mean([t in known for t in tokens])
    assert share_seen(seen_by(model_of(seen=seen)), told(asked), context) == pytest.approx(want)


@given(st.lists(st.booleans(), max_size=70))
def test_genes_are_packed_without_loss(bits):
    assert unpack_genes(pack_genes(np.array(bits, bool)), len(bits)).tolist() == bits


def test_large_corpora_are_looked_at_here_and_there(monkeypatch):
    monkeypatch.setattr(room._genes_in, "__defaults__", (5,))
    n = room._genes_in(told([[2 + i] for i in range(19)]), SIZE, 9)
    assert n.sum() == 5 and n[2] == 1 and n[20] == 1


def test_a_run_that_goes_on_has_seen_both():
    first = what_is_seen(told([[2, 3]]), SIZE, 9, dict(organ=["lung"]))
    second = what_is_seen(told([[4]], "mouse"), SIZE, 9, dict(organ=["gut", None], tissue=["skin"]))
    both = seen_by(model_of(seen=seen_before(second, model_of(seen=first))))
    assert both.species == ["human", "mouse"] and set(np.flatnonzero(both.genes)) == {2, 3, 4}
    assert both.tissues == dict(organ=["gut", "lung"], tissue=["skin"])
    older = seen_before(second, model_of(species="human"))
    assert older["species"] == ["human", "mouse"] and seen_by(model_of(seen=older)).genes is None


@pytest.mark.parametrize("training, species", [
    (dict(species="human+mouse"), ["human", "mouse"]), (dict(species="mouse"), ["mouse"]), (dict(species=None), None),
    ({}, None)])
def test_directories_of_earlier_releases(training, species):
    old, mice = model_of(["a", "b"], **training), told([[2]], "mouse")
    assert seen_by(old).species == species and share_seen(seen_by(old), mice, 9) is None
    refuse_foreign(old, mice)
    assert not warned(lambda: tell_seen(old, mice))


def test_a_species_that_was_never_seen():
    seen = what_is_seen(told([[2, 3]]), SIZE, 9)
    types, mice = model_of(["a", "b"], seen=seen), told([[2, 9], [9]], "mouse")
    line = refused(lambda: refuse_foreign(types, mice), "human", "never seen mouse (2 cells", "33%", "transfer()")
    asked = line.rsplit("allow_species='", 1)[1].split("'")[0]
    refuse_foreign(types, mice, asked)
    refused(lambda: refuse_foreign(types, mice, "pig"), "allow_species='mouse'")
    refuse_foreign(types, told([[2]]), None)
    said, = warned(lambda: tell_seen(types, mice))
    assert "has never seen mouse" in said and "33%" in said
    assert not warned(lambda: tell_seen(types, told([[2], [3, 9]])))
    said, = warned(lambda: tell_seen(types, told([[2, 9, 8]])))
    assert "33% of the genes in these 1 sentences" in said


def test_tissues_are_told_as_they_are_written():
    seen = dict(what_is_seen(told([[2]]), SIZE, 9), tissues=dict(organ=["Bone_Marrow"]))
    model = model_of(seen=seen)
    def said(**obs): return warned(lambda: tell_seen(model, told([[2]]), pd.DataFrame(obs)))
    assert not said(organ=["bone marrow"]) and not said(tissue=["gut"]) and not said(organ=[None])
    line, = said(organ=["gut", "Bone marrow", None])
    assert "never seen gut (1 of 3 cells, by 'organ')" in line


def test_a_namespace_without_a_past_is_no_error():
    bare = SimpleNamespace(vocab=range(3), context=3)
    assert seen_by(bare) == Seen() and tell_seen(bare, told([[2]])) == {}
