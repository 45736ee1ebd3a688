#!/usr/bin/env python
"""What memory each verb takes as the cells grow: `python bench/memory.py [--sizes 10000,100000] [--verbs embed,predict]
[--out bench/results] [--quick]`.

Real cells are repeated into one .h5ad, stretch by stretch; each verb reads it in a process of its own, from a path to a
path. memory.csv has a row per verb and size: the peak of resident memory above what the imports take, and cells per
second. Rows of verbs and sizes that are not asked for stay as they were."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from common import peak_mb, reset_peak, sources, write_csv

VERBS = "vocabulary", "tokenise", "embed", "predict", "perturb", "transfer"
SIZES = 10_000, 100_000, 1_000_000
STATE = dict(state="state", start="start", goal="goal")
SHAPE = dict(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=64, context=128)


def source():
    "The human file of the most cells, as it lies."
    by_cells = {}
    for path in sources():
        with h5py.File(path) as f:
            n, _ = f["X"].attrs["shape"]
        if "human" in path.name or path.parent.name == "pancreas":
            by_cells[int(n)] = path
    return by_cells[max(by_cells)]


def repeated(path, n, out):
    "`n` cells of a file, again and again, written without holding them: X as gzipped CSR, names of their own."
    a = ad.read_h5ad(path)
    data, indices, indptr = a.X.data, a.X.indices, a.X.indptr
    rows = np.resize(np.arange(a.n_obs), n)
    kinds = [c for c in ("cell_type", "condition", "donor", "organ", "cell_ontology_class") if c in a.obs]
    obs = a.obs[kinds].astype(str).astype("category").iloc[rows].set_axis([f"cell-{i:09d}" for i in range(n)])
    obs["state"] = pd.Categorical(np.array(["start", "goal"])[np.arange(n) % 2])
    obs["number"] = np.arange(n)
    lengths = np.diff(indptr)[rows]
    with h5py.File(out, "w") as f:
        for name, value in (("obs", obs), ("var", a.var[[]]), ("uns", {}), ("obsm", {}), ("layers", {})):
            write_elem(f, name, value)
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = f.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([n, a.n_vars])})
        x["indptr"] = np.append(0, np.cumsum(lengths))
        tables = ("data", data, np.float32), ("indices", indices, np.int32)
        for name, values, dtype in tables:
            size = int(lengths.sum())
            table = x.create_dataset(name, (size,), dtype, chunks=(2**16,), compression="gzip", compression_opts=1)
            for at in range(0, size, len(values)):
                table[at : at + len(values)] = values[: min(len(values), size - at)]


def prepare(folder, path):
    "Vocabulary, model, classifier and a small labelled file for the verbs."
    import torch

    import mix_geneformer as mgf
    from mix_geneformer.encoder.checkpoints import save_model
    from mix_geneformer.encoder.model import build_model

    few = folder / "few.h5ad"
    repeated(path, 3000, few)
    counts = mgf.read_counts(few, verbose=False)
    commonest = np.argsort(-counts.X.getnnz(0))[:3]
    (folder / "genes").write_text(",".join(counts.var["symbol"].iloc[commonest]))
    vocab = mgf.Vocabulary.build(few)
    torch.manual_seed(0)
    save_model(build_model(vocab, **SHAPE), vocab, folder / "model", dict(pool="mean"))
    mgf.tokenize(few, vocab, folder / "corpus", keep=["state"], progress=False)
    mgf.finetune(folder / "corpus", folder / "model", "state", folder / "classifier", max_steps=2, progress=False)


def run(verb, folder, path, out):
    "One call of a verb."
    import mix_geneformer as mgf
    from mix_geneformer import cli

    few, model, made = folder / "few.h5ad", folder / "model", str(out / "out.h5ad")
    genes = (folder / "genes").read_text()
    calls = dict(
        vocabulary=lambda: mgf.Vocabulary.build(path),
        tokenise=lambda: mgf.tokenize(path, mgf.Vocabulary.load(model), out / "corpus", 128, progress=False),
        embed=lambda: cli.mgf_embed(path, model, made),
        predict=lambda: cli.mgf_predict(path, folder / "classifier", made),
        perturb=lambda: cli.mgf_perturb(path, model, str(out / "run"), **STATE, genes=genes, max_cells=20),
        transfer=lambda: cli.mgf_transfer(few, path, made, label="state"),
    )
    return calls[verb]()


def child(verb, folder, path, out):
    "Peak MB above the imports, and seconds, of one verb in this process."
    import pkgutil

    import datasets  # noqa: F401
    import scanpy  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import mix_geneformer
    from mix_geneformer.cells.genes import gene_table

    for m in pkgutil.walk_packages(mix_geneformer.__path__, "mix_geneformer."):
        if "._modidx" not in m.name:
            __import__(m.name)
    gene_table("human"), gene_table("mouse")
    before, start = reset_peak(), time.perf_counter()
    run(verb, folder, path, out)
    print(f"\nmeasured {peak_mb() - before} {time.perf_counter() - start} {before}")


def measured(verb, folder, path):
    "The same, of a process of its own."
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = [sys.executable, __file__, "--child", verb, "--folder", folder, "--path", path, "--room", out]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{verb} failed: {done.stderr[-2000:]}")
    return map(float, done.stdout.rsplit("measured ", 1)[1].split())


def kept(path, rows):
    "The rows that are there already, the new ones in the place of their like."
    found = pd.DataFrame(rows)
    if path.is_file():
        found = pd.concat([pd.read_csv(path), found])
    found = found.drop_duplicates(["verb", "cells"], keep="last")
    return found.sort_values(["verb", "cells"], key=lambda c: c.map(VERBS.index) if c.name == "verb" else c)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", default=",".join(map(str, SIZES)), help="cells, separated by commas")
    p.add_argument("--verbs", default=",".join(VERBS), help="separated by commas")
    p.add_argument("--quick", action="store_true", help="a smoke test: few cells, numbers that mean nothing")
    p.add_argument("--out", default="bench/results", help="folder of memory.csv")
    p.add_argument("--keep", help="folder that keeps the large files between runs")
    for hidden in ("--child", "--folder", "--path", "--room"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args.child, Path(args.folder), Path(args.path), Path(args.room))
    rows, table = [], Path(args.out) / "memory.csv"
    with tempfile.TemporaryDirectory(prefix="mix_geneformer_bench_") as made:
        folder = Path(args.keep or made)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "classifier").is_dir():
            prepare(folder, source())
        for n in (3500,) if args.quick else map(int, args.sizes.split(",")):
            path = folder / f"cells{n}.h5ad"
            if not path.is_file():
                repeated(source(), n, path)
            for verb in args.verbs.split(","):
                peak, seconds, imports = measured(verb, folder, path)
                rows.append(dict(verb=verb, cells=n, peak_mb=peak, cells_per_s=n / seconds, imports_mb=imports))
                print(pd.DataFrame(rows[-1:]).to_string(index=False, header=False), flush=True)
                write_csv(kept(table, rows), table)
    print(f"wrote {table}")


if __name__ == "__main__":
    main()
