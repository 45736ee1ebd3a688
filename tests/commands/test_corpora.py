"A folder that holds another corpus is refused before the work."
import pytest

import mix_geneformer as mgf
from mix_geneformer import cli

def test_another_corpus_is_refused_before_a_vocabulary_is_built(both, tmp_path, monkeypatch):
    for i, a in enumerate(both): a.write_h5ad(tmp_path/f"{i}.h5ad")
    one, other, out = str(tmp_path/"0.h5ad"), str(tmp_path/"1.h5ad"), str(tmp_path/"corpus")
    cli.mgf_tokenize(one, out, context=30)
    cli.mgf_tokenize(one, out, context=30) # the same is kept
    built = []
    monkeypatch.setattr(mgf.Vocabulary, "build", lambda *a, **k: built.append(a))
    with pytest.raises(SystemExit, match="holds a corpus made from other inputs .*--overwrite"):
        cli.mgf_tokenize(other, out, context=30)
    assert not built
