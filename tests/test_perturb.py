"Genes of like rank and detection, and the p-value that compares with them."
import numpy as np

from mix_geneformer.statistics import like_genes, matched_p


def test_like_genes_are_the_nearest_others():
    rng = np.random.default_rng(0)
    rank, seen = rng.uniform(1, 99, 40), rng.uniform(.1, 1, 40)
    xy = np.column_stack([rank, np.log(seen)])
    far = np.linalg.norm(((xy - xy.mean(0)) / xy.std(0))[:, None] - ((xy - xy.mean(0)) / xy.std(0))[None], axis=-1)
    np.fill_diagonal(far, np.inf)
    np.testing.assert_array_equal(like_genes(rank, seen, 5), np.argsort(far, 1)[:, :5])
    same = like_genes(np.ones(9), np.ones(9), 4)   # all alike: any others will do
    assert same.shape == (9, 4) and not (same == np.arange(9)[:, None]).any()


def test_matched_p_is_uniform_without_effect():
    rng = np.random.default_rng(0)
    rank = rng.uniform(1, 100, 2000)
    p = matched_p(rng.normal(size=2000) * rank + rank, rank, rng.uniform(.1, 1, 2000))   # rank decides mean and spread
    assert abs((p < .05).mean() - .05) < .02 and .4 < p.mean() < .6
