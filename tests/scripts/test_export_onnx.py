"""The export to ONNX: both networks, at other sizes than the traced one, and input errors."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch

from s3dg import S3D
from scripts import export_onnx
from utils import run_script


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Save a small model whose BatchNorm statistics fit its activations."""
    torch.manual_seed(0)
    model = S3D(num_classes=16, space_to_depth=True, init="kaiming_normal")
    model.text_module.word_embd = torch.nn.Embedding.from_pretrained(torch.randn(5, 300))
    with torch.no_grad():
        for _ in range(3):
            model.forward_video(torch.rand(2, 3, 8, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def export(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export_onnx.py", *map(str, arguments)])
    run_script(export_onnx.main)


@pytest.mark.slow
def test_the_exported_networks_give_the_models_embeddings(weights, tmp_path, monkeypatch, capsys):
    export(monkeypatch, f"--weights={weights}", f"--out={tmp_path}")
    assert capsys.readouterr().out.count("apart from the model") == 4
    model, text = export_onnx.s3dg.load_model(weights), torch.tensor([[1, 2, 0, 0], [4, 3, 2, 1]])
    video = torch.rand(3, 3, 10, 34, 48)
    with torch.inference_mode():
        expected = {"video": model.encode_video(video), "text": model.encode_text(text)}
    for kind, x in (("video", video), ("text", text)):
        session = onnxruntime.InferenceSession(tmp_path / f"{kind}.onnx")
        (found,) = session.run([f"{kind}_embedding"], {kind: x.numpy()})
        np.testing.assert_allclose(found, expected[kind], atol=1e-5 * np.abs(found).max(), rtol=0)
    session = onnxruntime.InferenceSession(tmp_path / "video.onnx")
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, {"video": np.zeros((1, 3, 9, 35, 48), np.float32)})  # odd


def test_a_missing_package_and_a_bad_file_are_reported_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse():
        with pytest.raises(SystemExit) as ended:
            export(monkeypatch, f"--weights={tmp_path}/bad.pth", f"--out={tmp_path}/out")
        assert ended.value.code == 2
        return capsys.readouterr().err

    (tmp_path / "bad.pth").write_text("not weights")
    assert "bad.pth is damaged" in refuse()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = refuse()
    assert "needs packages that are missing: pip install onnxscript\n" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
