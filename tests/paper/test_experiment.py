"Arms have equal budgets, runs are those that were asked for, and what was made is not made again."
import json

import pandas as pd
import pytest
import torch
from conftest import toy

from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.encoder.model import build_model
from mix_geneformer.paper.experiment import ARMS, Experiment, Plan
from mix_geneformer.paper.profiles import model_settings, profile_settings

OFTEN = dict(seeds=3, random_seeds=1, control_seeds=1, control_splits=["donor"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    (folder/"toy").mkdir()
    for i, s in enumerate(("human", "mouse")): toy(s, 60, seed=i).write_h5ad(folder/"toy"/f"{s}.h5ad")
    settings = model_settings(profile_settings("smoke"))
    def make(**more):
        return Experiment(folder/"work", folder/"toy", device="cpu", progress=False, **{**settings, **more})
    e = make(pretrain_seeds=2)
    return folder, make, e, e.organ_runs("human", **OFTEN)


def trained(folder, name):
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob(f"work/{name}-*/training.json")}


def test_every_pretrained_arm_has_the_same_budget(made):
    folder = made[0]
    budgets = [(t["steps"], t["cells_seen"]) for t in trained(folder, "pretrain").values() if t["learning_rate"]]
    # single and mixed of two pretraining seeds, MLM only of one
    assert len(budgets) == 5 and set(budgets) == {(4, 64)}


def test_random_weights_are_those_that_were_drawn(made):
    _, _, e, _ = made
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "context", "hidden_act",
             "hidden_dropout_prob", "attention_probs_dropout_prob")
    torch.manual_seed(0)
    drawn = build_model(e.vocab, **{k: getattr(e.model, k) for k in names})
    kept = load_model(e.pretrained(**ARMS["random weights"]), "cpu").model.state_dict()
    for k, v in drawn.state_dict().items(): torch.testing.assert_close(kept[k], v, rtol=0, atol=0)


def test_the_runs_are_those_that_were_asked_for(made):
    _, _, e, runs = made
    n = runs.groupby(["split", "method"]).size().to_dict()
    both = ("mixed", "human only", "majority", "logistic regression", "PCA + k-NN")
    assert n == {**{("random", m): 1 for m in both}, **{("donor", m): 3 for m in both},
                 **{("donor", m): 1 for m in ("random weights", "MLM only")}}
    assert runs.groupby(["split", "seed"]).test_cells.nunique().eq(1).all()   # all methods of a seed share its split
    assert runs.query("split == 'random'").held_out.eq("").all()
    assert set(runs.query("split == 'donor'").held_out) <= {"d0", "d1", "d2"}


def test_what_was_made_is_kept_and_other_settings_lie_beside_it(made):
    folder, make, e, runs = made
    def stamp(): return {str(p): p.stat().st_mtime_ns for p in folder.glob("work/**/*") if p.is_file()}
    before = stamp()
    pd.testing.assert_frame_equal(make(pretrain_seeds=2).organ_runs("human", **OFTEN), runs)
    assert stamp() == before
    make(learning_rate=2e-3).pretrained()
    after = stamp()
    assert before.items() <= after.items() and len(after) > len(before)


@pytest.mark.parametrize("asked, parts, with_controls", [
    (dict(), [("random", 0), ("donor", 0)], {("random", 0), ("donor", 0)}),
    (dict(seeds=2, control_seeds=0), [("random", 0), ("random", 1), ("donor", 0), ("donor", 1)], set()),
    (dict(seeds=2, random_seeds=1, control_seeds=1), [("random", 0), ("donor", 0), ("donor", 1)],
     {("random", 0), ("donor", 0)}),
    (dict(seeds=1, random_seeds=3, control_splits=["donor"]), [("random", 0), ("donor", 0)], {("donor", 0)})])
def test_a_plan_is_counted_out(asked, parts, with_controls):
    plan = Plan(**asked)
    assert list(plan.parts()) == parts
    assert {p for p in parts if plan.arms(*p) == list(ARMS)} == with_controls
    assert {len(plan.arms(*p)) for p in parts} <= {2, 4}
