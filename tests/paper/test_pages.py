"What is stored of an executed notebook is small, names no machine, and is what nbdev_clean would leave."
import ast
import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from mix_geneformer.paper.pages import store, stored
from mix_geneformer.paper.profiles import PROFILES
from mix_geneformer.paper.reproduction import NOTEBOOKS

ROOT = Path(__file__).resolve().parents[2]
CODE = """import sys
import numpy as np
import pandas as pd
from IPython.display import Image, display
print("epoch 0"); print("wait", file=sys.stderr)
print("wrote {folder}/build/x")
for i in range(40): print("line", i)
display(Image("{picture}", width=900))
pd.DataFrame(dict(n=range(50)))"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    noise = np.random.default_rng(0).integers(0, 255, (700, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder/"noise.png")
    first = nbformat.v4.new_code_cell("seed = 0", metadata=dict(tags=["parameters"]))
    code = nbformat.v4.new_code_cell(CODE.format(folder=folder, picture=folder/"noise.png"))
    kernel = dict(kernelspec=dict(name="python3", language="python", display_name="Python 3"))
    nbformat.write(nbformat.v4.new_notebook(cells=[first, code], metadata=kernel), folder/"a.ipynb")
    (folder/"run").mkdir()
    papermill.execute_notebook(str(folder/"a.ipynb"), str(folder/"run/a.ipynb"), dict(seed=0), kernel_name="python3",
                               progress_bar=False)
    return folder, nbformat.read(folder/"run/a.ipynb", 4)


def test_outputs_are_small_and_name_no_machine(executed):
    folder, ran = executed
    kept = stored(ran, folder)
    said, picture, table = kept.cells[-1].outputs
    assert said.text.startswith("epoch 0\nwrote build/x\nline 0\n") and said.text.endswith("... and 30 lines more\n")
    png = base64.b64decode(picture.data["image/png"])
    assert len(png) <= 60_000 and picture.metadata == {"image/png": {"width": 900}}
    wide, high = Image.open(io.BytesIO(png)).size
    assert abs(wide - 2*high) <= 1
    assert table.data["text/html"].count("<td>") == 12 and "and 38 rows more" in table.data["text/html"]
    assert len(nbformat.writes(kept)) < 100_000 < len(nbformat.writes(ran))


def test_a_small_picture_is_kept_as_it_is(executed):
    out = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(out, "png")
    small = base64.b64encode(out.getvalue()).decode()
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"image/png": small+"\n"})])
    nb = nbformat.v4.new_notebook(cells=[cell], metadata=executed[1].metadata)
    assert stored(nb).cells[0].outputs[0].data["image/png"] == small


def test_rare_colours_of_a_large_picture_stay_apart(executed):
    "A dot of a legend has few pixels beside a cloud of points and white paper"
    points = np.full((800, 1600, 3), 255, dtype=np.uint8)
    points[:, :900] = np.random.default_rng(0).integers(90, 255, (800, 900, 1)) # greys that make it large
    dots = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233), (120, 40, 10)]
    for i, dot in enumerate(dots): points[100*i+20:100*i+40, 1200:1220] = dot
    out = io.BytesIO()
    Image.fromarray(points).save(out, "png")
    assert len(out.getvalue()) > 100_000
    large = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(out.getvalue()).decode()})
    cell = nbformat.v4.new_code_cell("1", outputs=[large])
    nb = nbformat.v4.new_notebook(cells=[cell], metadata=executed[1].metadata)
    small = Image.open(io.BytesIO(base64.b64decode(stored(nb).cells[0].outputs[0].data["image/png"]))).convert("RGB")
    share = small.width/1600
    found = [small.getpixel((round(1210*share), round((100*i+30)*share))) for i in range(len(dots))]
    assert np.abs(np.array(found) - dots).max() < 40


def test_what_ran_is_not_changed_by_storing(executed):
    before = nbformat.writes(executed[1])
    stored(executed[1])
    assert nbformat.writes(executed[1]) == before


def test_nbdev_clean_has_nothing_to_do_and_papermill_runs_it_again(executed, tmp_path):
    folder, ran = executed
    nbs = tmp_path/"nbs"
    nbs.mkdir()
    (tmp_path/"settings.ini").write_text((ROOT/"settings.ini").read_text())
    (nbs/"a.ipynb").write_text((folder/"a.ipynb").read_text())
    assert store(dict(a=dict(seed=0)), folder/"run", nbs) == ["a"]
    before = (nbs/"a.ipynb").read_bytes()
    assert {k for c in json.loads(before)["cells"] for k in c["metadata"]} == {"tags"}
    subprocess.run([Path(sys.executable).parent/"nbdev_clean"], cwd=tmp_path, check=True, capture_output=True)
    assert (nbs/"a.ipynb").read_bytes() == before
    again = papermill.execute_notebook(str(nbs/"a.ipynb"), None, dict(seed=4), kernel_name="python3",
                                       progress_bar=False)
    put_in = [c.source for c in again.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert put_in == ["# Parameters\nseed = 4\n"]


def test_another_run_or_an_edited_notebook_is_not_stored(executed, tmp_path):
    folder, _ = executed
    (tmp_path/"a.ipynb").write_text((folder/"a.ipynb").read_text())
    before = (tmp_path/"a.ipynb").read_bytes()
    assert store(dict(a=dict(seed=1)), folder/"run", tmp_path) == [] and (tmp_path/"a.ipynb").read_bytes() == before
    edited = nbformat.read(tmp_path/"a.ipynb", 4)
    edited.cells[-1].source += "\n# better"
    nbformat.write(edited, tmp_path/"a.ipynb")
    before = (tmp_path/"a.ipynb").read_bytes()
    assert store(dict(a=dict(seed=0)), folder/"run", tmp_path) == [] and (tmp_path/"a.ipynb").read_bytes() == before


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_paper_notebooks_show_the_profile_small(name):
    "Else their outputs, which are of `small`, would stand below other settings, and would not be stored"
    declared = papermill.inspect_notebook(str(ROOT/"nbs"/"paper"/f"{name}.ipynb"))
    shown = {k: ast.literal_eval(p["default"]) for k, p in declared.items()}
    wrong = {k: (v, PROFILES["small"][k]) for k, v in shown.items() if PROFILES["small"].get(k, v) != v}
    assert not wrong
