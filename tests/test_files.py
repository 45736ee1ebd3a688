"Whole or not there: files, folders, runs; one fingerprint; foreign pickles run nothing."
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from conftest import files_under, refused
from handmade import Runs
from hypothesis import example, given
from hypothesis import strategies as st

from mix_geneformer import files
from mix_geneformer.files import InputError, Run, fingerprint, load_plain_pickle, whole_folder, write_atomically

# --- files and folders ----------------------------------------------------------------------------------------------

def full(*_): raise OSError(28, "No space left on device")


def test_a_failed_rename_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomically(tmp_path/"a.txt", "old")
    monkeypatch.setattr(files.os, "replace", full)
    refused(lambda: write_atomically(tmp_path/"a.txt", "new"), "a.txt could not be written (No space left on device; ",
            "bytes are free there): free some space and call again.")
    assert (tmp_path/"a.txt").read_text() == "old" and files_under(tmp_path) == ["a.txt"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path/"a").write_text("")
    refused(lambda: write_atomically(tmp_path/"a"/"b", ""), "b could not be written")
    refused(lambda: whole_folder(tmp_path/"a"/"b").__enter__(), "b could not be written")


def fill(out, fail=None):
    with whole_folder(out) as tmp:
        (tmp/"sub").mkdir()
        (tmp/"sub"/"x").write_text("x")
        assert tmp.parent == out.parent   # on the same disk, or a rename would be no rename
        if fail: raise fail


