"First weights from counts."

import numpy as np
import pytest
import torch
from programmes import SMALL, apart_of, four_programmes

from mix_geneformer.encoder.model import build_model
from mix_geneformer.encoder.start import gene_frequencies, start_from_coexpression

@pytest.fixture(scope="module")
def cells():
    return four_programmes()


def test_the_start_predicts_before_the_first_step(cells):
    vocab, s = cells
    torch.manual_seed(0)
    random, apart = build_model(vocab, **SMALL), apart_of(cells)
    before = apart.table(random).iloc[-1]
    after = apart.table(start_from_coexpression(random, s.take(np.arange(200)))).iloc[-1]
    assert after.model < before.model and after.gained > -0.05


def test_the_start_spares_steps(cells):
    "After the same few steps the loss of cells kept apart is lower by far."
    vocab, s = cells
    apart, train, found = apart_of(cells), s.take(np.arange(200)), {}
    for start in False, True:
        torch.manual_seed(0)
        m = build_model(vocab, **SMALL)
        if start:
            start_from_coexpression(m, train)
        best = torch.optim.Adam(m.parameters(), lr=2e-3)
        for step in range(10):
            ids = torch.as_tensor(np.stack([train[i] for i in range(step * 20, step * 20 + 20)]).astype(np.int64))
            hide = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.15
            loss = torch.nn.functional.cross_entropy(m(ids.masked_fill(hide, 1)).logits[hide], ids[hide])
            best.zero_grad(), loss.backward(), best.step()
        found[start] = apart.table(m).iloc[-1].gained
    assert found[True] > found[False] + 0.2


def test_frequencies_are_those_that_are_read(cells):
    vocab, s = cells
    w = np.where(np.arange(240) % 4 == 0, 4.0, 0.0)
    f = gene_frequencies(s, len(vocab), weights=w, prior=0)
    assert f[2:32].sum() == pytest.approx(1) and f[32:].sum() == 0
