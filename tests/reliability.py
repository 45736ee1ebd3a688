"What the tests of faults and of foreign files have seen, as tables of the docs: written where RELIABILITY is set."
import os
import re
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[1]/"tables"/"reliability"
SEEN = {}   # table -> rows, of this session


def noted(table, **row): SEEN.setdefault(table, []).append(row)


def noted_refusal(what, size, line):
    "What was handed in, its bytes, and the sentence, without the folder of the test"
    line = re.sub(r"[^\s'(]*/pytest-of-[^/]+/pytest-\d+/[^/\s']+/", "", line)
    noted("foreign", input=what, bytes=size, sentence=line)


def write():
    "Write the tables"
    if not os.environ.get("RELIABILITY"): return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for table, rows in SEEN.items(): pd.DataFrame(rows).to_csv(FOLDER/f"{table}.csv", index=False)
