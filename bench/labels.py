"""How far the labels' scores, likeness and expected accuracy are from the truth.

    python bench/labels.py DATA          # DATA holds human_pancreas_baron, mouse_pancreas_baron, human_pbmc_kang_ifnb,
      human_pbmc_10x3k and mouse_kidney_tabulamuris (.h5ad)

Labelled cells of a source give types to cells whose labels are looked at afterwards alone: of a donor that was held
out, under another condition, of another data set, of another species, and of an organ that shares no type with the
source. In trials of missing types, one type is left out of the source, and its cells should become unassigned. A
fine-tuned classifier (the shipped model `mini`) is judged on a held-out donor. At most 900 cells a side, drawn with
seed 0.

Writes bench/results/labels.csv (a row per trial), labels_types.csv (a row per trial and type) and
labels_references.csv (which of several references fits a target)."""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import mix_geneformer as mgf
from mix_geneformer.classification.calibration import calibration_error
from mix_geneformer.classification.joining import join_names
from mix_geneformer.classification.prediction import class_probabilities
from mix_geneformer.label_transfer import TYPES
from mix_geneformer.paper.machine import run_info

MOST = 900
RESULTS = Path(__file__).parent / "results"
KANG_TO_10X = {
    "CD14 Mono": "CD14 Monocytes",
    "CD16 Mono": "FCGR3A Monocytes",
    "CD4 Naive T": "CD4 T",
    "CD4 Memory T": "CD4 T",
    "DC": "Dendritic",
    "B Activated": "B",
}
LEFT_OUT = "beta", "ductal", "delta"


def cells(folder, name, most=MOST, **only):
    "Some labelled cells of a file."
    a = mgf.read_counts(folder / f"{name}.h5ad", verbose=False)
    keep = a.obs.cell_type.notna()
    for column, values in only.items():
        keep &= a.obs[column].astype(str).isin(values)
    rows = np.flatnonzero(keep)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    return a[rows].copy()


