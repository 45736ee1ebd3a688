"The donors that the tables call unread are those that the models were kept apart from."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import DATA

from mix_geneformer.encoder.learnt import keep_apart
from mix_geneformer.paper.models import APART, SETTINGS, STUDIES

def cells_of_all_studies():
    here = [(DATA/f"{s.name}.h5ad").is_file() for s in STUDIES]
    if not all(here): pytest.skip("the cells of the models are not on this machine")
    frames = []
    for s in STUDIES:
        obs = ad.read_h5ad(DATA/f"{s.name}.h5ad", backed="r").obs
        donor = obs["donor"].astype(str).to_numpy() if "donor" in obs else "unknown"
        frames.append(pd.DataFrame(dict(study=s.name, species=s.species, donor=donor)))
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("species", [None, "human", "mouse"])
def test_all_models_are_kept_apart_from_the_same_donors_of_the_pancreas(species):
    t = cells_of_all_studies()
    if species: t = t[t.species.eq(species)]
    whole = tuple(s.name for s in STUDIES if s.apart and s.name in set(t.study))
    part = keep_apart(t.study, t.donor, SETTINGS["held_out"], whole, 0)
    for s in [species] if species else ["human", "mouse"]:
        pancreas = t.study.eq(f"{s}_pancreas_baron").to_numpy()
        assert set(t.donor[pancreas & (part == "held out")]) == set(APART[s])
        assert not np.isin(t.donor[pancreas & (part == "train")], APART[s]).any()