@pytest.mark.parametrize("fail, seen", [
    (OSError(28, "No space left on device"), InputError), (ValueError("v"), ValueError),
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_folder_that_fails_leaves_nothing(tmp_path, fail, seen):
    with pytest.raises(seen): fill(tmp_path/"deep"/"out", fail)
    assert files_under(tmp_path) == [] and os.listdir(tmp_path/"deep") == []


@pytest.mark.parametrize("there", [False, True])
def test_a_whole_folder_may_take_the_place_of_an_empty_one(tmp_path, there):
    if there: (tmp_path/"out").mkdir()
    fill(tmp_path/"out")
    assert files_under(tmp_path) == ["out/sub/x"] and os.listdir(tmp_path) == ["out"]
    assert (tmp_path/"out").stat().st_mode & 0o777 == 0o755
    refused(lambda: fill(tmp_path/"out"), "out holds 1 files: pass another out= or empty it.")
    refused(lambda: fill(tmp_path/"out"/"sub"/"x"), "x holds 1 files")


# --- one fingerprint ------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    seed:int=0
    path:object=None


ARRAYS = st.builds(lambda values, kind: np.array(values, dtype=kind), st.lists(st.integers(0, 99), max_size=4),
                   st.sampled_from(["<i8", "<i4", "<f4", "<f8", "U2", "O"]))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | ARRAYS
THINGS = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
                      max_leaves=8)


def written(x):
    "The same by other means: two things are equal where their texts are"
    if isinstance(x, np.ndarray): return f"array({x.dtype}, {x.shape}, {x.tolist()!r})"
    if isinstance(x, (list, tuple)): return "[" + ", ".join(map(written, x)) + "]"
    if isinstance(x, dict): return "{" + ", ".join(f"{k!r}: {written(x[k])}" for k in sorted(x)) + "}"
    return repr(x)


@given(st.lists(THINGS, max_size=3), st.lists(THINGS, max_size=3))
@example(["ab", "c"], ["a", "bc"])
@example([["ab", "c"]], [["a", "bc"]])
@example([["a"]], ["a"])
@example([np.zeros(2)], [np.zeros((2, 1))])
@example([np.zeros(2, "<f4")], [np.zeros(1, "<f8")])
@example([1], [1.])
@example([], [None])
def test_fingerprints_are_equal_where_the_parts_are(a, b):
    assert (fingerprint(*a) == fingerprint(*b)) == (written(a) == written(b))
    assert len(fingerprint(*a)) == 16 and int(fingerprint(*a), 16) >= 0


@given(st.dictionaries(st.text(), THINGS, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_matter(d, random):
    keys = list(d)
    random.shuffle(keys)
    assert fingerprint(d) == fingerprint({k: d[k] for k in keys})


def test_a_fingerprint_is_of_values_not_of_objects():
    x = np.arange(6).reshape(2, 3)
    assert fingerprint(x.T) == fingerprint(np.ascontiguousarray(x.T)) != fingerprint(x)
    assert fingerprint(np.float64(.5), np.int32(3)) == fingerprint(.5, 3)
    assert fingerprint((1, [2])) == fingerprint([1, (2,)])
    assert fingerprint(Settings(1, x)) == fingerprint(Settings(1, x.copy())) != fingerprint(Settings(1, x + 1))


def test_a_fingerprint_does_not_depend_on_the_process():
    "A set's order does"
    code = "from mix_geneformer.files import fingerprint; print(fingerprint({'a', 'b', 'c', 'd'}, dict(x=1)))"
    said = set()
    for seed in range(3):
        env = {**os.environ, "PYTHONHASHSEED": str(seed)}
        found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        said.add(found.stdout)
    assert said == {fingerprint({"a", "b", "c", "d"}, dict(x=1)) + "\n"}


# --- runs -----------------------------------------------------------------------------------------------------------

def part(): return dict(gene=np.arange(3), name=np.array(["a", "b", "c"]), shift=np.array([.1, np.nan, 3], np.float32))


def test_a_killed_run_goes_on_with_what_was_finished(tmp_path):
    def killed(): raise KeyboardInterrupt
    run = Run(tmp_path/"out", "mark", dict(seed=0))
    run.kept("0", part)
    with pytest.raises(KeyboardInterrupt): run.kept("1", killed)
    again = Run(tmp_path/"out", "mark", dict(seed=0))
    assert not again.fresh and again.has("0") and not again.has("1")
    for name, array in again.kept("0", killed).items():
        np.testing.assert_array_equal(array, part()[name])
        assert array.dtype == part()[name].dtype
    assert files_under(tmp_path) == ["out/run.json", "out/shards/0.npz"]


def test_the_folder_of_another_run_is_refused_by_name(tmp_path):
    Run(tmp_path, "mark", dict(mode="delete", seed=0), "perturb", "perturbation", "cells or weights")
    def other(mark, **settings):
        return lambda: Run(tmp_path, mark, settings, "perturb", "perturbation", "cells or weights")
    refused(other("m2", mode="inhibit", seed=1), "holds another perturbation, which differs in 2 of its inputs "
            "(mode, seed): pass another out= or remove the folder")
    refused(other("m2", mode="delete", seed=0), "differs in 1 of its inputs (cells or weights): ")
    assert not other("mark", mode="delete", seed=0)().fresh
    (tmp_path/"file").write_text("")
    refused(lambda: Run(tmp_path/"file", "mark", {}), "file could not be made (", ": pass another out=")


def test_a_run_that_is_refused_takes_back_what_it_made_and_no_more(tmp_path):
    run = Run(tmp_path/"new", "mark", {})
    run.kept("0", part)
    run.forget()
    assert os.listdir(tmp_path) == []
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"notes.txt").write_text("")
    Run(tmp_path/"mine", "mark", {}).forget()
    assert files_under(tmp_path) == ["mine/notes.txt"]
    Run(tmp_path/"begun", "mark", {}).kept("0", part)
    Run(tmp_path/"begun", "mark", {}).forget()
    assert "begun/shards/0.npz" in files_under(tmp_path)


def test_a_run_ends_with_its_table_and_what_was_noted(tmp_path):
    table = pd.DataFrame(dict(gene=["INS"], shift=[.5]))
    table.attrs["n_cells"] = 3
    run = Run(tmp_path, "mark", dict(seed=0))
    run.note(dict(rho=.25))
    assert run.end(table) == tmp_path/"run.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"run.csv"), table)
    noted = json.loads((tmp_path/"run.json").read_text())
    assert noted == run.noted() == dict(seed=0, fingerprint="mark", rho=.25, n_cells=3)


def test_a_run_without_a_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(None, "mark", dict(seed=0))
    np.testing.assert_array_equal(run.kept("0", part)["gene"], [0, 1, 2])
    run.note(dict(rho=1))
    run.forget()
    assert run.end(pd.DataFrame()) is None and run.noted() == {} and run.parts is None
    assert not run.fresh and not run.has("0") and os.listdir(tmp_path) == []


# --- foreign files run nothing --------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused(tmp_path, protocol):
    bad = tmp_path/"bad.pkl"
    for wrap in (lambda r: r, lambda r: {"ENSG1": r}, lambda r: [1, (r,)]):
        bad.write_bytes(pickle.dumps(wrap(Runs(tmp_path/"ran")), protocol))
        with pytest.raises(InputError, match="which is not plain data .1 forbidden name"): load_plain_pickle(bad)
    assert not (tmp_path/"ran").exists()
    pickle.loads(bad.read_bytes())
    assert (tmp_path/"ran").exists()   # the test's pickle does run where it may


def short(text): return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize("module,name", [
    ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "__import__"),
    ("subprocess", "Popen"), ("numpy", "load"), ("numpy.testing._private.utils", "runstring"),
    ("torch.storage", "_load_from_bytes"), ("pickle", "loads"), ("collections", "Counter.update")])
def test_forbidden_names(tmp_path, module, name):
    for code in (f"c{module}\n{name}\n.".encode(), b"\x80\x04" + short(module) + short(name) + b"\x93."):
        (tmp_path/"p").write_bytes(code)
        with pytest.raises(InputError, match="not plain data"): load_plain_pickle(tmp_path/"p")


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                     lambda x: st.lists(x) | st.dictionaries(st.text(), x) | st.tuples(x, x), max_leaves=8)


