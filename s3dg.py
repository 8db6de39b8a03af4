"""S3D-G, the text-video model of MIL-NCE (Miech et al., CVPR 2020), in one file.

Needs torch and numpy only: copy this file anywhere, or `from s3dg import S3D`. The video network is
the gated separable Inception of Xie et al. (arXiv 1712.04851); the text network is a max over word
features. Both map to the same 512-d space, where a dot product scores a video against a sentence.
Attribute names give the keys of the public checkpoints, so weights interchange both ways.
"""

import contextlib
import copy
import os
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.export
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

VOCABULARY_ROWS = 66250  # of the released vocabulary, plus row 0 for padding
WORD_DIM = 300
HIDDEN_DIM = 2048
WORD = re.compile(r"[\w']+")
VALUE_RANGE = -1, 2  # accepted values of video: [0, 1], with room for filters that overshoot
RAW_TEXT_WORDS = 16  # words kept of a raw sentence given to the model
KINETICS_MEAN = 0.43216, 0.394666, 0.37645  # of RGB, as torchvision normalizes it
KINETICS_STD = 0.22803, 0.22145, 0.216989
OPEN_GATE = 10.0  # a gate's bias: sigmoid(10) is 0.99995


# --- text ---------------------------------------------------------------------------------------


def tokenize(sentence: str, vocabulary: Container[str] = ()) -> list[str]:
    r"""Split a sentence into its words, the matches of [\w']+, and lower-case them.

    A word that is in the vocabulary as it is written keeps its capitals.
    """
    tokens = []
    for word in WORD.findall(sentence):
        # Lower-casing can split a word: a dotted capital I becomes an i and a combining dot.
        tokens += [word] if word in vocabulary else WORD.findall(word.lower())
    return tokens


class Tokenizer:
    """Convert a sentence to word indices: a LongTensor [max_words], padded with zeros.

    words: the vocabulary, in the order of the embedding's rows. Word i has index i + 1; 0 pads.
    Words outside the vocabulary are dropped before the sentence is cut to max_words. Anything but a
    string (None, NaN) is a missing caption and counts as an empty sentence.
    """

    def __init__(self, words: Iterable[str], max_words: int):
        self.index = {str(word): i + 1 for i, word in enumerate(words)}
        self.max_words = max_words

    def __call__(self, sentence: str | float | None) -> torch.Tensor:
        tokens = tokenize(sentence, self.index) if isinstance(sentence, str) else []
        ids = [self.index[word] for word in tokens if word in self.index][: self.max_words]
        return torch.tensor(ids + [0] * (self.max_words - len(ids)), dtype=torch.long)


def load_words(path: str | os.PathLike) -> np.ndarray:
    """Read a vocabulary: a one-dimensional numpy array of unicode strings, never pickled.

    Raises FileNotFoundError, or ValueError of one line if the file holds something else.
    """
    words = read_data(path, lambda path: np.load(path, allow_pickle=False), "a vocabulary")
    if not isinstance(words, np.ndarray) or words.ndim != 1 or words.dtype.kind != "U":
        raise ValueError(f"{path} is not a vocabulary; give a one-dimensional array of strings")
    return words


def check_vocabulary(words: Sequence[str], rows: int, path: str | os.PathLike) -> None:
    """Raise ValueError unless the word embedding has a row for padding and one per word.

    rows: the number of its rows. path: the vocabulary's file, for the message.
    """
    if len(words) + 1 != rows:
        raise ValueError(
            f"{path} has {len(words)} words, but the word embedding has {rows} rows, one per word "
            "and one for padding; give the vocabulary made with these vectors"
        )


def load_word_vectors(path: str | os.PathLike) -> torch.Tensor:
    """Read word vectors: float32 [words + 1, 300], with the padding in row 0.

    Raises FileNotFoundError, or ValueError of one line if the file holds something else.
    """
    vectors = read_data(path, load_tensors, "word vectors")
    if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2 or vectors.shape[1] != WORD_DIM:
        raise ValueError(f"{path} has no word vectors; give a tensor [words + 1, {WORD_DIM}]")
    return vectors.detach().float()


