"From counts to a question: the cells, their order, and the genes."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import toy

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
