"Every verb as a command, from raw counts of both species to a ranking of genes; and what bad input leaves behind"
import json, subprocess, sys, time
from pathlib import Path

import anndata as ad
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from conftest import toy
from mix_geneformer.paper.reproduction import reproduce
from mix_geneformer.cells.genes import gene_table
from mix_geneformer.files import InputError
from mix_geneformer.paper.machine import run_info

BIN = Path(sys.executable).parent


def run(command, *args, ok=True):
    "Run a console script; its output, or on `ok=False` its one sentence"
    done = subprocess.run([BIN/command, *map(str, args)], capture_output=True, text=True)
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith(command)][-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Hand-made counts of two kinds of cells, one file per species"
    folder = tmp_path_factory.mktemp("counts")
    for seed, species in enumerate(("human", "mouse")):
        rng, kind = np.random.default_rng(seed), np.arange(60) % 2
        x = rng.poisson(1 + 6*(np.arange(40)[None] % 2 == kind[:, None])).astype(np.float32)
        obs = pd.DataFrame(dict(cell_type=np.array(["a", "b"])[kind], donor=[f"d{i % 5}" for i in range(60)]), index=[f"{species}{i}" for i in range(60)])
        ad.AnnData(x, obs, pd.DataFrame(index=gene_table(species).index[:40])).write_h5ad(folder/f"{species}.h5ad")
    return folder


@pytest.fixture(scope="module")
def made(files):
    "A corpus, a model and a classifier, each made by its command"
    size = ("--hidden_size", 16, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--intermediate_size", 32, "--context", 30, "--device", "cpu")
    run("mgf_tokenize", f"{files/'human.h5ad'},{files/'mouse.h5ad'}", files/"corpus", "--context", 30)
    run("mgf_pretrain", files/"corpus", files/"model", "--max_steps", 3, *size)
    run("mgf_finetune", files/"corpus", files/"model", "--out", files/"types", "--species", "human", "--epochs", 2, "--device", "cpu", "--split", "donor", "--donor", "donor")
    return files


def test_the_chain_of_commands(made):
    run("mgf_embed", made/"mouse.h5ad", made/"model", made/"embedded.h5ad", "--device", "cpu")
    assert ad.read_h5ad(made/"embedded.h5ad").obsm["X_mix_geneformer"].shape == (60, 16)
    run("mgf_predict", made/"mouse.h5ad", made/"types", made/"labels.csv", "--device", "cpu")
    labels = pd.read_csv(made/"labels.csv", index_col=0)
    assert set(labels.mix_geneformer_label) <= {"a", "b"} and labels.mix_geneformer_score.between(.5, 1).all()
    run("mgf_transfer", made/"human.h5ad", made/"human.h5ad", made/"carried.csv", "--genes", "all", "--device", "cpu")
    assert set(pd.read_csv(made/"carried.csv", index_col=0).mix_geneformer_label) <= {"a", "b"}
    out = run("mgf_perturb", made/"human.h5ad", made/"types", made/"isp", "--state", "cell_type", "--start", "a", "--goal", "b", "--max_cells", 5, "--device", "cpu")
    table = pd.read_csv(made/"isp"/"perturb.csv")
    assert len(table) > 10 and table.cosine_shift.is_monotonic_decreasing and "rank correlation" in out


def test_a_finished_output_is_kept_and_another_run_is_refused(made):
    before = (made/"model"/"model.safetensors").stat().st_mtime_ns
    size = ("--hidden_size", 16, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--intermediate_size", 32, "--context", 30, "--device", "cpu")
    run("mgf_pretrain", made/"corpus", made/"model", "--max_steps", 3, *size)
    assert "holds another run's result" in run("mgf_pretrain", made/"corpus", made/"model", "--max_steps", 3, "--seed", 1, *size, ok=False)
    assert (made/"model"/"model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("command, args, says", [
    ("mgf_fetch", ["moon"], "neither a folder nor one of the"),
    ("mgf_tokenize", ["{}/nothing.h5ad", "{}/new"], "does not exist"),
    ("mgf_pretrain", ["{}", "{}/new"], "is not a tokenised corpus"),
    ("mgf_finetune", ["{}/corpus", "{}/model", "--out", "{}/new", "--label", "age"], "no column 'age'"),
    ("mgf_embed", ["{}/human.h5ad", "{}", "{}/new"], "is not a model directory"),
    ("mgf_predict", ["{}/human.h5ad", "{}/model", "{}/new"], "a pretrained model with 0 cell types"),
    ("mgf_transfer", ["{}/human.h5ad", "{}/mouse.h5ad", "{}/new.csv"], "0 of 40 human genes have a counterpart"),
    ("mgf_perturb", ["{}/human.h5ad", "{}/model", "{}/new", "--state", "cell_type", "--start", "a", "--goal", "z"], "'z'"),
    ("mgf_reproduce", ["--profile", "tiny"], "There is no profile 'tiny'"),
    ("mgf_reproduce", ["--set", "{{"], "--set is not JSON")])
def test_bad_input_is_one_sentence_and_leaves_nothing(made, command, args, says):
    assert says in run(command, *[str(a).format(made) for a in args], ok=False)
    assert not (made/"new").exists() or not any((made/"new").iterdir())


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch):
    "Writes notebooks beside counts of a few cells, and runs them two at a time"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    (tmp_path/"counts").mkdir()
    toy().write_h5ad(tmp_path/"counts/human.h5ad")
    def run(**code):
        for name, text in code.items():
            cells = [nbformat.v4.new_code_cell("work = '.'", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(text)]
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3"))), tmp_path/f"{name}.ipynb")
        reproduce("smoke", "out", list(code), "counts", notebooks=".", jobs=2)
    return run, tmp_path/"out"

def test_notebooks_run_side_by_side_with_half_of_the_cores_each(two_notebooks):
    meet = "import os, time\nfrom pathlib import Path\nPath(work, '{}').write_text(os.environ['OMP_NUM_THREADS'])\nend = time.time()+90\nwhile not Path(work, '{}').exists():\n    assert time.time() < end\n    time.sleep(.1)"
    run, out = two_notebooks
    run(a=meet.format("a", "b"), b=meet.format("b", "a")) # one after the other they would wait in vain
    assert (out/"work"/"a").read_text() == (out/"work"/"b").read_text() == str(max(1, run_info()["cores"]//2))
    said = (out/"tables"/"run.md").read_text()
    assert "| notebook, 2 at a time | minutes |" in said and said.count("| a |") == said.count("| b |") == 1

def test_a_notebook_that_fails_ends_the_others(two_notebooks):
    run, out = two_notebooks
    good = "import os, time\nfrom pathlib import Path\nPath(work, 'pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    bad = "import time\nfrom pathlib import Path\nwhile not (Path(work, 'pid').exists() and Path(work, 'pid').read_text()): time.sleep(.1)\nraise ValueError('3 of 4')"
    with pytest.raises(InputError, match=r"bad.ipynb stopped at cell \d with ValueError \(3 of 4\): see .*, then go on with --resume"): run(good=good, bad=bad)
    assert set(json.loads((out/"work"/"spent.json").read_text())["minutes"]) == {"bad"} and not (out/"tables"/"run.md").exists()
    pid, end = int((out/"work"/"pid").read_text()), time.time()+60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE: # the kernel of the other one
        assert time.time() < end
        time.sleep(.2)