def read_data(path: str | os.PathLike, load: Callable, kind: str) -> Any:
    """Return load(path). Raises ValueError of one line if it is invalid or lacks a package."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; give the path of {kind}")
    try:
        return load(path)
    except (OSError, MemoryError):  # the file may be intact
        raise
    except ImportError as error:
        raise ValueError(f"{path} needs the package {error.name}; install it") from None
    except Exception as error:  # np.load and torch.load raise many exception types on invalid files
        raise ValueError(
            f"{path} is damaged or is not {kind} ({type(error).__name__}); give another file"
        ) from None


def load_tensors(path: str | os.PathLike) -> Any:
    """Read a file of torch.save, or .safetensors, to the CPU, without running pickled code."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file  # an extra

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# --- layers -------------------------------------------------------------------------------------


def triple(value: int | Sequence[int]) -> tuple[int, ...]:
    """Repeat one size for T, H and W, or return three of them as they are."""
    return (value,) * 3 if isinstance(value, int) else tuple(value)


class TemporalConv3d(nn.Conv3d):
    """A kx1x1 convolution, computed as the equivalent 2-d one over T and H*W.

    oneDNN's 3-d convolution (torch 2.13, CPU) fills the gradient of bfloat16 weights with unrelated
    memory if T is 2, as it is in the last blocks of a 16-frame clip.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, (stride, _, _), (padding, _, _) = x.shape[3:], self.stride, self.padding
        kernel = self.weight.flatten(3)
        net = F.conv2d(x.flatten(3), kernel, self.bias, (stride, 1), (padding, 0))
        return net.unflatten(3, size)


class FrameConv3d(nn.Conv3d):
    """A 1xkxk convolution, computed as the equivalent 2-d one on frames."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (_, *stride), (_, *padding) = self.stride, self.padding
        frames = F.conv2d(frames_of(x), self.weight.squeeze(2), self.bias, stride, padding)
        return clips_of(frames, x.shape[0])


class FrameBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm, computed as the equivalent 2-d one on frames."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return clips_of(super().forward(frames_of(x)), x.shape[0])


class FrameMaxPool3d(nn.MaxPool3d):
    """A max-pool, computed as a 2-d one on frames and then, if needed, a 2-d one over time.

    Gradients are also the same: both go to the first of the largest values.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride, padding = map(triple, (self.kernel_size, self.stride, self.padding))
        options = {"ceil_mode": self.ceil_mode}
        frames = F.max_pool2d(frames_of(x), kernel[1:], stride[1:], padding[1:], **options)
        x = clips_of(frames, x.shape[0])
        if kernel[0] == 1:
            return x
        over_time = (kernel[0], 1), (stride[0], 1), (padding[0], 0)
        return F.max_pool2d(x.flatten(3), *over_time, **options).unflatten(3, x.shape[3:])


def frames_of(clips: torch.Tensor) -> torch.Tensor:
    """Reshape [B, C, T, H, W] to [B*T, C, H, W], a view if the channels are innermost."""
    return clips.transpose(1, 2).flatten(0, 1)


def clips_of(frames: torch.Tensor, clips: int) -> torch.Tensor:
    """Undo frames_of for a number of clips: [B*T, C, H, W] to [B, C, T, H, W], as a view."""
    return frames.unflatten(0, (clips, -1)).transpose(1, 2)


def compute_in_2d(model: nn.Module) -> nn.Module:
    """Make a model compute all layers but the first convolution in two dimensions; return it.

    Weights and keys stay the same, and outputs differ only by rounding. Meant for a GPU and the
    channels-last layout, where 2-d kernels may be faster.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = FrameBatchNorm3d
        elif type(module) is nn.MaxPool3d:
            module.__class__ = FrameMaxPool3d
        elif type(module) is nn.Conv3d and module.kernel_size[0] == module.stride[0] == 1:
            module.__class__ = FrameConv3d
    return model


