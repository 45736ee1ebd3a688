"Shipped models stand in for a short pretraining; what is missing is named."
import pandas as pd
import pytest
from conftest import toy

from mix_geneformer.files import InputError
from mix_geneformer.paper import shipped
from mix_geneformer.paper.profiles import model_settings, profile_settings
from mix_geneformer.paper.shipped import Shipped, experiment, model_at_hand

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    (folder/"toy").mkdir()
    for i, s in enumerate(("human", "mouse")):
        cells = toy(s, 60, seed=i)
        cells.obs["donor"] = pd.Series([f"{s}{1+k % 3}" for k in range(60)], cells.obs_names)
        cells.write_h5ad(folder/"toy"/f"{s}.h5ad")
    settings = model_settings(profile_settings("smoke")) | dict(finetune_max_steps=1)
    return experiment("shipped", folder/"work", folder/"toy", device="cpu", progress=False, orthologs="shared",
                      **settings)


def test_size_tokens_and_context_are_the_models(made):
    assert isinstance(made, Shipped) and made.model.context == 256 and made.vocab.orthologs == "shared"
    assert made.pretrained() == model_at_hand("mini") and made.tune.max_steps == 1


def test_the_donors_held_out_are_those_that_no_model_has_read(made):
    runs = made.organ_runs("human", ["donor"], 2)
    assert set(runs.held_out) == {"human2"} and "mixed, shared tokens" in set(runs.method)
    assert "none of human2 (human) and mouse1 (mouse)" in made.seen()


def test_a_model_that_is_missing_is_named_with_its_command(made, monkeypatch):
    def nowhere(name):
        if name == "mini": return model_at_hand(name)
        raise InputError(f"{name} is not here: make it with mgf_models --only {name} --out models")
    monkeypatch.setattr(shipped, "model_at_hand", nowhere)
    runs = made.organ_runs("mouse", ["donor"])
    assert "mixed" not in set(runs.method) and "mouse only" not in set(runs.method)
    assert any("Not run: mixed (mini_separate is not here" in v for v in made.verdicts())
    assert any(v.startswith("mini has learnt") for v in made.verdicts())


def test_kinds_and_tokens_that_are_not_shipped_are_refused(tmp_path):
    with pytest.raises(InputError, match="pass pretrain or shipped"): experiment("mine")
    with pytest.raises(InputError, match="or models='pretrain'"): experiment("shipped", tmp_path, orthologs="tied")
