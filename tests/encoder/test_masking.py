"Masking is 80, 10 and 10 of 15 %, and at every position."
import numpy as np
import pytest

from mix_geneformer.encoder.masking import mask_tokens

def test_masking_is_80_10_10_of_15_percent():
    ids = np.arange(2, 200_002)
    masked, chosen = mask_tokens(ids, [100_000, 100_000], [3, 4], 200_002)
    assert abs(chosen.mean() - .15) < .004 and (masked[~chosen] == ids[~chosen]).all()
    kinds = [(masked[chosen] == 1).mean(), (masked[chosen] == ids[chosen]).mean()]
    assert abs(kinds[0] - .8) < .01 and abs(kinds[1] - .1) < .01 and masked.min() >= 1
    random = masked[chosen & (masked != 1) & (masked != ids)]
    assert (
        abs(random.mean() / 100_002 - 1) < 0.03
        and random.min() < 1_000
        and random.max() > 199_000
        and len(np.unique(random)) > 0.98 * len(random)
    )
    # cells and positions are independent
    assert (
        abs(np.corrcoef(chosen[:100_000], chosen[100_000:])[0, 1]) < 0.01
        and abs(np.corrcoef(chosen[:-1], chosen[1:])[0, 1]) < 0.01
    )


@pytest.mark.parametrize("p", [.05, .15, .5, 1.])
def test_masking_has_the_share_asked_for_at_every_position(p):
    n = np.full(4_000, 50)
    chosen = mask_tokens(np.full(n.sum(), 5), n, np.arange(4_000), 100, mlm_probability=p)[1].reshape(4_000, 50)
    assert np.abs(chosen.mean(0) - p).max() < .035 and chosen.any(1).all()
