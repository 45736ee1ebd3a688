"First-order shifts: the gradient against finite differences, and what a shortlist misses."
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from perturbed import near, reader_of, tiny, told

from mix_geneformer.encoder.model import encode
from mix_geneformer.perturbation.edits import Change, all_edits
from mix_geneformer.perturbation.screening import constant_keys, cosine_gradient, screen_shifts
from mix_geneformer.perturbation.shifts import Towards, cosine

GENES = np.arange(2, 202)


@pytest.fixture(scope="module")
def towards():
    "Longer sentences"
    rng, reader = np.random.default_rng(2), reader_of(tiny(202, 128, spread=.02))
    cells = told([rng.permutation(GENES)[:n] for n in rng.integers(60, 120, 12)])
    return Towards(reader, cells, reader.means(told([rng.permutation(GENES)[:50] for _ in range(3)])).mean(0))


def held(towards, mode, positions="shift"):
    "All changes of genes that their cell holds"
    edits = all_edits(towards.sentences, GENES, Change(mode, positions, context=128))
    return [e for e in edits if not e.added]


def both_ways(towards, mode, positions):
    edits = held(towards, mode, positions)
    exact = pd.DataFrame(towards.shifts(edits))
    return pd.DataFrame(screen_shifts(towards, edits)).merge(exact, on=["cell", "gene"])


def in_double(towards, length=None):
    "The model, the tokens of the first cell and the goal, in float64"
    model = copy.deepcopy(towards.reader.model).double()
    return model, torch.from_numpy(towards.sentences[0][:length])[None], torch.from_numpy(towards.goal).double()


# the others change a whole position embedding
@pytest.mark.parametrize("mode, least", [("delete", .97), ("overexpress", .8), ("inhibit", .85), ("activate", .85)])
def test_screened_shifts_follow_the_exact_ones(towards, mode, least):
    assert both_ways(towards, mode, "keep")[["screened", "shift"]].corr("spearman").iloc[0, 1] > least


def test_gate_gradient_is_the_finite_difference(towards):
    model, ids, goal = in_double(towards)
    none = torch.zeros(ids.shape, dtype=torch.float64)

    def cos(i, gate):
        bias = none.clone()
        bias[0, i] = np.log(gate)
        with torch.no_grad(): mean = encode(model, dict(input_ids=ids, key_bias=bias)).mean(1)
        return cosine(mean, goal).item()
    slope = cosine_gradient(reader_of(model), dict(input_ids=ids), "key_bias", none, goal)[0]
    for i in (0, 7, ids.shape[1] - 1):
        assert slope[i].item() == pytest.approx((cos(i, 1.001) - cos(i, .999)) / .002, rel=1e-4)


def test_own_state_is_left_out_of_the_gradient(towards):
    "The gradient through the own state alone is that of a sentence whose other tokens do not see the change"
    model, ids, goal = in_double(towards, 20)
    words = model.bert.embeddings.word_embeddings(ids).detach()
    def hidden(x): return encode(model, dict(inputs_embeds=x))
    base = hidden(words).mean(1)
    with constant_keys(model):
        own = cosine_gradient(reader_of(model), dict(input_ids=ids), "inputs_embeds", words, goal)
    step = torch.zeros_like(words)
    step[0, 4] = torch.randn(words.shape[-1], generator=torch.manual_seed(0)) * 1e-4
    with torch.no_grad(): change = hidden(words + step) - hidden(words)
    moved = cosine(base + change[:, 4] / 20, goal) - cosine(base, goal)
    assert (own * step).sum().item() == pytest.approx(moved.item(), rel=.1)   # its own key is one of twenty
    with torch.no_grad(): assert torch.equal(hidden(words), hidden(words))
    assert not any(m._forward_hooks for m in model.modules())


def test_screening_misses_few_genes(towards):
    gene = both_ways(towards, "delete", "keep").groupby("gene")[["screened", "shift"]].mean()
    best, chosen = gene["shift"].nlargest(10).index, gene["screened"].nlargest(20).index
    assert len(set(best) & set(chosen)) >= 9


def test_screening_of_shifted_positions_is_no_use(towards):
    assert both_ways(towards, "delete", "shift")[["screened", "shift"]].corr("spearman").iloc[0, 1] < .6


def test_screened_shifts_do_not_depend_on_the_batch(towards):
    edits = held(towards, "inhibit")
    one_by_one = Towards(reader_of(towards.reader.model, 1), towards.sentences, towards.goal)
    near(pd.DataFrame(screen_shifts(towards, edits)), pd.DataFrame(screen_shifts(one_by_one, edits)))
