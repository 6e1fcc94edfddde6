"""Preferences: which answer a model should rather give, under which image, and by how much.

>>> from attnlib.convert import preference
>>> preference.dpo().responses
['chosen', 'rejected']

``preference.train(model, pairs, recipe="opa-dpo")`` trains any model of transformers.
"""

from .batches import Collator, Preference, encode, log_probs, read_batch, to_pairs
from .on_policy import Segment, TruthJudge, encode_revision, on_policy_pairs, revise, rollout
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
from .refill import mask_tokens, mask_words, refill, refill_pairs, refill_text
from .retrieval import retrieve, with_neighbours
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
    "Segment",
    "Side",
    "Term",
    "Trained",
    "TruthJudge",
    "Variant",
    "dpo",
    "encode",
    "encode_revision",
    "evaluate",
    "get_recipe",
    "load",
    "log_probs",
    "mask_blocks",
    "mask_patches",
    "mask_pixels",
    "mask_tokens",
    "mask_words",
    "on_policy_pairs",
    "opa_dpo",
    "rdpo",
    "read_batch",
    "refill",
    "refill_pairs",
    "refill_text",
    "retrieve",
    "revise",
    "rollout",
    "sft",
    "to_pairs",
    "train",
    "trainer",
    "with_neighbours",
]
