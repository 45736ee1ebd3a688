"From counts to a question: the cells, their order, and the genes."
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import refused, toy
from hypothesis import given, settings
from hypothesis import strategies as st

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.files import InputError
from mix_geneformer.perturbation.edits import Change
from mix_geneformer.perturbation.question import Ends, ask, detected

AB = Ends("cell_type", "a", "b")


@pytest.fixture(scope="module")
def loaded(): return SimpleNamespace(vocab=Vocabulary.build([toy()]), context=24)


@pytest.mark.parametrize("orthologs", ["separate", "shared", "tied"])
def test_states_encoded_together_are_the_states_encoded_apart(both, orthologs):
    "Start and goal cells lie between each other; each keeps its sentence, its row, and its order"
    some = SimpleNamespace(vocab=Vocabulary.build(list(both), orthologs), context=24)
    for species, cells in zip(("human", "mouse"), both):
        question = ask(cells, some, AB, Change())
        for side, rows in ((question.start, AB.rows(cells.obs)[0]), (question.goal, AB.rows(cells.obs)[1])):
            apart = encode_cells(cells[rows], some.vocab, 24)
            np.testing.assert_array_equal(side.sentences.values, apart.values)
            np.testing.assert_array_equal(side.sentences.offsets, apart.offsets)
            pd.testing.assert_frame_equal(side.obs, cells.obs.iloc[rows])
            assert set(side.sentences.species) == {species} == {question.species}


def test_a_draw_is_seeded(loaded):
    cells = toy()
    def drawn(**how): return ask(cells, loaded, Ends("cell_type", "a", "b", 5, 4, **how), Change())
    one, same, other = drawn(seed=1), drawn(seed=1), drawn(seed=2)
    assert (len(one.start), len(one.goal)) == (5, 4)
    assert one.start.obs.index.tolist() == same.start.obs.index.tolist() != other.start.obs.index.tolist()


def test_cells_and_ranks_are_counted(loaded):
    sentences = ask(toy(), loaded, AB, Change()).start.sentences
    n, total = detected(sentences, len(loaded.vocab))
    for token in range(len(loaded.vocab)):
        ranks = [s.tolist().index(token) + 1 for s in (sentences[i] for i in range(len(sentences))) if token in s]
        assert n[token] == len(ranks) and total[token] == sum(ranks)


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_genes_are_those_that_enough_cells_hold(loaded, mode):
    question = ask(toy(), loaded, AB, Change(mode), min_cells=5)
    held = np.zeros(len(loaded.vocab), int)
    sides = (question.start, question.goal) if mode == "overexpress" else (question.start,)
    for side in sides: held = np.maximum(held, detected(side.sentences, len(loaded.vocab))[0])
    assert question.genes.tolist() == np.flatnonzero(held >= 5).tolist()


def test_rare_genes_join_by_name(loaded):
    cells = toy()
    some = ask(cells, loaded, AB, Change(), min_cells=12)
    rare = sorted(set(ask(cells, loaded, AB, Change(), min_cells=1).genes) - set(some.genes))
    names = loaded.vocab.describe(rare[:2]).ensembl_id.tolist()
    assert ask(cells, loaded, AB, Change(), min_cells=12, also=names).genes.tolist() == sorted([*some.genes, *rare[:2]])


def test_edits_of_chosen_genes_are_numbered_among_them(loaded):
    question = ask(toy(), loaded, AB, Change())
    chosen = np.array([1, 4])
    for e in question.edits(chosen):
        assert (question.genes[chosen][e.index] == e.genes[:, 0]).all() and e.change.context == 24


@pytest.mark.parametrize("given, message", [
    (Ends("disease", "a", "b"), "state='disease' is none of the 2 columns of obs: pass one of cell_type, donor"),
    (Ends("cell_type", "z", "b"), "start='z' is the 'cell_type' of 0 of 24 cells: pass one of a, b"),
    (Ends("cell_type", "a", "a"), "start and goal are both 'a', 1 state instead of 2: pass two different"),
    (Ends("cell_type", "a", "b", max_goal_cells=2), "max cells of goal is 2, and 3 are the least for a comparison"),
])
def test_ends_that_are_not_there(loaded, given, message):
    with pytest.raises(InputError, match=message): ask(toy(), loaded, given, Change())


