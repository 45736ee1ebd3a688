#!/usr/bin/env python
"""What each stage costs as its input grows, and the arithmetic of a whole pretraining: `python bench/scaling.py
[--quick] [--out bench/results]`.

Writes scaling.csv (seconds at each size; of tokenising also the memory that a process of its own takes),
scaling_fit.csv (growth exponents), budget.csv (50 million cells, 10 epochs) and figures/scaling.*; the same real
cells, random weights and single thread as `run.py`."""

import argparse
import dataclasses
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import published
import torch
from common import (
    Data,
    adamw,
    clock,
    peak_mb,
    perturbed_cells,
    reset_peak,
    spread,
    write_cells,
    write_csv,
    write_machine,
)
from torch.nn import functional as F

from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.encoder.batches import MaskedBatches
from mix_geneformer.encoder.losses import Objective, mlm_loss
from mix_geneformer.encoder.states import Reader
from mix_geneformer.perturbation.verb import perturb

CELLS, EPOCHS, LENGTH = (
    50_000_000,
    10,
    1_200,
)  # Mix-Genecorpus-50M, the paper's epochs, the mean length of PERFORMANCE.md
WHY = {
    "tokenise": (
        "Each cell is read, ranked and written once and nothing is kept: linear, above a fixed start (gene tables, "
        "obs)."
    ),
    "training step": (
        "Per token, the matrices of a layer cost the same at any length and attention grows with it: the exponent "
        "goes from 1 towards 2, and drawing dropout for every pair of tokens brings it there sooner."
    ),
    "training step, no attention dropout": (
        "The same with a kernel that never writes the pairs of tokens out: they still have to be multiplied, so "
        "the exponent rises later."
    ),
    "embedding": (
        "One pass without gradient: matrices linear in length, attention quadratic; the matrices dominate until "
        "about 1,000 tokens."
    ),
    "MLM loss": (
        "Logits at the masked positions alone; the table of embeddings and its gradient are as large as the "
        "vocabulary: linear once that dominates."
    ),
    "MLM loss, every position": (
        "The same at every position, as published: linear in the vocabulary with a factor of 1 / 0.15 more positions."
    ),
    "perturbation": (
        "One pass of the encoder per perturbation: linear, above what is done once per cell (its own states, the goal)."
    ),
}


def sweep(stage, axis, sizes, call_of, rounds, work="", **about):
    "Seconds of call_of(size)() at each size, the sizes taken in turn after one unmeasured call of the smallest."
    calls = {n: call_of(n) for n in sizes}
    calls[sizes[0]]()
    times = {n: [] for n in sizes}
    for _ in range(rounds):
        for n, call in calls.items():
            times[n].append(clock(call)[0])
    found = []
    for n, t in times.items():
        s = spread(t)
        found.append(
            dict(
                stage=stage,
                axis=axis,
                size=n,
                seconds=s["median"],
                low=s["low"],
                high=s["high"],
                n=s["n"],
                work=work,
                **about,
            )
        )
    print(pd.DataFrame(found)[["stage", "size", "seconds"]].to_string(index=False, header=False), flush=True)
    return found


# --- one function per axis
# ---------------------------------------------------------------------------------------------


def cells(data):
    "Tokenising files of ever more cells (human, repeated)."
    a = ad.read_h5ad(data.files("raw")["human"])
    path_of = lambda n: data.folder / f"cells_{n}.h5ad"

    def call_of(n):
        path = path_of(n)
        part = a[np.resize(np.arange(a.n_obs), n)].copy()
        part.obs_names = [str(i) for i in range(n)]
        part.write_h5ad(path)
        return lambda: tokenise(data, path)

    rows = sweep(
        "tokenise",
        "cells",
        data.size([1000, 2000, 4000, 8000, 16000], [20, 40, 80]),
        call_of,
        data.size(3, 1),
        "one file",
    )
    for r in rows:
        child = subprocess.run(
            [sys.executable, __file__, "--tokenise", path_of(r["size"]), "--data", data.folder],
            capture_output=True,
            text=True,
            check=True,
        )
        r["added_mib"] = float(child.stdout)
    return rows


