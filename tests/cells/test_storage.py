"A corpus on disk: its columns, how it is opened, what is refused."

import shutil

import datasets
import pytest
from conftest import refused
from ranked import rows

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.storage import corpus_folder, corpus_vocabulary, load_corpus, only_species

def test_columns_of_a_corpus(both, vocab, corpus):
    ds = load_corpus(corpus)
    assert set(ds.column_names) == {"input_ids", "length", "species", "cell_type", "donor"} and len(ds) == 48
    assert (
        list(ds["species"]) == ["human"] * 24 + ["mouse"] * 24
        and list(ds["donor"]) == both[0].obs.donor.tolist() + both[1].obs.donor.tolist()
    )
    assert list(ds["length"]) == [len(r) for r in ds["input_ids"]] and max(ds["length"]) <= 24
    assert (
        ds.features["input_ids"].feature.dtype == "uint16"
        and corpus_vocabulary(corpus) == corpus_vocabulary(ds) == vocab
    )


def test_datasets_opens_the_folder(corpus, both, vocab):
    ds = datasets.load_from_disk(str(corpus))
    expected = rows(encode_cells(both[0], vocab, 24)) + rows(encode_cells(both[1], vocab, 24))
    assert [list(r) for r in ds["input_ids"]] == expected
    assert [list(r) for r in ds.select([47, 3])["input_ids"]] == [expected[47], expected[3]]
    assert ds.filter(lambda s: s == "mouse", input_columns="species").num_rows == 24


def test_the_folder_of_a_corpus_that_was_filtered(corpus, vocab):
    some = load_corpus(corpus).select([3, 30])
    assert corpus_folder(some) == corpus_folder(corpus) == corpus and corpus_vocabulary(some) == vocab


def test_a_data_set_of_somebody_else(corpus):
    refused(lambda: corpus_folder(datasets.Dataset.from_dict(dict(input_ids=[[2]]))), "0 vocabularies found beside it")
    refused(lambda: load_corpus(corpus.parent), "is not a tokenised corpus (state.json is missing)")


@pytest.mark.parametrize("species, n", [("human", 24), ("mouse", 24), (None, 48)])
def test_cells_of_one_species(corpus, species, n):
    found = only_species(load_corpus(corpus), species)
    assert len(found) == n and set(found["species"]) == ({species} if species else {"human", "mouse"})


def test_cells_of_a_species_that_is_not_there(corpus):
    refused(lambda: only_species(load_corpus(corpus), "zebrafish"), "has 0 zebrafish cells (only human, mouse)")


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_corpus_that_is_cut_off(corpus, tmp_path, share):
    broken = shutil.copytree(corpus, tmp_path / "broken")
    for file in broken.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(lambda: load_corpus(broken), "cannot be opened as a tokenised corpus", "tokenise again")