class STConv3D(nn.Module):
    """Convolution, BatchNorm, ReLU; `separable` splits it into 1xkxk and then kx1x1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        separable: bool = False,
    ):
        super().__init__()
        (kt, kh, kw), (st, sh, sw), (pt, ph, pw) = map(triple, (kernel, stride, padding))
        self.separable = separable
        if separable:
            space = {"kernel_size": (1, kh, kw), "stride": (1, sh, sw), "padding": (0, ph, pw)}
            time = {"kernel_size": (kt, 1, 1), "stride": (st, 1, 1), "padding": (pt, 0, 0)}
            self.conv1 = nn.Conv3d(in_channels, out_channels, bias=False, **space)
            self.bn1 = nn.BatchNorm3d(out_channels)
            self.conv2 = TemporalConv3d(out_channels, out_channels, bias=False, **time)
            self.bn2 = nn.BatchNorm3d(out_channels)
        else:
            self.conv1 = nn.Conv3d(
                in_channels, out_channels, (kt, kh, kw), (st, sh, sw), (pt, ph, pw), bias=False
            )
            self.bn1 = nn.BatchNorm3d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # If the ReLU changed a view in place, autograd would copy the gradient of its base.
        inplace = not isinstance(self.bn1, FrameBatchNorm3d)
        x = F.relu(self.bn1(self.conv1(x)), inplace=inplace)
        if self.separable:
            x = F.relu(self.bn2(self.conv2(x)), inplace=inplace)
        return x


class SelfGating(nn.Module):
    """Scale each channel by a sigmoid of the clip's mean features (S3D-G)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.sigmoid(self.fc(x.mean(dim=(2, 3, 4))))
        return x * weights[:, :, None, None, None]


def is_recorded() -> bool:
    """Check whether torch.jit.trace or torch.export (also for ONNX) is recording the model."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


class MaxPool3dTFPadding(nn.Module):
    """Max-pool of non-negative values, padded with zeros as TensorFlow's 'SAME' does.

    The padding is (kernel - stride), the smaller half first.
    """

    def __init__(self, kernel: Sequence[int], stride: Sequence[int]):
        super().__init__()
        sides = [
            (total // 2, total - total // 2)
            for total in (max(k - s, 0) for k, s in zip(kernel, stride, strict=True))
        ]
        self.padding = [side for pair in reversed(sides) for side in pair]  # F.pad: last axis first
        self.kernel, self.stride = kernel, stride
        self.pool = nn.MaxPool3d(kernel, stride, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_recorded():
            # Without ceil_mode, and without a branch, the graph is right for all sizes.
            rest = [side for s in reversed(self.stride) for side in (0, s - 1)]
            padding = [a + b for a, b in zip(self.padding, rest, strict=True)]
            return F.max_pool3d(F.pad(x, padding), self.kernel, self.stride)
        in_front = any(self.padding[::2])
        if in_front or any(
            size % step for size, step in zip(x.shape[2:], self.stride, strict=True)
        ):
            return self.pool(F.pad(x, self.padding))
        # ceil_mode covers the padding, whose zeros never exceed the values.
        return self.pool(x)


class InceptionBlock(nn.Module):
    """Four branches, each gated, concatenated: 1x1x1; two 1x1x1 + separable 3x3x3; pool + 1x1x1."""

    def __init__(
        self,
        in_channels: int,
        b0: int,
        b1_a: int,
        b1_b: int,
        b2_a: int,
        b2_b: int,
        b3: int,
        gating: bool = True,
    ):
        super().__init__()
        self.conv_b0 = STConv3D(in_channels, b0, 1)
        self.conv_b1_a = STConv3D(in_channels, b1_a, 1)
        self.conv_b1_b = STConv3D(b1_a, b1_b, 3, padding=1, separable=True)
        self.conv_b2_a = STConv3D(in_channels, b2_a, 1)
        self.conv_b2_b = STConv3D(b2_a, b2_b, 3, padding=1, separable=True)
        self.maxpool_b3 = nn.MaxPool3d(3, stride=1, padding=1)
        self.conv_b3_b = STConv3D(in_channels, b3, 1)
        self.gating = gating
        if gating:
            self.gating_b0 = SelfGating(b0)
            self.gating_b1 = SelfGating(b1_b)
            self.gating_b2 = SelfGating(b2_b)
            self.gating_b3 = SelfGating(b3)
        self.output_channels = b0 + b1_b + b2_b + b3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b0 = self.conv_b0(x)
        b1 = self.conv_b1_b(self.conv_b1_a(x))
        b2 = self.conv_b2_b(self.conv_b2_a(x))
        b3 = self.conv_b3_b(self.maxpool_b3(x))
        if self.gating:
            b0, b1 = self.gating_b0(b0), self.gating_b1(b1)
            b2, b3 = self.gating_b2(b2), self.gating_b3(b3)
        return torch.cat((b0, b1, b2, b3), dim=1)


class SentenceEmbedding(nn.Module):
    """The text network: frozen word vectors, a hidden layer, a max over the words, a projection."""

    def __init__(
        self,
        dim: int,
        word2vec_path: str | os.PathLike = "",
        token_to_word_path: str | os.PathLike = "data/dict.npy",
    ):
        super().__init__()
        self.token_to_word_path = token_to_word_path
        self.tokenizer: Tokenizer | None = None  # see load_tokenizer
        if word2vec_path:
            table = load_word_vectors(word2vec_path)
        else:
            table = torch.randn(VOCABULARY_ROWS, WORD_DIM)
        self.word_embd = nn.Embedding.from_pretrained(table, freeze=True)
        self.fc1 = nn.Linear(WORD_DIM, HIDDEN_DIM)
        self.fc2 = nn.Linear(HIDDEN_DIM, dim)

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of raw text. The vocabulary is read at first use.

        Raises FileNotFoundError, or ValueError if the vocabulary does not fit the word embedding.
        """
        if self.tokenizer is None:
            words = load_words(self.token_to_word_path)
            check_vocabulary(words, self.word_embd.num_embeddings, self.token_to_word_path)
            self.tokenizer = Tokenizer(words, RAW_TEXT_WORDS)
        return self.tokenizer

    def forward(
        self, x: torch.Tensor | str | Sequence[str], raw_text: bool = False
    ) -> torch.Tensor:
        """Embed word indices [N, words] or, with raw_text, N sentences: [N, dim]."""
        if raw_text:
            tokenizer = self.load_tokenizer()
            sentences = [x] if isinstance(x, str) else x
            x = torch.stack([tokenizer(sentence) for sentence in sentences])
            x = x.to(self.word_embd.weight.device)
        words = F.relu(self.fc1(self.word_embd(x)), inplace=True)
        words = words.amax(dim=1)  # over the padding, too, as in the release
        return in_full_precision(self.fc2, words)


