"Plain methods see no test label, statistics agree with closed forms and scipy, arms have equal budgets, and what was made is not made again"
import importlib.util, json, os

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from conftest import refused, toy
from mix_geneformer.statistics import scores
from mix_geneformer.cells.normalising import log_normalised, variable_genes
from mix_geneformer.paper.baselines import BASELINES, _one_vs_rest, baseline_names, logistic
from mix_geneformer.statistics import auroc, mean_interval, paired_test, verdict
from mix_geneformer.paper.experiment import ARMS, Experiment
from mix_geneformer.paper.organs import organ_table, told
from mix_geneformer.paper.profiles import PROFILES, profile_settings

NEEDS = dict(celltypist="celltypist", harmony="harmonypy", scanvi="scvi")


def cells(n=150, genes=60, types=3, seed=0):
    rng, kind = np.random.default_rng(seed), np.arange(n) % types
    x = sp.csr_matrix(rng.poisson(.4 + 3*(np.arange(genes) % types == kind[:, None])).astype(np.float32))
    return x, np.array([f"type {k}" for k in range(types)], dtype=object)[kind], np.arange(n//3, n), np.arange(n//3), np.array([f"d{i % 4}" for i in range(n)])


@pytest.mark.parametrize("name", BASELINES)
def test_a_method_learns_and_no_test_label_is_used(name):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None: pytest.skip(f"{NEEDS[name]} is of the extra 'baselines', not installed here")
    x, y, train, test, donors = cells()
    short = dict(epochs=4, label_epochs=4, device="cpu") if name == "scanvi" else {}
    p = BASELINES[name](x, y, train, test, donors, 0, **short)
    assert list(p.index) == list(test) and list(p.columns) == sorted(set(y)) and p.to_numpy().min() >= 0 and p.to_numpy().max() <= 1 + 1e-6
    wrong = y.copy()
    wrong[test] = np.roll(y[test], 1)
    pd.testing.assert_frame_equal(p, BASELINES[name](x, wrong, train, test, donors, 0, **short))
    wrong[test] = None
    pd.testing.assert_frame_equal(p, BASELINES[name](x, wrong, train, test, donors, 0, **short))
    if name not in ("majority", "scanvi"): assert scores(y[test], p.idxmax(axis=1))["accuracy"] > .9


@pytest.mark.parametrize("name", ["logistic", "pca_knn"])
def test_genes_and_scaling_come_from_the_training_cells_alone(name):
    "Whatever is in the other test cells, a test cell's probabilities stay"
    x, y, train, test, _ = cells()
    p = BASELINES[name](x, y, train, test)
    other = x.toarray()
    other[test[1:]] = other[test[1:]][:, ::-1]*7
    np.testing.assert_allclose(BASELINES[name](sp.csr_matrix(other), y, train, test).iloc[0], p.iloc[0], rtol=1e-9, atol=1e-12)


def test_logistic_regression_is_the_plain_one():
    x, y, train, test, _ = cells()
    dense = np.log1p(1e4*x.toarray().astype(float)/x.toarray().sum(1, keepdims=True))
    genes = np.sort(np.argsort(-dense[train].var(0), kind="stable")[:20])
    scale = StandardScaler().fit(dense[train][:, genes])
    plain = LogisticRegression(C=.1, max_iter=500).fit(np.clip(scale.transform(dense[train][:, genes]), -10, 10), y[train]).predict_proba(np.clip(scale.transform(dense[test][:, genes]), -10, 10))
    np.testing.assert_array_equal(variable_genes(log_normalised(x[train]), 20), genes)
    np.testing.assert_allclose(logistic(x, y, train, test, n_genes=20), plain, atol=1e-6)


def test_one_against_the_rest_is_a_regression_per_type():
    x, y, train, test, _ = cells()
    a, b = (log_normalised(x)[rows].toarray() for rows in (train, test))
    both = _one_vs_rest(C=1., max_iter=500, multi_class="ovr").fit(a, y[train])
    for i, t in enumerate(both.classes_):
        np.testing.assert_allclose(both.decision_function(b)[:, i], LogisticRegression(C=1., max_iter=500).fit(a, y[train] == t).decision_function(b), atol=1e-9)
    two = y[train] != "type 2"
    np.testing.assert_allclose(_one_vs_rest(C=1.).fit(a[two], y[train][two]).coef_, LogisticRegression(C=1.).fit(a[two], y[train][two]).coef_)


def test_bad_parts_are_refused():
    x, y, train, test, _ = cells()
    refused(lambda: logistic(x, y, train, train), "100 cells are in the training and in the test part")
    refused(lambda: logistic(x, y, [], test), "0 cells to learn from")
    refused(lambda: logistic(x, np.where(np.arange(150) == 60, None, y), train, test), "1 of 100 training cells have no label")
    refused(lambda: baseline_names("svm"), "svm", "scanvi")
    for name, needs in NEEDS.items():
        if importlib.util.find_spec(needs) is None: refused(lambda: baseline_names(name), needs, "make reproduce BASELINES=all", "mix-geneformer[baselines]")


def test_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    y, p = rng.choice(["a", "b", "c"], 60), rng.dirichlet(np.ones(3), 60).round(1)
    assert auroc(pd.DataFrame(p, columns=list("abc")), y) == pytest.approx(np.mean([roc_auc_score(y == t, p[:, i]) for i, t in enumerate("abc")]))
    assert auroc(pd.DataFrame(p[:, :2], columns=list("ab")), ["z"]*30 + ["y"]*30) == .5 and np.isnan(auroc(pd.DataFrame(p, columns=list("abc")), ["a"]*60))


@pytest.mark.parametrize("share", [None, .1, .2, .5])
@pytest.mark.parametrize("n", [2, 5, 10])
def test_intervals_and_tests_against_their_formulas(n, share):
    rng = np.random.default_rng(n)
    a = rng.uniform(.6, 1, n)
    b = a - rng.normal(.03, .02, n)
    d, factor = a - b, 1/n + (share/(1 - share) if share else 0)
    t = d.mean()/np.sqrt(d.var(ddof=1)*factor)
    found = paired_test(a, b, share)
    assert found["p_value"] == pytest.approx(2*scipy.stats.t.sf(abs(t), n - 1)) and found["difference"] == pytest.approx(d.mean())
    half = scipy.stats.t.ppf(.975, n - 1)*np.sqrt(d.var(ddof=1)*factor)
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half)) and (found["low"] > 0) == (found["p_value"] < .05 and d.mean() > 0)
    if share is None: assert found["p_value"] == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    mean, low, high = mean_interval(a, share)
    assert (mean, high - low) == pytest.approx((a.mean(), 2*scipy.stats.t.ppf(.975, n - 1)*np.sqrt(a.var(ddof=1)*factor)))


