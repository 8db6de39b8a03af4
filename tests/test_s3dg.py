import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import s3dg
from loss import MILNCELoss
from s3dg import S3D, Tokenizer
from tests.helpers import Evil, golden_json, golden_random, golden_weight

STEMS = {"std": False, "s2d": True}
VIDEO_SHAPES = [(2, 3, 8, 64, 64), (1, 3, 16, 112, 112), (1, 3, 32, 96, 128)]
GOLDEN_NAMES = {"std": "standard", "s2d": "space_to_depth"}


def assert_golden(value, expected):
    """Compare with a relative tolerance of 1e-9.

    1e-12 of the largest value is also allowed, for values that are small because large terms
    cancel: the rounding errors of the terms differ from processor to processor.
    """
    atol = 1e-12 * np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=atol)


@pytest.fixture(scope="module")
def golden_models():
    """Both stems with the golden weights, float64, in evaluation mode."""
    models = {}
    for stem, space_to_depth in STEMS.items():
        model = S3D(space_to_depth=space_to_depth).double().eval()
        model.load_state_dict({k: golden_weight(k, v.shape) for k, v in model.state_dict().items()})
        models[stem] = model
    return models


@pytest.mark.parametrize("stem", STEMS)
def test_keys_and_shapes_are_the_public_releases(golden_models, stem):
    expected = golden_json("state_dict")["state_dict"][GOLDEN_NAMES[stem]]
    state = golden_models[stem].state_dict()
    assert [[name, list(value.shape)] for name, value in state.items()] == expected


@pytest.mark.parametrize("shape", VIDEO_SHAPES)
@pytest.mark.parametrize("stem", STEMS)
def test_video_outputs_match_the_golden_values(golden_models, golden_values, stem, shape):
    name = "x".join(map(str, shape))
    video = torch.as_tensor(golden_random(f"golden/video/{name}").random_sample(shape))
    with torch.inference_mode():
        embedding = golden_models[stem](video, None, mode="video")
        mixed5c = golden_models[stem](video, None, mode="video", mixed5c=True)
    for value, key in ((embedding, "embedding"), (mixed5c, "mixed5c")):
        assert_golden(value, golden_values[f"{stem}/{name}/{key}"])


def golden_tokens():
    tokens = golden_random("golden/tokens").randint(0, 66250, (6, 20))
    tokens[0, 4:] = 0
    tokens[1] = 0
    return torch.as_tensor(tokens)


@pytest.mark.parametrize("stem", STEMS)
def test_text_outputs_match_the_golden_values(golden_models, golden_values, stem):
    with torch.inference_mode():
        text = golden_models[stem](None, golden_tokens(), mode="text")
    assert_golden(text, golden_values[f"{stem}/text"])


def test_float32_stays_within_a_thousandth_of_the_largest_value(golden_models, golden_values):
    name = "2x3x8x64x64"
    video = torch.as_tensor(golden_random(f"golden/video/{name}").random_sample((2, 3, 8, 64, 64)))
    model = S3D().eval()
    model.load_state_dict(golden_models["std"].state_dict())
    with torch.inference_mode():
        embedding, text = model(video.float(), golden_tokens())
    for value, key in ((embedding, f"std/{name}/embedding"), (text, "std/text")):
        expected = golden_values[key]
        assert np.abs(value.numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_training_step_matches_the_golden_loss_gradients_and_statistics(golden_values):
    model = S3D().double().train()
    model.load_state_dict({k: golden_weight(k, v.shape) for k, v in model.state_dict().items()})
    shape = (3, 3, 8, 64, 64)
    video = torch.as_tensor(golden_random("golden/train/video").random_sample(shape))
    tokens = torch.as_tensor(golden_random("golden/train/tokens").randint(0, 66250, (12, 20)))
    video_embd, text_embd = model(video, tokens)
    loss = MILNCELoss()(video_embd, text_embd)
    loss.backward()

    assert_golden(loss.item(), golden_values["train/loss"])
    assert_golden(video_embd.detach(), golden_values["train/video"])
    assert_golden(text_embd.detach(), golden_values["train/text"])
    parameters = dict(model.named_parameters())
    names = golden_json("state_dict")["parameters_sorted"]
    assert sorted(parameters) == names
    norms = [-1.0 if parameters[n].grad is None else parameters[n].grad.norm() for n in names]
    assert_golden(norms, golden_values["train/grad_norms"])
    for key, expected in golden_values.items():
        if key.startswith("train/grad/"):
            gradient = parameters[key.removeprefix("train/grad/")].grad.flatten()[:256]
            assert_golden(gradient, expected)
    means = [v for v in model.state_dict().values() if v.shape == (384,)]
    expected = golden_values["train/bn_running_mean"]
    atol = 1e-12 * np.abs(expected).max()
    assert any(np.allclose(v, expected, rtol=1e-9, atol=atol) for v in means)


def test_word_embedding_is_frozen_and_sized_by_its_vectors(tmp_path):
    vectors = torch.randn(8, 300)
    torch.save(vectors, tmp_path / "word2vec.pth")
    table = S3D(word2vec_path=tmp_path / "word2vec.pth").text_module.word_embd.weight
    assert torch.equal(table, vectors) and not table.requires_grad


def test_word_vectors_of_another_shape_are_rejected(tmp_path):
    torch.save(torch.randn(8, 50), tmp_path / "word2vec.pth")
    with pytest.raises(ValueError, match=r"word2vec\.pth.*300"):
        S3D(word2vec_path=tmp_path / "word2vec.pth")


def test_kaiming_normal_scales_convolutions_by_their_fan_in():
    model = S3D(init="kaiming_normal")
    weight = model.mixed_4c.conv_b1_b.conv1.weight
    fan_in = weight[0].numel()
    assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)


