"Notebooks run side by side, one that fails ends the others, and what was asked for is refused before the work."
import json
import time

import nbformat
import psutil
import pytest
from conftest import refused, toy

from mix_geneformer.files import InputError
from mix_geneformer.paper.machine import run_info
from mix_geneformer.paper.reproduction import NOTEBOOKS, reproduce

KERNEL = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))

MEET = """import os, time
from pathlib import Path
Path(work, '{}').write_text(os.environ['OMP_NUM_THREADS'])
end = time.time()+90
while not Path(work, '{}').exists():
    assert time.time() < end
    time.sleep(.1)"""
GOOD = """import os, time
from pathlib import Path
Path(work, 'pid').write_text(str(os.getpid()))
time.sleep(600)"""
BAD = """import time
from pathlib import Path
while not (Path(work, 'pid').exists() and Path(work, 'pid').read_text()): time.sleep(.1)
raise ValueError('3 of 4')"""


def write(path, text, parameters="work = '.'"):
    first = nbformat.v4.new_code_cell(parameters, metadata=dict(tags=["parameters"]))
    nb = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(text)], metadata=KERNEL)
    nbformat.write(nb, path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A folder with counts of a few cells, in which notebooks are run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path/"counts").mkdir()
    toy().write_h5ad(tmp_path/"counts/human.h5ad")
    return tmp_path


@pytest.fixture
def two_notebooks(checkout):
    "Writes notebooks and runs them two at a time"
    def run(**code):
        for name, text in code.items(): write(checkout/f"{name}.ipynb", text)
        reproduce("smoke", "out", list(code), "counts", notebooks=".", jobs=2)
    return run, checkout/"out"


def test_notebooks_run_side_by_side_with_half_of_the_cores_each(two_notebooks):
    run, out = two_notebooks
    run(a=MEET.format("a", "b"), b=MEET.format("b", "a")) # one after the other they would wait in vain
    cores = str(max(1, run_info()["cores"]//2))
    assert (out/"made"/"a").read_text() == (out/"made"/"b").read_text() == cores
    said = (out/"tables"/"run.md").read_text()
    assert "| notebook, 2 at a time | minutes |" in said and said.count("| a |") == said.count("| b |") == 1
    assert said.startswith("`mgf_reproduce --profile smoke --seed 0` on the corpus counts (human ")


def test_a_notebook_that_fails_ends_the_others(two_notebooks):
    run, out = two_notebooks
    says = r"bad.ipynb stopped at cell \d with ValueError \(3 of 4\): see .*, then go on with --resume"
    with pytest.raises(InputError, match=says): run(good=GOOD, bad=BAD)
    spent = json.loads((out/"made"/"spent.json").read_text())
    assert set(spent["minutes"]) == {"bad"} and not (out/"tables"/"run.md").exists()
    pid, end = int((out/"made"/"pid").read_text()), time.time()+60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE: # the kernel of the other one
        assert time.time() < end
        time.sleep(.2)


def test_the_minutes_of_a_run_that_goes_on_are_added(two_notebooks, checkout):
    run, out = two_notebooks
    run(a="1")
    (out/"made"/"kept").write_text("")
    (out/"made"/"spent.json").write_text(json.dumps(dict(wall=30., minutes=dict(a=20., b=10.))))
    reproduce("smoke", "out", "a", "counts", notebooks=".", resume=True)
    said = (out/"tables"/"run.md").read_text()
    assert "in 30." in said and "| a | 20." in said and "| b | 10.0 |" in said and (out/"made"/"kept").exists()
    refused(lambda: run(a="1"), "holds an earlier run", "--resume to go on with it, --overwrite to begin anew")
    assert (out/"made"/"kept").exists()
    reproduce("smoke", "out", "a", "counts", notebooks=".", overwrite=True)
    assert not (out/"made"/"kept").exists() # it begins anew
    (out/"made"/"spent.json").rename(out/"made"/"letter")
    refused(lambda: reproduce("smoke", "out", "a", "counts", notebooks=".", overwrite=True), "is no run's")


def test_a_run_in_the_checkout_is_stored_where_it_ran_as_the_notebook_shows(checkout):
    (checkout/"nbs").mkdir()
    write(checkout/"nbs/a.ipynb", "print(seeds)", "seeds = 2\nwork = '.'") # as in `small`
    write(checkout/"nbs/b.ipynb", "print(seeds)", "seeds = 3\nwork = '.'")
    reproduce("small", None, "a,b", "counts", notebooks="nbs", jobs=1)
    a, b = (nbformat.read(checkout/f"nbs/{n}.ipynb", 4) for n in "ab")
    assert a.cells[-1].outputs[0].text == "2\n" and len(a.cells) == 2 and not b.cells[-1].outputs
    assert (checkout/"tables/run.md").exists() and (checkout/"build/small/notebooks/b.ipynb").exists()
    reproduce("small", "elsewhere", "a", "counts", notebooks="nbs", jobs=1, seeds=5)
    assert nbformat.read(checkout/"nbs/a.ipynb", 4) == a # and it could be run again


def test_what_cannot_be_run_is_refused_before_anything_is_made(checkout):
    write(checkout/"a.ipynb", "1")
    before = sorted(checkout.iterdir())
    refused(lambda: reproduce(notebooks="."), "8 of 8 notebooks are not in", *NOTEBOOKS)
    unknown = "1 parameters are unknown to a.ipynb"
    refused(lambda: reproduce("smoke", "out", "a", "counts", notebooks=".", sead=1), unknown)
    refused(lambda: reproduce("smoke", "out", "a", "moon", notebooks="."), "moon")
    refused(lambda: reproduce("smoke", "out", "a", "counts", notebooks=".", baselines="svm"), "svm")
    assert sorted(checkout.iterdir()) == before