def test_what_cannot_be_said_is_not_said():
    assert np.isnan(paired_test([.9], [.8])["p_value"]) and np.isnan(mean_interval([.9])[1])
    assert verdict(paired_test([.9, .9], [.8, .8])) == "not tested"   # the same difference on every seed has no spread to judge it by
    assert verdict(paired_test([.9, .9], [.9, .9])) == "no difference shown"
    refused(lambda: mean_interval([]), "0 values have no mean")
    refused(lambda: paired_test([1, 2], [1, 2], 1.), "test_share=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    (folder/"toy").mkdir()
    for i, s in enumerate(("human", "mouse")): toy(s, 60, seed=i).write_h5ad(folder/"toy"/f"{s}.h5ad")
    settings = {k: v for k, v in profile_settings("smoke").items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "context", "attention_probs_dropout_prob", "batch_size",
                "max_steps", "learning_rate", "warmup_steps") or k.startswith("finetune_")}
    make = lambda **more: Experiment(folder/"work", folder/"toy", device="cpu", progress=False, **{**settings, **more})
    e = make(pretrain_seeds=2)
    return folder, make, e, e.organ_runs("human", seeds=3, random_seeds=1, control_seeds=1, control_splits=["donor"])


def trained(folder, name): return {p.parent.name: json.loads(p.read_text()) for p in folder.glob(f"work/{name}-*/training.json")}


