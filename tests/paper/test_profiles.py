"The profiles are what they say of each other, and the notebooks know their names."
import pytest
from conftest import refused

from mix_geneformer.paper.profiles import MODEL, PROFILES, model_settings, profile_settings

def test_evidence_is_small_with_more_seeds_and_all_arms():
    small, evidence = PROFILES["small"], profile_settings("evidence")
    assert {k for k in evidence if evidence[k] != small.get(k)} == {
        "seeds", "pretrain_seeds", "random_seeds", "control_seeds", "control_splits", "transfer_encoder_seeds",
        "transfer_only", "gap_seeds", "gap_cells", "gap_encoders", "gap_condition_cells", "ablation_seeds",
        "ablation_only"}
    assert evidence["seeds"] >= 5 and evidence["control_splits"] == ["random", "donor"]


def test_a_profile_is_asked_for_by_name_and_handed_out_as_a_copy():
    refused(lambda: profile_settings("tiny"), "There is no profile 'tiny' (of 4: smoke, small, full, evidence)")
    profile_settings("small")["seeds"] = 99
    assert PROFILES["small"]["seeds"] == 2


@pytest.mark.parametrize("name", PROFILES)
def test_the_settings_of_a_model_are_found_by_name(name):
    found = model_settings(profile_settings(name))
    assert set(found) <= set(MODEL) and {k: PROFILES[name][k] for k in found} == found
    assert found["hidden_size"] == PROFILES[name]["hidden_size"] and "seeds" not in found
    own = {f"transfer_{k}": k for k in found if f"transfer_{k}" in PROFILES[name]}
    assert model_settings(PROFILES[name], "transfer_").keys() >= set(own.values())
