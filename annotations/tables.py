"""Read the user's CSV tables, and validate every cell that matters."""

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import pandas as pd

from utils import DataError, atomic_write, escapes_root, log, one_line, plural, shorten

LARGEST_NUMBER = 1e7  # in a table, in practice seconds; the decoder rejects times beyond 1e9

AnyPath = str | os.PathLike[str]


@contextlib.contextmanager
def data_error(path: AnyPath, line: int | None = None) -> Iterator[None]:
    """Report a ValueError about the content of a file as a DataError that names the file."""
    try:
        yield
    except ValueError as error:
        raise DataError(path, str(error), line) from None


def read_cells(file: AnyPath | BinaryIO) -> pd.DataFrame:
    """Read a CSV file as strings. Empty cells are missing values, "null" and "NA" are words.

    Raises OSError, or ValueError if it is not a table (pandas' parser errors and undecodable bytes
    are ValueErrors).
    """
    table = pd.read_csv(file, dtype=str, keep_default_na=False, na_values=[""])
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the first cells for row names
        raise ValueError("its rows have more cells than its first line")
    return table


def read_table(
    path: AnyPath, columns: Sequence[str], numbers: Iterable[str] = (), names: Iterable[str] = ()
) -> pd.DataFrame:
    """Read a CSV file that must have these columns.

    Columns are strings, as in read_cells, except `numbers`: floats from 0 to LARGEST_NUMBER.
    `names` are columns of paths; see check_names. Raises DataError or OSError.
    """
    os.stat(path)  # pandas would fetch a URL
    try:
        table = read_cells(path)
    except ValueError as error:
        needed = f"give one with {', '.join(columns)}" if columns else "give one"
        raise DataError(path, f"is not a CSV table ({one_line(error)}); {needed}") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        present = shorten(", ".join(map(str, table.columns)))
        raise DataError(path, f"has no column {', '.join(missing)} (it has {present}); add it")
    for column in numbers:
        values = pd.to_numeric(table[column], errors="coerce")
        for row in table.index[~values.between(0, LARGEST_NUMBER)][:1]:
            fault = f"is not a number from 0 to {LARGEST_NUMBER:.0e}; fix it"
            raise cell_error(path, row, column, table[column][row], fault)
        table[column] = values
    check_names(table, names, path)
    return table


def read_annotations(
    path: AnyPath, columns: Sequence[str], names: Sequence[str], numbers: Iterable[str] = ()
) -> pd.DataFrame:
    """Read the table of an evaluation. It must have rows, and no empty cells in columns `names`."""
    table = read_table(path, columns, numbers=numbers, names=names)
    if table.empty:
        raise DataError(path, "has no rows; give the whole table")
    return require_non_empty(table, names, path)


def require_non_empty(table: pd.DataFrame, columns: Iterable[str], path: AnyPath) -> pd.DataFrame:
    """Return the table. Raises DataError if a cell of these columns is empty."""
    for column in columns:
        for row in table.index[table[column].isna()][:1]:
            raise cell_error(path, row, column, None, "is empty; fill it in")
    return table


def require_unique(table: pd.DataFrame, columns: Sequence[str], path: AnyPath) -> pd.DataFrame:
    """Return the table. Raises DataError if two rows have the same values in these columns."""
    for row in table.index[table.duplicated(columns)][:1]:
        value = table[columns[-1]][row]
        raise cell_error(path, row, columns[-1], value, "is duplicated; remove one")
    return table


def check_names(table: pd.DataFrame, columns: Iterable[str], path: AnyPath) -> None:
    """Raise DataError for paths of videos, or parts of paths, that lead out of their folder."""
    for column in columns:
        for row, name in enumerate(table[column]):
            if isinstance(name, str) and escapes_root(name):
                fault = "leads out of the data's folder; give a path in it, without .."
                raise cell_error(path, row, column, name, fault)


def cell_error(path: AnyPath, row: int, column: str, value: object, fault: str) -> DataError:
    """Make the error for a cell of a CSV table, with the line on which its row starts.

    row: from 0, as in read_table. fault: what is wrong with the value, and the fix.
    """
    cell = shorten(value) if isinstance(value, str) else "the cell"
    return DataError(path, f"column {column}: {cell} {fault}", line_of_row(path, row))


def line_of_row(path: AnyPath, row: int) -> int:
    """Return the line, from 1, on which a row of read_table starts: cells may have line breaks."""
    with open(path, newline="", encoding="utf-8-sig") as file, contextlib.suppress(csv.Error):
        reader = csv.reader(file)
        rows = -1  # the first record is the header
        before = 0  # lines
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():  # pandas skips blank lines
                if rows == row:
                    return before + 1
                rows += 1
            before = reader.line_num
    return row + 2  # a cell is too large for the csv module


def make_table(rows: Iterable[Sequence], columns: Sequence[str]) -> pd.DataFrame:
    """Make a table like those of read_table, in which empty texts are missing values."""
    table = pd.DataFrame(rows, columns=columns)
    texts = table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]
    table[texts] = table[texts].mask(table[texts] == "")
    return table


def count_empty(texts: pd.Series) -> list[str]:
    """Return a note if sentences are missing; they are evaluated as sentences without words."""
    count = int(texts.isna().sum())
    return [plural(count, "empty sentence")] if count else []


def log_notes(path: AnyPath, notes: Iterable[str]) -> None:
    """Log the notes on an annotation file."""
    for note in notes:
        log.info("%s: %s", path, note)


def write_table(path: AnyPath, table: pd.DataFrame) -> None:
    """Write a table that read_table can read. Raises OSError."""
    with atomic_write(path) as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())
