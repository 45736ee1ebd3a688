"Whether a model has learnt."

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programmes import CONTEXT, GENES, SMALL, apart_of, four_programmes

from mix_geneformer.cells.sentences import Sentences, sentences_of
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.encoder.learnt import Apart, has_learnt, hidden_places, keep_apart, learnt_sentence, model_losses
from mix_geneformer.encoder.model import build_model
from mix_geneformer.files import InputError

@pytest.fixture(scope="module")
def cells():
    return four_programmes()


def test_hidden_places_do_not_depend_on_the_batch(cells):
    vocab, s = cells
    torch.manual_seed(0)
    m, some = build_model(vocab, **SMALL), s.take(np.arange(30))
    places = hidden_places(some, vocab, CONTEXT)
    np.testing.assert_allclose(
        model_losses(m, some, vocab, places, CONTEXT), model_losses(m, some, vocab, places, CONTEXT, 4), rtol=1e-4
    )


def test_a_hidden_gene_cannot_be_read(cells):
    "A model that copies what it sees knows nothing of hidden places: each is <mask>, none is left as it is."
    vocab, s = cells
    torch.manual_seed(0)
    m, some = build_model(vocab, **SMALL), s.take(np.arange(30))
    places = hidden_places(some, vocab, CONTEXT)
    other = Sentences(some.values.copy(), some.offsets, "human")
    at = some.offsets[places.cell] + places["rank"]
    other.values[at] = 2 + (other.values[at] - 1) % GENES  # other genes at the hidden places
    a, b = (model_losses(m, x, vocab, places, CONTEXT) for x in (some, other))
    np.testing.assert_array_equal(a, b)


def test_whole_donors_are_kept_apart():
    study, donor = np.repeat(["a", "b"], [100, 40]), np.array([f"d{i % 7}" for i in range(140)])
    part = keep_apart(study, donor, 0.1, seed=3)
    for s in "ab":
        held = set(donor[(study == s) & (part == "held out")])
        assert held and not held & set(donor[(study == s) & (part == "train")])


def test_without_donors_cells_are_kept_apart():
    part = keep_apart(np.repeat("a", 50), None, 0.1)
    assert (part == "held out").sum() == 5


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(apart=("x",)), "1 of 1 studies to keep apart are not there"),
        (dict(apart=("a",)), "0 of 50 cells are left to learn from"),
    ],
)
def test_bad_splits_get_a_sentence(how, said):
    with pytest.raises(InputError, match=said):
        keep_apart(np.repeat("a", 50), **how)


def test_random_weights_are_called_so(cells):
    vocab, _ = cells
    torch.manual_seed(0)
    t = apart_of(cells).table(build_model(vocab, **SMALL))
    assert not has_learnt(t) and learnt_sentence(t).startswith("HAS NOT LEARNT")
    assert t["per cell type"].iloc[-1] < t["gene frequencies"].iloc[-1] - 0.5  # types tell more than frequencies


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None, "nan"]), st.sampled_from(["d1", "d2", "d3", None, ""])),
                min_size=12, max_size=60), st.integers(0, 3))
def test_cells_whose_place_is_unknown_are_nowhere(cells, seed):
    "The parts of the others are those of the corpus without these cells, and no donor is on two sides"
    studies, donors = (np.array(x, dtype=object) for x in zip(*cells))
    known = {s for s, d in cells if s in ("a", "b") and d}
    out = np.array([s not in ("a", "b") or (s in known and not d) for s, d in cells])
    if out.all(): return
    part = keep_apart(studies, donors, .2, seed=seed)
    assert ((part == "left out") == out).all()
    assert (part[~out] == keep_apart(studies[~out], donors[~out], .2, seed=seed)).all()
    for s in known:
        mine = [(d, p) for (t, d), p in zip(cells, part) if t == s and d]
        alone = len({d for d, _ in mine}) == 1          # then single cells are held out
        train, held = ({d for d, p in mine if p == side} for side in ("train", "held out"))
        assert alone or not train & held


def test_cells_of_no_known_type_are_no_type(vocab, corpus):
    "They are asked as gene frequencies are, and teach no type anything"
    cells = sentences_of(load_corpus(corpus))
    types = np.where(np.arange(len(cells)) % 4 == 0, None, np.where(np.arange(len(cells)) % 2, "x", "y"))
    part = np.where(np.arange(len(cells)) % 6 < 2, "held out", "train")
    apart = Apart(cells, vocab, 24, part, np.full(len(cells), "s"), types=types)
    gap = np.array([t is None for t in types[np.flatnonzero(part != "train")]])[apart.places.cell]
    per_type, overall = apart.references["per cell type"], apart.references["gene frequencies"]
    assert gap.any() and np.allclose(per_type[gap], overall[gap]) and not np.allclose(per_type[~gap], overall[~gap])