def test_too_few_cells_of_two_genes_are_told_by_their_side(loaded):
    cells = toy()
    x = cells.X.toarray()
    x[(cells.obs.cell_type == "b").to_numpy(), 1:] = 0
    x[:, 0] = 5
    cells.X = x
    told = "0 of 12 goal cells hold 2 genes of the vocabulary .human., the cells being human"
    with pytest.raises(InputError, match=told): ask(cells, loaded, AB, Change())


# missing states, donors and genes

GAPS = [None, np.nan, "", " ", "nan", "NA", pd.NA]


@settings(max_examples=25)
@given(st.dictionaries(st.integers(0, 23), st.sampled_from(GAPS), max_size=8), st.sampled_from(["cell_type", "donor"]))
def test_cells_with_a_gap_are_as_if_they_were_not_there(loaded, gaps, column):
    cells = toy()
    values = cells.obs[column].astype(object)
    for i, g in gaps.items(): values.iloc[i] = g
    cells.obs[column] = values
    ends = Ends("cell_type", "a", "b", 5, 4, donor="donor")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = ask(cells, loaded, ends, Change())
    plain = ask(toy()[[i for i in range(24) if i not in gaps]].copy(), loaded, ends, Change())
    for a, b in ((found.start, plain.start), (found.goal, plain.goal)):
        assert a.obs.index.tolist() == b.obs.index.tolist()
        np.testing.assert_array_equal(a.sentences.values, b.sentences.values)
    assert found.genes.tolist() == plain.genes.tolist()
    assert found.donors("donor").tolist() == plain.donors("donor").tolist()
    said = [str(w.message) for w in told]
    assert len(said) == bool(gaps) and all(m.startswith(f"{len(gaps)} of 24 cells have no {column!r}") for m in said)


@pytest.mark.parametrize("gap", [g for g in GAPS if g is not None])   # which asks for all cells
def test_a_gap_is_no_state(loaded, gap):
    cells = toy()
    cells.obs["cell_type"] = cells.obs.cell_type.astype(object).where(np.arange(24) > 5, gap)
    with pytest.warns(UserWarning, match="6 of 24 cells have no 'cell_type'"):
        refused(lambda: ask(cells, loaded, Ends("cell_type", gap, "b"), Change()), "of 0 of 24 cells: pass one of a, b")


def test_whole_numbers_beside_a_gap_are_asked_for_either_way(loaded):
    cells = toy()
    cells.obs["stage"] = np.where(np.arange(24) < 3, np.nan, 1. + np.arange(24) % 2)
    def rows(*ends): return [r.tolist() for r in Ends("stage", *ends).rows(cells.obs)]
    with pytest.warns(UserWarning, match="3 of 24"):
        assert rows(1, 2) == rows(1., 2.) == rows("1", "2") == [list(range(4, 24, 2)), list(range(3, 24, 2))]


def test_gaps_in_a_list_of_genes_are_told(loaded):
    cells, ids = toy(), toy().var_names
    with pytest.warns(UserWarning, match="3 of 5 names in the list of genes are missing"):
        some = ask(cells, loaded, AB, Change("overexpress"), genes=pd.Series([ids[0], None, ids[1], np.nan, ""]))
    assert some.genes.tolist() == loaded.vocab.lookup(list(ids[:2]), "human").tolist()
    with pytest.warns(UserWarning, match="1 of 2 names"): ask(cells, loaded, AB, Change(), also=np.array([ids[0], ""]))
    with pytest.warns(UserWarning, match="2 of 2 names"):
        refused(lambda: ask(cells, loaded, AB, Change(), genes=[None, ""]), "genes= lists 0 genes: pass symbols")
