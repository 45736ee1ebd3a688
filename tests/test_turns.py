"One process at a time makes an output; what a killed one has left is put in order by the next."
import os
import subprocess
import sys
import time

import pytest
from conftest import refused

from mix_geneformer.destinations import new_folder
from mix_geneformer.files import Taken, whole_folder
from mix_geneformer.turns import one_at_a_time, put_in_order, turn

HOLDS = """
import sys, time
from mix_geneformer.turns import turn
with turn(sys.argv[1]):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    "Another process that has the turn"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path/"out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.wait()


def test_the_turn_of_a_killed_process_is_free(holder, tmp_path):
    holder.kill()
    holder.wait()
    begun = time.monotonic()
    with turn(tmp_path/"out"): assert os.listdir(tmp_path) == [".out.turn"]
    assert time.monotonic()-begun < 5 and os.listdir(tmp_path) == []


def test_the_second_says_that_it_waits(holder, tmp_path):
    import threading
    threading.Timer(.3, holder.kill).start()
    with pytest.warns(UserWarning, match="is being made by another process: this one waits"), turn(tmp_path/"out"): pass
    assert os.listdir(tmp_path) == []


def test_who_trains_with_others_does_not_wait(holder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    def take():
        with turn(tmp_path/"out"): pass
    refused(take, "is being made by 1 other run", "pass another out=")
    monkeypatch.setenv("RANK", "1")
    take()   # the first has the turn for all


def test_where_no_lock_can_be_made_the_verb_speaks(tmp_path):
    (tmp_path/"file").touch()
    with turn(tmp_path/"file"/"out"): pass
    assert os.listdir(tmp_path) == ["file"]


def test_arguments_reach_the_verb(tmp_path):
    @one_at_a_time
    def verb(a, b=2, *, out=None): return a, b, out
    assert verb(1) == (1, 2, None) and verb(1, b=3, out=tmp_path/"x") == (1, 3, tmp_path/"x")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"): verb()


def test_only_its_own_remains_are_removed(tmp_path):
    for name in ("model.abcdefgh.partial", "model.v2.abcdefgh.partial", "model.1f.work", "models.abcdefgh.partial"):
        (tmp_path/f".{name}").mkdir()
    put_in_order(tmp_path/"model")
    assert sorted(os.listdir(tmp_path)) == [".model.1f.work", ".model.v2.abcdefgh.partial", ".models.abcdefgh.partial"]


@pytest.mark.parametrize("new_one", [False, True])
def test_a_run_killed_while_it_replaced_another(tmp_path, new_one):
    "The former folder comes back, unless the new one is whole"
    aside = tmp_path/".out.abcdefgh.old"/"out"
    aside.mkdir(parents=True)
    (aside/"former").touch()
    if new_one: (tmp_path/"out").mkdir()

    def run():
        if (tmp_path/"out").exists(): raise Taken(f"{tmp_path} holds 1 other run: remove it.")
        with whole_folder(tmp_path/"out") as d: (d/"new").touch()
    refused(lambda: new_folder(tmp_path/"out", run), "1 other run")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path/"out") == ([] if new_one else ["former"])
    new_folder(tmp_path/"out", run, overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path/"out") == ["new"]
