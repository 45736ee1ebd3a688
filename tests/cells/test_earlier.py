"Earlier names of genes: what is in the tables, and what files with such names give."
import importlib.util
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import genes_of, refused, toy

from mix_geneformer.cells.counts import as_counts, read_counts
from mix_geneformer.cells.earlier import _earlier, earlier_ids
from mix_geneformer.cells.features import named_kind
from mix_geneformer.cells.genes import SPECIES, gene_table
from mix_geneformer.cells.names import read_names
from mix_geneformer.cells.tokenizer import tokenize
from mix_geneformer.cells.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent.parent
RACK1, ATP5F1E = "ENSG00000204628", "ENSG00000124172"

pytestmark = pytest.mark.usefixtures("only_the_known")


def script():
    spec = importlib.util.spec_from_file_location("earlier", ROOT/".ci"/"earlier.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_what_the_tables_hold(species):
    names = _earlier(species)
    own = set(gene_table(species).symbol)
    assert len(names) > 40_000 and not own & set(names)
    assert all(gene.startswith(SPECIES[species].prefix) for gene in names.values())
    assert not [n for n in names if named_kind(n) or n.isdigit() or len(n) < 3]
    assert not {"EGFP", "RFP", "Cre", "tdTomato", "CD45", "CD3", "IgG1"} & set(names)
    assert sum(p.stat().st_size for p in (ROOT/"mix_geneformer"/"earlier").iterdir()) < 600_000


def test_which_names_the_script_keeps():
    ins, gcg = genes_of("human", 2)
    a, b = gene_table("human").symbol[[ins, gcg]]
    genes = [(a, "", ["OLDER1", b], ["ALIAS1", "BOTH1", "RFP", "CD99"]), (b, "", ["BOTH1"], ["OLDER1", "SHARED"]),
             ("NEWER1", "ENSG00000999999", [], ["SHARED"]), ("NOID1", "", ["GONE1"], [])]
    found = script().one_gene_each(genes, "human")
    assert found == {"NEWER1": "ENSG00000999999", "OLDER1": ins, "BOTH1": gcg, "ALIAS1": ins}


def cells(names, x=None):
    x = np.arange(1, 2*len(names)+1).reshape(2, -1) if x is None else x
    return ad.AnnData(np.asarray(x, dtype=np.float32), var=pd.DataFrame(index=list(names)))


def test_the_own_symbol_wins_and_rows_of_a_gene_are_summed():
    a = read_counts(cells(["INS", "GNB2L1", "RACK1", "ATP5E"], [[1, 2, 3, 4], [5, 6, 7, 8]]), verbose=False)
    assert a.var_names.tolist() == sorted([RACK1, ATP5F1E, "ENSG00000254647"])
    assert a[:, RACK1].X.toarray().ravel().tolist() == [5, 13]
    assert a[:, ATP5F1E].X.toarray().ravel().tolist() == [4, 8]
    told = a.uns["mix_geneformer"]
    assert (told["n_matched"], told["n_earlier"], told["n_met"]) == (4, 2, 1)


def test_the_report_tells(capsys):
    read_counts(cells(["INS", "GNB2L1", "RACK1", "ATP5E"]))
    assert "4 of 4 genes matched (2 by an earlier name, 1 of them added" in capsys.readouterr().out


def test_the_species_is_told_from_symbols_of_today():
    today = gene_table("mouse").symbol[genes_of("mouse", 5)]
    names = [*today, "GNB2L1", "ATP5E", "SEP15", "SELK", "SELT", "SELM", "MLTK"]
    m = read_names(names)
    assert m.species == "mouse" and m.n_earlier == 0
    assert read_names(["GNB2L1", "ATP5E", "SEP15"]).species == "human"
    assert read_names(["Gnb2l1", "Atp5e"]).species == "mouse"
    refused(lambda: read_names(["GNB2L1", "gene_1", "gene_2"]), "0 of 3 genes matched")


def test_spellings():
    assert earlier_ids(["HNRNPU.AS1"], "human") == earlier_ids(["HNRNPU-AS1"], "human") != [""]
    assert read_names(["Ins2", "GNB2L1"], "mouse").n_matched == 2


def test_a_name_of_another_species_is_left_alone():
    "In a file of two species a symbol of mouse is no earlier name of a human gene"
    theirs = sorted(set(_earlier("human")) & set(gene_table("mouse").symbol))[:20]
    ours = gene_table("human").symbol[genes_of("human", 30)].tolist()
    assert theirs and read_names([*ours, *theirs], "human").n_earlier == 0


def test_listed_genes_go_by_earlier_names():
    counts = cells(["RACK1", "INS"])
    vocab = Vocabulary.build(counts)
    with pytest.warns(UserWarning, match="GNB2L1 is RACK1"):
        assert vocab.lookup(["GNB2L1"], "human").tolist() == vocab.lookup(["RACK1"]).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vocab.lookup(["RACK1", "INS"])


def test_a_corpus_from_before_is_not_taken_for_one_of_today(tmp_path, monkeypatch):
    a = toy()
    a.var_names = [*a.var.symbol[:-1], "GNB2L1"]
    a.var = a.var[[]]
    a.write_h5ad(tmp_path/"a.h5ad")
    vocab = Vocabulary.build(tmp_path/"a.h5ad")
    with monkeypatch.context() as m:
        m.setattr("mix_geneformer.cells.names._by_earlier", lambda f, *_: np.full(len(f.rows), "", dtype=object))
        tokenize(tmp_path/"a.h5ad", vocab, tmp_path/"out", progress=False)
    refused(lambda: tokenize(tmp_path/"a.h5ad", vocab, tmp_path/"out", progress=False), "made from other inputs")


@pytest.mark.parametrize("name, least", dict(human_pbmc_kang_ifnb=980, mouse_kidney_tabulamuris=3700,
                                             mouse_spleen_jaitin=2200, human_pbmc_10x3k=0).items())
def test_real_files_gain_genes(name, least):
    path = ROOT.parent/"shared"/"data"/f"{name}.h5ad"
    if not path.exists(): pytest.skip(f"{path.name} is not beside the repository")
    n = as_counts(path).n_earlier
    assert n >= least and bool(n) == bool(least)
