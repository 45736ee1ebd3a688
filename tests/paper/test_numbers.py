"The paper's own numbers, typed a second time."
import re

import pytest

from mix_geneformer.paper.numbers import paper_table

TABLE1 = """Brain 15 96.9 97.6; Heart 11 97.8 97.7; Kidney 18 94.9 95.4; Large_intestine 7 93.1 94.6
            Limb_muscle 9 99.5 99.7; Mammary_gland 7 99.0 99.1; Spleen 10 98.7 98.6; Thymus 6 97.0 97.6
            Tongue 3 94.9 95.3"""
TABLE2 = """Spleen 6 98.9 99.0; Brain 6 96.8 97.7; Immune 10 94.4 95.1; Kidney 15 92.8 93.3
            Large_intestine 16 92.7 93.4; Liver 12 91.1 91.2; Lung 16 93.4 94.3; Pancreas 15 93.0 93.5
            Placenta 3 97.9 98.2"""


def expected(text):
    rows = [r.split() for r in re.split(r";|\n", text) if r.strip()]
    return [(o.replace("_", " "), int(n), float(a), float(b)) for o, n, a, b in rows]


@pytest.mark.parametrize("which, text", [(1, TABLE1), (2, TABLE2)])
def test_every_organ_and_number_of_the_paper(which, text):
    assert list(paper_table(which).itertuples(index=False, name=None)) == expected(text)


def test_perturbed_genes_and_figure4_of_the_paper():
    assert list(paper_table(3).itertuples(index=False, name=None)) == [
        ("mouse", "ALDOB", .011, 1.56e-2), ("mouse", "ALDH3B2", .011, 9.03e-3),
        ("human", "MTRNR2L11", .202, 0.), ("human", "NAP1L6", .035, 1.66e-3)]
    assert dict(paper_table("figure 4").values) == {"human": .43, "mouse": .05}
    assert "95.8" in paper_table(1).attrs["note"] and "abstract" in paper_table(1).attrs["note"]