@given(PLAIN, st.integers(0, 5))
def test_plain_pickles_are_read(tmp_path, data, protocol):
    (tmp_path/"p").write_bytes(pickle.dumps(data, protocol))
    assert load_plain_pickle(tmp_path/"p") == data


def test_pickles_of_numbers_and_containers_are_read_and_arrays_are_not(tmp_path):
    data = OrderedDict(a=np.float64(1.5), b=np.int64(7), c={1, 2}, d=b"x", e=np.float32(.25))
    (tmp_path/"p").write_bytes(pickle.dumps(data, 4))
    assert load_plain_pickle(tmp_path/"p") == data
    (tmp_path/"p").write_bytes(pickle.dumps(np.array([object()], dtype=object), 4))
    with pytest.raises(InputError, match="not plain data"): load_plain_pickle(tmp_path/"p")


@given(st.binary(max_size=60), st.integers(0, 40), st.integers(0, 255))
@example(b"", 0, 0)
@example(b"\x80\x04K\x01", 3, ord("R"))
@example(b"h\x05.", 0, ord("h"))
@example(b"I x\n.", 0, ord("I"))
@example(b"\x80\xff", 0, 0x80)
def test_damaged_pickles_are_refused(tmp_path, junk, at, byte):
    "Random bytes, and a good pickle with one byte changed or its end cut: plain data or InputError, nothing else"
    good = pickle.dumps({"<pad>": 0, "<mask>": 1, "ENSG00000115263": 2, "x": [1.5, (2, "y")]}, protocol=4)
    at %= len(good)
    for data in (junk, good[:at] + bytes([byte]) + good[at + 1:], good[:at]):
        (tmp_path/"p").write_bytes(data)
        try: load_plain_pickle(tmp_path/"p")
        except InputError: pass
