"The models of the repository: one budget, and cards that say what was measured."
import json
from pathlib import Path

import pytest

from mix_geneformer.encoder.checkpoints import SHIPPED, shipped_model
from mix_geneformer.paper.models import MODELS, SETTINGS, STUDIES

ROOT = Path(__file__).resolve().parents[2]
HERE = [name for name in SHIPPED if (ROOT/"models"/name).is_dir() or name == "mini"]

def told(name, what): return json.loads((shipped_model(name)/f"{what}.json").read_text())

@pytest.mark.parametrize("name", HERE)
def test_a_card_tells_the_verdict_the_losses_and_every_study(name):
    card, metrics = (shipped_model(name)/"README.md").read_text(), told(name, "metrics")
    assert metrics["verdict"] in card.replace("\n", " ")
    for row in metrics["kept_apart"]:
        line = next(line for line in card.splitlines() if row["part"] in line and row["study"] in line)
        assert f"{row['model']:.2f}" in line and f"{row['gained']:.2f}" in line
    for study in STUDIES: assert study.name in card and study.citation in card

@pytest.mark.parametrize("name", HERE)
def test_all_have_learnt_at_one_budget(name):
    training = told(name, "training")
    assert told(name, "metrics")["learnt"]
    assert (training["steps"], training["cells_seen"]) == (1600, 51_200)
    changed = {k for k, v in SETTINGS.items() if training[k] != v}
    assert changed <= {"precision"}
    expected = MODELS[name].get("species", "human+mouse")
    assert training["species"] == expected
