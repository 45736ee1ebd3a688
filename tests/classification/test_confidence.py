"Cells of a type that the source lacks are told from others; labels stay; thresholds, votes and damaged files"
import numpy as np
import pandas as pd
import pytest
from conftest import refused

from mix_geneformer.classification.confidence import COLUMNS, Ask, all_heard, heard, judge_in, judge_of, judged
from mix_geneformer.classification.cotraining import View, view_probabilities

KINDS = np.array(["alpha", "beta", "delta"])


def cells(seed, at, sd=1.):
    return (np.random.default_rng(seed).normal(size=(len(at), 50))*sd+4*np.eye(50)[at]).astype(np.float32)


@pytest.fixture(scope="module")
def source():
    kind = np.arange(600) % 3
    x, donors = cells(0, kind), np.array([f"d{i % 4}" for i in range(600)])
    return x, KINDS[kind], donors, judge_of([View(x, None, 1.)], KINDS[kind], donors)


def said(source, x): return view_probabilities([View(source[0], x, 1.)], source[1], KINDS)


def test_likeness_is_even_for_like_cells_and_low_for_missing_types(source):
    for seed in range(3):
        x = cells(10+seed, np.arange(300) % 3)
        like = heard(said(source, x), list(KINDS), x, source[3]).likeness
        assert .01 < (like < .05).mean() < .11 and .35 < (like > .5).mean() < .65
        x = cells(20+seed, np.full(300, 9))
        new = heard(said(source, x), list(KINDS), x, source[3])
        assert (new.likeness < .05).mean() > .4


def test_what_is_expected_is_near_the_truth_with_and_without_a_missing_type(source):
    kind = np.r_[np.arange(300) % 3, np.full(200, 9)]
    for some in (slice(0, 300), slice(0, 500)):
        x, true = cells(5, kind)[some], kind[some]
        found = heard(said(source, x), list(KINDS), x, source[3])
        columns, table = judged(found, Ask())
        accuracy = (found.best == true).mean()
        assert abs(table.expected_accuracy.iloc[-1]-accuracy) < abs(table.score.iloc[-1]-accuracy)+.03
        assert table.cells.iloc[-1] == len(x) == table.cells[:-1].sum()
        assert columns[COLUMNS[0]].astype(object).tolist() == KINDS[found.best].tolist()   # the best guess, as ever


def test_parts_are_the_whole_and_types_may_stand_in_any_order(source):
    x = cells(7, np.arange(90) % 3)
    p = said(source, x)
    p[4] = np.nan
    read = ~np.isnan(p).any(1)
    one = heard(p, list(KINDS), x[read], source[3], votes=True)
    cut = [heard(p[a:b], list(KINDS), x[a:b][read[a:b]], source[3], votes=True) for a, b in ((0, 5), (5, 90))]
    two = all_heard(cut)
    for name in ("best", "score", "likeness", "p"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    other = heard(p[:, ::-1], list(KINDS[::-1]), x[read], source[3])
    np.testing.assert_array_equal(other.likeness, one.likeness)
    assert one.best[4] == -1 and np.isnan(one.score[4]) and not judged(one, Ask())[0][COLUMNS[3]][4]


def test_a_group_says_what_its_cells_say_on_average(source):
    x = cells(8, np.arange(60) % 3, 2.)
    found = heard(said(source, x), list(KINDS), x, source[3], votes=True)
    groups = np.array(KINDS[np.arange(60) % 3], dtype=object)
    columns, _ = judged(found, Ask(majority_by="cluster"), groups)
    voted = pd.Series(columns[COLUMNS[0]].astype(object)).groupby(groups).nunique()
    assert (voted == 1).all() and (columns[COLUMNS[0]].astype(object) == groups).all()
    assert list(columns) == Ask(majority_by="cluster").columns()


def test_no_cell_was_read():
    found = heard(np.full((3, 2), np.nan), ["a", "b"])
    columns, table = judged(found, Ask(min_score=.5))
    assert len(table) == 0 and pd.isna(columns[COLUMNS[0]]).all() and not columns[COLUMNS[3]].any()


def test_few_cells_and_one_type_a_donor_make_a_judge():
    kind = np.array([0, 0, 1, 1, 1])
    judge = judge_of([View(cells(0, kind), None, 1.)], KINDS[kind])
    assert np.isfinite(judge.temperature)
    alone = judge_of([View(cells(0, kind), None, 1.)], KINDS[kind], KINDS[kind])     # each donor has a type of its own
    x = cells(1, kind)
    likeness = heard(np.tile([.6, .4], (5, 1)), list(KINDS[:2]), x, alone).likeness
    assert np.isnan(likeness).all() and alone.temperature == 1


def test_it_lies_beside_a_classifier_whole_or_is_refused(source, tmp_path):
    source[3].save(tmp_path)
    again, x = judge_in(tmp_path), cells(3, np.arange(30) % 3)
    a, b = (heard(said(source, x), list(KINDS), x, judge) for judge in (source[3], again))
    np.testing.assert_array_equal(a.likeness, b.likeness)
    np.testing.assert_array_equal(a.score, b.score)
    whole = (tmp_path/"calibration.npz").read_bytes()
    for size in (0, 10, len(whole)//2):
        (tmp_path/"calibration.npz").write_bytes(whole[:size])
        refused(lambda: judge_in(tmp_path), f"({size:,} bytes) is cut off or damaged")


@pytest.mark.parametrize("asked", [dict(min_score=-.1), dict(min_score=1.1), dict(min_likeness=5)])
def test_thresholds_are_shares(asked): refused(Ask(**asked).check, "is no share", "from 0 to 1")
