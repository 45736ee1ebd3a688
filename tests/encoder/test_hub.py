"Models are fetched once, at a pinned commit, and ours are pushed; the hub of these tests is on this machine."
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import refused, toy
from family import folder_of
from hubserver import COMMIT, hub

from mix_geneformer.embedding import embed
from mix_geneformer.encoder.checkpoints import load_model
from mix_geneformer.encoder.families import FAMILIES
from mix_geneformer.encoder.hub import wanted_files

CALL = """
import json, sys
import mix_geneformer as mgf
from conftest import toy
done = []
for call in json.loads(sys.argv[1]):
    try:
        if call[0] == "push": done.append(mgf.push_to_hub(*call[1:]))
        else:
            loaded = mgf.load_model(call[1], "cpu", **call[2])
            x = mgf.embed(toy(), loaded, progress=False).obsm["X_mix_geneformer"]
            done.append([str(loaded.path), loaded.family.name if loaded.family else "", float(abs(x).sum())])
    except mgf.InputError as e: done.append(str(e))
print(json.dumps(done))
"""


def elsewhere(endpoint, home, *calls):
    "Calls in a process of their own, that knows another hub"
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "t",
           "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)]), "MIX_GENEFORMER_CACHE": str(home/"ours")}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", CALL, json.dumps(calls)], env=env, capture_output=True,
                         text=True, timeout=300, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def contents(folder, start=""):
    return {start+p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_name_is_fetched_once(tmp_path):
    repository = contents(folder_of("V1", tmp_path/"hub"/"Geneformer-V1-10M", ids=40).parent)
    repository |= {"Geneformer-V1-10M/optimizer.pt": b"x"*99, "setup.py": b"raise SystemExit", "README.md": b"# theirs"}
    name, home = "ctheodoris/Geneformer", tmp_path/"home"
    by_name = ["load", name, dict(subfolder="Geneformer-V1-10M")]
    with hub(**{name: repository}) as (endpoint, server):
        there, = elsewhere(endpoint, home, by_name)
        asked = list(server.asked)
    assert there[1] == "Geneformer V1"
    assert any(FAMILIES[0].revision in path for path in asked) and not any("/main" in path for path in asked)
    assert not any(path.endswith(("optimizer.pt", "setup.py")) for path in asked)
    again, short, gone, old = elsewhere(endpoint, home, by_name, ["load", "Geneformer-V1-10M", {}],
                                        ["load", "Geneformer-V2-104M", {}], ["load", name, dict(
                                            subfolder="Geneformer-V1-10M", revision="d"*40)])
    assert there == again == short
    assert "ctheodoris/Geneformer/Geneformer-V2-104M is 0 of the folders here" in gone and "connection" in gone
    assert "dddddddddddd" in old
    here = embed(toy(), tmp_path/"hub"/"Geneformer-V1-10M", device="cpu", progress=False).obsm["X_mix_geneformer"]
    assert np.isclose(np.abs(here).sum(), there[2], rtol=1e-6)


def test_ours_goes_there_and_comes_back(model_dir, tmp_path):
    home = tmp_path/"home"
    with hub() as (endpoint, server):
        pushed, back, nothing = elsewhere(endpoint, home, ["push", str(model_dir), "me/islets"],
                                          ["load", "me/islets", {}], ["load", "me/nothing", {}])
        files = server.repos["me/islets"]
    assert pushed == f"{endpoint}/me/islets/commit/{COMMIT}"
    assert sorted(files) == ["README.md", "config.json", "metrics.json", "model.safetensors", "training.json",
                             "vocabulary.json"]
    assert files["model.safetensors"] == (model_dir/"model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "license: mit" in card and "# Mix-Geneformer model" in card
    own = embed(toy(), model_dir, device="cpu", progress=False).obsm["X_mix_geneformer"]
    assert back[1] == "" and np.isclose(back[2], np.abs(own).sum(), rtol=1e-6)
    assert "could not be fetched" in nothing and "check the name" in nothing
    offline, = elsewhere(endpoint, home, ["load", "me/islets", {}])
    assert offline == back


def test_without_a_network_a_name_is_refused_in_a_sentence():
    refused(lambda: load_model("nobody/no_model", "cpu"), "nobody/no_model is 0 of the folders here", "check the name")
    refused(lambda: load_model("no_model", "cpu"), "no_model is not a model directory", "Geneformer-V1-10M")


@pytest.mark.parametrize("has,takes", [(["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
                                       (["pytorch_model.bin"], "pytorch_model.bin")])
def test_safetensors_come_before_pickles(has, takes):
    names = ["config.json", *has, "tokenizer.py", "token_dictionary.pkl", "a/token_dictionary.pkl"]
    assert wanted_files(names, "") == ["config.json", takes, "token_dictionary.pkl"]


def test_what_is_no_model_of_ours_is_not_pushed(tmp_path):
    from mix_geneformer.encoder.checkpoints import push_to_hub
    theirs = folder_of("V1", tmp_path/"V1", ids=10)
    refused(lambda: push_to_hub(theirs, "me/theirs"), "lacks 2 of the files", "save_model()")
