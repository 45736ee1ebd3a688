#!/usr/bin/env python
"""How far screening by gradient can be trusted: `python bench/screening.py [--steps 0,100] [--out bench/results]`.

Every deletion in alpha cells of the human `pancreas`, towards beta cells, both by gradient and exactly, in a model
with random weights and after so many steps of pretraining, with the other positions kept and shifted: how the two
agree, and how many of the ten genes that move cells most a shortlist of a tenth holds. Nothing is timed here:
`bench/run.py` does that."""

import argparse
import tempfile
from pathlib import Path

import common
import numpy as np
import pandas as pd

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.perturbation.edits import POSITIONS
from mix_geneformer.perturbation.screening import shortlist
from mix_geneformer.perturbation.verb import perturb
from mix_geneformer.pretraining import pretrain
from mix_geneformer.statistics import agreement

MODEL = dict(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    context=256,
    attention_probs_dropout_prob=0.0,
    batch_size=32,
    warmup_steps=10,
)
START, GOAL, CELLS, SHARE, TOP = "pancreatic A cell", "type B pancreatic cell", 10, 0.1, 10


def rows(adata, label, model, steps, seed):
    for positions in POSITIONS:
        t = perturb(
            adata,
            model,
            state=label,
            start=START,
            goal=GOAL,
            positions=positions,
            max_cells=CELLS,
            max_goal_cells=100,
            screen=1.0,
            screen_min_correlation=-1.0,
            seed=seed,
            device="cpu",
            progress=False,
        )
        exact, screened = t.cosine_shift.to_numpy(), t.screened.to_numpy()
        best, chosen = np.argsort(-exact)[:TOP], shortlist(screened, SHARE)
        yield dict(
            steps=steps,
            positions=positions,
            genes=len(t),
            perturbations=t.attrs["n_perturbations"],
            correlation_of_perturbations=t.attrs["screen_correlation"],
            correlation_of_genes=agreement(screened, exact)["spearman"],
            top_10_in_shortlist=len(set(best) & set(chosen)),
            shortlist=len(chosen),
            rank_correlation=t.attrs["rank_correlation"],
        )


def main(steps, seed, out):
    corpus = fetch("pancreas")
    adata, found = read_counts(corpus.files["human"], verbose=False), []
    with tempfile.TemporaryDirectory() as d:
        dataset = tokenize(corpus, Vocabulary.build(corpus), Path(d) / "corpus", MODEL["context"], progress=False)
        for n in steps:
            model = pretrain(
                dataset,
                Path(d) / f"model-{n}",
                MODEL,
                seed=seed,
                epochs=10**6,
                max_steps=max(n, 1),
                learning_rate=1e-3 if n else 0.0,
                progress=False,
                device="cpu",
            )
            for r in rows(adata, corpus.label, model, n, seed):
                found.append(dict(r, seed=seed, data=corpus.sha256["human"][:12]))
                print(pd.DataFrame(found).tail(1).round(3).to_string(index=False, header=len(found) == 1), flush=True)
    common.write_csv(pd.DataFrame(found), Path(out) / "screening.csv")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="0,100", help="checkpoints, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="bench/results")
    a = parser.parse_args()
    main([int(n) for n in a.steps.split(",")], a.seed, a.out)
