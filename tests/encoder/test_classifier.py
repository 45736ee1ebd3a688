"A classifier sees one cell at a time."
import pytest
import torch
import torch.nn.functional as F
from tinymodel import batch_of, close, row, tiny, two_species

from mix_geneformer.encoder.classifier import classifier_from

@pytest.mark.parametrize("pool", ["mean", "first"])
def test_a_classifier_sees_one_cell_at_a_time(pool):
    v = two_species()
    clf, batch = classifier_from(tiny(v), ["a", "b", "c"], pool).eval(), batch_of([24, 3, 9], v)
    with torch.no_grad():
        whole = clf.logits(batch)
        for i in range(3): close(whole[i], clf.logits(row(batch, i))[0])
    labels = torch.tensor([0, 2, 1])
    close(clf(labels=labels, **batch)["loss"], F.cross_entropy(whole, labels))