def test_without_gating_the_network_has_no_gates():
    model = S3D(gating=False).eval()
    assert not any("gating" in name for name, _ in model.named_parameters())
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 8, 32, 32), mode="video").shape == (1, 512)


def test_unknown_mode_and_init_are_rejected(golden_models):
    with pytest.raises(ValueError, match="mode"):
        golden_models["std"](None, None, mode="audio")
    with pytest.raises(ValueError, match="init"):
        S3D(init="zeros")


def test_odd_sizes_are_rejected_by_the_space_to_depth_stem(golden_models):
    with pytest.raises(ValueError, match="even"):
        golden_models["s2d"](torch.rand(1, 3, 7, 64, 64), mode="video")
    for num_frames, size in ((7, 64), (8, 63)):
        with pytest.raises(ValueError, match="even"):
            golden_models["s2d"].check_clip(num_frames, size)
    golden_models["s2d"].check_clip(8, 64)
    golden_models["std"].check_clip(7, 63)


@pytest.mark.parametrize("case", golden_json("misc")["text"]["cases"], ids=str)
def test_tokenizer_matches_the_golden_ids(case):
    tokenizer = Tokenizer(golden_json("misc")["text"]["vocab"], case["max_words"])
    assert tokenizer(case["sentence"]).tolist() == case["ids"]


def test_a_word_that_is_in_the_vocabulary_with_its_capitals_keeps_them():
    tokenizer = Tokenizer(np.array(["Turkey", "turkey", "cut", "McIntosh", "i"]), 6)
    assert tokenizer("Cut Turkey, turkey, TURKEY, McIntosh").tolist() == [3, 1, 2, 2, 4, 0]
    assert tokenizer("mcintosh \u0130").tolist() == [5, 0, 0, 0, 0, 0]  # a dotted capital I
    assert s3dg.tokenize("Cut TURKEY", {"TURKEY"}) == ["cut", "TURKEY"]


def test_tokenizer_lower_cases_and_treats_none_and_null_as_words():
    tokenizer = Tokenizer(np.array(["none", "null", "cut"]), 4)
    assert tokenizer("CUT None, null").tolist() == [3, 1, 2, 0]
    assert tokenizer(float("nan")).tolist() == [0, 0, 0, 0]
    assert tokenizer("").dtype == torch.long


def test_raw_text_equals_its_token_ids(tmp_path):
    np.save(tmp_path / "dict.npy", np.array(["cut", "the", "tomato"]))
    torch.save(torch.randn(4, 300), tmp_path / "word2vec.pth")
    model = S3D(word2vec_path=tmp_path / "word2vec.pth", token_to_word_path=tmp_path / "dict.npy")
    tokens = torch.tensor([[1, 2, 3] + [0] * 13])
    expected = model(None, tokens, "text")
    assert torch.equal(model.text_module(["Cut the tomato!"], raw_text=True), expected)
    for text in ("Cut the tomato!", ["Cut the tomato!"], tokens):
        assert torch.equal(model.encode_text(text), expected)


