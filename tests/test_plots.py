"Colours, and cells as points."
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mix_geneformer.plots import MISSING, PALETTE, palette, points

def test_colours_follow_the_label_and_do_not_repeat():
    assert palette(["b", "a"]) == palette(["a", "b", "a", None])
    assert len(set(PALETTE)) == 20 and MISSING not in PALETTE
    for n in (1, 20, 21, 100): assert len(set(palette(f"t{i}" for i in range(n)).values())) == n
    reserved = palette(["human", "mouse", "before", "after", "goal"])
    assert not set(palette(f"t{i}" for i in range(20)).values()) & {reserved[k] for k in ("human", "mouse", "goal")}


def test_colours_do_not_depend_on_the_process():
    "Labels that differ in case alone tie in the alphabet; a set's order differs from process to process"
    code = ("from mix_geneformer.plots import palette; "
            "print(palette(['mast cell', 'Mast cell', 'MAST cell', 'Beta', 'beta']))")
    said = set()
    for seed in range(4):
        found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)},
                               capture_output=True, text=True, check=True)
        said.add(found.stdout)
    assert len(said) == 1 and "mast cell" in said.pop()


@pytest.mark.parametrize("column", ["tissue", "empty"])
def test_cells_without_a_label_are_grey_and_have_no_number(column):
    "A column that a panel lacks, and one without any label"
    fig, ax = plt.subplots()
    points(ax, pd.DataFrame(dict(x=[0., 1], y=[0., 1], empty=np.nan)), column, {}, {}, None)
    plt.close(fig)
    assert [len(c.get_offsets()) for c in ax.collections] == [2] and not ax.texts
