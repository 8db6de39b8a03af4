"""Imports point one way: utils, s3dg, loss <- packages <- scripts."""

import ast

import pytest

from tests.helpers import ROOT

LAYERS = [  # each may import itself and those before it
    {"utils", "s3dg", "loss"},
    {"video_decoder", "distributed", "annotations"},
    {
        "captions",
        "video_loader",
        "retrieval_loader",
        "youcook_loader",
        "msrvtt_loader",
        "recognition_loader",
        "hmdb_loader",
        "ucf_loader",
        "localization_loader",
        "crosstask_loader",
        "htm_align_loader",
    },
    {"training", "evaluation"},
    {"video_search"},
    {"args"},
    {"evaluation_script"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = [path for name in LAYER for path in ROOT.glob(f"{name}.py")]
FILES += [path for name in LAYER for path in ROOT.glob(f"{name}/*.py")]
FILES.sort()


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_from_a_higher_layer(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    scripts = {script.stem for script in ROOT.glob("*.py")} - LAYER.keys() - {"hubconf"}
    for name in imported(path):
        assert name not in scripts, name
        assert LAYER.get(name, 0) <= LAYER[own], name
    if own in ("utils", "s3dg", "loss"):
        assert not imported_of_project(path)


def imported_of_project(path):
    return set(imported(path)) & LAYER.keys()


def test_hubconf_imports_only_the_model():
    assert imported_of_project(ROOT / "hubconf.py") == {"s3dg"}
