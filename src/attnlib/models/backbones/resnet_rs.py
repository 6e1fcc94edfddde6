"""ResNet-RS: a ResNet whose training and scaling are new, more than its blocks.

Bello et al., 2021, "Revisiting ResNets: Improved Training and Scaling Strategies", arXiv 2103.07579. Blocks are as in
ResNet-D with a squeeze-and-excitation at the end of every branch; a convolution takes the place of the maximum behind
the stem. Depth grows where training is long enough to overfit, and resolution slowly: :func:`scale` has the pairs that
were trained, :class:`Recipe` how.

The authors' code is TensorFlow's; weights and counts are timm's. Differs from timm: biases of squeeze-and-excitations
start at zero; tokens that do not exist enter no convolution, mean or statistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...checks import check_choice, check_flag, check_int, check_real
from ..build import register_models
from .resnet import convert, resnet

#: Blocks per stage, and the sides of images that a depth was trained on.
_DEPTHS: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    50: ((3, 4, 6, 3), (160,)),
    101: ((3, 4, 23, 3), (160, 192)),
    152: ((3, 8, 36, 3), (192, 224, 256)),
    200: ((3, 24, 36, 3), (256,)),
    270: ((4, 29, 53, 4), (256,)),
    350: ((4, 36, 72, 4), (256, 320)),
    420: ((4, 44, 87, 4), (320,)),
}


def scale(depth: int, resolution: int) -> dict[str, Any]:
    """Name and image size of a pair that the paper trained, as arguments of :func:`attnlib.create_model`.

    Raises:
        ValueError: a depth or a resolution that is not in the paper's table; what is there is listed.

    >>> scale(152, 224)
    {'name': 'resnetrs152', 'img_size': 224}
    """
    check_choice("depth", depth, _DEPTHS)
    check_choice("resolution", resolution, _DEPTHS[depth][1])
    return {"name": f"resnetrs{depth}", "img_size": resolution}


@dataclass(frozen=True)
class Recipe:
    """How ResNet-RS is trained: a field for every knob, so that leaving one out is one change (``replace``).

    What they turn is torch's own: :meth:`optimizer`, :meth:`schedule`, :meth:`loss` and :meth:`averaged`. Augmentation
    is told, not done: magnitude and layers of RandAugment belong to the data pipeline; ``dropout`` and
    ``stochastic_depth`` to :func:`attnlib.create_model`, see :meth:`settings`.

    Args:
        epochs: of training.
        learning_rate: at the peak, for ``batch_size`` images a step.
        batch_size: of a step.
        warmup_epochs: the rate grows linearly over these.
        cosine: the rate falls along a cosine to zero behind them; otherwise it stays.
        momentum: of stochastic gradient descent.
        nesterov: that kind of momentum.
        weight_decay: of kernels and matrices; norms and biases have none. Smaller than the usual 1e-4, since the other
            regularisers are there.
        label_smoothing: of the loss.
        ema_decay: of the averaged weights; 0 for none.
        dropout: before the classifier.
        stochastic_depth: of the last block.
        randaugment_layers, randaugment_magnitude: of RandAugment.

    >>> Recipe().settings()
    {'drop_rate': 0.25, 'drop_path_rate': 0.0}
    """

    epochs: int = 350
    learning_rate: float = 1.6
    batch_size: int = 4096
    warmup_epochs: int = 5
    cosine: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    ema_decay: float = 0.9999
    dropout: float = 0.25
    stochastic_depth: float = 0.0
    randaugment_layers: int = 2
    randaugment_magnitude: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_int(name, getattr(self, name), least=1)
        for name in ("warmup_epochs", "randaugment_layers", "randaugment_magnitude"):
            check_int(name, getattr(self, name), least=0)
        for name in ("cosine", "nesterov"):
            check_flag(name, getattr(self, name))
        check_real("learning_rate", self.learning_rate, above=0)
        check_real("weight_decay", self.weight_decay, least=0)
        for name in ("momentum", "label_smoothing", "ema_decay", "dropout", "stochastic_depth"):
            check_real(name, getattr(self, name), least=0, below=1)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be fewer than epochs={self.epochs}")

    def settings(self) -> dict[str, float]:
        """What the model is told, as arguments of :func:`attnlib.create_model`."""
        return {"drop_rate": self.dropout, "drop_path_rate": self.stochastic_depth}

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Stochastic gradient descent; norms and biases do not decay."""
        some = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in some if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in some if p.dim() <= 1], "weight_decay": 0.0},
        ]
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=nesterov)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up and cosine over ``steps`` in all, one ``step()`` of it for each."""
        check_int("steps", steps, least=1)
        warm = steps * self.warmup_epochs // self.epochs
        rates = torch.optim.lr_scheduler
        rest: Any = rates.ConstantLR(optimizer, 1.0)
        if self.cosine:
            rest = rates.CosineAnnealingLR(optimizer, max(1, steps - warm))
        if not warm:
            return rest
        return rates.SequentialLR(optimizer, [rates.LinearLR(optimizer, 1e-3, 1.0, warm), rest], [warm])

    def loss(self) -> nn.CrossEntropyLoss:
        """Cross-entropy with smoothed labels."""
        return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)

    def averaged(self, model: nn.Module) -> torch.optim.swa_utils.AveragedModel | None:
        """A model of averaged weights and buffers, to be told ``update_parameters(model)`` at every step."""
        if not self.ema_decay:
            return None
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(self.ema_decay)
        return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)


_CROPS = {50: 0.91, 101: 0.94}
_SIDES = {50: 160, 101: 192, 152: 256, 200: 256, 270: 256, 350: 288, 420: 320}

register_models(
    "resnet-rs",
    resnet,
    {
        f"resnetrs{n}": dict(depths=depths, stem="deep", average=True, pool="conv", squeeze=0.25)
        for n, (depths, _) in _DEPTHS.items()
    },
    params={
        "resnetrs50": 35_691_912,
        "resnetrs101": 63_618_696,
        "resnetrs152": 86_621_576,
        "resnetrs200": 93_209_992,
        "resnetrs270": 129_861_448,
        "resnetrs350": 163_956_168,
        "resnetrs420": 191_891_656,
    },
    license="Apache-2.0",
    source="huggingface/pytorch-image-models",
    weights={f"resnetrs{n}": (f"timm/resnetrs{n}.tf_in1k", "model.safetensors") for n in _DEPTHS},
    convert=convert,
    img_size={f"resnetrs{n}": side for n, side in _SIDES.items()},
    data_of={f"resnetrs{n}": {"crop_pct": _CROPS.get(n, 1.0)} for n in _DEPTHS},
)
