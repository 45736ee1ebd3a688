"""The published algorithm in its plain form: what the fast paths of `mix_geneformer` are compared with.

Written from the description of the Geneformer-style pipeline that Mix-Geneformer uses, and faithful to what it costs:
one argsort per cell, Python lists of tokens, a `datasets` row at a time, padding to the longest cell, vocabulary
logits at every position, every layer at every position, a data set per perturbed cell. Where the description leaves a
choice, the cheaper one is taken here."""

import anndata
import datasets
import numpy as np
import torch
from scipy import sparse
from torch.nn import functional as F
from transformers.trainer_pt_utils import LengthGroupedSampler

# --- counts to tokens ------------------------------------------------------------------------------------------------


def rank(values, tokens, exact=False):
    """Tokens of one cell, the highest value first; exact: equal values in the order in which they come, which the
    published sort leaves open."""
    return tokens[np.argsort(-values, kind="stable" if exact else None)]


def normalised(x, totals, medians, exact=False):
    """Counts per 10,000 over medians, CSR; exact: over medians alone, so that no rounding hides or makes a tie (the
    total cannot change an order)."""
    if not exact:
        return sparse.csr_matrix(x / totals[:, None] * 10_000 / medians)
    x.sort_indices()
    x.data = x.data / medians[x.indices]
    return x


def tokenize(path, vocab, species, out, context=2048, keep=(), chunk=512, exact=False):
    """Counts of an .h5ad with var['ensembl_id'] and obs['n_counts'] -> a `datasets` folder; returns the Dataset.
    `exact` settles ties, for comparisons."""
    adata = anndata.read_h5ad(path, backed="r")
    tokens, medians = vocab.columns(adata.var["ensembl_id"].to_numpy(object), species)
    known = np.flatnonzero(tokens >= 0)
    known = known[np.argsort(tokens[known])]
    tokens, medians, totals = tokens[known], medians[known], adata.obs["n_counts"].to_numpy(np.float64)
    cells = []
    for start in range(0, adata.n_obs, chunk):
        rows = np.arange(start, min(start + chunk, adata.n_obs))
        x = adata[rows, known].X  # anndata 0.12 reads the whole matrix for this, once per chunk
        x = normalised(x.astype(np.float64), totals[rows], medians, exact)
        cells += [rank(x[i].data, tokens[x[i].indices], exact).tolist() for i in range(len(rows))]
    dataset = datasets.Dataset.from_dict(dict(input_ids=cells, **{k: adata.obs[k].astype(str).tolist() for k in keep}))

    def finish(row):
        row["input_ids"] = row["input_ids"][:context]
        row["length"] = len(row["input_ids"])
        return row

    dataset = dataset.map(finish)
    dataset.save_to_disk(out)
    adata.file.close()
    return dataset


# --- rows to batches -------------------------------------------------------------------------------------------------


def pad(rows, pad_token_id=0):
    "Rows of a data set -> input_ids, attention_mask (B, T), padded to the longest with Python lists."
    longest = max(len(r["input_ids"]) for r in rows)
    ids, mask = [], []
    for r in rows:
        missing = longest - len(r["input_ids"])
        ids.append(r["input_ids"] + [pad_token_id] * missing)
        mask.append([1] * len(r["input_ids"]) + [0] * missing)
    return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


class MaskedCollator:
    """15 % of the tokens are to be predicted: 80 % of them hidden, 10 % replaced at random, 10 % left; drawn for
    every position."""

    def __init__(self, vocab, mlm_probability=0.15):
        self.vocab, self.p = vocab, mlm_probability

    def __call__(self, rows):
        batch = pad(rows, self.vocab.pad_token_id)
        ids = batch["input_ids"]
        labels = ids.clone()
        special = set(range(self.vocab.n_special))
        special = torch.tensor([[1 if t in special else 0 for t in row] for row in labels.tolist()], dtype=torch.bool)
        chosen = torch.bernoulli(torch.full(labels.shape, self.p).masked_fill(special, 0)).bool()
        labels[~chosen] = -100
        hidden = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & chosen
        ids[hidden] = self.vocab.mask_token_id
        swapped = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & chosen & ~hidden
        ids[swapped] = torch.randint(self.vocab.n_special, len(self.vocab), labels.shape)[swapped]
        return dict(batch, labels=labels)


class LabelledCollator:
    "Rows with a `label` number."

    def __init__(self, vocab):
        self.vocab = vocab

    def __call__(self, rows):
        return dict(pad(rows, self.vocab.pad_token_id), labels=torch.tensor([r["label"] for r in rows]))


def loader(dataset, lengths, collator, batch_size, seed=0):
    """Rows of a data set by the batch, like lengths together: the published code trains and fine-tunes with
    `group_by_length`."""
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collator)