def in_full_precision(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer in the type of its weights, even if autocast would use a narrower one."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast computes on a device, or None if it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def to_unit_range(
    video: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """Convert uint8 clips [.., 3, T, H, W] to the model's input, in [0, 1].

    dtype, memory_format: of the result, see input_format. In bfloat16 and float16 the values are
    those that autocast would round from float32, because bytes are exact in both and the division
    is in float32. Convert on the device, so that bytes are transferred, a quarter of the size.
    """
    return video.to(dtype, memory_format=memory_format, copy=True).div_(255)


def input_format(network: nn.Module) -> tuple[torch.dtype, torch.memory_format]:
    """Return dtype and memory format of the network's first 3-d convolution, for to_unit_range.

    Clips in this format need no further conversion. Without such a layer: float32, contiguous.
    """
    weight = next((p for p in network.parameters() if p.ndim == 5), torch.empty(0))
    innermost = weight.ndim == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d)
    return weight.dtype, torch.channels_last_3d if innermost else torch.contiguous_format


def check_video(video: torch.Tensor, *, check_range: bool) -> None:
    """Raise ValueError unless a batch of clips is valid input of the model.

    check_range: also check the values, for which the host waits for a GPU.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video must be [B, 3, T, H, W], not {list(video.shape)}; convert it")
    if not video.is_floating_point():
        raise ValueError(
            f"video must be float in [0, 1], not {video.dtype}; convert it with to_unit_range"
        )
    if is_recorded() or torch.compiler.is_compiling() or video.is_meta or not video.numel():
        return
    if check_range and not (video.is_cuda and torch.cuda.is_current_stream_capturing()):
        low, high = torch.stack(video.detach().aminmax()).tolist()
        if not (low >= VALUE_RANGE[0] and high <= VALUE_RANGE[1]):  # also if they are NaN
            raise ValueError(
                f"video must be RGB in [0, 1], but has values from {low:.3g} to {high:.3g}; divide "
                "bytes by 255, and do not subtract a mean"
            )


def space_to_depth(video: torch.Tensor) -> torch.Tensor:
    """Move 2x2x2 blocks to channels: [B, 3, T, H, W] -> [B, 24, T/2, H/2, W/2].

    Channel order: t-offset, h-offset, w-offset, colour. Raises ValueError if T, H or W is odd.
    """
    b, c, t, h, w = video.shape
    if t % 2 or h % 2 or w % 2:
        raise ValueError(f"the space_to_depth stem needs even T, H and W, not {t}x{h}x{w}")
    blocks = video.reshape(b, c, t // 2, 2, h // 2, 2, w // 2, 2)
    blocks = blocks.permute(0, 3, 5, 7, 1, 2, 4, 6)
    return blocks.reshape(b, 8 * c, t // 2, h // 2, w // 2)


# --- the model ----------------------------------------------------------------------------------


class S3D(nn.Module):
    """The joint text-video model.

    num_classes: size of the joint embedding.
    gating: self-gating after the stem and on every Inception branch (S3D-G).
    space_to_depth: use the stem of the public weights: 2x2x2 blocks become channels.
    word2vec_path: word vectors [words + 1, 300]. By default there are 66250 random ones.
    init: 'uniform' (PyTorch's defaults) or 'kaiming_normal' for the convolutions.
    token_to_word_path: the vocabulary, read only when raw text is given.
    torchvision: use the video network of torchvision's S3D, see load_model. It has a separable
    stem, symmetric padding in its pools, an epsilon of 0.001 in BatchNorm, and normalizes RGB by
    mean and deviation itself.

    If the attribute grad_checkpoint is set (it is False at first), the backward pass recomputes the
    activations within each stage, which saves memory and takes time. The attribute joint_space is
    False if only the video network is trained, see load_kinetics. Embeddings have the type of the
    weights, also under autocast.
    """

    def __init__(
        self,
        num_classes: int = 512,
        gating: bool = True,
        space_to_depth: bool = False,
        word2vec_path: str | os.PathLike = "",
        init: str = "uniform",
        token_to_word_path: str | os.PathLike = "data/dict.npy",
        torchvision: bool = False,
    ):
        super().__init__()
        if init not in ("uniform", "kaiming_normal"):
            raise ValueError(f"init must be 'uniform' or 'kaiming_normal', not {init!r}")
        self.num_classes = num_classes
        self.grad_checkpoint = False
        self.joint_space = True
        self.space_to_depth = space_to_depth
        self.torchvision = torchvision
        if torchvision:
            self.conv1 = STConv3D(3, 64, 7, 2, 3, separable=True)
            for name, values in (("mean", KINETICS_MEAN), ("std", KINETICS_STD)):
                self.register_buffer(
                    name, torch.tensor(values).view(1, 3, 1, 1, 1), persistent=False
                )
        elif space_to_depth:
            self.conv1 = STConv3D(24, 64, (2, 4, 4), 1, (1, 2, 2))
        else:
            self.conv1 = STConv3D(3, 64, (3, 7, 7), 2, (1, 3, 3))
        self.conv_2b = STConv3D(64, 64, 1)
        self.conv_2c = STConv3D(64, 192, 3, padding=1, separable=True)
        self.gating = SelfGating(192) if gating else nn.Identity()

        def max_pool(kernel, stride):
            if torchvision:
                return nn.MaxPool3d(kernel, stride, [(k - 1) // 2 for k in kernel])
            return MaxPool3dTFPadding(kernel, stride)

        self.maxpool_2a = max_pool((1, 3, 3), (1, 2, 2))
        self.maxpool_3a = max_pool((1, 3, 3), (1, 2, 2))

        def inception(in_channels, *branches):
            return InceptionBlock(in_channels, *branches, gating=gating)

        self.mixed_3b = inception(192, 64, 96, 128, 16, 32, 32)
        self.mixed_3c = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool_4a = max_pool((3, 3, 3), (2, 2, 2))
        self.mixed_4b = inception(480, 192, 96, 208, 16, 48, 64)
        self.mixed_4c = inception(512, 160, 112, 224, 24, 64, 64)
        self.mixed_4d = inception(512, 128, 128, 256, 24, 64, 64)
        self.mixed_4e = inception(512, 112, 144, 288, 32, 64, 64)
        self.mixed_4f = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool_5a = max_pool((2, 2, 2), (2, 2, 2))
        self.mixed_5b = inception(832, 256, 160, 320, 32, 128, 128)
        self.mixed_5c = inception(832, 384, 192, 384, 48, 128, 128)
        self.fc = nn.Linear(self.mixed_5c.output_channels, num_classes)
        self.text_module = SentenceEmbedding(num_classes, word2vec_path, token_to_word_path)
        for module in self.modules():
            if torchvision and isinstance(module, nn.BatchNorm3d):
                module.eps = 1e-3
        if init == "kaiming_normal":
            for module in self.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], path: str | os.PathLike) -> "S3D":
        """Build the model that a state dict belongs to, on the CPU, in training mode.

        Stem, gating, embedding size and vocabulary size follow from the keys and shapes.
        path: the file, for messages. Raises ValueError if the weights are not those of an S3D.
        """

        def shape(name, dims):
            if name not in state or state[name].ndim != dims:
                raise ValueError(
                    f"{path} has no weights of an S3D model: {name} is missing or malformed"
                )
            return state[name].shape

        model = cls(
            num_classes=shape("fc.weight", 2)[0],
            gating="gating.fc.weight" in state,
            space_to_depth=shape("conv1.conv1.weight", 5)[1] == 24,
            torchvision="conv1.conv2.weight" in state,
        )
        rows = shape("text_module.word_embd.weight", 2)[0]
        if rows != model.text_module.word_embd.num_embeddings:
            model.text_module.word_embd = nn.Embedding.from_pretrained(torch.zeros(rows, WORD_DIM))
        load_state_dict_checked(model, state, path)
        return model

    def check_clip(self, num_frames: int, size: int) -> None:
        """Raise ValueError if the stem cannot take clips of num_frames frames, size x size pixels.

        The space_to_depth stem takes even numbers only.
        """
        if self.space_to_depth and (num_frames % 2 or size % 2):
            raise ValueError(
                f"{num_frames} frames of {size}x{size} pixels do not fit this model, whose "
                "space_to_depth stem needs even numbers; give even ones"
            )

    def clip_dims(self) -> dict[int, Any]:
        """Return the axes of clips that may be dynamic, for dynamic_shapes of torch.export.

        They are batch, frames, height and width. The last three are even with the space_to_depth
        stem, and large enough for the last block to have more than one position in each direction.
        The exported program rejects other sizes.
        """
        step = 2 if self.space_to_depth else 1
        frames, size = (12, 48) if self.torchvision else (8, 32)
        least = {"frames": frames, "height": size, "width": size}
        dims = [step * torch.export.Dim(name, min=n // step + 1) for name, n in least.items()]
        return dict(zip((0, 2, 3, 4), (torch.export.Dim("batch"), *dims), strict=True))

    def forward(
        self,
        video: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        mode: str = "all",
        mixed5c: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Embed videos, texts or both.

        video: float [B, 3, T, H, W], RGB in [0, 1], without normalization by mean and deviation.
        text: word indices [N, words].
        mode: 'all' -> (video [B, num_classes], text [N, num_classes]); 'text' -> the latter;
        'video' -> the former, or with mixed5c the pooled [B, 1024] feature before the projection.
        """
        if mode not in ("all", "video", "text"):
            raise ValueError(f"mode must be 'all', 'video' or 'text', not {mode!r}")
        for name, given in (("video", video), ("text", text)):
            if given is None and mode in ("all", name):
                raise ValueError(f"mode {mode!r} needs {name}; give it, or another mode")
        if mode == "video":
            return self.forward_video(video, mixed5c=mixed5c)
        if mode == "text":
            return self.text_module(text)
        return self.forward_video(video), self.text_module(text)

    def forward_video(self, video: torch.Tensor, mixed5c: bool = False) -> torch.Tensor:
        """Embed videos, float [B, 3, T, H, W] in [0, 1]: [B, num_classes].

        mixed5c: return [B, 1024] instead, the mean of the last block over T, H and W. Raises
        ValueError for another shape or type and, in evaluation mode, for another range.
        """
        check_video(video, check_range=not self.training)
        converted = video.dtype == autocast_type(video.device)  # as a convolution would do
        net = video if converted else video.to(self.conv1.conv1.weight.dtype)
        for stage in (
            self.stem,
            self.conv_2b,
            self.conv_2c,
            self.gating,
            self.maxpool_3a,
            self.mixed_3b,
            self.mixed_3c,
            self.maxpool_4a,
            self.mixed_4b,
            self.mixed_4c,
            self.mixed_4d,
            self.mixed_4e,
            self.mixed_4f,
            self.maxpool_5a,
            self.mixed_5b,
            self.mixed_5c,
        ):
            if self.grad_checkpoint and torch.is_grad_enabled():
                net = self.recompute_in_backward(stage, net)
            else:
                net = stage(net)
        net = net.mean(dim=(2, 3, 4), dtype=self.fc.weight.dtype)
        return net if mixed5c else in_full_precision(self.fc, net)

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        """Embed videos, float [B, 3, T, H, W] in [0, 1]: [B, num_classes], not normalized."""
        return self.forward_video(video)

    def encode_text(self, text: torch.Tensor | str | Sequence[str]) -> torch.Tensor:
        """Embed N sentences, or word indices [N, words]: [N, num_classes], not normalized.

        Sentences need the vocabulary, see SentenceEmbedding.load_tokenizer.
        """
        return self.text_module(text, raw_text=not isinstance(text, torch.Tensor))

    def stem(self, video: torch.Tensor) -> torch.Tensor:
        """Apply conv1, of either kind, and its pooling: [B, 64, T/2, H/4, W/4]."""
        if self.space_to_depth:
            net = self.conv1(space_to_depth(video))
            net = net[:, :, 1:, 1:, 1:]  # even kernels need one row less of padding at the front
        elif self.torchvision:
            net = self.conv1(((video - self.mean) / self.std).to(video.dtype))
        else:
            net = self.conv1(video)
        return self.maxpool_2a(net)

    def recompute_in_backward(self, stage: Callable, net: torch.Tensor) -> torch.Tensor:
        """Apply a stage without keeping its activations (gradient checkpointing)."""

        def contexts():
            return contextlib.nullcontext(), frozen_bn_stats(self)

        return checkpoint(
            stage, net, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


@contextlib.contextmanager
def frozen_bn_stats(model: nn.Module) -> Iterator[None]:
    """Freeze the running averages of BatchNorm, which already include this batch."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    kept = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, momentum, count in kept:
            layer.momentum, layer.num_batches_tracked = momentum, count


def fuse_for_inference(model: S3D, dtype: torch.dtype | None = None) -> S3D:
    """Return a faster copy of the model, in evaluation mode, for inference only.

    dtype: of the convolutions. In the model's own type, the default, BatchNorm is folded into them;
    in float32 the embeddings stay within 1e-5 of the model's. With bfloat16 or float16 for a
    float32 model, the weights of convolutions and gates are converted once, instead of in every
    call as under autocast, and embeddings of videos are bit-identical to those under autocast.
    (With torchvision's stem, which normalizes the rounded clip, they agree up to rounding.)
    BatchNorm is then not folded, as that would round the weights again. The text network keeps its
    type, and the copy shares the model's table of word vectors.
    """
    own = model.fc.weight.dtype
    dtype = own if dtype is None else dtype
    table = model.text_module.word_embd.weight
    fast = copy.deepcopy(model, {id(table): table}).eval()
    for module in list(fast.modules()):
        if dtype == own and isinstance(module, STConv3D):
            for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"))[: 1 + module.separable]:
                folded = fuse_conv_bn_eval(getattr(module, conv), getattr(module, bn))
                setattr(module, conv, folded)
                setattr(module, bn, nn.Identity())
        elif dtype != own and isinstance(module, nn.Conv3d | SelfGating):
            module.to(dtype)
    return fast


# --- weights ------------------------------------------------------------------------------------


def load_model(
    weights: str | os.PathLike,
    vocabulary: str | os.PathLike | None = None,
    *,
    num_classes: int = 512,
    word2vec_path: str | os.PathLike = "",
) -> S3D:
    """Load a trained model, on the CPU, in evaluation mode.

    weights: the released `s3d_howto100m.pth`, a checkpoint of the training, or torchvision's S3D of
    Kinetics-400. A `.safetensors` file with the same names needs the package safetensors. Stem,
    gating, embedding size and vocabulary size follow from the weights.
    vocabulary: the words that belong to the weights, the released `s3d_dict.npy` or the training's
    `dict.npy`. If given, it is read and checked now. Only raw text needs it.
    num_classes, word2vec_path: see S3D; for torchvision's weights, which have a video network only.

    No pickled code is run. Raises FileNotFoundError, or ValueError of one line that names the file
    if it is invalid or the files do not belong together.
    """
    state = read_weights(weights)["state_dict"]
    if "features.0.0.0.weight" in state:
        model = S3D(num_classes, word2vec_path=word2vec_path, torchvision=True)
        load_kinetics(model, state, weights)
    else:
        model = S3D.from_state_dict(state, weights)
    if vocabulary is not None:
        model.text_module.token_to_word_path = vocabulary
        model.text_module.load_tokenizer()
    return model.eval()


def load_kinetics(model: S3D, state: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Load the weights of torchvision's S3D into one made with torchvision=True.

    The classifier is skipped. The projection and the text network, which torchvision does not have,
    keep their initial weights, and joint_space becomes False. Gates start open: their weights are 0
    and their bias is OPEN_GATE, so each takes 0.005 % off a value. Adam can close them. SGD hardly
    moves them, as their gradient is 1/5500 of that of a gate at one half. path: the file, for
    messages. Raises ValueError if the weights do not fit.
    """
    for module in model.modules():
        if isinstance(module, SelfGating):
            nn.init.zeros_(module.fc.weight)
            nn.init.constant_(module.fc.bias, OPEN_GATE)
    own = ("fc.", "text_module.", "gating.")
    found = {n: v for n, v in model.state_dict().items() if n.startswith(own) or ".gating_" in n}
    for name, value in state.items():
        if not name.startswith("classifier."):
            found[rename_from_torchvision(name)] = value
    load_state_dict_checked(model, found, path)
    model.joint_space = False


def rename_from_torchvision(name: str) -> str:
    """Return our name of a parameter of torchvision's S3D, or its own name if we have none."""
    stages = "conv1 - conv_2b conv_2c - mixed_3b mixed_3c - mixed_4b mixed_4c mixed_4d mixed_4e "
    stages += "mixed_4f - mixed_5b mixed_5c"
    branches = {
        "0": "b0",
        "1.0": "b1_a",
        "1.1": "b1_b",
        "2.0": "b2_a",
        "2.1": "b2_b",
        "3.1": "b3_b",
    }
    # Stage, branch, half of a separable convolution, convolution or BatchNorm, parameter.
    pattern = r"features\.(\d+)\.(?:branch(0|[123]\.[01])\.)?(?:([01])\.)?([01])\.(\w+)"
    if not (match := re.fullmatch(pattern, name)):
        return name
    stage, branch, second, kind, parameter = match.groups()
    block = f".conv_{branches.get(branch, 'b3_b')}" if branch else ""
    layer = f"{('conv', 'bn')[int(kind)]}{1 + int(second or 0)}"
    return f"{stages.split()[int(stage)]}{block}.{layer}.{parameter}"


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint, or the released weights: a dict with a "state_dict" without `module.`.

    No pickled code is run. Raises FileNotFoundError, or ValueError of one line if the file is
    damaged or holds something else.
    """
    return parse_weights(read_data(path, load_tensors, "a checkpoint or weights"), path)


def parse_weights(content: Any, path: str | os.PathLike) -> dict[str, Any]:
    """Convert the content of a checkpoint, or of released weights, as read_weights returns it.

    path: the file, for messages. Raises ValueError if the content is something else.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; give a checkpoint or weights")
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds no state dict (its keys are {summarize(content)}); give a checkpoint or "
            "weights"
        )
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    return {**(content if "state_dict" in content else {}), "state_dict": state}


def summarize(names: Collection, most: int = 3) -> str:
    """Join the first few names, and count the rest, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def load_state_dict_checked(
    model: nn.Module, state: dict[str, torch.Tensor], path: str | os.PathLike
) -> None:
    """Load a state dict; if it does not fit, raise a ValueError with the first keys that differ."""
    own = model.state_dict()
    faults = []
    if lacking := [name for name in own if name not in state]:
        faults.append(f"it lacks {summarize(lacking)}")
    if unknown := [name for name in state if name not in own]:
        faults.append(f"it has unknown {summarize(unknown)}")
    shapes = [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if shapes:
        faults.append(summarize(shapes))
    if faults:
        raise ValueError(f"{path} does not fit the S3D model: {'; '.join(faults)}")
    model.load_state_dict(state)
