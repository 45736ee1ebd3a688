"""One transformer for human and mouse single-cell RNA-seq: counts in, embeddings, cell types and perturbations out.

Modules are nouns and verbs are functions: `mgf.pretrain` lives in `mix_geneformer.pretraining`. A module is loaded when
one of its names is first used, so that importing the package costs nothing.
"""
__version__ = "0.1.0"

import importlib

_where = {name: module for module, names in {
    "files": "InputError",
    "cells.genes": "gene_table orthologs",
    "cells.names": "map_genes",
    "cells.counts": "open_counts read_counts",
    "cells.corpora": "CORPORA fetch",
    "cells.vocabulary": "Vocabulary",
    "cells.encoding": "encode_cells",
    "cells.storage": "load_corpus",
    "cells.tokenizer": "tokenize",
    "cells.exchange": "export_corpus import_corpus",
    "encoder.families": "families",
    "encoder.checkpoints": "load_model push_to_hub",
    "pretraining": "SIZES pretrain",
    "classification.finetuning": "finetune",
    "classification.prediction": "predict",
    "embedding": "embed umap",
    "gene_embedding": "gene_vectors",
    "label_transfer": "transfer",
    "references": "rank_references",
    "classification.joining": "join_names",
    "statistics": "transfer_scores",
    "perturbation.verb": "perturb perturbed_embeddings",
    "perturbation.neighbours": "moved_genes",
    "perturbation.pairs": "perturb_pairs",
    "paper.experiment": "Experiment"}.items() for name in names.split()}
_rooms = ("files", "statistics", "cells", "encoder", "pretraining", "classification", "embedding", "label_transfer",
          "references", "perturbation", "plots", "pl", "paper", "cli")
__all__ = ["__version__", *_where]


def __getattr__(name):
    "Load what is asked for, now."
    if name in _where:
        value = getattr(importlib.import_module(f"{__name__}.{_where[name]}"), name)
        globals()[name] = value
        return value
    if name in _rooms: return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *__all__, *_rooms})