def dense(batch):
    """A batch of `mix_geneformer.encoder.batches` with the published shapes: an attention mask, and labels (B, T)
    with -100 where nothing is predicted."""
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch["attention_mask"].long() if batch.get("attention_mask") is not None else torch.ones_like(ids)
    if "masked" in batch:
        used = labels != -100
        labels = torch.full_like(ids, -100)
        labels[torch.nonzero(used)[:, 0], batch["masked"][used]] = batch["labels"][used]
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


# --- training --------------------------------------------------------------------------------------------------------


def mean_of_tokens(hidden, mask):
    mask = mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def contrast(h1, h2, temperature=0.05, symmetric=True):
    "NT-Xent of 2N views, or (symmetric=False) equation 3: first views against second ones."
    n = len(h1)
    if not symmetric:
        return F.cross_entropy(F.cosine_similarity(h1[:, None], h2[None], dim=-1) / temperature, torch.arange(n))
    views = torch.cat([h1, h2])
    similar = F.cosine_similarity(views[:, None], views[None], dim=-1) / temperature
    similar = similar.masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similar, torch.arange(2 * n).roll(n))


def pretraining_loss(model, batch, temperature=0.05, pool="first", symmetric=True):
    "MLM with logits at every position, and SimCSE of two passes with dropout."
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    first = model(**inputs, output_hidden_states=True)
    second = model.bert(**inputs).last_hidden_state
    logits = first.logits
    mlm = F.cross_entropy(logits.view(-1, logits.shape[-1]), batch["labels"].view(-1), ignore_index=-100)
    h1, h2 = (
        h[:, 0] if pool == "first" else mean_of_tokens(h, batch["attention_mask"])
        for h in (first.hidden_states[-1], second)
    )
    return mlm + contrast(h1, h2, temperature, symmetric)


def classification_loss(net, batch):
    "Cross-entropy of a linear layer on the mean over tokens; `net` has `bert`, `dropout` and `classifier`."
    hidden = net.bert(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states[-1]
    return F.cross_entropy(
        net.classifier(net.dropout(mean_of_tokens(hidden, batch["attention_mask"]))), batch["labels"]
    )


def train_step(loss_of, optimiser):
    "One optimiser step; returns the loss."
    optimiser.zero_grad()
    loss = loss_of()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


# --- what a trained model is used for
# ----------------------------------------------------------------------------------


@torch.no_grad()
def states(model, rows, places=None, emb_layer=-2):
    """Hidden states of padded rows, (B, T, H), from the whole model with its vocabulary head; -2 is the layer before
    the last, Geneformer's choice."""
    batch = pad([dict(input_ids=list(r)) for r in rows])
    if places is not None:
        batch["position_ids"] = pad([dict(input_ids=list(p)) for p in places])["input_ids"]
    return model(**batch, output_hidden_states=True).hidden_states[emb_layer]


def embed(model, rows, batch_size=8, emb_layer=-2):
    "Mean over the tokens of each cell, in the order given: (cells, H)."
    found = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        hidden = states(model, some, emb_layer=emb_layer)
        for h, r in zip(hidden, some):
            found.append(h[: len(r)].mean(0, keepdim=True).cpu())
    return torch.cat(found)


def delete_each(cell, genes):
    "A data set of one cell's sentences, in each of which one gene is missing."
    where = [i for i, token in enumerate(cell) if token in genes]
    dataset = datasets.Dataset.from_dict(dict(input_ids=[cell] * len(where), at=where))

    def delete(row):
        ids, places = list(row["input_ids"]), list(range(len(row["input_ids"])))
        row["gene"] = ids[row["at"]]
        del ids[row["at"]], places[row["at"]]
        return dict(row, input_ids=ids, places=places)

    return dataset.map(delete)


def perturb(model, start, goal, genes, batch_size=4, positions="shift", emb_layer=-2):
    """Deletes each of `genes` from each start cell: rows of (cell, gene, cos(perturbed, goal) - cos(original, goal),
    cos(perturbed, original))."""
    goal, genes, found = embed(model, goal, batch_size, emb_layer).mean(0), set(int(g) for g in genes), []
    for number, cell in enumerate(start):
        cell = [int(t) for t in cell]
        original, dataset = states(model, [cell], emb_layer=emb_layer)[0], delete_each(cell, genes)
        for first in range(0, len(dataset), batch_size):
            rows = dataset[first : first + batch_size]
            hidden = states(model, rows["input_ids"], rows["places"] if positions == "keep" else None, emb_layer)
            for h, at, gene in zip(hidden, rows["at"], rows["gene"]):
                before = torch.cat([original[:at], original[at + 1 :]]).mean(0)
                after = h[: len(cell) - 1].mean(0)
                shift = F.cosine_similarity(after, goal, dim=0) - F.cosine_similarity(before, goal, dim=0)
                found.append((number, gene, float(shift), float(F.cosine_similarity(after, before, dim=0))))
    return found