def tokenise(data, path):
    with tempfile.TemporaryDirectory(dir=data.folder) as out:
        tokenize(path, data.vocab, Path(out) / "corpus", keep=[], progress=False, threads=1)


def length(data):
    "A training step and an embedding of two cells of ever more tokens."
    sizes, found = data.size([128, 256, 512, 1024, 2048], [16, 32, 64]), []
    chosen = data.longest(2, sizes[-1])
    sizes = [n for n in sizes if n <= data.sentences.lengths[chosen].min()]
    for stage, p in ("training step", 0.1), ("training step, no attention dropout", 0.0):
        model = data.model(attention_dropout=p)
        objective, optimiser = Objective(model), adamw(model)

        def call_of(n):
            batch = MaskedBatches(data.sentences, data.vocab, 2, n).collate(chosen, 0)
            return lambda: published.train_step(lambda: objective(**batch)["loss"], optimiser)

        found += sweep(stage, "length", sizes, call_of, data.size(2, 1), "2 cells")
    loaded, two = data.loaded(sizes[-1]), data.sentences.take(chosen)

    def call_of(n):
        return lambda: Reader(dataclasses.replace(loaded, context=n)).vectors(two)

    return found + sweep("embedding", "length", sizes, call_of, data.size(3, 1), "2 cells")


def vocabulary(data):
    "Loss and gradient of the MLM head for ever more tokens to choose from."
    from types import SimpleNamespace

    sizes, n, h = data.size([1000, 4000, 16000, 64000], [1000, 2000, 4000]), data.size(1024, 32), 256
    rng = np.random.default_rng(0)
    at = np.sort(rng.choice(n, max(1, int(0.15 * n)), replace=False))
    hidden = torch.randn(1, n, h)

    def call_of(size, dense):
        head = torch.nn.Linear(h, size)
        labels = torch.full((1, n), -100)
        labels[0, at] = torch.from_numpy(rng.integers(0, size, len(at)))

        def call():
            x = hidden.clone().requires_grad_()
            loss = (
                F.cross_entropy(head(x)[0], labels[0], ignore_index=-100)
                if dense
                else mlm_loss(SimpleNamespace(cls=head), x, labels)
            )
            head.zero_grad()
            loss.backward()

        return call

    return [
        r
        for stage, dense in (("MLM loss", False), ("MLM loss, every position", True))
        for r in sweep(
            stage,
            "vocabulary",
            sizes,
            functools.partial(call_of, dense=dense),
            data.size(3, 1),
            f"{n:,} tokens, {len(at)} masked",
        )
    ]


def perturbations(data):
    "Putting ever more genes first, one at a time, in each of three cells."
    tokens = data.size(64, 32)
    a, loaded = perturbed_cells(data, 3, tokens), data.loaded(tokens)
    frame = data.vocab.frame
    ids = frame.loc[frame["species"].eq("human"), "ensembl_id"].tolist()

    def call_of(n):
        return lambda: perturb(
            a,
            loaded,
            "overexpress",
            state="state",
            start="start",
            goal="goal",
            genes=ids[:n],
            n_boot=2,
            n_matched=2,
            progress=False,
            device="cpu",
        )

    return sweep(
        "perturbation",
        "perturbations",
        data.size([10, 30, 100, 300, 1000], [5, 10, 20]),
        call_of,
        data.size(2, 1),
        f"3 cells x {tokens} tokens",
    )


# --- what follows from it
# ------------------------------------------------------------------------------------------------


def fits(t):
    """Growth exponent of each stage, over the three largest sizes (where the fixed cost is small) and over the two
    largest."""
    rows = []
    for stage, g in t.groupby("stage", sort=False):
        x, y = np.log(g["size"].to_numpy(float)), np.log(g["seconds"].to_numpy())
        rows.append(
            dict(
                stage=stage,
                axis=g["axis"].iloc[0],
                exponent=np.polyfit(x[-3:], y[-3:], 1)[0],
                last=(y[-1] - y[-2]) / (x[-1] - x[-2]),
                largest=int(g["size"].iloc[-1]),
                why=WHY[stage],
            )
        )
    return pd.DataFrame(rows)


