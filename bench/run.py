#!/usr/bin/env python
"""Every stage beside the published way to the same result: `python bench/run.py [--only NAME,...] [--quick] [--out
bench/results]`.

Contenders take turns (A B A B ...) within one process, on one thread unless their name says otherwise, on the same
real cells; before they are timed their results are compared. Peak memory is taken from a process of its own for each.
Counts come from the .h5ad files in $MGF_BENCH_DATA, or from the `pancreas` corpus; weights are random, which changes
no cost."""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import published
import torch
from common import (
    Comparison,
    Data,
    adamw,
    clock,
    interleaved,
    peak_mb,
    perturbed_cells,
    reset_peak,
    table,
    write_cells,
    write_csv,
    write_machine,
)

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.sentences import MappedSentences
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.encoder.batches import LabelledBatches, MaskedBatches
from mix_geneformer.encoder.classifier import classifier_from
from mix_geneformer.encoder.losses import Objective
from mix_geneformer.encoder.states import Reader, cell_budget
from mix_geneformer.perturbation.verb import perturb

COMPARISONS = {}


def comparison(fn):
    "Register a function Data -> Comparison under its name."
    COMPARISONS[fn.__name__] = fn
    return fn


def close(ours, theirs, tolerance, what):
    "Says how far apart two arrays are; refuses more than `tolerance`."
    apart = float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max())
    assert apart <= tolerance, f"{what} differ by {apart:.2g}, more than {tolerance:g}"
    return f"{what} within {apart:.1g}" if apart else f"{what} identical"


