"What a pretraining takes is said first, and changes nothing of it."
import pytest

import mix_geneformer as mgf
from mix_geneformer import cli

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, context=30, device="cpu")


def weights(folder): return (folder/"model.safetensors").read_bytes()


def test_the_command_takes_what_a_cpu_can_do_and_says_what_it_takes(corpus, tmp_path, capsys):
    path = str(corpus)
    cli.mgf_pretrain(path, str(tmp_path/"said"), max_steps=6, decay_steps=2, held_out=0., **TINY)
    assert f"{tmp_path/'said'}: 6 steps, " in capsys.readouterr().out
    settings = mgf.SIZES["mini"] | dict(TINY, max_steps=6, decay_steps=2, held_out=0.)
    mgf.pretrain(path, tmp_path/"plain", progress=False, **settings)
    assert weights(tmp_path/"said") == weights(tmp_path/"plain")


def test_a_dry_run_writes_nothing(corpus, tmp_path, capsys):
    how = dict(TINY, size="paper", epochs=10**6, max_steps=1000)
    cli.mgf_pretrain(str(corpus), str(tmp_path/"model"), dry_run=True, **how)
    said = capsys.readouterr().out
    assert "1,000 steps, 8,000 cells read" in said and "MiB a checkpoint" in said
    assert not list(tmp_path.iterdir())


def test_what_is_finished_is_not_planned_again(corpus, tmp_path, capsys):
    run = lambda: cli.mgf_pretrain(str(corpus), str(tmp_path/"model"), size="paper", max_steps=3, **TINY)
    run()
    before = capsys.readouterr().out
    run()
    assert "3 steps, 24 cells read" in before and "cells read" not in capsys.readouterr().out


def test_an_unknown_size_is_refused(corpus, tmp_path):
    with pytest.raises(SystemExit, match="size='maxi' is none of 2: pass paper or mini"):
        cli.mgf_pretrain(str(corpus), str(tmp_path/"model"), size="maxi")
