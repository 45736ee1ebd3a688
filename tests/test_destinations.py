"What can be known of an output is asked before the work: its name, what lies there, whether the disk takes it."
import os

import pytest
from conftest import files_under, refused
from hypothesis import given
from hypothesis import strategies as st

import mix_geneformer as mgf
from mix_geneformer import destinations
from mix_geneformer.destinations import check_folder_name, check_room, new_file, new_folder
from mix_geneformer.files import InputError, Taken, whole_folder

ENDINGS = (".h5ad", ".csv")


@pytest.fixture
def mine(tmp_path):
    (tmp_path/"mine.h5ad").write_text("counts")
    return tmp_path/"mine.h5ad"


@given(st.sampled_from(["new", "new.v2", "a b"]), st.sampled_from(["", ".h5ad", ".csv", ".tsv", ".H5AD", ".csv.gz"]))
def test_an_output_is_what_it_is_called(stem, ending):
    out = f"{stem}{ending}"
    if ending in ENDINGS: assert str(new_file(out, ENDINGS)) == out
    else: refused(lambda: new_file(out, ENDINGS), "2 kinds of file", "pass a name that ends in .h5ad or .csv")


def names_of(path):
    "Every way to call a file"
    link, hard, folder = (path.with_name(n) for n in ("link.h5ad", "hard.h5ad", "linked"))
    link.symlink_to(path)
    os.link(path, hard)
    folder.symlink_to(path.parent)
    return path, link, hard, folder/path.name, path.parent/".."/path.parent.name/path.name, os.path.relpath(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_input_is_never_an_output(mine, overwrite):
    for out in names_of(mine):
        refused(lambda out=out: new_file(out, ENDINGS, [mine, None], overwrite), "very command reads", "another name")
        refused(lambda out=out: new_file(mine, ENDINGS, [None, out], overwrite), "very command reads")
    assert mine.read_text() == "counts"


def test_what_is_there_is_replaced_only_where_asked(mine):
    refused(lambda: new_file(mine, ENDINGS), "is there already (6 bytes kept)", "--overwrite")
    assert new_file(mine, ENDINGS, overwrite=True) == mine
    lost = mine.with_name("lost.h5ad")
    lost.symlink_to("nowhere")
    refused(lambda: new_file(lost, ENDINGS), "is there already (0 bytes kept)")
    (mine.parent/"folder.csv").mkdir()
    refused(lambda: new_file(mine.parent/"folder.csv", ENDINGS, overwrite=True), "is a folder")


def test_a_missing_folder_is_no_obstacle_and_not_made_before_the_work(tmp_path):
    assert new_file(tmp_path/"a"/"b"/"new.csv", ENDINGS).name == "new.csv" and not any(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be_a_closed_folder_and_a_full_disk(mine, monkeypatch):
    refused(lambda: new_file(mine/"new.csv", ENDINGS), "could not be made (", "pass a place where files can be written")
    refused(lambda: check_room(mine, 10**18), "takes 1,000,000,000,000,000,000 bytes or more", "free some")
    def closed(**_): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(destinations.tempfile, "TemporaryFile", closed)
    refused(lambda: new_file(mine.parent/"new.csv", ENDINGS), "could not be made (Permission denied, error 13")


@pytest.mark.parametrize("name", ["corpus.h5ad", "isp.csv", "a.tsv", "b.json", "c.h5mu"])
def test_a_folder_is_not_called_like_a_file(name, tmp_path):
    refused(lambda: check_folder_name(tmp_path/name), "the ending of a file", "pass a name without it")
    refused(lambda: new_folder(tmp_path/name, lambda: 1/0), "the ending of a file")


# --- folders ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def out(tmp_path):
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"old").write_text("")
    return tmp_path/"out"


def make(out, fail=None):
    "A run that only its own result lets pass"
    if out.exists(): raise Taken(f"{out} holds 1 other run: remove it.")
    if fail == "before": raise InputError("0 cells: pass some.")
    with whole_folder(out) as d: (d/"new").write_text("")
    if fail == "late": raise KeyboardInterrupt
    return "made"


def test_another_runs_folder_makes_way_only_where_asked(out):
    refused(lambda: new_folder(out, lambda: make(out)), "1 other run: remove it, or pass --overwrite to replace it.")
    assert files_under(out.parent) == ["out/old"]
    assert new_folder(out, lambda: make(out), overwrite=True) == "made" and files_under(out.parent) == ["out/new"]


def test_a_run_that_is_refused_brings_the_old_one_back(out):
    refused(lambda: new_folder(out, lambda: make(out, "before"), overwrite=True), "0 cells")
    assert files_under(out.parent) == ["out/old"]
    with pytest.raises(KeyboardInterrupt): new_folder(out, lambda: make(out, "late"), overwrite=True)
    assert files_under(out.parent) == ["out/new"] and os.listdir(out.parent) == ["out"]


def test_what_is_no_result_never_makes_way(out):
    def filled():
        with whole_folder(out): pass
    refused(lambda: new_folder(out, filled, overwrite=True), "holds 1 files")
    assert files_under(out.parent) == ["out/old"]


def test_a_folder_that_holds_the_input_stays(out):
    for held in (out, out/"old"):
        refused(lambda held=held: new_folder(out, lambda: make(out), [held], overwrite=True), "this very command reads")
    assert files_under(out.parent) == ["out/old"]


def test_several_processes_do_not_replace(out, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(lambda: new_folder(out, lambda: make(out), overwrite=True), "1 process alone", "remove it")


def test_verbs_refuse_a_folder_that_is_called_like_a_file(both, vocab, corpus, model_dir, tmp_path):
    "Before any work: their outputs are folders"
    human, out, quiet = both[0], tmp_path/"new.csv", dict(device="cpu", progress=False)
    calls = [
        lambda: mgf.tokenize(human, vocab, out, progress=False),
        lambda: mgf.pretrain(corpus, out, max_steps=1, **quiet),
        lambda: mgf.finetune(corpus, model_dir, out=out, max_steps=1, **quiet),
        lambda: mgf.perturb(human, model_dir, state="cell_type", start="a", goal="b", out=out, **quiet)]
    for call in calls: refused(call, "new.csv ends in '.csv', the ending of a file")
    assert not any(tmp_path.iterdir())
