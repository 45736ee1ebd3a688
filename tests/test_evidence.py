"What is left of the evidence of a perturbation: the share that is rank, and the condition corpus"
import numpy as np
import pytest

from mix_geneformer.cells.corpora import fetch, part_of_corpus
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.perturbation.evidence import INTERFERON
from mix_geneformer.statistics import rank_share


def test_share_of_a_ranking_that_is_rank():
    rng, rank = np.random.default_rng(0), np.random.default_rng(1).uniform(1, 99, 500)
    assert rank_share(-rank ** 2, rank) == pytest.approx(1)
    assert rank_share(rank + rng.normal(size=500) * 28, rank) == pytest.approx(.5, abs=.1)   # as much noise as signal
    assert abs(np.mean([rank_share(rng.normal(size=60), rank[:60]) for _ in range(200)])) < .02   # adjusted: nothing by chance
    assert np.isnan(rank_share(np.ones(9), rank[:9])) and np.isnan(rank_share(rank[:5], rank[:5]))


def test_the_condition_corpus_is_cut_once(tmp_path):
    try: blood = fetch("pbmc_ifnb")
    except Exception as e: pytest.skip(f"the pbmc_ifnb corpus is neither cached nor to be had: {e}")
    part = part_of_corpus(blood, tmp_path, n=50, only=dict(cell_type=["CD14+ Monocytes"]))
    a = read_counts(fetch(part).files["human"], verbose=False)
    assert a.n_obs == 50 and set(a.obs.cell_type) == {"CD14+ Monocytes"} and fetch(part).condition == "condition" and set(INTERFERON) <= set(a.var.symbol)
    stamp = next(part.iterdir()).stat().st_mtime_ns
    assert part_of_corpus(blood, tmp_path, n=50, only=dict(cell_type=["CD14+ Monocytes"])) == part and next(part.iterdir()).stat().st_mtime_ns == stamp
