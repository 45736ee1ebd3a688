#!/usr/bin/env python
"""With which settings a shipped model is fine-tuned: `python bench/finetuning.py [--model mini] [--only NAME,...]
[--seeds 2] [--work build/finetuning] [--out bench/results]`.

Every arm fine-tunes the model on the pancreas of one species with the donors held out that no shipped model has read,
for as many cells as the profile `learnt` gives it, and is judged by its validation part alone: the best epoch's
accuracy and macro-F1 there, averaged over seeds. Test cells are never looked at. One row an arm and species."""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch

import pandas as pd

from mix_geneformer import Vocabulary, fetch, finetune, load_model, tokenize
from mix_geneformer.encoder.checkpoints import shipped_model
from mix_geneformer.files import write_atomically
from mix_geneformer.paper.models import APART

CELLS = 2880  # read by a run: 180 steps of 16
ARMS = dict(
    rate_5e4=dict(learning_rate=5e-4),
    rate_1e3=dict(learning_rate=1e-3),
    rate_2e3=dict(learning_rate=2e-3),
    rate_1e3_batch_8=dict(learning_rate=1e-3, batch_size=8),
    rate_2e3_batch_32=dict(learning_rate=2e-3, batch_size=32),
)


def run(model, corpus, species, settings, seed, folder):
    "The validation part's scores of one fine-tuning, and what it cost."
    settings = dict(dict(batch_size=16, warmup_steps=20), **settings)
    begun = time.process_time()
    made = finetune(
        corpus, model, "cell_ontology_class", folder, species=species, donor="donor", split="donor",
        test_donors=APART[species], epochs=20, max_steps=CELLS // settings["batch_size"], seed=seed, progress=False,
        **settings,
    )  # fmt: skip
    log = pd.DataFrame(load_model(made.path, "cpu").training["log"])
    best = log.loc[log.valid_accuracy.idxmax()]
    return dict(valid_accuracy=best.valid_accuracy, valid_macro_f1=best.valid_macro_f1,
                cpu_seconds=time.process_time() - begun)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--only", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", default="build/finetuning")
    parser.add_argument("--out", default="bench/results")
    a = parser.parse_args()
    work, pancreas = Path(a.work), fetch("pancreas")
    model = shipped_model(a.model)
    vocab = Vocabulary.load(model)
    context = load_model(model, "cpu").context
    tokenize(pancreas, vocab, work / "corpus", context, progress=False)
    rows = []
    for name in [n.strip() for n in a.only.split(",")]:
        for species in APART:
            runs = []
            for seed in range(a.seeds):
                folder = work / f"{a.model}-{name}-{species}-{seed}"
                runs.append(run(model, work / "corpus", species, ARMS[name], seed, folder))
            mean = pd.DataFrame(runs).mean().round(4)
            rows.append(dict(model=a.model, arm=name, species=species, seeds=a.seeds, **mean))
            print(rows[-1], flush=True)
    write_atomically(Path(a.out) / "finetuning.csv", pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    main()
