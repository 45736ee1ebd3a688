"""How the settings of `transfer` were chosen: on blood cells, so that the pancreas of the tables stays unseen.

    python bench/tune_transfer.py DATA   # DATA holds human_pbmc_kang_ifnb.h5ad, human_pbmc_10x3k.h5ad and
      mouse_spleen_jaitin.h5ad

The four groups that both species have: B cells, NK cells, monocytes, dendritic cells. Of the stimulated human cells
(Kang et al. 2018, GSE96583) only the controls are taken; mouse spleen is of Jaitin et al. 2014 (GSE54006). Writes
bench/results/transfer_tuning.csv."""

import sys
from pathlib import Path

import pandas as pd

from mix_geneformer.cells.counts import read_counts
from mix_geneformer.label_transfer import TransferConfig, learn_both, transfer_views
from mix_geneformer.paper.machine import run_info
from mix_geneformer.statistics import scores

GROUPS = {
    "B": ("B", "B Activated", "B cell", "GC B cell"),
    "NK": ("NK", "NK cell"),
    "monocyte": ("CD14 Mono", "CD16 Mono", "CD14 Monocytes", "FCGR3A Monocytes", "monocyte_or_neutrophil"),
    "dendritic": ("DC", "Dendritic", "CD8+ DC", "CD8- DC", "pDC"),
}
SETTINGS = [
    dict(genes="all"),
    *(dict(min_agreement=a) for a in (0.0, 0.2, 0.4)),
    *(dict(min_agreement=0.2, n_anchors=n) for n in (100, 500)),
]


def cells(path):
    a = read_counts(path, verbose=False)
    group = a.obs.cell_type.astype(str).map({c: g for g, of in GROUPS.items() for c in of})
    keep = group.notna() & ~a.obs.get("condition", pd.Series("", a.obs_names)).astype(str).str.contains(
        "IFN|stim|LPS", case=False
    )
    return a[keep.to_numpy()].copy(), group[keep].to_numpy(str)


def main(folder):
    folder, rows = Path(folder), []
    mouse = cells(folder / "mouse_spleen_jaitin.h5ad")
    for name in ("human_pbmc_kang_ifnb", "human_pbmc_10x3k"):
        human = cells(folder / f"{name}.h5ad")
        for way, (source, labels), (target, true) in (
            ("human to mouse", human, mouse),
            ("mouse to human", mouse, human),
        ):
            for s in SETTINGS:
                cfg = TransferConfig(**s)
                views, genes = transfer_views(source, target, None, cfg)
                for rounds in (0, 3):
                    p = learn_both(views, labels, rounds, cfg.share)
                    rows.append(
                        {
                            "human cells": name,
                            "direction": way,
                            "genes": cfg.genes,
                            "min_agreement": cfg.min_agreement if cfg.genes == "conserved" else None,
                            "n_anchors": cfg.n_anchors if cfg.genes == "conserved" else None,
                            "genes used": int(genes.used.sum()),
                            "rounds": rounds,
                            "source cells": source.n_obs,
                            "target cells": target.n_obs,
                            **scores(true, p.columns.to_numpy()[p.to_numpy().argmax(1)]),
                        }
                    )
                    print(rows[-1], flush=True)
    table = pd.DataFrame(rows).drop(columns=["n_cells", "n_types"]).assign(commit=run_info()["commit"])
    table.to_csv(Path(__file__).parent / "results" / "transfer_tuning.csv", index=False)
    print(
        table.fillna("-")
        .groupby(["genes", "min_agreement", "n_anchors", "rounds"])[["accuracy", "macro_f1"]]
        .mean()
        .round(3)
        .to_string()
    )


if __name__ == "__main__":
    main(sys.argv[1])
