"""The documents: their relative links and anchors resolve, and the README stays short."""

import re
import unicodedata
from pathlib import Path

import pytest

from evaluation.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
README_WORDS = 1300
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name for name in ("data/README.md", "benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
INLINE = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")  # [text](target), ![text](target)
REFERENCE = re.compile(r"\[[^\]]+\]\[([^\]]+)\]")  # [text][label]
DEFINITION = re.compile(r"^\[([^\]]+)\]: *(\S+)", re.MULTILINE)


def prose(document):
    """Return the text of a document without its code, in which brackets are not links."""
    text = re.sub(r"^( *)```.*?^\1```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?:^|(?<=\n\n))(?:(?: {4}.*)?\n)+", "\n", text)
    return re.sub(r"`[^`]*`", lambda code: re.sub(r"[\[\]]", "", code[0]), text)


def anchors(document):
    """Return the anchors that GitHub makes of a document's headings."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(document), re.MULTILINE):
        heading = INLINE.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        kept = [c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LNM"]
        anchor = "".join(kept).replace(" ", "-")
        copies = sum(
            re.fullmatch(re.escape(anchor) + r"(-\d+)?", other) is not None for other in found
        )
        found.append(f"{anchor}-{copies}" if copies else anchor)
    return found


def broken_links(document):
    """List the relative targets of a document that do not exist, and labels without a target."""
    text = prose(document)
    defined = dict(DEFINITION.findall(text))
    broken = [f"[{label}]" for label in REFERENCE.findall(text) if label not in defined]
    for target in [*INLINE.findall(text), *defined.values()]:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        exists = file.exists() and file.is_relative_to(ROOT)
        if not exists or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document):
    assert broken_links(document) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `b_c` page, & more\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    good = (
        "[a](other.md#a-b_c-page--more) [b](#here) [c](other.md#twice-1) [d](https://host/x) [e][l]"
    )
    bad = "[a](absent.md) [b](#absent) ![c](other.md#twice-2) [d](../outside) [e][absent]"
    page.write_text(f"# Here\n\n{good}\n\n    [code](absent)\n\n{bad}\n\n[l]: other.md\n")
    bad_targets = ["[absent]", "absent.md", "#absent", "other.md#twice-2", "../outside"]
    assert broken_links(page) == bad_targets


def test_every_page_is_linked_from_the_readme():
    linked = set(INLINE.findall(prose(ROOT / "README.md")))
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - linked == set()


def test_the_readme_has_every_published_figure_that_evaluate_all_shows():
    readme = (ROOT / "README.md").read_text().partition("**Published**")[2]
    shown = set(re.findall(r"[\d.]+", readme.partition("**Ours**")[0]))
    for sources in PUBLISHED.values():
        for source in sources:
            for name, figure in source.figures.items():
                text = f"{figure:g}" if name == "MR" else f"{figure:.1f}"
                assert text in shown, (source, name)


def test_the_readme_is_short():
    words = len((ROOT / "README.md").read_text().split())
    assert words <= README_WORDS, f"README.md has {words} words; move some to docs/"
