#!/usr/bin/env python
"""One GPU beside the CPU: equality, rates, profile. First where the counts are, `python bench/gpu.py --prepare
build/cells.npz`; then on the machine with the GPU (it needs torch, transformers, accelerate, pandas, scipy, tqdm
and fastcore only)

    python bench/gpu.py --cells build/cells.npz --out bench/results/gpu

checks that the GPU gives what the CPU gives, times the training step over attention paths, token budgets and
torch.compile, then embedding and perturbation, runs the training loop with its loader, profiles the best step, and
writes csv files and profile.txt. `--tiny --device cpu` proves the script itself on any machine. Weights are random:
they change no cost. Peak rate: one large bf16 matrix product, measured first."""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from mix_geneformer.cells.sentences import Sentences
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.encoder.batches import MaskedBatches
from mix_geneformer.encoder.losses import Objective
from mix_geneformer.encoder.model import compile_parts, encode, encoder_flops, pool_tokens
from mix_geneformer.encoder.speed import matmul_rate
from mix_geneformer.encoder.states import Budget, Reader
from mix_geneformer.encoder.train import fit, parameter_groups

VOCABULARY, HIDDEN, LAYERS, CONTEXT = 52_000, 256, 6, 2048  # the paper's model and about its vocabulary


def prepare(path):
    """Cell sentences of the `pancreas` corpus and of $MGF_BENCH_DATA, in the smallest type, as one file of a few
    megabytes."""
    from common import sources

    from mix_geneformer.cells.encoding import encode_cells

    vocab = Vocabulary.build(sources())
    parts = [encode_cells(p, vocab, CONTEXT) for p in sources()]
    values, lengths = np.concatenate([p.values for p in parts]), np.concatenate([p.lengths for p in parts])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, values=values, lengths=lengths, tokens=len(vocab))
    print(
        (
            f"{len(lengths):,} cells, {lengths.mean():,.0f} tokens each on average: {path} "
            f"({Path(path).stat().st_size:,} bytes)"
        )
    )


class Tokens:
    "What a loader asks of a vocabulary."

    pad_token_id, mask_token_id, n_special, orthologs = 0, 1, 2, "separate"
    marks = (), ()  # no <cls>, no <eos>

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


