#!/usr/bin/env python
"""What attention dropout does to quality: `python bench/dropout.py [--seeds 4] [--steps 200] [--out bench/results]`.

Dropout of attention probabilities rules the cost of a step at 2,048 tokens on a CPU, and hidden dropout alone still makes SimCSE's two views. So
the same models are pretrained with 0.1 (the paper's) and with 0, on the same nine tenths of the `pancreas` cells of both species with the
same seeds, and compared on what neither has seen: masked-language loss of the other tenth, and cell types read off the frozen vectors by logistic
regression with a donor held out. Nothing is timed here: `bench/run.py` does that."""
import common
import argparse, tempfile
from pathlib import Path
import numpy as np, pandas as pd, torch
from scipy import stats
from sklearn.linear_model import LogisticRegression

from mix_geneformer.batches import MaskedBatches
from mix_geneformer.classify import frequent_types, scores, split_cells
from mix_geneformer.corpus import fetch
from mix_geneformer.embed import cell_vectors
from mix_geneformer.genes import Vocabulary
from mix_geneformer.model import Objective, load_model
from mix_geneformer.pretrain import pretrain
from mix_geneformer.tokenizer import sentences_of, tokenize

MODEL = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, context=128, batch_size=32, learning_rate=1e-3, warmup_steps=20)
ROWS = ["masked_loss", "alignment", "uniformity", "human_accuracy", "human_macro_f1", "mouse_accuracy", "mouse_macro_f1"]


def unseen(loaded, sentences, seed):
    "Masked-language loss, alignment and uniformity over cells that were not trained on; dropout makes the two views."
    batches, found = MaskedBatches(sentences, loaded.vocab, 64, loaded.context, seed=12345), []
    mlm, views = Objective(loaded.model.eval(), simcse_weight=0), Objective(loaded.model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for b in batches.epoch(0):
            loss = mlm.eval()(**b)["mlm"]
            two = views.train()(**b)
            found.append([float(loss), float(two["alignment"]), float(two["uniformity"])])
    loaded.model.eval()
    return dict(zip(ROWS, np.mean(found, axis=0)))


def probe(loaded, dataset, corpus, seed):
    "Cell types from frozen vectors, the donors held out as in the tables."
    out = {}
    for species in corpus.files:
        rows = np.flatnonzero(np.asarray(dataset["species"][:]) == species)
        labels, donors = (np.asarray(dataset.select(rows)[k][:], dtype=object) for k in (corpus.label, corpus.donor))
        use = np.flatnonzero(np.isin(labels, frequent_types(labels)[0]))
        x, y = cell_vectors(loaded, sentences_of(dataset.select(rows[use]))), labels[use]
        part = split_cells(y, "donor", donors[use], seed=seed)
        fitted = LogisticRegression(max_iter=2000).fit(x[part == "train"], y[part == "train"])
        s = scores(y[part == "test"], fitted.predict(x[part == "test"]))
        out.update({f"{species}_accuracy": s["accuracy"], f"{species}_macro_f1": s["macro_f1"]})
    return out


def summary(runs):
    "Per measure: mean of each, their paired difference over seeds with its 95 % interval, and the t-test's p."
    rows = []
    for k in ROWS:
        wide = runs.pivot(index="seed", columns="attention_dropout", values=k)
        d = wide[0.] - wide[.1]
        half = stats.t.ppf(.975, len(d)-1)*d.std(ddof=1)/np.sqrt(len(d))
        rows.append(dict(measure=k, with_0_1=wide[.1].mean(), without=wide[0.].mean(), difference=d.mean(), low=d.mean()-half, high=d.mean()+half, p_value=stats.ttest_rel(wide[0.], wide[.1]).pvalue, seeds=len(d)))
    return pd.DataFrame(rows)


def main(seeds, steps, out):
    corpus = fetch("pancreas")
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        dataset = tokenize(corpus, Vocabulary.build(corpus), d/"corpus", MODEL["context"], progress=False)
        rows = []
        for seed in range(seeds):
            cells = np.random.default_rng(seed).permutation(len(dataset))
            held, train = np.sort(cells[:len(cells)//10]), np.sort(cells[len(cells)//10:])
            for p in (.1, 0.):
                model = pretrain(dataset.select(train), d/f"{seed}-{p}", MODEL, seed=seed, epochs=10**6, max_steps=steps, attention_probs_dropout_prob=p, progress=False, device="cpu")
                loaded = load_model(model, "cpu")
                rows.append(dict(seed=seed, attention_dropout=p, **unseen(loaded, sentences_of(dataset.select(held)), seed), **probe(loaded, dataset, corpus, seed)))
                print(pd.DataFrame(rows).tail(1).round(4).to_string(index=False, header=len(rows) == 1), flush=True)
                common.write_csv(pd.DataFrame(rows).assign(steps=steps, **{k: MODEL[k] for k in ("hidden_size", "num_hidden_layers", "context", "batch_size")}), Path(out)/"attention_dropout_runs.csv")
        table = summary(pd.DataFrame(rows)).assign(steps=steps, cells=len(train), data="+".join(h[:12] for h in corpus.sha256.values()))
        common.write_csv(table, Path(out)/"attention_dropout.csv")
        print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="2 or more")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each model")
    parser.add_argument("--out", default="bench/results")
    a = parser.parse_args()
    if a.seeds < 2 or a.steps < 1: parser.error(f"seeds={a.seeds} and steps={a.steps} give no interval: pass at least 2 and 1")
    main(a.seeds, a.steps, a.out)
