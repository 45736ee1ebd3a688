"The UMAPs of Figures 2 and 4: the same bytes every time, and what cannot be drawn."
import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from mix_geneformer.files import InputError
from mix_geneformer.paper.figures import umap_panels, umap_states
from mix_geneformer.plots import save_figure

def cells(n=60, seed=0):
    rng = np.random.default_rng(seed)
    kind = np.array([f"type {i % 6}" for i in range(n)], object)
    half = np.arange(n) < n//2
    return pd.DataFrame(dict(
        x=rng.normal(size=n), y=rng.normal(size=n), cell_type=np.where(half, None, kind),
        predicted=np.where(half, None, kind), species=np.where(half, "mouse", "human"),
        state=np.array(["before", "after", "goal"])[np.arange(n) % 3]))


@pytest.mark.parametrize("draw", [
    lambda: umap_panels({"mouse → human": cells(), "human → mouse": cells(seed=1)}),
    lambda: umap_panels({"one": cells()}, {"cell_type": "type"}),
    lambda: umap_states({"a": cells(), "b": cells(seed=1)})])
def test_figures_are_the_same_bytes_every_time(draw, tmp_path):
    a = [p.read_bytes() for p in save_figure(draw(), "f", tmp_path, dpi=60)]
    b = [p.read_bytes() for p in save_figure(draw(), "f", tmp_path, dpi=60)]
    assert a == b and a[0].startswith(b"\x89PNG") and b"<svg" in a[1] and b"<dc:date>" not in a[1]
    assert b"<image" in a[1]   # points are pixels in the svg too
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.png", "f.svg"]


def test_the_same_figure_saved_twice_is_the_same(tmp_path):
    fig = umap_panels({"one": cells()})
    first = [p.read_bytes() for p in save_figure(fig, "f", tmp_path)]
    assert first == [p.read_bytes() for p in save_figure(fig, "f", tmp_path)]


def test_drawing_leaves_the_reader_s_own_style_alone():
    before = dict(mpl.rcParams)
    umap_panels({"one": cells()})
    umap_states({"a": cells()})
    assert dict(mpl.rcParams) == before


def test_a_panel_may_lack_a_column_that_another_has():
    fig = umap_panels({"one": cells(), "two": cells(seed=1).drop(columns="predicted")})
    assert len(fig.axes) == 6 and not fig.axes[4].texts


@pytest.mark.parametrize("frames, columns, message", [
    ({}, {"state": "s"}, "0 panels"),
    ({"a": cells()[:0]}, {"state": "s"}, "has 0 cells"),
    ({"a": cells().drop(columns="x")}, {"state": "s"}, "lacks the columns ['x']"),
    ({"a": cells().assign(y=np.nan)}, {"state": "s"}, "60 cells of panel 'a'"),
    ({"a": cells()}, {"organ": "s"}, "has the column 'organ'")])
def test_panels_that_cannot_be_drawn_are_refused(frames, columns, message):
    with pytest.raises(InputError, match=re.escape(message)): umap_panels(frames, columns)