def at(t, stage, size):
    "Seconds at a size between those measured, on the straight line between its neighbours in logarithms."
    g = t[t["stage"] == stage]
    return float(np.exp(np.interp(np.log(size), np.log(g["size"]), np.log(g["seconds"]))))


def budget(t):
    "Hours for 50 million cells: from the rates measured here, and by the estimates of PERFORMANCE.md for one H200."
    rows = []

    def add(what, basis, rate, times):
        rows.append(
            dict(what=what, basis=basis, cells_per_s=rate, cells=CELLS * times, hours=CELLS * times / rate / 3600)
        )

    here = "measured here, one CPU thread"
    g = t[t["stage"] == "tokenise"].iloc[-1]
    add("tokenise once", here, g["size"] / g["seconds"], 1)
    for stage in ("training step", "training step, no attention dropout"):
        add(f"pretrain {EPOCHS} epochs, {LENGTH:,} tokens a cell: {stage}", here, 2 / at(t, stage, LENGTH), EPOCHS)
    add(f"embed once, {LENGTH:,} tokens a cell", here, 2 / at(t, "embedding", LENGTH), 1)
    for tokens, mfu, rate in ((1200, 30, 2384), (1200, 40, 3179), (2048, 30, 1059), (2048, 40, 1412)):
        add(
            f"pretrain {EPOCHS} epochs, {tokens:,} tokens a cell",
            f"one H200 at {mfu} % MFU: estimate from FLOPs, not measured",
            rate,
            EPOCHS,
        )
    return pd.DataFrame(rows)


def figure(t, fit, folder):
    "One panel per axis, logarithmic; the legend gives each stage's exponent."
    import matplotlib.pyplot as plt

    from mix_geneformer.plots import save_figure, style

    style()
    titles = dict(cells="Cells", length="Length", vocabulary="Vocabulary", perturbations="Perturbations")
    labels = dict(
        cells="cells in the file",
        length="tokens per cell",
        vocabulary="tokens in the vocabulary",
        perturbations="perturbations per cell",
    )
    fig, axes = plt.subplots(2, 2, figsize=(7.2, 5.6))
    for ax, (axis, title) in zip(axes.flat, titles.items()):
        for stage, g in t[t["axis"] == axis].groupby("stage", sort=False):
            e = fit.set_index("stage").loc[stage, "exponent"]
            ax.errorbar(
                g["size"],
                g["seconds"],
                [g["seconds"] - g["low"], g["high"] - g["seconds"]],
                marker="o",
                ms=3.5,
                lw=1.2,
                label=f"{stage} (exponent {e:.2f})",
            )
        ax.set(xscale="log", yscale="log", title=title, xlabel=labels[axis], ylabel="seconds")
        ax.set_xticks(
            sorted(set(t.loc[t["axis"] == axis, "size"])),
            [f"{n:,}" for n in sorted(set(t.loc[t["axis"] == axis, "size"]))],
            minor=False,
        )
        ax.minorticks_off()
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
        ax.legend(loc="upper left", fontsize=7)
    fig.tight_layout()
    return save_figure(fig, "scaling", folder)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, numbers that mean nothing")
    p.add_argument("--out", default="bench/results", help="folder of the csv files")
    p.add_argument("--figures", default="figures", help="folder of scaling.png and scaling.svg")
    for hidden in ("--tokenise", "--data"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.tokenise:
        before = reset_peak()
        tokenise(Data(args.data), Path(args.tokenise))
        return print(max(peak_mb() - before, 0.1))
    with tempfile.TemporaryDirectory(prefix="mix_geneformer_bench_") as folder:
        write_cells(folder, *((60, 0) if args.quick else (10_000, 1_500)))
        data = Data(folder, args.quick)
        t = pd.DataFrame([r for measure in (cells, length, vocabulary, perturbations) for r in measure(data)])
        fit = fits(t)
        for name, frame in (("scaling", t), ("scaling_fit", fit), ("budget", budget(t))):
            write_csv(frame, Path(args.out) / f"{name}.csv")
        write_machine(args.out, data, " ".join(["scaling.py", *sys.argv[1:]]), ["scaling"])
        paths = figure(t, fit, args.figures)
    print(f"wrote scaling.csv, scaling_fit.csv and budget.csv to {args.out}, and {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
