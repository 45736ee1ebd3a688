"Which cell is read when."

import numpy as np
import pandas as pd
import pytest

from mix_geneformer.cells.mixing import (
    cell_weights,
    cells_in_turn,
    mixed_batches,
    mixed_order,
    named_shares,
    study_shares,
)
from mix_geneformer.files import InputError

STUDIES = np.repeat(["blood", "gut", "skin", "spleen"], [900, 70, 7, 200]).astype(object)
SPECIES = np.repeat(["human", "mouse"], [900, 277]).astype(object)


def test_each_species_has_the_same_share_at_any_power():
    for power in 0, 0.5, 1:
        w = study_shares(STUDIES, SPECIES, power)
        assert w["blood"] == pytest.approx(0.5) and w.sum() == pytest.approx(1)


def test_a_study_of_both_species_has_one_share():
    w = study_shares(["a"] * 4 + ["b"] * 4, ["human", "human", "mouse", "mouse"] + ["mouse"] * 4)
    assert list(w.index) == ["a", "b"] and w.sum() == pytest.approx(1)


def test_the_epochs_of_a_run_hold_the_shares():
    shares = study_shares(STUDIES, SPECIES)
    read = np.concatenate([mixed_order(STUDIES, shares, 100, 3, e) for e in range(40)])
    found = np.array([(STUDIES[read] == s).sum() for s in shares.index])
    assert np.abs(found - shares.to_numpy() * 4000).max() <= 1
    times = np.bincount(read, minlength=len(STUDIES))
    for s in shares.index:
        assert np.ptp(times[STUDIES == s]) <= 1  # cells of a study take turns


def test_turns_do_not_depend_on_where_one_enters():
    cells = np.arange(100, 113)
    row = cells_in_turn(cells, 0, 200, (5, 1))
    for start, stop in (0, 1), (12, 14), (13, 26), (25, 199), (39, 39):
        assert (cells_in_turn(cells, start, stop, (5, 1)) == row[start:stop]).all()


def test_seeds_differ_and_repeat():
    shares = study_shares(STUDIES, SPECIES)
    a, b, c = (mixed_order(STUDIES, shares, 64, seed, 2) for seed in (0, 0, 1))
    assert (a == b).all() and (a[: len(c)] != c[: len(a)]).any()


@pytest.mark.parametrize("window", [1, 4])
def test_batches_are_full_and_hold_the_order(window):
    order, lengths = mixed_order(STUDIES, study_shares(STUDIES, SPECIES), 320, 0, 1), np.arange(len(STUDIES)) % 90 + 1
    batches = mixed_batches(order, lengths, 32, window, 0, 1)
    assert {len(b) for b in batches} == {32}
    assert set(np.concatenate(batches)) <= set(order)


def test_windows_leave_less_padding():
    order, lengths = np.random.default_rng(0).permutation(960), np.random.default_rng(1).integers(10, 90, 960)
    pads = [
        sum(32 * lengths[b].max() - lengths[b].sum() for b in mixed_batches(order, lengths, 32, w)) for w in (1, 10)
    ]
    assert pads[1] < pads[0] / 2


def test_statistics_weigh_cells_as_they_are_read():
    w = cell_weights(STUDIES, study_shares(STUDIES, SPECIES))
    assert w.mean() == pytest.approx(1) and w[STUDIES == "blood"].sum() == pytest.approx(w[STUDIES != "blood"].sum())
    assert (cell_weights(STUDIES, named_shares(dict(gut=1), STUDIES))[STUDIES != "gut"] == 0).all()


@pytest.mark.parametrize(
    "shares, said",
    [
        (dict(lung=1.0), "1 of 1 shares name no study"),
        (dict(gut=0.0), "0 of 1 shares are above 0"),
        (dict(gut=1, skin=-1), "1 of 2 shares are above 0"),
    ],
)
def test_bad_shares_get_a_sentence(shares, said):
    with pytest.raises(InputError, match=said):
        named_shares(shares, STUDIES)


@pytest.mark.parametrize("gap", [None, np.nan, "", "NA"])
def test_cells_of_no_known_study_are_not_read(gap):
    studies, species = np.array(["a"]*6 + ["b"]*3 + [gap]*4, dtype=object), np.repeat(["human", "mouse"], [6, 7])
    shares = study_shares(studies, species)
    pd.testing.assert_series_equal(shares, study_shares(studies[:9], species[:9]))
    assert (cell_weights(studies, shares)[9:] == 0).all() and mixed_order(studies, shares, 40).max() < 9
    with pytest.raises(InputError, match="the studies are a, b"): named_shares(dict(c=1), studies)
    with pytest.raises(InputError, match="0 of 4 cells have a study"): study_shares(studies[9:], species[9:])
