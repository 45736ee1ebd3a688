"""What `run.py` and `scaling.py` share: real cells on disk, a model with random weights, interleaved timing, results
as csv."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before numpy and torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import gc
import hashlib
import json
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import torch

from mix_geneformer.cells.corpora import fetch
from mix_geneformer.cells.counts import read_counts
from mix_geneformer.cells.sentences import sentences_of
from mix_geneformer.cells.storage import load_corpus
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.checkpoints import Loaded
from mix_geneformer.encoder.model import build_model
from mix_geneformer.encoder.train import parameter_groups
from mix_geneformer.files import sha256
from mix_geneformer.paper.machine import run_info

# tokens of the model: as many as the paper's two species have together; rows beyond the corpus' own are never read
VOCABULARY = 52_000
SPECIES = "human", "mouse"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", message=".*rank_correlation.*")  # random weights: the result is not looked at

# --- cells -----------------------------------------------------------------------------------------------------------


def sources():
    "Files of raw counts: those in $MGF_BENCH_DATA, else the `pancreas` corpus."
    folder = os.environ.get("MGF_BENCH_DATA")
    return sorted(Path(folder).glob("*.h5ad")) if folder else list(fetch("pancreas").files.values())


def write_cells(folder, n_cells, min_genes):
    """Human cells, and a fifth as many of the mouse, repeated where there are too few: <species>_raw.h5ad,
    <species>_gzip.h5ad, vocabulary, corpus."""
    folder, number = Path(folder), dict(zip(SPECIES, (n_cells, n_cells // 5)))
    counts = {s: [] for s in SPECIES}
    for path in sources():
        a = read_counts(path, verbose=False)
        counts[a.obs["species"].iloc[0]].append(a[np.diff(a.X.indptr) >= min_genes])
    about, files = (
        dict(
            data_sha256=hashlib.sha256("".join(sha256(p) for p in sources()).encode()).hexdigest(),
            sources=[p.name for p in sources()],
            min_genes=min_genes,
        ),
        [],
    )
    for species, parts in counts.items():
        a = ad.concat(parts, join="outer")
        a = a[np.resize(np.random.default_rng(0).permutation(a.n_obs), number[species])]
        about[f"{species}_cells"] = f"{number[species]:,} of {sum(len(p) for p in parts):,} distinct"
        obs = pd.DataFrame(
            dict(n_counts=np.asarray(a.X.sum(1), np.float64).ravel(), cell_type="unknown"),
            index=[f"{species}{i}" for i in range(a.n_obs)],
        )
        a = ad.AnnData(a.X.tocsr(), obs, pd.DataFrame(dict(ensembl_id=a.var_names.astype(str)), index=a.var_names))
        a.X.sort_indices()
        a.write_h5ad(folder / f"{species}_raw.h5ad")
        a.write_h5ad(folder / f"{species}_gzip.h5ad", compression="gzip")
        small = a[: min(a.n_obs, 1000)].copy()
        for kind in ("raw", "gzip"):
            small.write_h5ad(folder / f"{species}_{kind}_small.h5ad", compression=None if kind == "raw" else "gzip")
        files.append(folder / f"{species}_raw.h5ad")
    vocab = Vocabulary.build(files)
    vocab.save(folder)
    tokenize(files, vocab, folder / "corpus", keep=["cell_type"], progress=False)
    (folder / "about.json").write_text(json.dumps(about))


@dataclass
class Data:
    "The cells of a bench run, and models for them; `quick` makes everything small enough for a smoke test."

    folder: Path
    quick: bool = False

    def __post_init__(self):
        self.folder = Path(self.folder)

    def size(self, full, quick):
        return quick if self.quick else full

    def files(self, kind, small=False):
        return {s: self.folder / f"{s}_{kind}{'_small' if small else ''}.h5ad" for s in SPECIES}

    @functools.cached_property
    def about(self):
        return json.loads((self.folder / "about.json").read_text())

    @functools.cached_property
    def vocab(self):
        return Vocabulary.load(self.folder)

    @functools.cached_property
    def corpus(self):
        return load_corpus(self.folder / "corpus")

    @functools.cached_property
    def sentences(self):
        return sentences_of(self.corpus)

    def longest(self, n, length, among=None):
        "Numbers of `n` cells that have at least `length` tokens (drawn at random), or of the `n` longest."
        lengths = self.sentences.lengths[:among]
        enough = np.flatnonzero(lengths >= length)
        return (
            np.sort(np.random.default_rng(0).choice(enough, n, replace=False))
            if len(enough) >= n
            else np.argsort(-lengths, kind="stable")[:n]
        )

    def rows(self, cells, context):
        return [np.asarray(self.sentences[i][:context], dtype=np.int64).tolist() for i in cells]

    def model(self, context=2048, attention_dropout=0.1, vocabulary=VOCABULARY):
        "6 layers x 256, random weights, in training mode."
        torch.manual_seed(0)
        shape = self.size({}, dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64))
        m = build_model(self.vocab, context=context, attention_probs_dropout_prob=attention_dropout, **shape)
        if not self.quick and vocabulary > len(self.vocab):
            m.resize_token_embeddings(vocabulary, mean_resizing=False)
        return m.train()

    def loaded(self, context):
        return Loaded(self.model(context).eval(), self.vocab, context, "mean", None, self.folder, {})


def adamw(module, fused=False):
    return torch.optim.AdamW(parameter_groups(module, 0.01), lr=1e-4, fused=fused)


def perturbed_cells(data, n, length):
    "AnnData of `n` start and `n` goal cells (human, `length` genes or more, obs['state']), as `perturb` takes them."
    a = ad.read_h5ad(data.files("raw")["human"])
    a = a[data.longest(2 * n, length, among=a.n_obs)].copy()
    a.obs["state"] = ["start"] * n + ["goal"] * n
    a.obs_names = [f"cell{i}" for i in range(2 * n)]
    return a


# --- timing
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    "Ways to the same result, the published one first."

    contenders: dict  # name -> function of no argument that does the work once
    work: float  # how much that is
    unit: str  # of what
    check: object  # called before the timing: says in words what is the same, or raises AssertionError
    rounds: int = 3  # timed calls of each, in turn
    memory: tuple = ()  # contenders whose peak memory is taken, each in a process of its own; () none, None all
    share: dict = field(
        default_factory=dict
    )  # contender -> share of the work that it does; its times are divided by this
    prepare: object = None  # called with a contender's name before it is timed: makes its model
    note: str = ""  # what a reader must know: sizes, what was scaled
    extra: object = None  # called afterwards: more rows (contender, metric, unit, value)


def clock(fn):
    "Wall and CPU seconds (threads and finished children included) of one call."
    gc.collect()
    seconds = lambda: np.array([time.perf_counter(), time.process_time() + sum(os.times()[2:4])])
    start = seconds()
    fn()
    return seconds() - start


def peak_mb():
    "Peak resident memory of this process since `reset_peak` (or its start), in MiB."
    try:
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak():
    """Begin a new peak at what is resident now; returns that, in MiB. (Where the system cannot, the peak since the
    start stands.)"""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak_mb()


def spread(values):
    "Median, smallest and largest."
    return dict(median=float(np.median(values)), low=float(min(values)), high=float(max(values)), n=len(values))


def table(comparison, times, equal, memory=None):
    "A row per contender and metric; `ratio` is how many times better than the published way."
    c, rows = comparison, []
    for name, (wall, cpu) in times.items():
        wall, cpu = (np.array(t) / c.share.get(name, 1) for t in (wall, cpu))
        rows += [
            dict(contender=name, metric=m, unit=u, **spread(v))
            for m, u, v in (("wall", "s", wall), ("cpu", "s", cpu), ("rate", f"{c.unit}/s", c.work / wall))
        ]
    for name, found in (memory or {}).items():
        rows += [dict(contender=name, metric=m, unit="MiB", **spread([v])) for m, v in found.items()]
    t = pd.DataFrame(rows)
    base = t[t["contender"] == next(iter(times))].set_index("metric")["median"]
    ratio = t["metric"].map(base) / t["median"]
    t.insert(6, "ratio", np.where(t["metric"] == "rate", 1 / ratio, ratio))
    more = [
        dict(contender=name, metric=metric, unit=unit, **spread([value]))
        for name, metric, unit, value in (c.extra() if c.extra else ())
    ]
    return pd.concat([t, pd.DataFrame(more)] if more else [t], ignore_index=True).assign(equal=equal, note=c.note)


def interleaved(comparison):
    "Times of each contender, taken in turn: {name: (wall seconds, CPU seconds)}."
    times = {name: ([], []) for name in comparison.contenders}
    for name in times:
        comparison.prepare and comparison.prepare(name)
    for _ in range(comparison.rounds):
        for name, fn in comparison.contenders.items():
            for kept, t in zip(times[name], clock(fn)):
                kept.append(t)
    return times


def write_csv(frame, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")


def write_machine(out, data, command, names):
    "machine.json: what the csv files beside it were measured on, and when each of `names` was."
    info = dict(
        run_info(),
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        quick=data.quick,
        vocabulary=VOCABULARY,
        mean_length=float(data.sentences.lengths.mean()),
        **data.about,
    )
    now = dict(date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), command=command)
    path = Path(out) / "machine.json"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    runs.update(dict.fromkeys(names, dict(now, commit=info["commit"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    info["commit"] = " and ".join(
        dict.fromkeys(filter(None, (r["commit"] for r in runs.values())))
    )  # of every row on the page, not only of the last run
    path.write_text(json.dumps(dict(info, **now, runs=runs), indent=1))
