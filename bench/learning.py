#!/usr/bin/env python
"""Which settings of the shipped models buy the most: `python bench/learning.py FOLDER [--only NAME,...] [--steps 800]
[--work build/learning] [--out bench/results]`.

FOLDER holds the studies' `.h5ad` files (the models page names them). Every arm changes one thing of `SETTINGS` in
`mix_geneformer.paper.models`, is trained for the same optimiser steps on the same cells, and is asked the same hidden
genes of the same cells kept apart: nats gained over gene frequencies, averaged over studies. `cpu_seconds` says what
an arm costs, so that a gain can be weighed against longer training. An arm that is finished is kept; one row an arm."""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch

import pandas as pd

from mix_geneformer.files import write_atomically
from mix_geneformer.paper.models import make_model

ARMS = dict(
    base={},
    no_hidden_dropout=dict(hidden_dropout_prob=0.0),
    mask_30=dict(mlm_probability=0.3),
    rate_4e3=dict(learning_rate=4e-3),
    rate_1e3=dict(learning_rate=1e-3),
    studies_alike=dict(study_power=0.0),
    wider=dict(hidden_size=192, num_attention_heads=6, intermediate_size=384),
    deeper=dict(num_hidden_layers=5),
    simcse=dict(simcse_weight=0.1),
    random_start=dict(init="random"),
)
SAID = "held out", "study apart"


def arm(name, folder, steps, work):
    "Train one arm, unless it is finished; its row."
    out = Path(work) / f"{name}_{steps}"
    row = out / "row.json"
    if row.is_file():
        return json.loads(row.read_text())
    begun = time.process_time()
    model = make_model("mini", out, folder, steps, steps // 4, **ARMS[name])
    told = dict(arm=name, changed=json.dumps(ARMS[name]), steps=steps, cpu_seconds=round(time.process_time() - begun))
    kept_apart = json.loads((model / "metrics.json").read_text())["kept_apart"]
    for part in SAID:
        mine = [r["gained"] for r in kept_apart if r["part"] == part and r["study"] != "mean over studies"]
        told[f"gained, {part}"] = round(sum(mine) / len(mine), 4)
    write_atomically(row, json.dumps(told))
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--only", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--work", default="build/learning")
    parser.add_argument("--out", default="bench/results")
    a = parser.parse_args()
    names = [n.strip() for n in a.only.split(",")]
    unknown = [n for n in names if n not in ARMS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: none of {', '.join(ARMS)}")
    rows = []
    for name in names:
        rows.append(arm(name, a.folder, a.steps, a.work))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    file = Path(a.out) / "learning.csv"
    if file.is_file():
        before = pd.read_csv(file)
        again = before.set_index(["arm", "steps"]).index.isin(table.set_index(["arm", "steps"]).index)
        table = pd.concat([before[~again], table])
    write_atomically(file, table.to_csv(index=False))


if __name__ == "__main__":
    main()
