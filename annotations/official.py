"""Read the files that a data set's authors publish, and validate every value.

Functions raise ValueError with the place of the value in the file; tables.data_error adds the
file's name.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from annotations.tables import LARGEST_NUMBER, AnyPath, data_error
from utils import DataError, escapes_root, one_line, shorten

JSON_TYPES = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def is_json(path: AnyPath) -> bool:
    return str(path).lower().endswith(".json")


def read_json(path: AnyPath) -> Any:
    """Return the content of a JSON file without duplicate keys. Raises DataError or OSError."""

    def to_dict(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {shorten(key)} is duplicated")
        return content

    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=to_dict)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError
        raise DataError(path, f"is not JSON ({one_line(error)}); fetch it again") from None


def read_lines(path: AnyPath) -> list[str]:
    """Return the lines of a text file. Raises DataError or OSError."""
    with data_error(path):
        try:
            # str.splitlines would also split at other characters, which a title may have.
            return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not a text file ({one_line(error)}); give one") from None


def require_key(content: Any, key: str, types: type | tuple[type, ...], place: str = "") -> Any:
    """Return content[key]. Raises ValueError unless it has one of these types; bool is not an int.

    place: where in the file the content is, such as "entry 3 of videos".
    """
    types = types if isinstance(types, tuple) else (types,)
    where = f"{place}: " * bool(place)
    if not isinstance(content, dict) or key not in content:
        keys = ", ".join(map(shorten, list(content)[:5])) if isinstance(content, dict) else "none"
        raise ValueError(f"{where}has no {key!r} (its keys: {keys}); give the official file")
    value = content[key]
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(JSON_TYPES[kind] for kind in types)
        raise ValueError(f"{where}{key!r} is {shorten(value)}, not {expected}; fix it")
    return value


def parse_text(sentence: str, place: str) -> str:
    """Return a sentence with its line ends as \\n, which CSV files preserve."""
    check_encodable(sentence, place)
    return "\n".join(sentence.splitlines())


def parse_name(name: str | int, place: str = "") -> str:
    """Return a path, or part of one, as a string. Raises ValueError if it is empty or leads out."""
    name = str(name)
    where = f"{place}: " * bool(place)
    if not name:
        raise ValueError(f"{where}a name is empty; fill it in")
    if escapes_root(name):
        fault = "leads out of the data's folder; give a path in it, without .."
        raise ValueError(f"{where}{shorten(name)} {fault}")
    check_encodable(name, place)
    return name


def parse_segment(segment: list, place: str) -> tuple[float, float]:
    """Return a segment's start and end in seconds."""
    numbers = all(type(time) in (int, float) and 0 <= time <= LARGEST_NUMBER for time in segment)
    if len(segment) != 2 or not numbers or segment[0] > segment[1]:
        raise ValueError(f"{place}: 'segment' is {shorten(segment)}, not [start, end]; fix it")
    return segment[0], segment[1]


def check_encodable(text: str, place: str) -> None:
    """Raise ValueError for a lone surrogate, which JSON can represent but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        where = f"{place}: " * bool(place)
        raise ValueError(f"{where}{shorten(text)} is not Unicode text; fix it") from None