def trials(folder):
    "Kind, source, target, the type that is left out of the source, names."
    human, mouse = cells(folder, "human_pancreas_baron"), cells(folder, "mouse_pancreas_baron")
    whose = human.obs.donor.astype(str)
    for donor in sorted(whose.unique()):
        rest, own = human[whose != donor], human[whose == donor]
        yield "held-out donor", f"pancreas without {donor}", donor, rest, own, None, None
    donor = "human3"
    for lost in LEFT_OUT:
        rest, own = human[whose != donor], human[whose == donor]
        yield "type missing, held-out donor", f"pancreas without {donor}", donor, rest, own, lost, None
    for a, b, source, target in (("human", "mouse", human, mouse), ("mouse", "human", mouse, human)):
        yield "other species", f"{a} pancreas", f"{b} pancreas", source, target, None, None
        for lost in LEFT_OUT:
            yield "type missing, other species", f"{a} pancreas", f"{b} pancreas", source, target, lost, None
    kang = cells(folder, "human_pbmc_kang_ifnb", 6000)
    whose = kang.obs.donor.astype(str)
    first = whose.isin(sorted(whose.unique())[: whose.nunique() // 2])
    control = kang.obs.condition.astype(str) == "control"

    def some(keep):
        return kang[np.sort(np.random.default_rng(0).permutation(np.flatnonzero(keep))[:MOST])]

    begun, same, treated = some(control & first), some(control & ~first), some(~control & ~first)
    yield "held-out donor", "blood, control", "blood, control", begun, same, None, None
    yield "other condition", "blood, control", "blood, IFN-beta", begun, treated, None, None
    blood = cells(folder, "human_pbmc_10x3k")
    yield "other data set", "blood (Kang)", "blood (10x)", some(control), blood, None, KANG_TO_10X
    kidney = cells(folder, "mouse_kidney_tabulamuris")
    yield "no type shared", "blood (10x)", "mouse kidney", blood, kidney, None, None


def judged(found, known, raw, true):
    "What the columns say, against the truth."
    label, score = (found.obs[f"mix_geneformer_{c}"].to_numpy() for c in ("label", "score"))
    assigned = found.obs.mix_geneformer_assigned.to_numpy(bool)
    right, new = label.astype(str) == true, ~np.isin(true, list(known))
    types = found.uns["mix_geneformer"]["types"].set_index("type")
    share = lambda x: float(np.mean(x)) if len(x) else np.nan
    row = {
        "cells": len(true),
        "of types the source lacks": int(new.sum()),
        "accuracy": share(right),
        "expected": float(types.expected_accuracy["all cells"]),
        "mean score": share(score),
        "mean raw score": share(raw),
        "calibration error": calibration_error(score[~new], right[~new]),
        "calibration error, raw": calibration_error(raw[~new], right[~new]),
        "assigned": share(assigned),
        "accuracy of the assigned": share(right[assigned]),
        "right cells unassigned": share(~assigned[right]),
        "wrong cells unassigned": share(~assigned[~right & ~new]),
        "cells of lacking types unassigned": share(~assigned[new]),
    }
    rows = []
    for t in types.index.drop("all cells"):
        mine = label.astype(str) == t
        rows.append(
            {
                "type": t,
                "cells": int(mine.sum()),
                "accuracy": share(right[mine]),
                "expected": float(types.expected_accuracy[t]),
                "mean score": share(score[mine]),
                "mean raw score": share(raw[mine]),
                "unassigned": float(types.unassigned[t]),
            }
        )
    return row, rows


def transferred(source, target, lost, names):
    "Labels by `transfer`; those of the target are hidden from it."
    source = source if lost is None else source[source.obs.cell_type.astype(str) != lost]
    hidden = target.copy()
    del hidden.obs["cell_type"]
    found = mgf.transfer(source.copy(), hidden, names=names, progress=False)
    known = set(found.obsm[TYPES].columns.astype(str))
    return found, known, found.obsm[TYPES].max(axis=1).to_numpy()


def classified(source, target, lost):
    "Labels by a fine-tuned classifier whose donors are held out as the target's is."
    source = source if lost is None else source[source.obs.cell_type.astype(str) != lost]
    quiet = dict(progress=False, device="cpu")
    with tempfile.TemporaryDirectory() as d:
        model = mgf.load_model("mini", "cpu")
        keep = ["cell_type", "donor"]
        corpus = mgf.tokenize(source.copy(), model.vocab, f"{d}/corpus", model.context, keep, progress=False)
        how = dict(split="donor", donor="donor", epochs=4, batch_size=16, learning_rate=1e-3, **quiet)
        result = mgf.finetune(corpus, model, out=f"{d}/types", **how)
        found = mgf.predict(target.copy(), result.path, **quiet)
        raw = class_probabilities(
            mgf.load_model(result.path, "cpu"), target.copy(), progress=False
        )
        return found, set(raw.columns), raw.max(axis=1).to_numpy()


def references(folder):
    "Which of several references fits blood best, and how right each is there."
    blood = cells(folder, "human_pbmc_10x3k")
    true = blood.obs.cell_type.astype(str).to_numpy()
    hidden = blood.copy()
    del hidden.obs["cell_type"]
    kang = cells(folder, "human_pbmc_kang_ifnb", condition=["control"])
    treated = cells(folder, "human_pbmc_kang_ifnb", condition=["IFN-beta"])
    for a in (kang, treated):
        a.obs["cell_type"] = join_names(a.obs.cell_type, KANG_TO_10X)
    given = {
        "blood, control (Kang)": kang,
        "blood, IFN-beta (Kang)": treated,
        "mouse spleen": cells(folder, "mouse_spleen_jaitin"),
        "pancreas": cells(folder, "human_pancreas_baron"),
    }
    table, labels = mgf.rank_references(given, hidden, progress=False, return_labels=True)
    table["accuracy"] = [float((labels[name].astype(str) == true).mean()) for name in table.reference]
    return table


def main(folder):
    folder, rows, each, info = Path(folder), [], [], run_info()
    RESULTS.mkdir(exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    v = info["versions"]
    about = {"seed": 0, "cpu": info["cpu"], "cores": info["cores"], "python": info["python"], "torch": v["torch"]}
    about |= {"scikit-learn": v["scikit-learn"], "anndata": v["anndata"], "commit": info["commit"]}
    for kind, a, b, source, target, lost, names in trials(folder):
        ways = ["transfer"]
        if kind.endswith("held-out donor") and b == "human3" and lost in (None, "ductal"):
            ways.append("finetune, predict")
        for way in ways:
            begun, true = time.perf_counter(), target.obs.cell_type.astype(str).to_numpy()
            if way == "transfer":
                found, known, raw = transferred(source, target, lost, names)
            else:
                found, known, raw = classified(source, target, lost)
            row, types = judged(found, known, raw, true)
            head = {"way": way, "kind": kind, "source": a, "target": b, "left out": lost or ""}
            rows.append({**head, **row, "seconds": round(time.perf_counter() - begun, 1)})
            each += [{**head, **t} for t in types]
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            for name, table in (("labels", rows), ("labels_types", each)):  # what is measured stays if it is stopped
                pd.DataFrame(table).assign(**about).round(4).to_csv(RESULTS / f"{name}.csv", index=False)
    references(folder).assign(**about).round(4).to_csv(RESULTS / "labels_references.csv", index=False)


if __name__ == "__main__":
    main(sys.argv[1])
