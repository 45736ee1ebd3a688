"The paper's numbers, the join, and the files that tables and figures become."
import os, re, subprocess, sys
import numpy as np, pandas as pd, pytest
from mix_geneformer.files import InputError
from mix_geneformer.paper.machine import describe_run, run_info
from mix_geneformer.paper.numbers import paper_table
from mix_geneformer.paper.tables import as_percent, format_p, markdown_table, with_paper, write_table
from mix_geneformer.plots import MISSING, PALETTE, palette, save_figure, umap_panels, umap_states

TABLE1 = """Brain 15 96.9 97.6; Heart 11 97.8 97.7; Kidney 18 94.9 95.4; Large_intestine 7 93.1 94.6; Limb_muscle 9 99.5 99.7
            Mammary_gland 7 99.0 99.1; Spleen 10 98.7 98.6; Thymus 6 97.0 97.6; Tongue 3 94.9 95.3"""
TABLE2 = """Spleen 6 98.9 99.0; Brain 6 96.8 97.7; Immune 10 94.4 95.1; Kidney 15 92.8 93.3; Large_intestine 16 92.7 93.4
            Liver 12 91.1 91.2; Lung 16 93.4 94.3; Pancreas 15 93.0 93.5; Placenta 3 97.9 98.2"""


def expected(text):
    rows = [r.split() for r in re.split(r";|\n", text) if r.strip()]
    return [(o.replace("_", " "), int(n), float(a), float(b)) for o, n, a, b in rows]


@pytest.mark.parametrize("which, text", [(1, TABLE1), (2, TABLE2)])
def test_every_organ_and_number_of_the_paper(which, text):
    assert list(paper_table(which).itertuples(index=False, name=None)) == expected(text)


def test_perturbed_genes_and_figure4_of_the_paper():
    assert list(paper_table(3).itertuples(index=False, name=None)) == [
        ("mouse", "ALDOB", .011, 1.56e-2), ("mouse", "ALDH3B2", .011, 9.03e-3), ("human", "MTRNR2L11", .202, 0.), ("human", "NAP1L6", .035, 1.66e-3)]
    assert dict(paper_table("figure 4").values) == {"human": .43, "mouse": .05}
    assert "95.8" in paper_table(1).attrs["note"] and "abstract" in paper_table(1).attrs["note"]


def results():
    return pd.DataFrame({"organ": ["pancreas", "LIMB_muscle", "limb muscle"], "split": ["random", "random", "donor"], "cell types": [10, 9, 9],
                         "mixed accuracy": [.95, .9, .8], "mixed macro-F1": [.9, np.nan, .7]})


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
    ours = pd.DataFrame({"fine-tuned on": ["mouse", "mouse"], "gene": ["Aldob", "Arx"], "cosine_shift": [.002, .01], "p_value": [.5, 0.], "rank": [40, 1]})
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


@pytest.mark.parametrize("p, text", [(0, "< 2.2e-308"), (5e-324, "< 2.2e-308"), (2.3e-308, "2.3e-308"), (1.56e-2, "0.0156"), (1, "1"), (np.nan, "")])
def test_p_values_never_underflow(p, text): assert format_p(p) == text


@pytest.mark.parametrize("p", [-.1, 1.1, float("inf")])
def test_impossible_p_values_are_refused(p):
    with pytest.raises(InputError, match="outside 0 to 1"): format_p(p)


def read_md(text):
    lines = [l for l in text.splitlines() if l.startswith("|")]
    cells = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", l)[1:-1]] for l in lines]
    return pd.DataFrame(cells[2:], columns=cells[0])


def test_csv_and_markdown_agree(tmp_path):
    df = with_paper(results(), 2, "a | b").assign(p_value=[0., *np.linspace(.001, .9, 10)])
    csv, md = write_table(df, "t", "One\nsentence.", tmp_path)
    again, shown = pd.read_csv(csv, keep_default_na=False, dtype=str), read_md(md.read_text())
    assert md.read_text().startswith("One sentence.\n\n|") and list(shown) == list(again) == list(df)
    for c in df:
        for a, b in zip(again[c], shown[c]):
            if a == "": assert b == "–"
            else:
                try: assert float(b) == pytest.approx(float(a), rel=6e-3)
                except ValueError: assert a == b
    assert (again.status == "not run: `a | b`").sum() == 8 and "a \\| b" in md.read_text()
    assert again["cell types"][0] in ("9", "10") and again.p_value[0] == "< 2.2e-308"
    assert pd.isna(pd.read_csv(csv)["mixed accuracy (%)"][3])


def test_markdown_may_show_less_and_puts_intervals_behind_numbers(tmp_path):
    df = pd.DataFrame({"what": ["a", "b|c"], "AUROC": [.5, .25], "AUROC low": [.4, np.nan], "AUROC high": [.6, .3], "low": [1, 2], "p_value": [.1, 0.]})
    csv, md = write_table(df, "t", folder=tmp_path, shown=df[:1])
    assert list(pd.read_csv(csv)) == list(df) and len(pd.read_csv(csv)) == 2
    assert read_md(md.read_text()).values.tolist() == [["a", "0.5 [0.4, 0.6]", "1", "0.1"]]
    assert read_md(markdown_table(df)).values.tolist()[1] == ["b|c", "0.25", "2", "< 2.2e-308"]   # half an interval is none