def test_raw_text_without_a_vocabulary_names_the_missing_file(tmp_path):
    model = S3D(token_to_word_path=tmp_path / "absent.npy")
    with pytest.raises(FileNotFoundError, match=r"absent\.npy"):
        model.text_module(["cut"], raw_text=True)


def test_raw_text_with_a_vocabulary_that_does_not_fit_is_rejected(tmp_path):
    np.save(tmp_path / "dict.npy", np.array(["cut"]))
    model = S3D(token_to_word_path=tmp_path / "dict.npy")
    with pytest.raises(ValueError, match="66250 rows"):
        model.text_module(["cut"], raw_text=True)


@pytest.mark.parametrize("content", [np.array(["a", 1], dtype=object), np.arange(3)])
def test_a_vocabulary_that_is_pickled_or_has_no_strings_is_rejected(tmp_path, content):
    np.save(tmp_path / "dict.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match="not a vocabulary"):
        s3dg.load_words(tmp_path / "dict.npy")


def test_the_file_works_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "s3dg.py").write_text(Path(s3dg.__file__).read_text())
    code = (
        "import sys, torch; from s3dg import S3D; m = S3D(space_to_depth=True).eval();"
        "print(tuple(m(torch.rand(1, 3, 8, 64, 64), torch.zeros(2, 20).long())[1].shape));"
        "assert not {'pandas', 'av', 'args', 'utils'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "(2, 512)"


# --- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A model with a short word table, so that its files are small."""
    model = S3D(num_classes=16)
    model.text_module.word_embd = torch.nn.Embedding.from_pretrained(torch.randn(5, 300))
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bare", [False, True])
def test_weights_load_with_or_without_prefix_and_wrapping(tmp_path, small, prefix, bare):
    state = {prefix + name: value for name, value in small.state_dict().items()}
    torch.save(state if bare else {"epoch": 1, "state_dict": state}, tmp_path / "weights.pth")
    model = s3dg.load_model(tmp_path / "weights.pth")
    assert not model.training and model.num_classes == 16
    for name, value in small.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("stem", ["standard", "space_to_depth"])
def test_a_file_with_the_released_keys_and_shapes_loads_with_its_stem(tmp_path, stem):
    keys = golden_json("state_dict")["state_dict"][stem]
    torch.save({name: torch.zeros(shape) for name, shape in keys}, tmp_path / "s3d.pth")
    model = s3dg.load_model(tmp_path / "s3d.pth")
    assert model.space_to_depth == (stem == "space_to_depth")


def test_keys_and_shapes_that_differ_are_named(tmp_path, small):
    state = dict(small.state_dict())
    state["fc.bias"] = torch.zeros(7)
    state["extra.weight"] = state.pop("conv_2b.conv1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError) as refused:
        s3dg.load_model(tmp_path / "weights.pth")
    message = str(refused.value)
    for part in ("weights.pth", "conv_2b.conv1.weight", "extra.weight", "fc.bias is [7], not [16]"):
        assert part in message


@pytest.mark.parametrize(
    "damage", ["absent", "text", "more text", "empty", "truncated", "pickle", "list", "other model"]
)
def test_a_file_that_is_not_a_checkpoint_is_an_error_that_names_it(tmp_path, small, damage, capsys):
    path = tmp_path / "weights.pth"
    if damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "more text":
        path.write_text("Kitchen weights, not a checkpoint")
    elif damage == "empty":
        path.touch()
    elif damage == "truncated":
        torch.save(small.state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "other model":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    error = FileNotFoundError if damage == "absent" else ValueError
    with pytest.raises(error, match=r"weights\.pth") as refused:
        s3dg.load_model(path)
    assert "\n" not in str(refused.value)
    assert "must not run" not in capsys.readouterr().out


def test_safetensors_load_like_torch_save(tmp_path, small):
    save_file(small.state_dict(), tmp_path / "weights.safetensors")
    model = s3dg.load_model(tmp_path / "weights.safetensors")
    for name, value in small.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    (tmp_path / "weights.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        s3dg.load_model(tmp_path / "weights.safetensors")


def test_safetensors_without_the_package_is_an_error_that_names_it(tmp_path, small, monkeypatch):
    save_file(small.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"weights\.safetensors needs the package safetensors"):
        s3dg.load_model(tmp_path / "weights.safetensors")


# --- the weights of torchvision's S3D ------------------------------------------------------------


def torchvision_model():
    """Return torchvision's S3D, or None if torchvision does not load, as with another torch."""
    try:
        from torchvision.models.video import s3d
    except (ImportError, RuntimeError):
        return None
    return s3d()


def kinetics_state():
    """Make random weights with the names and shapes of torchvision's S3D.

    torchvision_s3d.json lists these in order. It was made with torchvision 0.29.1, by loading its
    models/video/s3d.py and ops/misc.py alone, with stubs for their imports, as
    [[name, list(value.shape)] for name, value in s3d().state_dict().items()].
    """
    generator, state = torch.Generator().manual_seed(1), {}
    for name, shape in golden_json("torchvision_s3d"):
        value = torch.rand(shape, generator=generator) + 0.5
        if len(shape) == 5:
            value = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        state[name] = value.long() if not shape else value
    return state


def test_every_weight_of_torchvision_is_loaded_to_its_place(tmp_path):
    state = kinetics_state()
    torch.save(state, tmp_path / "s3d.pth")
    model = s3dg.load_model(tmp_path / "s3d.pth", num_classes=16)
    assert model.torchvision and model.num_classes == 16 and not model.training
    own = {name: value for name, value in model.state_dict().items() if "gating" not in name}
    own = {n: v for n, v in own.items() if not n.startswith(("fc.", "text_module."))}
    theirs = {name: value for name, value in state.items() if not name.startswith("classifier")}
    assert len(own) == len(theirs)
    # Both models register their layers in the order of use, so their weights are in one order.
    for (name, value), other in zip(own.items(), theirs.values(), strict=True):
        assert torch.equal(value, other), name
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm3d)} == {1e-3}
    gates = [m for m in model.modules() if isinstance(m, s3dg.SelfGating)]
    assert len(gates) == 37
    x = torch.rand(1, 192, 2, 3, 3)
    torch.testing.assert_close(model.gating(x), x, rtol=1e-4, atol=0)

    torch.save({"state_dict": model.state_dict()}, tmp_path / "epoch0001.pth.tar")
    again, video = s3dg.load_model(tmp_path / "epoch0001.pth.tar"), torch.rand(1, 3, 14, 48, 48)
    with torch.inference_mode():
        assert torch.equal(again.encode_video(video), model.encode_video(video))


def test_torchvisions_weights_take_the_given_word_vectors(tmp_path):
    torch.save(kinetics_state(), tmp_path / "s3d.pth")
    vectors = torch.randn(8, 300)
    torch.save(vectors, tmp_path / "word2vec.pth")
    model = s3dg.load_model(tmp_path / "s3d.pth", word2vec_path=tmp_path / "word2vec.pth")
    assert torch.equal(model.text_module.word_embd.weight, vectors)


def test_incomplete_weights_of_torchvision_are_rejected(tmp_path):
    state = kinetics_state()
    del state["features.5.branch1.1.0.0.weight"]
    torch.save(state, tmp_path / "s3d.pth")
    with pytest.raises(ValueError, match=r"s3d\.pth .*lacks mixed_3b\.conv_b1_b\.conv1\.weight"):
        s3dg.load_model(tmp_path / "s3d.pth")


def test_torchvisions_weights_give_torchvisions_features(tmp_path):
    theirs = torchvision_model()
    if theirs is None:
        pytest.skip("torchvision does not load here; its names and shapes are tested above")
    state = theirs.state_dict()
    assert [[name, list(v.shape)] for name, v in state.items()] == golden_json("torchvision_s3d")
    theirs.load_state_dict(kinetics_state())
    torch.save(theirs.state_dict(), tmp_path / "s3d.pth")
    model, video = s3dg.load_model(tmp_path / "s3d.pth"), torch.rand(1, 3, 14, 64, 64)
    normalized = (video - model.mean) / model.std
    with torch.inference_mode():
        features = theirs.eval().features(normalized).mean((2, 3, 4))
        gated = model.forward_video(video, mixed5c=True)
        ungated = S3D(gating=False, torchvision=True).eval()
        ungated.load_state_dict(model.state_dict(), strict=False)
        assert relative_difference(ungated.forward_video(video, mixed5c=True), features) < 1e-4
    assert relative_difference(gated, features) < 0.02


# --- the same maths, faster or in less memory -----------------------------------------------------


@functools.cache
def float32_state(stem):
    """Make weights whose BatchNorm statistics fit the activations, like those of a trained model.

    With the golden weights, values reach several hundred and saturate the gates, which amplifies
    rounding errors.
    """
    torch.manual_seed(0)
    model = S3D(space_to_depth=STEMS[stem], init="kaiming_normal")
    with torch.no_grad():
        for _ in range(5):
            model.forward_video(torch.rand(4, 3, 16, 64, 64))
    return model.state_dict()


def float32_model(stem):
    model = S3D(space_to_depth=STEMS[stem])
    model.load_state_dict(float32_state(stem))
    return model.eval()


def relative_difference(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("mixed5c", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("stem", STEMS)
def test_an_inference_copy_gives_the_models_embeddings(stem, layout, mixed5c):
    model, video = float32_model(stem).to(memory_format=layout), torch.rand(2, 3, 16, 64, 64)
    with torch.inference_mode():
        expected = model.forward_video(video, mixed5c)
        folded = s3dg.fuse_for_inference(model).forward_video(video, mixed5c)
        short = s3dg.fuse_for_inference(model, torch.bfloat16).forward_video(video, mixed5c)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model.forward_video(video, mixed5c)
    assert relative_difference(folded, expected) < 1e-5
    assert torch.equal(short, autocast) and short.dtype == torch.float32
    assert 0 < relative_difference(short, expected) < 0.02  # of bfloat16: 8 bits


def test_an_inference_copy_has_the_models_own_type_by_default():
    model, video = float32_model("std").double(), torch.rand(1, 3, 4, 32, 32).double()
    with torch.inference_mode():
        value, expected = (
            s3dg.fuse_for_inference(model)(video, mode="video"),
            model(video, mode="video"),
        )
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_an_inference_copy_leaves_the_model_as_it_is_and_shares_its_word_vectors():
    model = float32_model("std").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        fast = s3dg.fuse_for_inference(model, dtype)
        assert not fast.training and model.training
        own, shared = model.text_module.word_embd.weight, fast.text_module.word_embd.weight
        assert shared.data_ptr() == own.data_ptr()
        assert torch.equal(fast.text_module(golden_tokens()), model.text_module(golden_tokens()))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_become_the_values_that_autocast_rounds_from_float32(dtype, layout):
    video = torch.arange(256, dtype=torch.uint8).expand(3, 256).reshape(1, 3, 4, 8, 8)
    clips = s3dg.to_unit_range(video, dtype, layout)
    assert clips.dtype == dtype and clips.is_contiguous(memory_format=layout)
    assert torch.equal(clips, (video.float() / 255).to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("stem", STEMS)
def test_clips_in_the_type_and_layout_of_autocast_embed_the_same(stem, layout):
    model = float32_model(stem).to(memory_format=layout)
    assert s3dg.input_format(model) == (torch.float32, layout)
    video = torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.forward_video(s3dg.to_unit_range(video))
        value = model.forward_video(s3dg.to_unit_range(video, torch.bfloat16, layout))
    assert torch.equal(value, expected)
    fast = s3dg.fuse_for_inference(model, torch.bfloat16)
    assert s3dg.input_format(fast) == (torch.bfloat16, layout)


@pytest.mark.parametrize("size", [(4, 8, 8), (5, 9, 7), (2, 25, 50)])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (2, 2, 2)])
def test_pooling_pads_with_zeros_as_tensorflow_does(kernel, size):
    stride = tuple(min(k, 2) for k in kernel)
    x = torch.rand(1, 2, *size).sub(0.7).relu_()
    total = [k - s for k, s in zip(kernel, stride, strict=True)]
    padding = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    expected = torch.nn.functional.pad(x, padding)
    expected = torch.nn.functional.max_pool3d(expected, kernel, stride, ceil_mode=True)
    assert torch.equal(s3dg.MaxPool3dTFPadding(kernel, stride)(x), expected)


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_temporal_convolution_equals_the_3d_one(frames, dtype):
    """So do its gradients: see TemporalConv3d for those of the 3-d one at two frames."""
    torch.manual_seed(0)
    conv = s3dg.TemporalConv3d(32, 32, (3, 1, 1), padding=(1, 0, 0), bias=False)
    x = torch.randn(2, 32, frames, 4, 4).to(dtype).double().requires_grad_()
    weight = conv.weight.detach().to(dtype).double().requires_grad_()
    expected = torch.nn.functional.conv3d(x, weight, padding=(1, 0, 0))
    wanted = torch.autograd.grad(expected.sum(), (x, weight))
    conv, own = conv.to(dtype), x.detach().to(dtype).requires_grad_()
    value = conv(own)
    found = torch.autograd.grad(value.sum(), (own, conv.weight))
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for one, other in zip((value, *found), (expected, *wanted), strict=True):
        assert one.shape == other.shape and relative_difference(one, other) < tolerance


# --- tracing and export ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (2, 2, 2)])
def test_a_traced_or_exported_pool_is_right_at_other_sizes(kernel):
    pool = s3dg.MaxPool3dTFPadding(kernel, tuple(min(k, 2) for k in kernel))
    x = torch.rand(1, 2, 4, 8, 8)
    axes = {axis: torch.export.Dim.DYNAMIC for axis in (2, 3, 4)}
    traced = torch.jit.trace(pool, x)
    exported = torch.export.export(pool, (x,), dynamic_shapes=(axes,)).module()
    for size in ((4, 8, 8), (5, 9, 7), (3, 25, 50), (3, 6, 11)):
        x = torch.rand(1, 2, *size).sub(0.7).relu_()
        assert torch.equal(traced(x), pool(x)) and torch.equal(exported(x), pool(x))


class VideoTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, video):
        return self.model.encode_video(video)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_is_right_at_other_sizes_and_needs_no_vocabulary():
    model = float32_model("s2d")
    model.text_module.token_to_word_path = "absent.npy"
    with torch.no_grad():
        traced = torch.jit.trace(VideoTower(model), torch.rand(1, 3, 4, 32, 32))
        for shape in ((2, 3, 4, 32, 32), (1, 3, 6, 50, 38)):
            video = torch.rand(shape)
            assert relative_difference(traced(video), model.encode_video(video)) < 1e-6
        with pytest.raises(RuntimeError):
            traced(torch.rand(1, 3, 6, 33, 32))  # odd


@pytest.mark.slow
@pytest.mark.parametrize("stem", [*STEMS, "torchvision"])
def test_an_exported_model_is_right_at_other_sizes_and_rejects_the_rest(stem):
    model = S3D(torchvision=True).eval() if stem == "torchvision" else float32_model(stem)
    video, axes = torch.rand(2, 3, 16, 64, 64), model.clip_dims()
    exported = torch.export.export(VideoTower(model), (video,), dynamic_shapes=(axes,)).module()
    with torch.no_grad():
        for shape in ((2, 3, 16, 64, 64), (1, 3, 14, 50, 70)):
            video = torch.rand(shape)
            assert relative_difference(exported(video), model.encode_video(video)) < 1e-6
        rejected = [(1, 3, 8, 64, 64), (1, 3, 16, 64, 32)]
        rejected += [(1, 3, 15, 64, 64), (1, 3, 16, 65, 64)] * (stem == "s2d")
        for shape in rejected:
            with pytest.raises(AssertionError, match="Guard failed"):
                exported(torch.rand(shape))


# --- two dimensions, and gradient checkpointing ---------------------------------------------------


LAYERS = {
    "1x1x1": nn.Conv3d(8, 12, 1),
    "1xkxk": nn.Conv3d(8, 12, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
    "BatchNorm": nn.BatchNorm3d(8),
    "pool of a block": nn.MaxPool3d(3, stride=1, padding=1),
    "pool of space": nn.MaxPool3d((1, 3, 3), (1, 2, 2), ceil_mode=True),
    "pool 4a": nn.MaxPool3d((3, 3, 3), (2, 2, 2), ceil_mode=True),
    "pool 5a": nn.MaxPool3d((2, 2, 2), (2, 2, 2), ceil_mode=True),
}


def outputs_and_gradients(layer, x):
    own = x.clone().requires_grad_()
    output = layer(own)
    weights = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), [own, *layer.parameters()])]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_layer_computed_in_2d_equals_the_3d_layer(name, layout):
    layer = copy.deepcopy(LAYERS[name]).double().train()
    flat = s3dg.compute_in_2d(copy.deepcopy(layer))
    assert type(flat) is not type(layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 4, 9, 9, generator=generator, dtype=torch.float64)
    x = x.relu().to(memory_format=layout)  # many zeros, like activations: ties in the pools
    three, two = outputs_and_gradients(layer, x), outputs_and_gradients(flat, x)
    for found, expected in zip(two, three, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert "pool" not in name or torch.equal(two[0], three[0])
    for found, expected in zip(flat.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_frames_are_a_view_of_clips_with_the_channels_innermost():
    x = torch.randn(2, 8, 4, 5, 5).to(memory_format=torch.channels_last_3d)
    frames = s3dg.frames_of(x)
    assert frames.data_ptr() == x.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(s3dg.clips_of(frames, 2), x)


@pytest.mark.parametrize(
    ("stem", "train"),
    [
        ("std", False),
        ("s2d", False),
        ("std", True),
        pytest.param("s2d", True, marks=pytest.mark.slow),
    ],
)
def test_a_network_computed_in_2d_equals_the_3d_network(stem, train):
    """Clips are larger in training mode: BatchNorm of few values would amplify rounding errors."""
    video, found = torch.rand(*((4, 3, 8, 64, 64) if train else (2, 3, 4, 32, 32))).double(), []
    for flat in (False, True):
        model = float32_model(stem).double().to(memory_format=torch.channels_last_3d).train(train)
        if flat:
            assert s3dg.compute_in_2d(model) is model
            kinds = nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d
            assert [m for m in model.modules() if type(m) in kinds] == [model.conv1.conv1]
            assert model.state_dict().keys() == float32_state(stem).keys()
        embedding = model.forward_video(video.to(memory_format=torch.channels_last_3d))
        embedding.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((embedding, torch.cat(gradients), list(model.buffers())))
    (embedding, gradient, buffers), (own_embedding, own_gradient, own_buffers) = found
    assert relative_difference(own_embedding, embedding) < 1e-12
    assert relative_difference(own_gradient, gradient) < 1e-10
    for own, other in zip(own_buffers, buffers, strict=True):
        assert torch.equal(own, other) or relative_difference(own, other) < 1e-12


def test_an_inference_copy_of_a_model_computed_in_2d_gives_its_embeddings():
    model, video = s3dg.compute_in_2d(float32_model("std")), torch.rand(1, 3, 4, 32, 32)
    with torch.inference_mode():
        expected = model.forward_video(video)
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            value = s3dg.fuse_for_inference(model, dtype).forward_video(video)
            assert relative_difference(value, expected) < limit


@pytest.mark.parametrize("flat", [False, True])
def test_grad_checkpoint_changes_neither_gradients_nor_running_averages(flat):
    video, models = torch.rand(2, 3, 4, 32, 32), []
    for checkpointed in (False, True):
        model = float32_model("std").train()
        if flat:
            s3dg.compute_in_2d(model)
        model.grad_checkpoint = checkpointed
        calls = []
        model.mixed_4d.conv_b0.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.forward_video(video).square().sum().backward()
        assert len(calls) == 1 + checkpointed
        models.append(model)
    plain, checkpointed = models
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(one, other), name
    assert checkpointed.conv1.bn1.momentum == 0.1


@pytest.mark.slow
def test_the_model_compiles_as_one_graph():
    """Uses only the compiler's front end: --compile needs a C++ compiler and takes minutes."""
    model = float32_model("std").train()
    video, tokens = torch.rand(2, 3, 4, 32, 32), golden_tokens()
    expected = model(video, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for value, other in zip(compiled(video, tokens), expected, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(3, 4, 32, 32), r"\[B, 3, T, H, W\], not \[3, 4, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32, 3), "not .1, 4, 32, 32, 3"),
        (torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8), "not torch.uint8; convert it"),
        (torch.full((1, 3, 4, 32, 32), 255.0), "to 255; divide bytes by 255"),
        (torch.full((1, 3, 4, 32, 32), torch.nan), "from nan to nan"),
        (None, "mode 'video' needs video"),
    ],
)
def test_invalid_video_is_an_error_that_names_the_fault(video, message):
    with pytest.raises(ValueError, match=message):
        S3D(word2vec_path="").eval()(video, mode="video")


def test_a_missing_text_is_named():
    with pytest.raises(ValueError, match="mode 'all' needs text"):
        S3D()(torch.zeros(1, 3, 4, 32, 32))
