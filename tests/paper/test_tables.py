"The join with the paper's numbers, and the files that tables become."
import re

import numpy as np
import pandas as pd
import pytest

from mix_geneformer import files
from mix_geneformer.files import InputError
from mix_geneformer.paper.numbers import paper_table
from mix_geneformer.paper.tables import as_percent, format_p, markdown_table, with_paper, write_table

def results():
    return pd.DataFrame({"organ": ["pancreas", "LIMB_muscle", "limb muscle"], "split": ["random", "random", "donor"],
                         "cell types": [10, 9, 9], "mixed accuracy": [.95, .9, .8],
                         "mixed macro-F1": [.9, np.nan, .7]})


@pytest.mark.parametrize("which, n", [(1, 11), (2, 11)])
def test_the_join_keeps_every_row_of_both_sides(which, n):
    df = with_paper(results(), which, 'get "{organ}"')
    assert set(df.organ) == {*paper_table(which).organ, "Pancreas", "Limb muscle"}
    assert len(df) == n and df.columns[-1] == "status"
    ran = df.status.eq("run here")
    assert ran.sum() == 3 and list(ran) == sorted(ran, reverse=True)
    assert df[~ran][["cell types", "mixed accuracy (%)", "mixed macro-F1 (%)"]].isna().all().all()
    for organ, status in zip(df[~ran].organ, df[~ran].status): assert status == f'not run: `get "{organ}"`'
    for c in paper_table(which).columns[1:]:
        theirs = df.drop_duplicates("organ").set_index("organ")[f"paper {c}"].dropna().to_dict()
        assert theirs == paper_table(which).set_index("organ")[c].to_dict()


def test_nothing_measured_means_not_run():
    empty = results()[:1].assign(**{"cell types": np.nan, "mixed accuracy": np.nan, "mixed macro-F1": np.nan})
    assert with_paper(empty, 1, "x").status.eq("not run: `x`").all()
    assert len(with_paper(None, 1, "x")) == len(with_paper(results()[:0], 1, "x")) == 9


def test_perturbed_genes_join_by_model_and_gene_whatever_the_case():
    ours = pd.DataFrame({"fine-tuned on": ["mouse", "mouse"], "gene": ["Aldob", "Arx"], "cosine_shift": [.002, .01],
                         "p_value": [.5, 0.], "rank": [40, 1]})
    df = with_paper(ours, 3, "x")
    assert len(df) == 5 and df.gene.tolist() == ["ALDOB", "Arx", "ALDH3B2", "MTRNR2L11", "NAP1L6"]
    assert df["paper cosine_shift"][0] == .011 and df["cosine_shift"][0] == .002
    md = markdown_table(df)
    assert "< 2.2e-308" in md and not re.search(r"\| *0(\.0)? *\|", md)


@pytest.mark.parametrize("change, message", [
    (lambda d: d.rename(columns={"organ": "tissue"}), "lack 1 of 1 key columns"),
    (lambda d: d.assign(**{"paper types": 3}), "kept for the paper"),
    (lambda d: d.assign(**{"mixed accuracy": 95.}), "3 values of 'mixed accuracy' lie outside 0 to 1")])
def test_results_that_cannot_be_joined_are_refused(change, message):
    with pytest.raises(InputError, match=re.escape(message)): with_paper(change(results()), 1, "x")


def test_percent_is_marked_once():
    once = as_percent(results())
    assert once["mixed accuracy (%)"].tolist() == [95., 90., 80.] and as_percent(once).equals(once)


@pytest.mark.parametrize("p, text", [(0, "< 2.2e-308"), (5e-324, "< 2.2e-308"), (2.3e-308, "2.3e-308"),
                                     (1.56e-2, "0.0156"), (1, "1"), (np.nan, "")])
def test_p_values_never_underflow(p, text): assert format_p(p) == text


@pytest.mark.parametrize("p", [-.1, 1.1, float("inf")])
def test_impossible_p_values_are_refused(p):
    with pytest.raises(InputError, match="outside 0 to 1"): format_p(p)


def read_md(text):
    lines = [l for l in text.splitlines() if l.startswith("|")]
    cells = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", l)[1:-1]] for l in lines]
    return pd.DataFrame(cells[2:], columns=cells[0])


def same_value(a, b):
    "A cell of the csv and the cell of the markdown that shows it"
    if a == "": return b == "–"
    try: return float(b) == pytest.approx(float(a), rel=6e-3)
    except ValueError: return a == b


def test_csv_and_markdown_agree(tmp_path):
    df = with_paper(results(), 2, "a | b").assign(p_value=[0., *np.linspace(.001, .9, 10)])
    csv, md = write_table(df, "t", "One\nsentence.", tmp_path)
    again, shown = pd.read_csv(csv, keep_default_na=False, dtype=str), read_md(md.read_text())
    assert md.read_text().startswith("One sentence.\n\n|") and list(shown) == list(again) == list(df)
    for c in df:
        for a, b in zip(again[c], shown[c], strict=True): assert same_value(a, b), (c, a, b)
    assert (again.status == "not run: `a | b`").sum() == 8 and "a \\| b" in md.read_text()
    assert again["cell types"][0] in ("9", "10") and again.p_value[0] == "< 2.2e-308"
    assert pd.isna(pd.read_csv(csv)["mixed accuracy (%)"][3])


def test_markdown_may_show_less_and_puts_intervals_behind_numbers(tmp_path):
    df = pd.DataFrame({"what": ["a", "b|c"], "AUROC": [.5, .25], "AUROC low": [.4, np.nan], "AUROC high": [.6, .3],
                       "low": [1, 2], "p_value": [.1, 0.]})
    csv, md = write_table(df, "t", folder=tmp_path, shown=df[:1])
    assert list(pd.read_csv(csv)) == list(df) and len(pd.read_csv(csv)) == 2
    assert read_md(md.read_text()).values.tolist() == [["a", "0.5 [0.4, 0.6]", "1", "0.1"]]
    half = read_md(markdown_table(df)).values.tolist()[1]
    assert half == ["b|c", "0.25", "2", "< 2.2e-308"]   # half an interval is none


def test_notes_fold_away_below_the_table_and_leave_the_csv_alone(tmp_path):
    plain = [p.read_bytes() for p in write_table(results(), "t", "c", tmp_path)]
    csv, md = (p.read_bytes() for p in write_table(results(), "t", "c", tmp_path, notes=["One |\nnote.", "Another."]))
    assert csv == plain[0] and md.startswith(plain[1])
    assert md[len(plain[1]):].decode() == ("\n<details>\n<summary>How it was made</summary>\n\n- One | note.\n"
                                          "- Another.\n\n</details>\n")


def test_tables_are_deterministic_whole_and_replaced(tmp_path):
    a = [p.read_bytes() for p in write_table(results(), "t", "c", tmp_path/"new")]
    b = [p.read_bytes() for p in write_table(results(), "t", "c", tmp_path/"new")]
    assert a == b and sorted(p.name for p in (tmp_path/"new").iterdir()) == ["t.csv", "t.md"]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    old = write_table(results(), "t", "c", tmp_path)[0].read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(InputError, match="t.csv could not be written .No space left on device; .* free some space"):
        write_table(results()[:1], "t", "c", tmp_path)
    assert (tmp_path/"t.csv").read_bytes() == old and not list(tmp_path.glob("*.partial"))


def test_duplicate_columns_are_refused(tmp_path):
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(InputError, match="1 column names of table 't' occur twice"):
        write_table(twice, "t", folder=tmp_path)