def test_tables_are_deterministic_whole_and_replaced(tmp_path):
    a = [p.read_bytes() for p in write_table(results(), "t", "c", tmp_path/"new")]
    b = [p.read_bytes() for p in write_table(results(), "t", "c", tmp_path/"new")]
    assert a == b and sorted(p.name for p in (tmp_path/"new").iterdir()) == ["t.csv", "t.md"]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    from mix_geneformer import files as report
    old = write_table(results(), "t", "c", tmp_path)[0].read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(InputError, match="t.csv could not be written .No space left on device; .* free some space"): write_table(results()[:1], "t", "c", tmp_path)
    assert (tmp_path/"t.csv").read_bytes() == old and not list(tmp_path.glob("*.partial"))


def test_duplicate_columns_are_refused(tmp_path):
    with pytest.raises(InputError, match="1 column names of table 't' occur twice"): write_table(pd.DataFrame([[1, 2]], columns=["a", "a"]), "t", folder=tmp_path)


def cells(n=60, seed=0):
    rng = np.random.default_rng(seed)
    kind = np.array([f"type {i % 6}" for i in range(n)], object)
    half = np.arange(n) < n//2
    return pd.DataFrame({"x": rng.normal(size=n), "y": rng.normal(size=n), "cell_type": np.where(half, None, kind), "predicted": np.where(half, None, kind),
                         "species": np.where(half, "mouse", "human"), "state": np.array(["before", "after", "goal"])[np.arange(n) % 3]})


@pytest.mark.parametrize("draw", [lambda: umap_panels({"mouse → human": cells(), "human → mouse": cells(seed=1)}), lambda: umap_panels({"one": cells()}, {"cell_type": "type"}),
                                  lambda: umap_states({"a": cells(), "b": cells(seed=1)})])
def test_figures_are_the_same_bytes_every_time(draw, tmp_path):
    a = [p.read_bytes() for p in save_figure(draw(), "f", tmp_path, dpi=60)]
    b = [p.read_bytes() for p in save_figure(draw(), "f", tmp_path, dpi=60)]
    assert a == b and a[0].startswith(b"\x89PNG") and b"<svg" in a[1] and b"<dc:date>" not in a[1]
    assert b"<image" in a[1] and sorted(p.name for p in tmp_path.iterdir()) == ["f.png", "f.svg"]   # points are pixels in the svg too


def test_the_same_figure_saved_twice_is_the_same(tmp_path):
    fig = umap_panels({"one": cells()})
    assert [p.read_bytes() for p in save_figure(fig, "f", tmp_path)] == [p.read_bytes() for p in save_figure(fig, "f", tmp_path)]


def test_drawing_leaves_the_reader_s_own_style_alone():
    import matplotlib as mpl
    before = dict(mpl.rcParams)
    umap_panels({"one": cells()}), umap_states({"a": cells()})
    assert dict(mpl.rcParams) == before


def test_colours_follow_the_label_and_do_not_repeat():
    assert palette(["b", "a"]) == palette(["a", "b", "a", None]) and len(set(PALETTE)) == 20 and MISSING not in PALETTE
    for n in (1, 20, 21, 100): assert len(set(palette(f"t{i}" for i in range(n)).values())) == n
    assert not set(palette(f"t{i}" for i in range(20)).values()) & set(palette(["human", "mouse", "before", "after", "goal"])[k] for k in ("human", "mouse", "goal"))


def test_colours_do_not_depend_on_the_process():
    "Labels that differ in case alone tie in the alphabet; a set's order differs from process to process"
    code = "from mix_geneformer.plots import palette; print(palette(['mast cell', 'Mast cell', 'MAST cell', 'Beta', 'beta']))"
    said = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(s)}, capture_output=True, text=True, check=True).stdout for s in range(4)}
    assert len(said) == 1


@pytest.mark.parametrize("frames, columns, message", [
    ({}, {"state": "s"}, "0 panels"), ({"a": cells()[:0]}, {"state": "s"}, "has 0 cells"), ({"a": cells().drop(columns="x")}, {"state": "s"}, "lacks the columns ['x']"),
    ({"a": cells().assign(y=np.nan)}, {"state": "s"}, "60 cells of panel 'a'"), ({"a": cells()}, {"organ": "s"}, "has the column 'organ'")])
def test_panels_that_cannot_be_drawn_are_refused(frames, columns, message):
    with pytest.raises(InputError, match=re.escape(message)): umap_panels(frames, columns)


def test_the_run_is_described_in_one_sentence():
    info = run_info()
    assert info["mix_geneformer"] and info["python"].count(".") == 2 and info["versions"]["numpy"] == np.__version__
    text = describe_run({**info, "commit": None}, minutes=2, cells=1, seed=0)
    assert text.startswith("Run on ") and "in 2.0 minutes: 1 cell, seed 0; mix-geneformer" in text and text.endswith(".") and "\n" not in text
