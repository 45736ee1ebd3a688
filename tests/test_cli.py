"Every verb as a command, from raw counts of both species to a ranking of genes; and what bad input leaves behind"

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from mix_geneformer.cells.genes import gene_table

BIN = Path(sys.executable).parent


def run(command, *args, ok=True):
    "Run a console script; its output, or on `ok=False` its one sentence"
    done = subprocess.run([BIN / command, *map(str, args)], capture_output=True, text=True)
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
        x = rng.poisson(1 + 6 * (np.arange(40)[None] % 2 == kind[:, None])).astype(np.float32)
        obs = pd.DataFrame(
            dict(cell_type=np.array(["a", "b"])[kind], donor=[f"d{i % 5}" for i in range(60)]),
            index=[f"{species}{i}" for i in range(60)],
        )
        ad.AnnData(x, obs, pd.DataFrame(index=gene_table(species).index[:40])).write_h5ad(folder / f"{species}.h5ad")
    return folder


@pytest.fixture(scope="module")
def made(files):
    "A corpus, a model and a classifier, each made by its command"
    size = (
        "--hidden_size",
        16,
        "--num_hidden_layers",
        1,
        "--num_attention_heads",
        2,
        "--intermediate_size",
        32,
        "--context",
        30,
        "--device",
        "cpu",
    )
    run("mgf_tokenize", f"{files / 'human.h5ad'},{files / 'mouse.h5ad'}", files / "corpus", "--context", 30)
    run("mgf_pretrain", files / "corpus", files / "model", "--max_steps", 3, *size)
    run(
        "mgf_finetune",
        files / "corpus",
        files / "model",
        "--out",
        files / "types",
        "--species",
        "human",
        "--epochs",
        2,
        "--device",
        "cpu",
        "--split",
        "donor",
        "--donor",
        "donor",
    )
    return files


def test_the_chain_of_commands(made):
    run("mgf_embed", made / "mouse.h5ad", made / "model", made / "embedded.h5ad", "--device", "cpu")
    assert ad.read_h5ad(made / "embedded.h5ad").obsm["X_mix_geneformer"].shape == (60, 16)
    foreign = "mgf_predict", made / "mouse.h5ad", made / "types", made / "labels.csv", "--device", "cpu"
    assert "has never seen mouse" in run(*foreign, ok=False) and not (made / "labels.csv").exists()
    run(*foreign, "--allow_species", "mouse")
    labels = pd.read_csv(made / "labels.csv", index_col=0)
    assert set(labels.mix_geneformer_label) <= {"a", "b"} and labels.mix_geneformer_score.between(0.5, 1).all()
    run(
        "mgf_transfer",
        made / "human.h5ad",
        made / "human.h5ad",
        made / "carried.csv",
        "--genes",
        "all",
        "--device",
        "cpu",
    )
    assert set(pd.read_csv(made / "carried.csv", index_col=0).mix_geneformer_label) <= {"a", "b"}
    out = run(
        "mgf_perturb",
        made / "human.h5ad",
        made / "types",
        made / "isp",
        "--state",
        "cell_type",
        "--start",
        "a",
        "--goal",
        "b",
        "--max_cells",
        5,
        "--device",
        "cpu",
    )
    table = pd.read_csv(made / "isp" / "perturb.csv")
    assert len(table) > 10 and table.cosine_shift.is_monotonic_decreasing and "rank correlation" in out


def test_a_finished_output_is_kept_and_another_run_is_refused(made):
    before = (made / "model" / "model.safetensors").stat().st_mtime_ns
    size = (
        "--hidden_size",
        16,
        "--num_hidden_layers",
        1,
        "--num_attention_heads",
        2,
        "--intermediate_size",
        32,
        "--context",
        30,
        "--device",
        "cpu",
    )
    run("mgf_pretrain", made / "corpus", made / "model", "--max_steps", 3, *size)
    assert "holds another run's result" in run(
        "mgf_pretrain", made / "corpus", made / "model", "--max_steps", 3, "--seed", 1, *size, ok=False
    )
    assert (made / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "command, args, says",
    [
        ("mgf_fetch", ["moon"], "neither a folder nor one of the"),
        ("mgf_tokenize", ["{}/nothing.h5ad", "{}/new"], "does not exist"),
        ("mgf_pretrain", ["{}", "{}/new"], "is not a tokenised corpus"),
        ("mgf_finetune", ["{}/corpus", "{}/model", "--out", "{}/new", "--label", "age"], "no column 'age'"),
        ("mgf_embed", ["{}/human.h5ad", "{}", "{}/new.h5ad"], "is not a model directory"),
        ("mgf_predict", ["{}/human.h5ad", "{}/model", "{}/new.csv"], "a pretrained model with 0 cell types"),
        ("mgf_transfer", ["{}/human.h5ad", "{}/mouse.h5ad", "{}/new.csv"], "0 of 40 human genes have a counterpart"),
        (
            "mgf_perturb",
            ["{}/human.h5ad", "{}/model", "{}/new", "--state", "cell_type", "--start", "a", "--goal", "z"],
            "'z'",
        ),
        ("mgf_reproduce", ["--profile", "tiny"], "There is no profile 'tiny'"),
        ("mgf_reproduce", ["--set", "{{"], "--set is not JSON"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(made, command, args, says):
    assert says in run(command, *[str(a).format(made) for a in args], ok=False)
    assert not [file for file in made.glob("new*") if file.is_file() or any(file.iterdir())]
