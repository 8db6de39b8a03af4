"""Read the files that a data set's authors hand out, and check every value of them."""

import json
from collections import Counter
from pathlib import Path

from annotations.tables import (
    escapes_root,
)
from utils import InputError, check_file, one_line, shorten


def is_json(path):
    return str(path).lower().endswith(".json")


def read_json(path, flag):
    """The content of a JSON file. A key that an object has twice is a fault, not the last one."""
    check_file(path, flag)

    def distinct(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {shorten(twice)} is there twice")
        return content

    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError
        raise InputError(
            f"--{flag}: {path} is not JSON ({one_line(error)}): fetch it again"
        ) from None


def read_lines(path, where):
    """The lines of a text file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{where} is not a text file ({one_line(error)}): give one") from None


def get(content, key, kinds, where):
    """content[key], of one of these types; JSON's true and false are no numbers."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    words = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
    if not isinstance(content, dict) or key not in content:
        have = ", ".join(map(shorten, list(content)[:5])) if isinstance(content, dict) else "none"
        raise InputError(f"{where} has no {key!r} (its keys: {have}): give the official file")
    value = content[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(words[kind] for kind in kinds)
        raise InputError(f"{where}: {key!r} is {shorten(value)}, not {expected}: mend it")
    return value


def text_of(sentence, where):
    """A sentence, with line ends that a CSV file keeps."""
    check_encodable(sentence, where)
    return "\n".join(sentence.splitlines())


def name_of(name, where):
    """A path, or a part of one, that stays in the data's folder."""
    name = str(name)
    if not name or escapes_root(name):
        fault = "leads out of the data's folder: it needs to be a path in it, without .."
        raise InputError(f"{where}: {shorten(name)} {fault if name else 'is not a name'}")
    check_encodable(name, where)
    return name


def check_encodable(text, where):
    """JSON can spell halves of characters, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {shorten(text)} is not Unicode text: mend it") from None
