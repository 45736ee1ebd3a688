"Whether a model has learnt is said of every kind of model, by its own name."
import json
import shutil

import pytest

from mix_geneformer.encoder.checkpoints import shipped_model
from mix_geneformer.paper.verdicts import model_name, model_verdict, unmeasured_verdict

def test_a_measured_model_says_what_its_metrics_say():
    said = json.loads((shipped_model("mini")/"metrics.json").read_text())["verdict"]
    assert model_verdict("mini") == "mini h" + said[1:]


def test_a_model_that_has_not_learnt_is_called_so(tmp_path):
    shutil.copytree(shipped_model("mini"), tmp_path/"poor")
    metrics = dict(verdict="HAS NOT LEARNT more than gene frequencies: x")
    (tmp_path/"poor"/"metrics.json").write_text(json.dumps(metrics))
    assert model_verdict(tmp_path/"poor") == "poor HAS NOT LEARNT more than gene frequencies: x"


@pytest.mark.parametrize("loss, learnt", [(8.86, False), (8.84, True), (9.5, False)])
def test_what_was_not_kept_apart_may_have_learnt_and_no_more(loss, learnt):
    assert unmeasured_verdict(loss, 8.9).startswith("was not measured" if learnt else "HAS NOT LEARNT")


def test_arms_made_for_a_table_are_called_by_what_they_were_made_of(tmp_path):
    told = dict(species="mouse", steps=1200, learning_rate=1e-3, simcse_weight=1.)
    assert model_name(tmp_path/"pretrain-mouse-1", told) == "the model pretrained here (mouse, 1,200 steps)"
