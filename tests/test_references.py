"References are ordered without the labels of the target"
import numpy as np
import pytest
from conftest import refused, toy

from mix_geneformer.references import rank_references

def test_labels_of_the_target_are_not_used_and_names_are_kept(tmp_path):
    target, bare = toy(n=40, seed=3), toy(n=40, seed=3)
    del bare.obs["cell_type"]
    toy(n=60, seed=1).write_h5ad(tmp_path/"near.h5ad")
    mixed = toy(n=60, seed=2)
    mixed.obs["cell_type"] = np.random.default_rng(0).permutation(mixed.obs.cell_type)
    mixed.write_h5ad(tmp_path/"mixed.h5ad")
    paths = [tmp_path/"mixed.h5ad", tmp_path/"near.h5ad"]
    table, labels = rank_references(paths, bare, progress=False, return_labels=True)
    assert table.reference.tolist() == ["near", "mixed"] and list(labels) == ["mixed", "near"]
    assert (labels.near.astype(str).to_numpy() == target.obs.cell_type).mean() > .9
    assert rank_references(paths, target, progress=False).equals(table)


@pytest.mark.parametrize("given,parts", [([], ["0 references"]), (["a/x.h5ad", "b/x.h5ad"], ["1 different names"])])
def test_references_that_have_no_name(given, parts):
    refused(lambda: rank_references(given, toy(), progress=False), *parts)
