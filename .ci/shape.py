#!/usr/bin/env python3
"""The shape of the house: `make shape` prints it, `.ci/shape.py --check` exits 1 where a limit does not hold.

Measured are export cells (lines with signature and docments, definitions, comprehensions), the width of lines, the
length of modules, and imports against the floors of `ROOMS`. `--walk` also runs a tiny perturbation and follows the
counts through it."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mix_geneformer"

# Rooms behind the door of `cells.counts`: whoever wants counts asks there, and a walk counts them as that one room.
BEHIND_THE_DOOR = (
    "cells.obstacles",
    "cells.foreign",
    "cells.rows",
    "cells.anndatas",
    "cells.loom",
    "cells.tenx",
    "cells.features",
    "cells.names",
    "cells.containers",
    "cells.reports",
    "cells.checks",
    "cells.totals",
)

# From the ground up: a room imports rooms below it alone.
ROOMS = (
    "rooms",
    "refusals",
    "files",
    "missing",
    "turns",
    "destinations",
    "statistics",
    "cells.genes",
    "cells.earlier",
    *BEHIND_THE_DOOR,
    "cells.counts",
    "cells.normalising",
    "cells.conserved",
    "cells.mixing",
    "cells.downloads",
    "cells.corpora",
    "cells.medians",
    "cells.dictionaries",
    "cells.vocabulary",
    "cells.ranking",
    "cells.sentences",
    "cells.encoding",
    "cells.stretches",
    "cells.storage",
    "cells.tokenizer",
    "cells.exchange",
    "cells.splits",
    "growing",
    "outputs",
    "encoder.start",
    "encoder.runs",
    "encoder.attention",
    "encoder.model",
    "encoder.families",
    "encoder.weights",
    "encoder.hub",
    "encoder.classifier",
    "encoder.seen",
    "encoder.losses",
    "encoder.checkpoints",
    "encoder.masking",
    "encoder.batches",
    "encoder.learnt",
    "encoder.states",
    "encoder.speed",
    "encoder.watching",
    "encoder.train",
    "encoder.costs",
    "pretraining",
    "embedding",
    "classification.calibration",
    "classification.likeness",
    "classification.cotraining",
    "classification.confidence",
    "classification.joining",
    "classification.groups",
    "gene_embedding",
    "classification.parts",
    "classification.measures",
    "classification.finetuning",
    "classification.prediction",
    "label_transfer",
    "references",
    "perturbation.edits",
    "perturbation.shifts",
    "perturbation.screening",
    "perturbation.ends",
    "perturbation.question",
    "perturbation.summary",
    "perturbation.search",
    "perturbation.plan",
    "perturbation.verb",
    "perturbation.neighbours",
    "perturbation.pairs",
    "perturbation.evidence",
    "perturbation.planted",
    "plots",
    "pl",
    "paper.numbers",
    "paper.tables",
    "paper.machine",
    "paper.figures",
    "paper.pages",
    "paper.baselines",
    "paper.profiles",
    "paper.plans",
    "paper.verdicts",
    "paper.experiment",
    "paper.cards",
    "paper.models",
    "paper.shipped",
    "paper.organs",
    "paper.reproduction",
    "commands.manners",
    "commands.corpora",
    "commands.models",
    "commands.cells",
    "commands.genes",
    "commands.info",
    "commands.paper",
    "cli",
    "genes",
    "tokenizer",
)  # the last two: old addresses of names

LIMITS = dict(
    median_lines=10,
    ninth_decile_lines=25,
    longest_line=120,
    longest_module=350,
    circles=0,
    arrows_upward=0,
    stays=8,
    climbs=2,
)


def export_cells(notebook):
    "The source of each exported cell of a notebook that holds more than imports."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        directive, _, source = "".join(cell["source"]).partition("\n")
        if cell["cell_type"] != "code" or not directive.replace(" ", "").startswith("#|export"):
            continue
        if not all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Try)) for node in ast.parse(source).body):
            yield source.strip()


def library_notebooks():
    "Notebooks that export a module."
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if "#| default_exp" in p.read_text(encoding="utf-8")]


def code_lines(path):
    "Lines of code of a notebook (its code cells) or of a file; without what nbdev itself writes or shortens."
    if path.suffix != ".ipynb":  # nbdev writes `__all__` up to 130 columns wide
        return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("__all__ = [")]
    lines = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"]).splitlines()
        if code and code[0].startswith("#| export"):  # imports of ours become relative: the module counts
            code = [line for line in code if not line.startswith(f"from {PACKAGE}.")]
        lines += code
    return lines


def tracked(*patterns):
    "Files that git tracks or would track."
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file() and not name.endswith("_modidx.py")]


def modules():
    "Name and path of each generated module."
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        if not name.endswith(("__init__", "_modidx")):
            found[name] = path
    return found


def imports(name, path):
    "The rooms that a module imports, wherever in it the import stands."
    rooms, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            above = name.split(".")[: -node.level]
            target = ".".join([*above, *(node.module or "").split(".")]).strip(".")
        elif (node.module or "").startswith(PACKAGE + "."):
            target = node.module[len(PACKAGE) + 1 :]
        else:
            continue
        for alias in node.names:
            found.add(f"{target}.{alias.name}" if f"{target}.{alias.name}" in rooms else target)
    return (found & set(rooms)) - {name}


def circles(arrows):
    "Modules that import each other in a loop."
    reach = {name: set(to) for name, to in arrows.items()}
    for via in arrows:
        for name in arrows:
            if via in reach[name]:
                reach[name] |= reach[via]
    return sorted(name for name in arrows if name in reach[name])


def upward(arrows):
    "Imports that climb: from a room to itself or to a higher one."
    lost = sorted(set(arrows) - set(ROOMS))
    if lost:
        sys.exit(f"{len(lost)} modules have no floor in ROOMS of .ci/shape.py: {', '.join(lost)}")
    return sorted(f"{a} -> {b}" for a, to in arrows.items() for b in to if ROOMS.index(b) >= ROOMS.index(a))


def measure():
    "All that is measured without running anything."
    lengths, definitions, comprehensions = [], 0, 0
    loops = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    for notebook in library_notebooks():
        for source in export_cells(notebook):
            tree = ast.parse(source)
            lengths.append(len(source.splitlines()))
            definitions += sum(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
            comprehensions += sum(isinstance(node, loops) for node in ast.walk(tree))
    lines = [(len(line), path) for path in tracked("*.py", "*.ipynb", ".ci/*.py") for line in code_lines(path)]
    longest, where = max(lines, key=lambda found: found[0])
    rooms = modules()
    arrows = {name: imports(name, path) for name, path in rooms.items()}
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in rooms.items()}
    largest = max(sizes, key=sizes.get)
    return dict(
        export_cells=len(lengths),
        median_lines=statistics.median(lengths),
        ninth_decile_lines=sorted(lengths)[int(0.9 * len(lengths))],
        longest_cell=max(lengths),
        definitions_per_cell=round(definitions / len(lengths), 2),
        comprehensions_per_100_lines=round(100 * comprehensions / sum(lengths), 1),
        longest_line=longest,
        longest_line_in=str(where.relative_to(ROOT)),
        lines_too_wide=sum(n > LIMITS["longest_line"] for n, _ in lines),
        modules=len(rooms),
        longest_module=sizes[largest],
        longest_module_is=largest,
        circles=len(circles(arrows)),
        arrows=sum(map(len, arrows.values())),
        arrows_upward=len(upward(arrows)),
        upward=upward(arrows),
    )


def walk():
    "How often counts change the room, and how often they climb, on their way through one call of `perturb`."
    import tempfile

    sys.path.insert(0, str(ROOT / "tests"))
    import anndata
    import numpy as np
    import torch
    from conftest import TINY, toy
    from scipy import sparse

    import mix_geneformer as mgf
    from mix_geneformer.cells.counts import Counts
    from mix_geneformer.encoder.checkpoints import save_model
    from mix_geneformer.encoder.model import build_model

    cells = toy(n=24)
    vocab = mgf.Vocabulary.build(cells)
    torch.manual_seed(0)
    stays = []

    def enter(frame, event, argument):
        if event != "call" or not frame.f_globals.get("__name__", "").startswith(PACKAGE + "."):
            return
        code = frame.f_code
        given = [frame.f_locals.get(n) for n in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if not any(isinstance(v, (anndata.AnnData, Counts)) or sparse.issparse(v) for v in given):
            return
        room = frame.f_globals["__name__"][len(PACKAGE) + 1 :]
        room = "cells.counts" if room in BEHIND_THE_DOOR else room
        if not stays or stays[-1] != room:
            stays.append(room)
        # block after block: a loop is gone through once
        if len(stays) > 3 and stays[-4:-2] == stays[-2:]:
            del stays[-2:]

    routes = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(build_model(vocab, **TINY), vocab, Path(folder) / "model")
        loaded, file = mgf.load_model(model, "cpu"), Path(folder) / "cells.h5ad"
        cells.write_h5ad(file)
        for given, source in (("AnnData", cells), ("a path", file)):
            stays.clear()
            sys.setprofile(enter)
            try:
                mgf.perturb(
                    source, loaded, state="cell_type", start="a", goal="b", min_cells=1, n_boot=10, progress=False
                )
            finally:
                sys.setprofile(None)
            routes[given] = list(stays)
    climbs = [int((np.diff([ROOMS.index(room) for room in route]) > 0).sum()) for route in routes.values()]
    told = "; ".join(f"given {given}: {' > '.join(route)}" for given, route in routes.items())
    return dict(stays=max(map(len, routes.values())), climbs=max(climbs), routes=told)


def walk_apart(tries=3):
    "`walk`, in a process of its own: the interpreter may die under a profiler, which says nothing of a route."
    for _ in range(tries):
        done = subprocess.run([sys.executable, __file__, "--walk-only"], capture_output=True, text=True)
        if done.returncode >= 0:
            break
    if done.returncode:
        sys.exit(done.stderr or f"the walk died {tries} times by signal {-done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments):
    if "--walk-only" in arguments:
        return print(json.dumps(walk()))
    found = measure()
    if "--walk" in arguments:
        found |= walk_apart()
    broken = [name for name, most in LIMITS.items() if name in found and found[name] > most]
    for name, value in found.items():
        if value == []:
            continue
        limit = f"   (at most {LIMITS[name]})" if name in LIMITS else ""
        print(f"{name:30} {value}{limit}{'   <-- BROKEN' if name in broken else ''}")
    if "--check" in arguments and broken:
        sys.exit(f"{len(broken)} limits do not hold: {', '.join(broken)}")


if __name__ == "__main__":
    main(sys.argv[1:])
