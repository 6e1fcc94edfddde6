"""ResUNet on EfficientNet-B0 with channel attention on every skip and ASPP at the bottom.

"Enhancing Brain Tumor Segmentation Using Channel Attention and Transfer Learning", 2025, arXiv 2501.11196. No code was
released and the abstract names the parts only; how they are put together is our reading, and each choice an argument:
skips pass a gate over channels (squeeze-and-excitation of reduction 16, or ECA) before they meet the map from below,
which is brought to their size; residual blocks; ASPP of rates 6, 12 and 18 at stride 32; a last level at full size
without a skip. Loss: Dice and cross entropy.

Released weights of EfficientNet have a stem of three channels; :func:`attnlib.create_model` adapts it to another number
(four sequences of an MRI) so that grey images get the answer they had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ...checks import check_choice, check_int, check_ints
from ...nn.gates.eca import EfficientChannelAttention
from ...nn.gates.squeeze_excite import SqueezeExciteGate
from ..build import create_model, register_models
from .context import ASPP
from .unet import UNet

ATTENTIONS = (None, "se", "eca")


def channel_gate(kind: str | None, reduction: int = 16) -> Callable[[int], nn.Module] | None:
    """From a number of channels to the gate that stands on a skip."""
    check_choice("attention", kind, ATTENTIONS)
    if kind == "eca":
        return EfficientChannelAttention
    return (lambda dim: SqueezeExciteGate(dim, reduction=min(reduction, dim))) if kind == "se" else None


class ResUNet(UNet):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes, H, W).

    Args:
        in_chans: channels of images; 4 sequences in BraTS.
        num_classes: with the background; 1 for the foreground alone.
        dims: channels of the decoder, finest first.
        attention: of the skips: ``"se"``, ``"eca"`` or none.
        reduction: of squeeze-and-excitation.
        rates: dilations of ASPP; none without it.
        encoder: name of a backbone, built without weights, or one that gives maps.
        pretrained: of the backbone by name, as of :func:`attnlib.create_model`.
        settings: further ones of :class:`attnlib.models.dense.unet.UNet`.
    """

    def __init__(
        self,
        in_chans: int = 4,
        num_classes: int = 4,
        dims: Sequence[int] = (16, 32, 64, 128, 256),
        attention: str | None = "se",
        reduction: int = 16,
        rates: Sequence[int] = (6, 12, 18),
        encoder: str | nn.Module = "efficientnet_b0",
        pretrained: Any = False,
        **settings: Any,
    ):
        check_int("reduction", reduction, least=1)
        rates = check_ints("rates", rates, least=1)
        trunk: Any = encoder
        if isinstance(encoder, str):
            trunk = create_model(encoder, pretrained, features_only=True, in_chans=in_chans)
        elif pretrained is not False:
            raise ValueError("pretrained is for an encoder given by name")
        given: dict[str, Any] = dict(loss_kind="both", residual=True, upsample="resize", momentum=0.1)
        super().__init__(
            in_chans, num_classes, dims, 2, encoder=trunk, skip_attention=channel_gate(attention, reduction),
            bottleneck=(lambda dim: ASPP(dim, dim, rates)) if rates else None, **{**given, **settings},
        )  # fmt: skip


register_models(
    "resunet-eca-aspp-brain-tumor",
    ResUNet,
    {"resunet_efficientnet_b0": dict(in_chans=4), "resunet_eca_efficientnet_b0": dict(in_chans=4, attention="eca")},
    task="segment",
)