def same_loss_and_gradients(ours, theirs, module):
    "Loss to 1e-6 (relative), gradients to 1e-5."
    found = []
    for loss_of in (ours, theirs):
        module.zero_grad()
        loss = loss_of()
        loss.backward()
        found.append(
            (
                float(loss.detach()),
                {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
            )
        )
    module.zero_grad()
    (a, ga), (b, gb) = found
    apart = max(float((ga[n] - gb[n]).abs().max()) for n in ga)
    assert apart <= 1e-5, f"gradients differ by {apart:.2g}"
    return f"{close(a / b, 1, 1e-6, 'losses')}, gradients within {apart:.1g}"


# --- tokenise
# ----------------------------------------------------------------------------------------------------------


def theirs_tokenise(data, kind, out, small=False, **exact):
    return published.tokenize(data.files(kind, small)["human"], data.vocab, "human", out, keep=["cell_type"], **exact)


def ours_tokenise(data, kind, out, threads, small=False):
    return tokenize(
        data.files(kind, small)["human"], data.vocab, out, keep=["cell_type"], progress=False, threads=threads
    )


def tokenise(data, kind):
    def fresh(fn, *args):
        def call():
            with tempfile.TemporaryDirectory(dir=data.folder) as out:
                fn(data, kind, Path(out) / "corpus", *args)

        return call

    def check():
        with tempfile.TemporaryDirectory(dir=data.folder) as out:
            a = theirs_tokenise(data, kind, Path(out) / "theirs", True, exact=True)["input_ids"][:]
            b = ours_tokenise(data, kind, Path(out) / "ours", 1, True)["input_ids"][:]
        same = sum(x == y for x, y in zip(a, b))
        assert len(a) == len(b) == same, f"{len(b) - same:,} of {len(b):,} cells differ"
        return f"tokens identical in {same:,} of {len(b):,} cells"

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    contenders = {"published": fresh(theirs_tokenise), "ours": fresh(ours_tokenise, 1)}
    if cores > 1:
        contenders[f"ours, {cores} threads"] = fresh(ours_tokenise, cores)
    lengths = data.sentences.lengths[data.sentences.species == "human"]
    n = len(lengths)
    return Comparison(
        contenders,
        n,
        "cells",
        check,
        rounds=data.size(3, 1),
        memory=("published", "ours") if kind == "raw" else (),
        note=f"{n:,} cells in one file, {lengths.mean():,.0f} tokens each on average; the file in the page cache",
    )


@comparison
def tokenise_raw(data):
    return tokenise(data, "raw")


@comparison
def tokenise_gzip(data):
    return tokenise(data, "gzip")


# --- training
# ------------------------------------------------------------------------------------------------------------


def pretraining(data, batch_size, length, contenders, memory):
    cells = data.longest(batch_size, length)
    length = min(length, int(data.sentences.lengths[cells].min()))  # nothing is padded
    batch = MaskedBatches(data.sentences, data.vocab, batch_size, length).collate(cells, 0)

    @functools.cache
    def step(attention_dropout, ours, **objective):
        "A step of a model of its own, made when it is first called."
        model = data.model(length, attention_dropout)
        optimiser = adamw(model, fused=ours)
        mine = Objective(model, **objective)
        loss_of = (
            (lambda: mine(**batch)["loss"])
            if ours
            else (lambda: published.pretraining_loss(model, published.dense(batch)))
        )
        return lambda: published.train_step(loss_of, optimiser)

    kinds = {
        "published": dict(attention_dropout=0.1, ours=False),
        "ours": dict(attention_dropout=0.1, ours=True, pool="first", symmetric=True),
        "published, no attention dropout": dict(attention_dropout=0.0, ours=False),
        "ours, no attention dropout": dict(attention_dropout=0.0, ours=True, pool="first", symmetric=True),
        "ours, equation 3 and mean over tokens, no attention dropout": dict(
            attention_dropout=0.0, ours=True, pool="mean", symmetric=False
        ),
    }

    def check():
        model = data.model(length).eval()  # no dropout
        mine = Objective(model, pool="first", symmetric=True)
        return same_loss_and_gradients(
            lambda: mine(**batch)["loss"], lambda: published.pretraining_loss(model, published.dense(batch)), model
        )

    return Comparison(
        {k: lambda k=k: step(**kinds[k])() for k in contenders},
        batch_size * length,
        "tokens",
        check,
        rounds=data.size(3, 1),
        memory=memory,
        prepare=lambda k: step(**kinds[k]),
        note=(
            f"{batch_size} cells x {length} tokens, {data.model(length).config.vocab_size:,} in the vocabulary, "
            f"forward, backward and AdamW; position 0 contrasted, NT-Xent"
        ),
    )


@comparison
def train_512(data):
    return pretraining(
        data,
        4,
        data.size(512, 32),
        (
            "published",
            "ours",
            "published, no attention dropout",
            "ours, no attention dropout",
            "ours, equation 3 and mean over tokens, no attention dropout",
        ),
        (),
    )


@comparison
def train_2048(data):
    kinds = "published", "ours", "ours, no attention dropout"
    return pretraining(data, 2, data.size(2048, 64), kinds, kinds)


@comparison
def finetune(data):
    "An epoch over a few cells of mixed lengths, in the same batches of like length."
    context, size, n = data.size(2048, 64), 3, 6
    cells = np.random.default_rng(1).choice(len(data.sentences), n, replace=False)
    sentences, labels = data.sentences.take(cells), np.arange(n) % 5
    rows = [dict(input_ids=r, label=int(l)) for r, l in zip(data.rows(cells, context), labels)]
    collate, batches = (
        published.LabelledCollator(data.vocab),
        LabelledBatches(sentences, data.vocab, size, context, labels),
    )

    def net(attention_dropout):
        torch.manual_seed(0)
        return classifier_from(data.model(context, attention_dropout), list("abcde")).train()

    @functools.cache
    def epoch(attention_dropout, ours):
        model = net(attention_dropout)
        optimiser = adamw(model, fused=ours)

        def theirs():
            for cells in batches.plan(0):
                batch = collate([rows[i] for i in cells])
                published.train_step(lambda: published.classification_loss(model, batch), optimiser)

        def mine():
            for batch in batches.epoch(0):
                published.train_step(lambda: model(**batch)["loss"], optimiser)

        return mine if ours else theirs

    def check():
        model = net(0.0).eval()
        batch = batches.collate(np.arange(size), 0)
        return same_loss_and_gradients(
            lambda: model(**batch)["loss"], lambda: published.classification_loss(model, collate(rows[:size])), model
        )

    kinds = {"published": (0.1, False), "ours": (0.1, True), "ours, no attention dropout": (0.0, True)}
    return Comparison(
        {k: lambda k=k: epoch(*kinds[k])() for k in kinds},
        n,
        "cells",
        check,
        rounds=data.size(3, 1),
        prepare=lambda k: epoch(*kinds[k]),
        note=(
            f"{n} cells drawn at random, {np.minimum(sentences.lengths, context).mean():,.0f} tokens on average, "
            f"the same batches of {size} of like length"
        ),
    )


def before_last(loaded):
    return loaded.model.config.num_hidden_layers - 1  # layers to run for what Geneformer reads


# --- using a model
# -------------------------------------------------------------------------------------------------------


@comparison
def embed(data):
    n, size, context = data.size(16, 6), 8, data.size(2048, 64)
    lengths = data.sentences.lengths
    near = np.flatnonzero(
        np.abs(np.minimum(lengths, context) - context * 0.59) < context * 0.15
    )  # about 1,210 tokens at 2,048, as in the targets
    cells = np.random.default_rng(2).choice(near, n, replace=False)
    sentences, rows, loaded = data.sentences.take(cells), data.rows(cells, context), data.loaded(context)
    theirs, ours = (
        lambda: published.embed(loaded.model, rows, size).numpy(),
        lambda: Reader(loaded, cell_budget(loaded, size), before_last(loaded)).vectors(sentences),
    )
    return Comparison(
        {"published": theirs, "ours": ours},
        n,
        "cells",
        lambda: close(ours(), theirs(), 1e-5, "vectors"),
        rounds=data.size(3, 1),
        memory=("published", "ours"),
        note=(
            f"{n} cells drawn at random, {np.minimum(sentences.lengths, context).mean():,.0f} tokens on average, "
            f"batches of {size}, the layer before the last"
        ),
    )


def perturbation(data, n_cells, length, n_genes, positions):
    """Deletions, of all genes of the cells and of the `n_genes` that most of them hold: counts of both, published(),
    ours(**keywords), check()."""
    a, loaded = perturbed_cells(data, n_cells, length), data.loaded(length)
    coded = encode_cells(a, loaded.vocab, length)
    rows = [np.asarray(coded[i], np.int64).tolist() for i in range(len(coded))]
    held, n = np.unique(np.concatenate(rows[:n_cells]), return_counts=True)
    most = np.argsort(-n, kind="stable")[:n_genes]
    genes, ids = held[most], loaded.vocab.describe(held[most], "human")["ensembl_id"].tolist()
    ours = functools.partial(
        perturb,
        a,
        loaded,
        "delete",
        state="state",
        start="start",
        goal="goal",
        positions=positions,
        emb_layer=before_last(loaded),
        n_boot=2,
        n_matched=2,
        progress=False,
        device="cpu",
    )
    theirs = lambda few=None: published.perturb(
        loaded.model, rows[:n_cells], rows[n_cells:], genes[:few], positions=positions
    )

    def check(few=5):
        found = pd.DataFrame(theirs(few)).groupby(1)[2].mean().loc[genes[:few]]
        return close(
            ours(genes=ids[:few]).set_index("ensembl_id")["cosine_shift"].loc[ids[:few]],
            found,
            1e-6,
            f"shifts of {len(found)} genes",
        )

    return int(n[most].sum()), int(n.sum()), theirs, functools.partial(ours, genes=ids), ours, check


@comparison
def perturb_exact(data):
    length = data.size(1000, 64)
    n, _, theirs, ours, _, check = perturbation(data, 3, length, data.size(27, 4), "shift")
    return Comparison(
        {"published": theirs, "ours": ours},
        n,
        "perturbations",
        check,
        rounds=data.size(3, 1),
        memory=("published", "ours"),
        note=(
            f"3 cells x {length} tokens, {n} deletions, later tokens move up, the layer before the last is read; "
            f"the goal is embedded within the time"
        ),
    )


@comparison
def perturb_screened(data):
    """Every gene of the cells: by gradient, then the top tenth exactly; the others' time is scaled up from some of
    the genes."""
    n_cells, length, sample = data.size(4, 3), data.size(512, 64), data.size(50, 10)
    n, every, theirs, some, ours, check = perturbation(data, n_cells, length, data.size(12, 4), "keep")
    found = {}

    def screened():
        found["table"] = ours(
            genes=None, min_cells=1, screen=0.1, screen_sample=sample, screen_min_correlation=-1.0
        )  # random weights may correlate as they like

    def extra():
        for k, v in found["table"].attrs.items():
            if k in ("screen_correlation", "screen_sample", "n_perturbations"):
                yield "ours, screened", k, "", float(v)

    share = dict.fromkeys(
        ("published", "ours"), (2 * n_cells + n) / (2 * n_cells + every)
    )  # sentences that pass the encoder: start and goal cells, perturbations
    return Comparison(
        {"published": theirs, "ours": some, "ours, screened": screened},
        every,
        "perturbations",
        check,
        rounds=data.size(3, 1),
        share=share,
        extra=extra,
        note=(
            f"{n_cells} cells x {length} tokens, other positions kept, all {every:,} deletions; published and exact "
            f"timed on {n} of them and scaled by the sentences encoded; screened: gradient, {sample} at random and "
            f"the top tenth of the genes exactly"
        ),
    )


# --- batches
# ---------------------------------------------------------------------------------------------------------------


def collation(data, collator, batches, size, context, **labels):
    "Ten batches of cells in memory: rows of Python lists, or our flat tokens."
    n = 10 * size
    cells = np.arange(n) % len(data.sentences)
    rows = [
        dict(input_ids=r, **{k: int(v[i]) for k, v in labels.items()}) for r, i in zip(data.rows(cells, context), cells)
    ]
    theirs, ours = lambda i: collator(rows[i : i + size]), lambda i: batches.collate(cells[i : i + size], 0)

    def every(make):
        def call():
            for i in range(0, n, size):
                make(i)

        return call

    def check():
        a, b = published.dense(ours(0)), theirs(0)
        assert torch.equal(a["attention_mask"].bool(), b["attention_mask"].bool())
        original = lambda x: (
            torch.where(x["labels"] != -100, x["labels"], x["input_ids"]) if x["labels"].ndim == 2 else x["input_ids"]
        )
        assert torch.equal(original(a), original(b)) and a["labels"].shape == b["labels"].shape
        return "the same padded tokens" + (" under different random masks" if a["labels"].ndim == 2 else " and labels")

    return Comparison(
        {"published": every(theirs), "ours": every(ours)},
        10,
        "batches",
        check,
        rounds=data.size(9, 1),
        note=(
            f"10 batches of {size} cells, {np.minimum(data.sentences.lengths[cells], context).mean():,.0f} tokens "
            f"on average"
        ),
    )


def collate_mlm(data, size):
    context = data.size(2048, 64)
    return collation(
        data,
        published.MaskedCollator(data.vocab),
        MaskedBatches(data.sentences, data.vocab, size, context),
        size,
        context,
    )


def collate_labels(data, size):
    context, labels = data.size(2048, 64), np.arange(len(data.sentences)) % 7
    return collation(
        data,
        published.LabelledCollator(data.vocab),
        LabelledBatches(data.sentences, data.vocab, size, context, labels),
        size,
        context,
        label=labels,
    )


@comparison
def collate_mlm_8(data):
    return collate_mlm(data, 8)


@comparison
def collate_mlm_32(data):
    return collate_mlm(data, 32)


@comparison
def collate_labels_12(data):
    return collate_labels(data, 12)


@comparison
def collate_labels_32(data):
    return collate_labels(data, 32)


@comparison
def loading(data):
    "From the corpus on disk to a model that does nothing, against what the fastest training step takes."
    size, context, n = 8, 2048, data.size(800, 40)
    cells = np.random.default_rng(4).choice(len(data.corpus), n, replace=False)
    dataset = data.corpus.select(cells)
    in_memory, on_disk, rows, tokens = (
        data.sentences.take(cells),
        MappedSentences(dataset),
        dataset.select_columns(["input_ids"]),
        int(data.sentences.lengths[cells].sum()),
    )
    padding = {}

    def run(name, batches):
        held = real = 0
        for batch in batches:
            held, real = held + batch["input_ids"].numel(), real + int(published.dense(batch)["attention_mask"].sum())
        padding[name] = 1 - real / held

    ours = lambda sentences, **how: MaskedBatches(sentences, data.vocab, size, context, **how).epoch(0)
    theirs = lambda: published.loader(rows, in_memory.lengths.tolist(), published.MaskedCollator(data.vocab), size)

    def check():
        a, b = (
            sorted(int(m) for x in made for m in published.dense(x)["attention_mask"].sum(1))
            for made in (ours(on_disk), theirs())
        )
        assert a == b and sum(a) == tokens
        return f"the same {n:,} cells of {tokens:,} tokens in all"

    contenders = {
        "published": lambda: run("published", theirs()),
        "ours, on disk": lambda: run("ours, on disk", ours(on_disk)),
        "ours, in memory": lambda: run("ours, in memory", ours(in_memory)),
    }

    def extra():
        run("ours, random batches", ours(in_memory, length_window=1))
        for name, share in padding.items():
            yield name, "padding", "share", share
        step = pretraining(data, 4, data.size(512, 32), ("ours, no attention dropout",), ())
        call = step.contenders["ours, no attention dropout"]
        call()
        yield "training step, 4 x 512, no attention dropout", "rate", "tokens/s", step.work / clock(call)[0]

    return Comparison(
        contenders,
        tokens,
        "tokens",
        check,
        rounds=data.size(5, 1),
        extra=extra,
        note=(
            f"{n:,} cells, batches of {size}, masking included; the last line is what the fastest training step "
            f"takes in on one thread"
        ),
    )


# --- the command
# -------------------------------------------------------------------------------------------------------------


def memory_of(name, contenders, data):
    "Peak memory of each contender, in a process of its own."
    found = {}
    for c in contenders:
        cmd = [sys.executable, __file__, "--child", name, "--contender", c, "--data", str(data.folder)] + [
            "--quick"
        ] * data.quick
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise RuntimeError(r.stderr)
        found[c] = json.loads(r.stdout.splitlines()[-1])
    return found


def child(name, contender, data):
    "Do a contender's work once and print what memory it took: in all, and above what it began with."
    c = COMPARISONS[name](data)
    before = reset_peak()
    if c.prepare:
        c.prepare(contender)
    c.contenders[contender]()
    print(json.dumps(dict(peak_memory=peak_mb(), added_memory=max(peak_mb() - before, 0.1))))


def measure(name, data, out):
    c = COMPARISONS[name](data)
    equal = c.check()
    t = table(c, interleaved(c), equal, memory_of(name, c.memory, data))
    write_csv(t, Path(out) / f"{name}.csv")
    shown = t[t["metric"].isin(["wall", "peak_memory"])].assign(ratio=lambda d: d["ratio"].map("{:.2f}x".format))
    print(
        (
            f"\n{name}: "
            f"{equal}\n"
            f"{shown[['contender', 'metric', 'unit', 'median', 'low', 'high', 'ratio']].to_string(index=False)}"
        ),
        flush=True,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help=f"some of these, with commas: {','.join(COMPARISONS)}")
    p.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, numbers that mean nothing")
    p.add_argument("--out", default="bench/results", help="folder of the csv files")
    for hidden in ("--child", "--contender", "--data"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args.child, args.contender, Data(args.data, args.quick))
    names = args.only.split(",") if args.only else list(COMPARISONS)
    if unknown := [n for n in names if n not in COMPARISONS]:
        p.error(f"{len(unknown)} unknown comparisons ({', '.join(unknown)}): pass some of {', '.join(COMPARISONS)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="mix_geneformer_bench_") as folder:
        write_cells(folder, *((60, 0) if args.quick else (10_000, 1_500)))
        data = Data(folder, args.quick)
        for name in names:
            try:
                measure(name, data, args.out)
                write_machine(args.out, data, " ".join(["run.py", *sys.argv[1:]]), [name])
            except Exception:  # the other comparisons still count
                traceback.print_exc()
                failed.append(name)
    if failed:
        sys.exit(f"{len(failed)} of {len(names)} comparisons failed: {', '.join(failed)}")
    print(f"\nwrote {len(names)} tables and machine.json to {args.out}")


if __name__ == "__main__":
    main()
