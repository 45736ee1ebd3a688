#!/usr/bin/env python
"""What a choice made for speed does to quality: `python bench/quality.py attention_dropout|bucketing [--seeds 4]
[--steps 200] [--jobs 1] [--out bench/results]`.

attention_dropout: dropout of attention probabilities rules the cost of a step at 2,048 tokens on a CPU, and hidden
dropout alone still makes SimCSE's two views. The paper's 0.1 against 0, on `pancreas`. bucketing: batches of like
length need next to no padding, but the cells that SimCSE tells apart then share a length. Such batches against random
ones (`length_window=1`), on `pbmc_ifnb`, whose cells are 450 to 2,500 tokens long.

The two are trained on the same nine tenths of the cells with the same seeds, and compared on what neither has seen:
masked-language loss of the other tenth, and cell types read off the frozen vectors by logistic regression, donors
held out where the corpus has them. Nothing is timed here: `bench/run.py` does that."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy import stats
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.splits import frequent_types, split_cells
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.batches import MaskedBatches
from mix_geneformer.encoder.checkpoints import Loaded
from mix_geneformer.encoder.losses import Objective
from mix_geneformer.encoder.model import build_model
from mix_geneformer.encoder.states import Reader
from mix_geneformer.encoder.train import fit
from mix_geneformer.statistics import scores

BATCH = 32


@dataclass
class Choice:
    corpus: str
    cells: int  # of it, drawn at random
    context: int
    shape: dict  # of the model
    arms: dict  # name -> settings of the model, settings of the batches; the difference is the second less the first


CHOICES = dict(
    attention_dropout=Choice(
        "pancreas",
        4028,
        128,
        dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256),
        dict(
            with_0_1=(dict(attention_probs_dropout_prob=0.1), {}), without=(dict(attention_probs_dropout_prob=0.0), {})
        ),
    ),
    bucketing=Choice(
        "pbmc_ifnb",
        4000,
        1024,
        dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            attention_probs_dropout_prob=0.0,
        ),
        dict(random=({}, dict(length_window=1)), like_lengths=({}, {})),
    ),
)


def unseen(loaded, sentences, seed):
    """Masked-language loss, alignment and uniformity over cells that were not trained on, and how well a line through
    the vectors tells their lengths; dropout makes the two views."""
    batches, found = MaskedBatches(sentences, loaded.vocab, 64, loaded.context, seed=12345, length_window=1), []
    mlm, views = Objective(loaded.model.eval(), simcse_weight=0), Objective(loaded.model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for b in batches.epoch(0):
            loss = mlm.eval()(**b)["mlm"]
            two = views.train()(**b)
            found.append([float(loss), float(two["alignment"]), float(two["uniformity"])])
    loaded.model.eval()
    x, length = Reader(loaded).vectors(sentences), np.log(np.minimum(sentences.lengths, loaded.context))
    told = LinearRegression().fit(x[::2], length[::2]).score(x[1::2], length[1::2]) if np.ptp(length) else np.nan
    return dict(zip(("masked_loss", "alignment", "uniformity"), np.mean(found, axis=0))) | dict(length_r2=told)


def probe(loaded, dataset, corpus, seed):
    "Cell types from frozen vectors."
    out = {}
    for species in corpus.files:
        rows = np.flatnonzero(np.asarray(dataset["species"][:]) == species)
        labels = np.asarray(dataset.select(rows)[corpus.label][:], dtype=object)
        use = np.flatnonzero(np.isin(labels, frequent_types(labels)[0]))
        x, y = Reader(loaded).vectors(sentences_of(dataset.select(rows[use]))), labels[use]
        part = (
            split_cells(y, "donor", np.asarray(dataset.select(rows[use])[corpus.donor][:], dtype=object), seed=seed)
            if corpus.donor
            else split_cells(y, seed=seed)
        )
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(
            x[part == "train"], y[part == "train"]
        )
        s = scores(y[part == "test"], fitted.predict(x[part == "test"]))
        out.update({f"{species}_accuracy": s["accuracy"], f"{species}_macro_f1": s["macro_f1"]})
    return out


def summary(runs, first, second):
    "Per measure: mean of each, their paired difference over seeds with its 95 % interval, and the t-test's p."
    rows = []
    for k in runs.columns.drop(["seed", "arm"]):
        wide = runs.pivot(index="seed", columns="arm", values=k)
        d = wide[second] - wide[first]
        if d.isna().any():
            continue
        half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
        rows.append(
            {
                "measure": k,
                first: wide[first].mean(),
                second: wide[second].mean(),
                "difference": d.mean(),
                "low": d.mean() - half,
                "high": d.mean() + half,
                "p_value": stats.ttest_rel(wide[second], wide[first]).pvalue,
                "seeds": len(d),
            }
        )
    return pd.DataFrame(rows)


def pair(c, corpus, folder, seed, steps):
    "A model of each arm on the same cells with the same seed: a row of measures for each."
    dataset, vocab, rows = load_corpus(folder), Vocabulary.load(folder), []
    dataset = dataset.select(np.sort(np.random.default_rng(0).permutation(len(dataset))[: c.cells]))
    cells = np.random.default_rng(seed).permutation(len(dataset))
    held, train = (
        sentences_of(dataset.select(np.sort(part))) for part in (cells[: len(cells) // 10], cells[len(cells) // 10 :])
    )
    for arm, (of_model, of_batches) in c.arms.items():
        torch.manual_seed(seed)
        model = build_model(vocab, context=c.context, **c.shape, **of_model)
        fit(
            Objective(model),
            MaskedBatches(train, vocab, BATCH, c.context, seed, **of_batches),
            epochs=10**6,
            max_steps=steps,
            learning_rate=1e-3,
            warmup_steps=20,
            seed=seed,
            device="cpu",
            progress=False,
        )
        loaded = Loaded(model, vocab, c.context, "mean", None, None, {})
        rows.append(
            dict(
                seed=seed,
                arm=arm,
                **unseen(loaded, held, seed),
                **probe(loaded, dataset, corpus, seed),
                cells=len(train),
            )
        )
        print(pd.DataFrame(rows).tail(1).round(4).to_string(index=False), flush=True)
    return rows


def main(what, seeds, steps, jobs, out):
    c = CHOICES[what]
    corpus = fetch(c.corpus)
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d) / "corpus"
        tokenize(corpus, Vocabulary.build(corpus), folder, c.context, progress=False)
        runs = pd.DataFrame(
            sum(Parallel(n_jobs=jobs)(delayed(pair)(c, corpus, folder, seed, steps) for seed in range(seeds)), [])
        )
    cells = int(runs.pop("cells").iloc[0])
    table = summary(runs, *c.arms).assign(
        steps=steps, cells=cells, corpus=c.corpus, data="+".join(h[:12] for h in corpus.sha256.values())
    )
    common.write_csv(
        runs.assign(steps=steps, context=c.context, batch_size=BATCH, **c.shape), Path(out) / f"{what}_runs.csv"
    )
    common.write_csv(table, Path(out) / f"{what}.csv")
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CHOICES)
    parser.add_argument("--seeds", type=int, default=4, help="2 or more")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each model")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--out", default="bench/results")
    a = parser.parse_args()
    if a.seeds < 2 or a.steps < 1:
        parser.error(f"seeds={a.seeds} and steps={a.steps} give no interval: pass at least 2 and 1")
    main(a.what, a.seeds, a.steps, a.jobs, a.out)
