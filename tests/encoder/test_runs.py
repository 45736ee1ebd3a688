"Settings whose names mean one thing, and results that are made once."

import json
from dataclasses import dataclass

import pytest
from conftest import refused

from mix_geneformer.encoder.runs import finished, main_process, make_config, n_processes, settings_for, wait_for_all

@dataclass
class Baking:
    heat: int = 180
    minutes: int = 40
    yeast: str = "fresh"


def test_later_settings_win():
    assert make_config(Baking) == Baking()
    assert make_config(Baking, dict(heat=200, minutes=30), minutes=35) == Baking(200, 35)
    assert make_config(Baking, Baking(heat=220), yeast="dry") == Baking(220, 40, "dry")


@pytest.mark.parametrize("how", [dict(config=dict(head=200)), dict(head=200)])
def test_settings_of_no_name(how):
    refused(lambda: make_config(Baking, **how), "1 unknown settings (head)", "heat, minutes, yeast")


def test_a_function_gets_the_settings_that_it_knows():
    def knead(minutes, hands=2):
        return minutes, hands

    assert settings_for(knead, Baking(minutes=7)) == dict(minutes=7)


def test_a_result_is_known_by_its_fingerprint(tmp_path):
    out = tmp_path / "bread"
    assert not finished(out, "f1")
    out.mkdir()
    refused(lambda: finished(out, "f1"), "holds another run's result (fingerprint None, not f1)")
    (out / "training.json").write_text(json.dumps(dict(fingerprint="f1")))
    assert finished(out, "f1")
    refused(lambda: finished(out, "f2"), "fingerprint f1, not f2", "pass another out= or remove it")


def test_one_process_is_the_main_one():
    assert n_processes() == 1 and main_process() and wait_for_all() is None
