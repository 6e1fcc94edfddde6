"""Preferences: which answer a model should rather give, under which image, and by how much.

>>> from attnlib.convert import preference
>>> preference.dpo().responses
['chosen', 'rejected']

``preference.train(model, pairs, recipe="opa-dpo")`` trains any model of transformers.
"""

from .batches import Collator, Preference, encode, log_probs, read_batch, to_pairs
from .recipes import (
    GIVEN,
    RECIPES,
    Anchor,
    Imitation,
    Losses,
    Read,
    Recipe,
    Side,
    Term,
    dpo,
    get_recipe,
    opa_dpo,
    rdpo,
    sft,
)
from .reference import Reference
from .training import Trained, evaluate, load, train, trainer
from .variants import About, MaskedAttention, MeanBlocks, MeanPixels, Variant, mask_blocks, mask_patches, mask_pixels

__all__ = [
    "GIVEN",
    "RECIPES",
    "About",
    "Anchor",
    "Collator",
    "Imitation",
    "Losses",
    "MaskedAttention",
    "MeanBlocks",
    "MeanPixels",
    "Preference",
    "Read",
    "Recipe",
    "Reference",
    "Side",
    "Term",
    "Trained",
    "Variant",
    "dpo",
    "encode",
    "evaluate",
    "get_recipe",
    "load",
    "log_probs",
    "mask_blocks",
    "mask_patches",
    "mask_pixels",
    "opa_dpo",
    "rdpo",
    "read_batch",
    "sft",
    "to_pairs",
    "train",
    "trainer",
]
