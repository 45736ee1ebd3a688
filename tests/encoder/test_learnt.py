"Whether a model has learnt."

import numpy as np
import pytest
import torch
from programmes import CONTEXT, GENES, SMALL, apart_of, four_programmes

from mix_geneformer.cells.sentences import Sentences
from mix_geneformer.encoder.learnt import has_learnt, hidden_places, keep_apart, learnt_sentence, model_losses
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