def test_every_pretrained_arm_has_the_same_budget(made):
    folder = made[0]
    budgets = [(t["steps"], t["cells_seen"]) for t in trained(folder, "pretrain").values() if t["learning_rate"]]
    assert len(budgets) == 5 and set(budgets) == {(4, 64)}   # single and mixed of two pretraining seeds, MLM only of one


def test_random_weights_are_those_that_were_drawn(made):
    import torch
    from mix_geneformer.encoder.checkpoints import load_model
    from mix_geneformer.encoder.model import build_model
    _, _, e, _ = made
    torch.manual_seed(0)
    drawn = build_model(e.vocab, **{k: getattr(e.model, k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "context", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")})
    kept = load_model(e.pretrained(**ARMS["random weights"]), "cpu").model.state_dict()
    for k, v in drawn.state_dict().items(): torch.testing.assert_close(kept[k], v, rtol=0, atol=0)


def test_the_runs_are_those_that_were_asked_for(made):
    _, _, e, runs = made
    n = runs.groupby(["split", "method"]).size().to_dict()
    plain = ("majority", "logistic regression", "PCA + k-NN")
    assert n == {**{("random", m): 1 for m in ("mixed", "human only", *plain)}, **{("donor", m): 3 for m in ("mixed", "human only", *plain)}, **{("donor", m): 1 for m in ("random weights", "MLM only")}}
    assert runs.groupby(["split", "seed"]).test_cells.nunique().eq(1).all()   # all methods of a seed share its split
    assert runs.query("split == 'random'").held_out.eq("").all() and set(runs.query("split == 'donor'").held_out) <= {"d0", "d1", "d2"}


def test_what_was_made_is_kept_and_other_settings_lie_beside_it(made):
    folder, make, e, runs = made
    stamp = lambda: {str(p): p.stat().st_mtime_ns for p in folder.glob("work/**/*") if p.is_file()}
    before = stamp()
    pd.testing.assert_frame_equal(make(pretrain_seeds=2).organ_runs("human", seeds=3, random_seeds=1, control_seeds=1, control_splits=["donor"]), runs)
    assert stamp() == before
    make(learning_rate=2e-3).pretrained()
    after = stamp()
    assert before.items() <= after.items() and len(after) > len(before)


def test_the_table_says_what_was_not_run_and_where_the_model_loses(made):
    from mix_geneformer.paper.tables import with_paper
    runs = made[3]
    t = organ_table(runs)
    assert t[t.command.notna()].method.tolist() == ["random weights", "MLM only", "CellTypist", "Harmony + k-NN", "scANVI"] + ["CellTypist", "Harmony + k-NN", "scANVI"] and t[t.command.notna()].accuracy.isna().all()
    assert t.query("split == 'random'")["accuracy low"].isna().all() and t.query("split == 'donor' and method == 'mixed'")["accuracy low"].notna().all()
    full = with_paper(t, 2, "elsewhere")
    assert full.query("method == 'scANVI'").status.eq("not run: `make reproduce BASELINES=all`").all() and "command" not in full
    worse = runs.assign(accuracy=np.where(runs.method.eq("logistic regression"), .9 + runs.seed*.001, .5 - runs.seed*.002), macro_f1=.5)
    assert "loses (mixed, human only, PCA + k-NN)" in told(organ_table(worse))
    assert (organ_table(worse).query("split == 'donor' and method == 'mixed'")["against logistic regression"] == "loses (macro-F1: no difference shown)").all()


def test_evidence_is_small_with_more_seeds_and_all_arms():
    small, evidence = PROFILES["small"], profile_settings("evidence")
    assert {k for k in evidence if evidence[k] != small.get(k)} == {"seeds", "pretrain_seeds", "random_seeds", "control_seeds", "control_splits", "transfer_encoder_seeds", "transfer_only",
                                                                         "gap_seeds", "gap_cells", "gap_encoders", "gap_condition_cells", "ablation_seeds", "ablation_only"}
    assert evidence["seeds"] >= 5 and evidence["control_splits"] == ["random", "donor"]
