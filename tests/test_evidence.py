"What is left of the evidence of a perturbation: the condition corpus"
import pytest

from mix_geneformer.cells.corpora import fetch, part_of_corpus
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.perturbation.evidence import INTERFERON


def test_the_condition_corpus_is_cut_once(tmp_path):
    try: blood = fetch("pbmc_ifnb")
    except Exception as e: pytest.skip(f"the pbmc_ifnb corpus is neither cached nor to be had: {e}")
    part = part_of_corpus(blood, tmp_path, n=50, only=dict(cell_type=["CD14+ Monocytes"]))
    a = read_counts(fetch(part).files["human"], verbose=False)
    assert a.n_obs == 50 and set(a.obs.cell_type) == {"CD14+ Monocytes"} and fetch(part).condition == "condition" and set(INTERFERON) <= set(a.var.symbol)
    stamp = next(part.iterdir()).stat().st_mtime_ns
    assert part_of_corpus(blood, tmp_path, n=50, only=dict(cell_type=["CD14+ Monocytes"])) == part and next(part.iterdir()).stat().st_mtime_ns == stamp
