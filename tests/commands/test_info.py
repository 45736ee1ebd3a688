"What a thing is, told for each kind."
import json

import pytest

from mix_geneformer import cli

def told(capsys, thing, **how):
    cli.mgf_info(str(thing), json=True, **how)
    return json.loads(capsys.readouterr().out)


def test_a_shipped_model_tells_its_size_and_whether_it_has_learnt(capsys):
    found = told(capsys, "mini")
    assert (found["kind"], found["layers"], found["steps"], found["cells_seen"]) == ("encoder", 3, 1600, 51_200)
    assert found["learnt"].startswith("Has learnt: ") and found["parameters"] > 3e6


def test_a_corpus_and_a_model_of_ones_own(corpus, model_dir, capsys):
    found = told(capsys, corpus)
    assert found["kind"] == "corpus" and found["cells"] > 0 and "human (" in found["species"]
    assert told(capsys, model_dir)["kind"] == "encoder"


def test_a_file_of_counts_and_its_layers(both, tmp_path, capsys):
    human = both[0].copy()
    human.layers["counts"] = human.X.copy()
    human.X = human.X / 3
    human.write_h5ad(tmp_path/"cells.h5ad")
    with pytest.raises(SystemExit, match="layer"): cli.mgf_info(str(tmp_path/"cells.h5ad"))
    found = told(capsys, tmp_path/"cells.h5ad", layer="counts")
    assert (found["species"], found["n_cells"]) == ("human", human.n_obs)


def test_what_is_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="mgf_info: .*neither 1 file or folder nor the name"):
        cli.mgf_info(str(tmp_path/"moon"))
