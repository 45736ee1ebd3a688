"""One transformer for human and mouse single-cell RNA-seq: counts in, embeddings, cell types and perturbations out.

The verbs are loaded when first used, so that importing the package costs nothing. Four of them share their name with the
module they live in (`pretrain`, `embed`, `transfer`, `perturb`): on the package that name is always the verb, and the rest of the module
is reached with `from mix_geneformer.pretrain import ...`.
"""
__version__ = "0.1.0"

import importlib, sys, types

_modules = ("genes", "corpus", "tokenizer", "batches", "model", "train", "pretrain", "classify", "compare", "embed", "transfer", "perturb", "evidence", "report", "experiment", "cli")
_where = {name: module for module, names in {
    "genes": "InputError orthologs gene_table",
    "corpus": "CORPORA fetch read_counts open_counts",
    "tokenizer": "Vocabulary tokenize load_corpus encode_cells",
    "model": "load_model",
    "pretrain": "pretrain",
    "classify": "finetune predict",
    "embed": "embed umap transfer_scores",
    "transfer": "transfer",
    "perturb": "perturb perturbed_embeddings",
    "experiment": "Experiment"}.items() for name in names.split()}
__all__ = ["__version__", *_where]


def __getattr__(name):
    "Import what is asked for, now."
    if name in _where:
        value = getattr(importlib.import_module(f"{__name__}.{_where[name]}"), name)
        globals()[name] = value
        return value
    if name in _modules: return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return sorted({*globals(), *__all__, *_modules})


class _Package(types.ModuleType):
    "Importing a submodule binds it on its package: refuse that for the names that are verbs."
    def __setattr__(self, name, value):
        if name in _where and isinstance(value, types.ModuleType): return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
