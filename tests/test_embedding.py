"A cell's vector is its own, whatever the batch."
import anndata as ad
import numpy as np
import pytest
import torch
from conftest import toy
from tinymodel import KINDS, tiny

from mix_geneformer.cells.encoding import encode_cells
from mix_geneformer.cells.vocabulary import Vocabulary
from mix_geneformer.embedding import embed
from mix_geneformer.encoder.checkpoints import load_model, save_model

@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_do_not_depend_on_batch_size_or_company(kind, tmp_path):
    v = Vocabulary.build([toy("human"), toy("mouse", seed=1)], kind)
    loaded = load_model(save_model(tiny(v), v, tmp_path/"model"), "cpu")
    for species in ("human", "mouse"):
        a = toy(species, seed=species == "mouse")
        whole = embed(a.copy(), loaded, batch_size=64, progress=False).obsm["X_mix_geneformer"]
        assert (
            whole.shape == (24, 16)
            and whole.dtype == np.float32
            and np.isfinite(whole).all()
            and whole.std(0).min() > 1e-3
        )
        for size in (1, 5):
            np.testing.assert_allclose(
                embed(a.copy(), loaded, batch_size=size, progress=False).obsm["X_mix_geneformer"], whole, atol=1e-5
            )
        np.testing.assert_allclose(
            embed(a[[11, 4]].copy(), loaded, progress=False).obsm["X_mix_geneformer"], whole[[11, 4]], atol=1e-5
        )
        s = encode_cells(a, v, 24)
        by_hand = [net_mean(loaded, s[i], species) for i in range(24)]
        # in the cells' order
        np.testing.assert_allclose(whole, by_hand, atol=1e-5)


def net_mean(loaded, sentence, species):
    batch = dict(input_ids=torch.from_numpy(sentence.astype(np.int64))[None])
    if loaded.vocab.orthologs == "tied":
        batch["token_type_ids"] = torch.full_like(batch["input_ids"], loaded.vocab.species_index(species))
    with torch.no_grad(): return loaded.model.bert(**batch).last_hidden_state[0].mean(0).numpy()


def both_in_one():
    "Human and mouse cells in one matrix, with symbols; two mouse cells hold a symbol that human genes bear too"
    human, mouse = toy("human"), toy("mouse", seed=1)
    for a in (human, mouse): a.var_names = a.var.symbol.to_numpy()
    shared = human.var_names[0]
    both = ad.concat([human, mouse], join="outer", fill_value=0)
    x = both.X.tolil()
    x[30, both.var_names.get_loc(shared)] = 1   # as an alignment to both genomes leaves it
    x[31, both.var_names.get_loc(shared)] = 2
    both.X = x.tocsr().astype(np.float32)
    return both


@pytest.mark.filterwarnings("ignore")
def test_cells_of_the_other_species_get_no_vector_by_a_symbol_that_both_share(tmp_path):
    both = both_in_one()
    v = Vocabulary.build([toy("human"), toy("mouse", seed=1)])
    loaded = load_model(save_model(tiny(v), v, tmp_path/"model"), "cpu")
    with pytest.warns(UserWarning, match="24 of 48 cells have no gene .* or more counts of another species' genes"):
        found = embed(both, loaded, species="human", progress=False).obsm["X_mix_geneformer"]
    assert np.isfinite(found[:24]).all() and np.isnan(found[24:]).all()
    alone = embed(both[:24].copy(), loaded, species="human", progress=False).obsm["X_mix_geneformer"]
    np.testing.assert_allclose(found[:24], alone, atol=1e-6)
