"""Answer grounding: a question chooses the channels of a pyramid, and with them what is segmented.

Khoshsirat and Kambhamettu, 2023, "Sentence Attention Blocks for Answer Grounding", arXiv 2309.11593. The maps of a
convolutional backbone at strides 2 to 32 are gated by the embedding of a question
(:class:`attnlib.nn.gates.sentence.SentenceGate`), then put together from the coarsest on,

    ``m_i <- relu(m_i + resize(BN(W m_{i+1})))``,

and the finest is classified. Images are normalised by their own mean and deviation. The later embedding attention block
(Khoshsirat et al., 2024) reads several embeddings with a narrower gate, of all maps or of the last alone.

Differs from the authors' code: channels come from the backbone (their table does not fit EfficientNet-B0 to B2); maps
are not changed in place; the text encoder stays outside, as theirs does, or is bound to answer questions in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real, check_type, describe
from ...nn.gates.sentence import SentenceGate
from ...nn.released import Released, Rule
from ..backbones.convs import InvertedResidual, blocks_of
from ..backbones.stages import map_info
from ..build import create_model, register_models
from ..protocol import TaskModel, answering
from .context import resized_maps
from .heads import pixel_cross_entropy

LEVELS = ("all", "last")
Texts = Tensor | Sequence[Tensor]


class MergeMaps(nn.Module):
    """``relu(fine + resize(BN(W coarse)))``.

    Args:
        coarse_dim: channels of the coarser map.
        dim: of the finer one, and out.
    """

    def __init__(self, coarse_dim: int, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(coarse_dim, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(B, coarse_dim, h, w), (B, dim, H, W) -> (B, dim, H, W)."""
        return (resized_maps(self.norm(self.conv(coarse)), fine.shape[2:]) + fine).relu()


class SentenceSegmenter(TaskModel):
    """Images (B, in_chans, H, W) and embeddings of questions (B, E) to logits (B, num_classes, H, W).

    Args:
        encoder: the name of a model, or a module that gives maps, finest first, with a ``feature_info``.
        num_classes: 2: the answer's pixels and others.
        in_chans: channels of images.
        text_dim: width of the embedding, or of each of several.
        gate: of :class:`SentenceGate`; ``None`` for a plain pyramid that hears no question.
        source, hidden, norm: of :class:`SentenceGate`.
        levels: ``"all"`` maps are gated and merged, or the ``"last"`` alone is gated and classified (EAB's form of
            a single scale).
        drop: dropout before the classifier.
        input_norm: normalise every image by itself.
        text_encoder: from a list of strings to (B, E), for :meth:`ask`.
        ignore_index: the label of pixels that have none.
        drop_path_rate: of an encoder by name.

    Raises:
        ValueError: an encoder without a ``feature_info``.
    """

    head_names: Sequence[str] = ("classifier.",)

    def __init__(
        self,
        encoder: str | nn.Module = "tf_efficientnet_b7",
        num_classes: int = 2,
        in_chans: int = 3,
        text_dim: int | Sequence[int] = 384,
        gate: str | None = "softmax",
        source: str = "sentence",
        hidden: int = 4,
        norm: bool = True,
        levels: str = "all",
        drop: float = 0.5,
        input_norm: bool = True,
        text_encoder: Callable[[list[str]], Tensor] | None = None,
        ignore_index: int = 255,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, least=1)
        self.in_chans = check_int("in_chans", in_chans, least=1)
        check_choice("levels", levels, LEVELS)
        trunk: Any = encoder
        if isinstance(encoder, str):
            trunk = create_model(encoder, features_only=True, in_chans=in_chans, drop_path_rate=drop_path_rate)
        check_type("encoder", trunk, nn.Module)
        dims = map_info(trunk).channels()
        self.encoder, self.levels = trunk, levels
        used = dims if levels == "all" else dims[-1:]
        self.input_norm = nn.InstanceNorm2d(in_chans, track_running_stats=True) if input_norm else nn.Identity()
        self.gates = nn.ModuleList(
            [] if gate is None else [SentenceGate(c, text_dim, hidden, gate, source, norm) for c in used]
        )
        self.merges = nn.ModuleList(MergeMaps(b, a) for a, b in zip(used, used[1:], strict=False))
        self.drop = nn.Dropout(check_real("drop", drop, least=0, below=1))
        self.classifier = nn.Conv2d(used[0], num_classes, 1)
        if text_encoder is not None and not callable(text_encoder):
            raise TypeError(f"text_encoder must take a list of strings, got {describe(text_encoder)}")
        self.text_encoder = text_encoder
        self.ignore_index = check_int("ignore_index", ignore_index)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Maps of the trunk, which any number of questions may be asked of: finest first."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        return list(self.encoder(self.input_norm(x)))

    def gated(self, maps: Sequence[Tensor], text: Texts, has_text: Tensor | None = None) -> list[Tensor]:
        """Those of the maps that are used, gated."""
        used = list(maps if self.levels == "all" else maps[-1:])
        if not len(self.gates):
            return used
        return [
            gate(m.permute(0, 2, 3, 1), text, has_text=has_text).permute(0, 3, 1, 2)
            for gate, m in zip(self.gates, used, strict=True)
        ]

    def decode(
        self, maps: Sequence[Tensor], text: Texts, size: Sequence[int], has_text: Tensor | None = None
    ) -> Tensor:
        """Logits (B, num_classes, *size) of :meth:`maps` and a question."""
        *fine, y = self.gated(maps, text, has_text)
        for merge, m in zip(reversed(list(self.merges)), reversed(fine), strict=True):
            y = merge(y, m)
        return resized_maps(self.classifier(self.drop(y)), size)

    def forward(self, x: Tensor, text: Texts, has_text: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes, H, W).

        Args:
            x: (B, in_chans, H, W).
            text: (B, E), or a sequence of embeddings.
            has_text: (B,) boolean, which images have a question; the gates of the others weigh all channels alike.
        """
        return self.decode(self.maps(x), text, x.shape[2:], has_text)

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross entropy; ``target`` is (B, H, W) classes, ``ignore_index`` where a pixel has none."""
        return {"cross_entropy": pixel_cross_entropy(prediction, target, self.ignore_index)}

    def predict(self, x: Tensor, text: Texts, has_text: Tensor | None = None) -> Tensor:
        """Classes (B, H, W)."""
        return self(x, text, has_text).argmax(1)

    @answering
    def ask(self, x: Tensor, questions: Sequence[str]) -> Tensor:
        """Classes (B, H, W) of questions in words, one for every image.

        Raises:
            ValueError: no ``text_encoder``, an empty question, another number of questions than images.
        """
        if self.text_encoder is None:
            raise ValueError("questions in words need a text_encoder; hand it over, or embeddings to predict()")
        if isinstance(questions, str) or not all(isinstance(q, str) for q in questions):
            raise TypeError(f"questions must be a list of strings, got {describe(questions)}")
        if empty := [i for i, q in enumerate(questions) if not q.strip()]:
            raise ValueError(f"questions has an empty text at {empty}")
        if len(questions) != len(x):
            raise ValueError(f"questions must be one for each of {len(x)} images, got {len(questions)}")
        return self.predict(x, self.text_encoder(list(questions)).to(x))