class Bench:
    def __init__(self, cells, out, device, tiny):
        saved = np.load(cells)
        self.sentences, self.out, self.device, self.tiny = (
            Sentences(saved["values"], np.r_[0, saved["lengths"].cumsum()], "human"),
            Path(out),
            torch.device(device),
            tiny,
        )
        self.cuda = self.device.type == "cuda"
        self.vocab = Tokens(int(saved["tokens"]) if tiny else VOCABULARY)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rate = matmul_rate(self.device, torch.bfloat16)
        self.write_machine()

    def write_machine(self):
        import transformers

        name = torch.cuda.get_device_name(self.device) if self.cuda else "CPU"
        self.machine = dict(
            device=name,
            torch=torch.__version__,
            transformers=transformers.__version__,
            numpy=np.__version__,
            python=sys.version.split()[0],
            matmul_tflops=self.rate / 1e12,
            date=time.strftime("%Y-%m-%d"),
            tiny=self.tiny,
        )
        (self.out / "machine.json").write_text(json.dumps(self.machine, indent=1))
        print(self.machine, flush=True)

    def model(self, attention_dropout=0.0, hidden_dropout=0.1, seed=0):
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(seed)
        h, n = (32, 2) if self.tiny else (HIDDEN, LAYERS)
        return BertForMaskedLM(
            BertConfig(
                vocab_size=len(self.vocab),
                hidden_size=h,
                num_hidden_layers=n,
                num_attention_heads=4,
                intermediate_size=2 * h,
                max_position_embeddings=CONTEXT,
                hidden_act="silu",
                hidden_dropout_prob=hidden_dropout,
                attention_probs_dropout_prob=attention_dropout,
                pad_token_id=0,
            )
        )

    def reader(self, model, tokens, context=CONTEXT, **how):
        "A reader of batches of so many tokens."
        return Reader(SimpleNamespace(model=model, vocab=self.vocab, context=context), Budget(tokens), **how)

    def cut(self, cells, length):
        "Some cells, cut at a length."
        values, n = self.sentences.flat(cells, length)
        return Sentences(values, np.concatenate([[0], np.cumsum(n)]), "human")

    def cells(self, mean_length, n=4096):
        "Cells whose lengths have about this mean: all, cut at what gives it; or those that fill the context."
        lengths = self.sentences.lengths
        if mean_length >= CONTEXT:
            return np.resize(np.flatnonzero(lengths >= min(CONTEXT, lengths.max())), n), CONTEXT
        cut = next((c for c in range(64, CONTEXT + 1, 8) if np.minimum(lengths, c).mean() >= mean_length), CONTEXT)
        return np.resize(np.random.default_rng(0).permutation(len(lengths)), n), cut

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, call, repeats=10, warm=3):
        "Seconds of one call: median, smallest, largest."
        repeats, warm = (2, 1) if self.tiny else (repeats, warm)
        for _ in range(warm):
            call()
        times = []
        for _ in range(repeats):
            self.sync()
            t = time.perf_counter()
            call()
            self.sync()
            times.append(time.perf_counter() - t)
        return dict(seconds=np.median(times), low=min(times), high=max(times), n=repeats)

    def write(self, name, rows):
        pd.DataFrame(rows).to_csv(self.out / f"{name}.csv", index=False, float_format="%.6g")
        print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False)}", flush=True)

    def to(self, batch, device=None):
        return {k: v.to(device or self.device) for k, v in batch.items()}

    # --- the GPU gives what the CPU gives
    # --------------------------------------------------------------------------------

    def equality(self):
        from mix_geneformer.perturbation.edits import Change, all_edits
        from mix_geneformer.perturbation.shifts import Towards

        rows, idx = [], np.arange(6)
        model = self.model(hidden_dropout=0.0).eval()
        batch = MaskedBatches(self.sentences, self.vocab, 6, 128 if self.tiny else 512).collate(idx, 0)
        found = {}
        for device in ("cpu", self.device):
            model.to(device).zero_grad()
            for name, kw in (("equation 3, mean", {}), ("NT-Xent, position 0", dict(pool="first", symmetric=True))):
                model.zero_grad()
                out = Objective(model, **kw)(**self.to(batch, device))
                out["loss"].backward()
                found[str(device), name] = (
                    float(out["loss"].detach()),
                    torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]),
                )
        for name in ("equation 3, mean", "NT-Xent, position 0"):
            (a, g), (b, h) = found["cpu", name], found[str(self.device), name]
            rows += [
                dict(what=f"loss, {name}, float32", difference=abs(a - b) / abs(a), allowed=1e-5),
                dict(what=f"gradients, {name}, float32", difference=float((g - h).abs().max()), allowed=1e-4),
            ]
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        vector = lambda b, **kw: pool_tokens(encode(model, b, **kw), b["attention_mask"]).float().cpu()
        with torch.inference_mode():
            model.to("cpu")
            true = vector(inputs)
            model.to(self.device)
            b = self.to(inputs)
            for packed in (False, True):
                rows.append(
                    dict(
                        what=f"cell vectors, float32, {'packed' if packed else 'padded'}",
                        difference=float((vector(b, packed=packed) - true).abs().max()),
                        allowed=1e-4,
                    )
                )
            with torch.autocast(self.device.type, torch.bfloat16):
                for packed in (False, True):
                    rows.append(
                        dict(
                            what=f"cell vectors, bf16, {'packed' if packed else 'padded'}: 1 - cosine",
                            difference=float(1 - F.cosine_similarity(vector(b, packed=packed), true).min()),
                            allowed=1e-2,
                        )
                    )
            some, goal, shifts = self.cut(range(3), 100), true.mean(0).numpy(), {}
            edits = all_edits(some, np.unique(some.values), Change(context=CONTEXT))
            for device, bf16 in (("cpu", False), (self.device, False), (self.device, True)):
                reader = self.reader(model.to(device), 4096, bf16=bf16)
                shifts[str(device), bf16] = Towards(reader, some, goal).all_shifts(edits)["shift"].to_numpy()
        true = shifts["cpu", False]
        rows.append(
            dict(
                what="perturbation shifts, float32",
                difference=float(np.abs(shifts[str(self.device), False] - true).max()),
                allowed=1e-5,
            )
        )
        rows.append(
            dict(
                what="perturbation shifts, bf16: 1 - Spearman",
                difference=1
                - float(pd.Series(shifts[str(self.device), True]).corr(pd.Series(true), method="spearman")),
                allowed=0.2,
            )
        )
        self.write("equality", [dict(r, ok=r["difference"] <= r["allowed"]) for r in rows])
        wrong = [r["what"] for r in rows if not r["difference"] <= r["allowed"]]
        if wrong:
            print(f"{len(wrong)} of {len(rows)} differ by more than allowed: {', '.join(wrong)}", flush=True)

    # --- training
    # ----------------------------------------------------------------------------------------------------------

    def step(self, mean_length, tokens, attention_dropout, compiled):
        "A training step, its operations, cells and tokens."
        model = self.model(attention_dropout).to(self.device).train()
        module = Objective(model).to(self.device)
        if compiled:
            compile_parts(module)
        optimiser = torch.optim.AdamW(parameter_groups(module, 0.01), lr=1e-4, fused=True)
        cells, context = self.cells(mean_length)
        loader = MaskedBatches(self.sentences.take(cells), self.vocab, len(cells), context, batch_tokens=tokens)
        batch = next(b for b in loader.epoch(0))
        moved, flops = self.to(batch), module.flops(**batch)

        def call():
            with torch.autocast(self.device.type, torch.bfloat16):
                out = module(**moved)
            out["loss"].backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step(), optimiser.zero_grad(set_to_none=True)

        return call, flops, len(batch["input_ids"]), int(batch["attention_mask"].sum())

    def training(self):
        rows, best = [], None
        budgets = (512, 1024) if self.tiny else (32_768, 131_072, 262_144)
        for mean_length, (attention_dropout, compiled), tokens in itertools.product(
            (48,) if self.tiny else (1200, CONTEXT), ((0.1, False), (0.0, False), (0.0, True)), budgets
        ):
            row = dict(
                mean_length=mean_length,
                attention="padded, dropout 0.1"
                if attention_dropout
                else "varlen, no dropout"
                if self.cuda
                else "cell by cell, no dropout",
                compile=compiled,
                batch_tokens=tokens,
            )
            try:
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                call, flops, cells, real = self.step(mean_length, tokens, attention_dropout, compiled)
                t = self.time(call)
                row.update(
                    t,
                    cells_per_s=cells / t["seconds"],
                    tokens_per_s=real / t["seconds"],
                    mfu=flops / t["seconds"] / self.rate,
                    memory_gb=torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else np.nan,
                    error="",
                )
                if best is None or row["mfu"] > best[0]:
                    best = row["mfu"], (mean_length, tokens, attention_dropout, compiled)
            except Exception as e:
                row["error"] = str(e).splitlines()[0][
                    :120
                ]  # an unsupported path or too large a batch: the others still count
            rows.append(row)
            if self.cuda:
                torch.cuda.empty_cache()
            self.write("training", rows)
        return best[1]

    def head(self):
        "Masked positions' logits and cross-entropy, whole or in chunks."
        n, h = (64, 32) if self.tiny else (20_000, HIDDEN)
        x, w, b = (
            torch.randn(*shape, device=self.device, dtype=torch.bfloat16).requires_grad_()
            for shape in ((n, h), (len(self.vocab), h), (len(self.vocab),))
        )
        y = torch.randint(0, len(self.vocab), (n,), device=self.device)
        ways = {"logits in float32": lambda: F.cross_entropy(F.linear(x, w, b).float(), y)}
        ways["compiled"] = torch.compile(ways["logits in float32"])
        if hasattr(F, "linear_cross_entropy"):
            ways["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
                x, w, y, linear_bias=b, options=torch.nn.LinearCrossEntropyOptions()
            )
        rows = []
        for name, loss in ways.items():
            try:
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                rows.append(
                    dict(
                        way=name,
                        positions=n,
                        **self.time(lambda: loss().backward()),
                        memory_gb=torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else np.nan,
                    )
                )
            except Exception as e:
                rows.append(dict(way=name, error=str(e).splitlines()[0][:120]))
        self.write("head", rows)

    def loop(self, mean_length, tokens, attention_dropout, compiled):
        "The whole training loop, its loader included, and the loader by itself."
        cells, context = self.cells(mean_length, 200 if self.tiny else 20_000)
        batches = MaskedBatches(self.sentences.take(cells), self.vocab, len(cells), context, batch_tokens=tokens)
        _, speed = fit(
            Objective(self.model(attention_dropout)),
            batches,
            max_steps=4 if self.tiny else 60,
            compile=compiled,
            device=str(self.device),
            precision="bf16" if self.cuda else "no",
            log_every=20,
        )
        t = time.perf_counter()
        real = sum(int(b["attention_mask"].sum()) for b, _ in zip(batches.epoch(1), range(4 if self.tiny else 60)))
        self.write(
            "loop",
            [
                dict(what="training loop", **speed),
                dict(what="loader alone", tokens_per_s=real / (time.perf_counter() - t)),
            ],
        )

    def profile(self, *settings):
        from torch.profiler import ProfilerActivity, profile

        call, *_ = self.step(*settings)
        for _ in range(1 if self.tiny else 5):
            call()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda) as p:
            for _ in range(1 if self.tiny else 3):
                call()
            self.sync()
        table = p.key_averages().table(
            sort_by="self_cuda_time_total" if self.cuda else "self_cpu_time_total",
            row_limit=30,
            max_name_column_width=80,
        )
        (self.out / "profile.txt").write_text(f"{settings}\n{table}\n")
        print(f"\nprofile of {settings}\n{table}", flush=True)

    # --- use --------------------------------------------------------------------------------------------------------
    # ---------

    def embedding(self):
        model, rows = self.model().to(self.device).eval(), []
        cells, context = self.cells(48 if self.tiny else 1200, 64 if self.tiny else 4096)
        sentences = self.sentences.take(cells)

        def vectors(bf16, tokens):
            return self.reader(model, tokens, context, bf16=bf16).vectors(sentences)

        for bf16, tokens in itertools.product((False, True), (1024,) if self.tiny else (65_536, 262_144, 1_048_576)):
            t = self.time(lambda: vectors(bf16, tokens), 3, 1)
            rows.append(
                dict(
                    bf16=bf16,
                    batch_tokens=tokens,
                    **t,
                    cells_per_s=len(cells) / t["seconds"],
                    mfu=encoder_flops(model.config, np.minimum(sentences.lengths, context)) / t["seconds"] / self.rate,
                )
            )
            self.write("embedding", rows)

    def perturbation(self):
        from mix_geneformer.perturbation.edits import Change, all_edits
        from mix_geneformer.perturbation.screening import screen_shifts
        from mix_geneformer.perturbation.shifts import Towards

        model, rows, length = self.model().to(self.device).eval(), [], 60 if self.tiny else 1000
        enough = np.flatnonzero(self.sentences.lengths >= length)[: 3 if self.tiny else 40]
        some = self.cut(enough, length)
        goal = np.random.default_rng(0).normal(size=model.config.hidden_size).astype(np.float32)
        edits = all_edits(some, np.unique(some.values), Change(context=CONTEXT))
        n = sum(len(e) for e in edits)
        for emb_layer, bf16, tokens in itertools.product(
            (None, model.config.num_hidden_layers - 1), (False, True), (1024,) if self.tiny else (262_144, 1_048_576)
        ):
            towards = Towards(self.reader(model, tokens, bf16=bf16, emb_layer=emb_layer), some, goal)
            t = self.time(lambda: towards.all_shifts(edits), 2, 1)
            rows.append(
                dict(
                    way="exact",
                    layers=emb_layer or model.config.num_hidden_layers,
                    bf16=bf16,
                    batch_tokens=tokens,
                    length=length,
                    perturbations=n,
                    **t,
                    per_s=n / t["seconds"],
                )
            )
            self.write("perturbation", rows)
        towards = Towards(self.reader(model, 262_144), some, goal)
        t = self.time(lambda: screen_shifts(towards, edits), 2, 1)
        rows.append(
            dict(
                way="screened, gradient alone",
                layers=model.config.num_hidden_layers,
                bf16=False,
                batch_tokens=262_144,
                length=length,
                perturbations=n,
                **t,
                per_s=n / t["seconds"],
            )
        )
        self.write("perturbation", rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prepare", help="write the cell sentences to this file and stop")
    p.add_argument("--cells", help="the file that --prepare wrote")
    p.add_argument("--out", default="bench/results/gpu")
    p.add_argument("--device", default="cuda")
    p.add_argument(
        "--tiny",
        action="store_true",
        help="a small model and small batches: proves the script, its numbers mean nothing",
    )
    a = p.parse_args()
    if a.prepare:
        return prepare(a.prepare)
    if not a.cells:
        p.error("0 cells: pass --cells with a file that --prepare wrote")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("0 CUDA devices are visible: pass --device cpu --tiny to prove the script")
    b = Bench(a.cells, a.out, a.device, a.tiny)
    b.equality()
    best = b.training()
    b.head()
    b.loop(*best)
    b.embedding()
    b.perturbation()
    b.profile(*best)
    print(f"\nwrote {b.out}")


if __name__ == "__main__":
    main()
