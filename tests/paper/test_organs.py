"Tables 1 and 2 say what was not run and where the model loses."
import numpy as np
import pandas as pd

from mix_geneformer.paper.organs import organ_table, organ_view, told
from mix_geneformer.paper.tables import with_paper

METHODS = ["mixed", "human only", "majority", "logistic regression", "PCA + k-NN"]


def runs():
    "One seed of the random split, three of the donors' with the controls in the first: as `Experiment.organ_runs`"
    rng, rows = np.random.default_rng(0), []
    for split, seeds in (("random", 1), ("donor", 3)):
        for seed in range(seeds):
            methods = METHODS + (["random weights", "MLM only"] if split == "donor" and seed == 0 else [])
            held = "" if split == "random" else f"d{seed}"
            for m in methods:
                size = dict(types=2, train_cells=40, test_cells=20, test_share=1/3, held_out=held)
                rows.append(dict(size, organ="Toy", split=split, seed=seed, method=m, accuracy=rng.uniform(.5, 1),
                                 macro_f1=rng.uniform(.5, 1)))
    return pd.DataFrame(rows)


def test_the_table_says_what_was_not_run():
    t = organ_table(runs())
    extra, left = ["CellTypist", "Harmony + k-NN", "scANVI"], t[t.command.notna()]
    assert left.method.tolist() == ["random weights", "MLM only", *extra] + extra and left.accuracy.isna().all()
    assert t.query("split == 'random'")["accuracy low"].isna().all()
    assert t.query("split == 'donor' and method == 'mixed'")["accuracy low"].notna().all()
    assert t.query("split == 'donor'")["held-out donors"].dropna().unique().tolist() == ["d0; d1; d2", "d0"]
    full = with_paper(t, 2, "elsewhere")
    left = full.query("method == 'scANVI'")
    assert left.status.eq("not run: `make reproduce BASELINES=all`").all() and "command" not in full


def test_the_table_says_where_the_model_loses():
    found = runs()
    best = found.method.eq("logistic regression")
    worse = found.assign(accuracy=np.where(best, .9 + found.seed*.001, .5 - found.seed*.002), macro_f1=.5)
    t = organ_table(worse)
    assert "loses (mixed, human only, PCA + k-NN)" in told(t)
    said = t.query("split == 'donor' and method == 'mixed'")["against logistic regression"]
    assert (said == "loses (macro-F1: no difference shown)").all()


def test_a_page_shows_what_was_run_and_says_what_was_not():
    shown, not_run = organ_view(with_paper(organ_table(runs()), 2, "elsewhere"))
    assert {"accuracy (%)", "paper Mix-Geneformer (%)"} < set(shown)
    assert not set(shown) & {"status", "types", "held-out donors"}
    assert "scANVI" not in set(shown.method) and "CellTypist, Harmony + k-NN, scANVI: `make" in not_run