def convert(state_dict: Mapping[str, Tensor], model: SentenceSegmenter) -> dict[str, Tensor]:
    """From the authors' ``Model``, and from EAB's ``SingleScaleModel`` and ``MultiScaleModel``.

    The trunk is ``efficientnet_pytorch``'s; that of EAB is a CLIP model (``clip_model.*``), which is loaded by itself.
    """
    theirs = Released(state_dict, "the authors' Model")
    theirs.leave(r"clip_model\..*", because="the encoder is given")
    out = theirs.parts(r"(?:sentence_attentions|eab)\.(\d+)\.(.+)", r"gates.\1", SentenceGate.convert_state_dict)
    out |= theirs.parts(r"eab\.()(attention\..+)", r"gates.0\1", SentenceGate.convert_state_dict)
    rules: dict[str, Rule] = {
        r"init_norm\.(\w+)": r"input_norm.\1",
        r"classifier\.(weight|bias)": r"classifier.\1",
        r"merge_blocks\.(\d+)\.low_res_conv\.0\.weight": r"merges.\1.conv.weight",
        r"merge_blocks\.(\d+)\.low_res_conv\.1\.(\w+)": r"merges.\1.norm.\2",
        r"backbone\._conv_stem\.weight": "encoder.model.stem.0.conv.weight",
        r"backbone\._bn0\.(\w+)": r"encoder.model.stem.0.norm.\1",
    }
    trunk: Any = getattr(model.encoder, "model", None)
    blocks = [] if trunk is None else [(i, j, b) for i, j, b in blocks_of(trunk) if isinstance(b, InvertedResidual)]
    for number, (i, j, block) in enumerate(blocks):
        lead, ours = rf"backbone\._blocks\.{number}\._", f"encoder.model.stages.{i}.blocks.{j}"
        parts = [("expand_conv", "bn0", "expand"), ("depthwise_conv", "bn1", "depthwise"),
                 ("project_conv", "bn2", "project")]  # fmt: skip
        for conv, norm, part in parts[0 if block.expand is not None else 1 :]:
            rules[rf"{lead}{conv}\.weight"] = f"{ours}.{part}.conv.weight"
            rules[rf"{lead}{norm}\.(\w+)"] = rf"{ours}.{part}.norm.\1"
        for conv, part in (("se_reduce", "fc1"), ("se_expand", "fc2")):
            rules[rf"{lead}{conv}\.(weight|bias)"] = rf"{ours}.squeeze.{part}.\1"
    own = model.state_dict()
    for name, value in theirs.renamed(rules).items():
        flat = name in own and own[name].dim() == 2 and value.dim() == 4
        out[name] = value.flatten(1) if flat and re.search(r"\.fc[12]\.", name) else value
    return theirs.close(out)


register_models(
    "sentence-attention-block",
    SentenceSegmenter,
    {f"sentence_attention_efficientnet_b{n}": dict(encoder=f"tf_efficientnet_b{n}") for n in range(3, 8)},
    params={
        "sentence_attention_efficientnet_b3": 14_096_170,
        "sentence_attention_efficientnet_b4": 20_904_810,
        "sentence_attention_efficientnet_b5": 31_620_018,
        "sentence_attention_efficientnet_b6": 43_924_706,
        "sentence_attention_efficientnet_b7": 66_856_978,
    },
    source="khoshsirat/embedding-attention-blocks",
    convert=convert,  # type: ignore[arg-type]
    task="segment",
)
