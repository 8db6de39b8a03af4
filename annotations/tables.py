"""Tables: CSV files that a user gives, read with a look at every cell that matters."""

import contextlib
import csv
import re

import pandas as pd

from utils import InputError, atomic_write, check_file, log, one_line, shorten

LARGEST_NUMBER = 1e7  # of a table: seconds, in practice; the decoder takes no time far beyond
OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|\0")  # what a path must not have to stay in its folder


def read_ours(path, flag, columns, names, numbers=()):
    """A table of ours, which has rows; `names` are the columns that no row may leave empty."""
    table = read_table(path, columns, numbers=numbers, names=names, flag=flag)
    if table.empty:
        raise InputError(f"--{flag}: {path} has no rows: give the whole table")
    return require_non_empty(table, names, path, flag)


def as_table(rows, columns):
    """Rows as read_table would give them: an empty text is a missing one."""
    table = pd.DataFrame(rows, columns=columns)
    texts = table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]
    table[texts] = table[texts].mask(table[texts] == "")
    return table


def empty_notes(texts):
    """A note where sentences are missing: they stay in, as a sentence without words."""
    count = int(texts.isna().sum())
    return [f"{count} sentences are empty"] if count else []


def log_notes(path, notes):
    """Has an evaluation's log say what of an official file is not evaluated."""
    for note in notes:
        log.info("%s: %s", path, note)


def write_table(path, table, summary, notes):
    """What data/*/prepare.py end with: the CSV file, and what is in it and what is not."""
    try:
        with atomic_write(path) as file:
            file.write(table.to_csv(index=False, lineterminator="\n").encode())
    except OSError as error:
        raise InputError(f"--out: {path} cannot be written: {one_line(error)}") from None
    print("\n".join([f"{path}: {summary}", *notes]))


def read_cells(path):
    """A CSV file's table, all strings; an empty cell is missing, "null" or "NA" is a word.

    Raises ValueError where it is no table: pandas' parser errors and undecodable bytes are one.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first cells for row names
        raise ValueError("its rows have more cells than its first line")
    return table


def read_table(path, columns, numbers=(), names=(), flag="eval_csv"):
    """Reads a CSV file's columns. All are strings but `numbers`, which are 0 or above; an empty
    cell is a missing text. `names` are columns of paths, see check_names.

    Words such as "null" or "NA" stay words. Raises InputError naming the file and the fault.
    """
    check_file(path, flag)
    needed = f"give one with {', '.join(columns)}"
    try:
        table = read_cells(path)
    except ValueError as error:
        reason = one_line(error)
        raise InputError(f"--{flag}: {path} is not a CSV table ({reason}): {needed}") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        have = shorten(", ".join(map(str, table.columns)))
        raise InputError(
            f"--{flag}: {path} has no column {', '.join(missing)} (it has {have}): add it"
        )
    for column in numbers:
        values = pd.to_numeric(table[column], errors="coerce")
        wrong = table.index[~values.between(0, LARGEST_NUMBER)]
        if len(wrong):
            fault = f"is not a number from 0 to {LARGEST_NUMBER:.0e}: mend it"
            raise cell_error(path, flag, wrong[0], column, table[column][wrong[0]], fault)
        table[column] = values
    check_names(table, names, path, flag)
    return table


def require_non_empty(table, columns, path, flag):
    """Refuses a table in whose columns a cell is empty."""
    for column in columns:
        for row in table.index[table[column].isna()][:1]:
            raise cell_error(path, flag, row, column, None, "names nothing: mend it")
    return table


def require_unique(table, columns, path, flag):
    """Refuses a table that has the same values of these columns twice."""
    for row in table.index[table.duplicated(columns)][:1]:
        value = table[columns[-1]][row]
        raise cell_error(
            path, flag, row, columns[-1], value, "is there twice: take one of them out"
        )
    return table


def escapes_root(name):
    """Whether a path, joined to a folder, could lead out of it: an absolute one, or one with `..`.

    What the folder itself holds, links included, is its owner's business.
    """
    return OUTSIDE.search(name) is not None


def check_names(table, columns, path, flag):
    """Refuses paths in a table, of videos or parts of such paths, that lead out of their folder."""
    for column in columns:
        for row, name in enumerate(table[column]):
            if isinstance(name, str) and escapes_root(name):
                fault = "leads out of the data's folder: give a path in it, without .."
                raise cell_error(path, flag, row, column, name, fault)


def cell_error(path, flag, row, column, value, fault):
    """The InputError for a cell of a CSV table, by the line on which its row starts."""
    cell = shorten(value) if isinstance(value, str) else "an empty cell"
    return InputError(
        f"--{flag}: {path}, line {line_of_row(path, row)}, column {column}: {cell} {fault}"
    )


def line_of_row(path, row):
    """The line, from 1, on which a row of read_table starts: quoted cells may have line ends."""
    with open(path, newline="", encoding="utf-8-sig") as file, contextlib.suppress(csv.Error):
        reader = csv.reader(file)
        rows = -1  # the first record is the header
        before = 0  # lines
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():  # pandas passes over blank lines
                if rows == row:
                    return before + 1
                rows += 1
            before = reader.line_num
    return row + 2  # a cell that the csv module takes for too large
