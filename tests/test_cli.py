"Every verb as a command, from raw counts of both species to a ranking of genes; and what bad input leaves behind"

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import mix_geneformer as mgf
from mix_geneformer import cli, label_transfer
from mix_geneformer.cells import counts
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
    assert not [p for p in made.glob("new*") if p.is_file() or any(p.iterdir())]


# --- outputs: called from Python, where a command takes no second to start ------------------------------------------

@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "Counts, a corpus, a model and a classifier, of the test's own"
    for name in ("corpus", "model", "types"): shutil.copytree(made / name, tmp_path / name)
    for species in ("human", "mouse"): shutil.copy(made / f"{species}.h5ad", tmp_path)
    shutil.copy(made / "human.h5ad", tmp_path / "known.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, context=30, max_steps=2)
FILES = dict(  # commands that write a file
    embed=lambda out, **k: cli.mgf_embed("human.h5ad", "model", out, device="cpu", **k),
    predict=lambda out, **k: cli.mgf_predict("human.h5ad", "types", out, device="cpu", **k),
    transfer=lambda out, **k: cli.mgf_transfer("known.h5ad", "human.h5ad", out, genes="all", device="cpu", **k),
)
ENDS = dict(start="a", goal="b", max_cells=4, device="cpu")
FOLDERS = dict(  # commands that make a folder
    tokenize=lambda out, **k: cli.mgf_tokenize("human.h5ad, mouse.h5ad", out, vocab="model", **k),
    pretrain=lambda out, **k: cli.mgf_pretrain("corpus", out, device="cpu", **{**TINY, **k}),
    finetune=lambda out, **k: cli.mgf_finetune("corpus", "model", out, max_steps=2, device="cpu", species="human", **k),
    perturb=lambda out, **k: cli.mgf_perturb("human.h5ad", "types", out, **{**ENDS, **k}),
)
OTHER = dict(tokenize=dict(context=9), pretrain=dict(seed=3), finetune=dict(seed=3), perturb=dict(mode="inhibit"))
ALL = {**FILES, **FOLDERS}


def says(call, *parts):
    "The sentence with which a command ends"
    with pytest.raises(SystemExit) as e: call()
    line = str(e.value)
    assert line.startswith("mgf_") and "\n" not in line and all(p in line for p in parts), line


def content(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def idle(monkeypatch):
    "No work is done: what a command refuses, it refuses before"
    def work(*_, **__): raise AssertionError("work was begun")
    for name in ("load_model", "pretrain", "finetune", "tokenize", "perturb"): monkeypatch.setattr(mgf, name, work)
    for owner, name in ((counts, "as_counts"), (label_transfer, "carried_types"), (mgf.Vocabulary, "load")):
        monkeypatch.setattr(owner, name, work)


@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_input_is_refused_as_the_output(here, idle, command, overwrite):
    (here / "link.h5ad").symlink_to("human.h5ad")
    os.link(here / "human.h5ad", here / "hard.h5ad")
    before = content(here)
    reads = dict(tokenize="human.h5ad", pretrain="corpus", finetune="model", perturb="types").get(command)
    names = [reads, f"./{reads}", str(here / reads)] if reads else ["human.h5ad", "./human.h5ad", "link.h5ad"]
    names += [] if reads else ["hard.h5ad"]
    for out in names: says(lambda out=out: ALL[command](out, overwrite=overwrite))
    assert content(here) == before


@pytest.mark.parametrize("command", ALL)
def test_an_output_is_what_it_is_called_or_refused(here, idle, command):
    before = content(here)
    for out in ("new.json", "new.txt", "new.xlsx", "new.h5", "new.npy", *["new"]*(command in FILES),
                *["new.h5ad"]*(command in FOLDERS), *["new.csv"]*(command in FOLDERS and command != "perturb")):
        says(lambda out=out: ALL[command](out), repr(Path(out).suffix) if "." in out else "no ending", ": pass a name")
    assert content(here) == before


@pytest.mark.parametrize("command", ALL)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(here, idle, command):
    ending = ".csv" if command in FILES else ""
    says(lambda: ALL[command](f"human.h5ad/new{ending}"), "could not be made (")
    (here / "dir.csv").mkdir()
    if command in FILES: says(lambda: ALL[command]("dir.csv", overwrite=True), "is a folder")
    else: says(lambda: ALL[command]("mouse.h5ad/x"), "could not be made (")


@pytest.mark.parametrize("command", FILES)
def test_a_file_there_is_replaced_only_where_asked(here, command):
    for ending, read in ((".h5ad", ad.read_h5ad), (".csv", pd.read_csv), (".tsv", pd.read_table)):
        out = here / "deep" / "er" / f"new{ending}"  # missing folders are made
        FILES[command](str(out))
        first = read(out)
        assert len(first) == 60
        out.write_text("old")
        says(lambda out=out: FILES[command](str(out)), "is there already (3 bytes kept)", "--overwrite")
        assert out.read_text() == "old"
        FILES[command](str(out), overwrite=True)
        assert read(out).shape == first.shape
    assert sorted(p.name for p in (here / "deep" / "er").iterdir()) == ["new.csv", "new.h5ad", "new.tsv"]


@pytest.mark.parametrize("command", FOLDERS)
def test_a_run_goes_on_and_anothers_place_is_taken_only_where_asked(here, command, capsys):
    FOLDERS[command]("a/b/new")
    before = content(here / "a")
    FOLDERS[command]("a/b/new")  # the same again: it is there
    FOLDERS[command]("a/b/new", overwrite=True)
    assert set(content(here / "a")) == set(before)
    says(lambda: FOLDERS[command]("a/b/new", **OTHER[command]), "holds a", "pass --overwrite to replace it")
    kept = content(here / "a")
    FOLDERS[command]("a/b/new", overwrite=True, **OTHER[command])
    now = content(here / "a")
    assert now != kept and {n for n in now if "shards" not in n} == {n for n in kept if "shards" not in n}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_of_something_else_never_makes_way(here, command):
    (here / "home").mkdir()
    (here / "home" / "letter").write_text("mine")
    try: FOLDERS[command]("home", overwrite=True)
    except SystemExit as e: assert "home" in str(e)
    assert (here / "home" / "letter").read_text() == "mine"


def test_a_ranking_as_a_table(here):
    FOLDERS["perturb"]("isp")
    for out, sep in (("isp.csv", ","), ("deep/isp.tsv", "\t")):
        FOLDERS["perturb"](out, genes=None)
        assert pd.read_csv(out, sep=sep).equals(pd.read_csv("isp/perturb.csv"))
        says(lambda out=out: FOLDERS["perturb"](out), "is there already", "--overwrite")


def test_lists_tolerate_blanks(here):
    names = list(gene_table("human").index[:2])
    for genes in (",".join(names), f" {names[0]} , {names[1]},"):
        FOLDERS["perturb"](f"isp{len(genes)}.csv", genes=genes)
    one, two = (pd.read_csv(p) for p in sorted(here.glob("isp*.csv")))
    assert one.equals(two) and set(one.ensembl_id) == set(names)


def test_two_results_in_one_file(here):
    FILES["embed"]("one.h5ad")
    cli.mgf_predict("one.h5ad", "types", "two.h5ad", device="cpu")
    cli.mgf_embed("two.h5ad", "model", "three.h5ad", pool="first", key="X_first", device="cpu")
    a = ad.read_h5ad("three.h5ad")
    assert {"X_mix_geneformer", "X_first"} <= set(a.obsm) and "mix_geneformer_label" in a.obs
    notes = a.uns["mix_geneformer"]
    assert (notes["model"], notes["classifier"], notes["X_first"]["model"]) == ("model", "types", "model")


def test_a_device_that_is_none(here):
    for command in ("embed", "predict"):
        say = "none of 3 kinds of device: pass 'auto', 'cpu', 'cuda' or 'mps'"
        run_it = dict(embed=cli.mgf_embed, predict=cli.mgf_predict)[command]
        says(lambda run_it=run_it: run_it("human.h5ad", "types", "new.csv", device="gpu"), say)
    assert not (here / "new.csv").exists()


def test_overwrite_of_a_classifier_beside_its_model_asks_for_its_name(here):
    says(lambda: cli.mgf_finetune("corpus", "model", overwrite=True), "pass --out too")
