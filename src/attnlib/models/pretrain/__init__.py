"""Masked pretraining: masks, patches of any rank, decoders that see what is left, and what is trained with them."""

from .masks import block_mask, random_mask
from .teacher import MaskedPretraining, Predicted, cosine_loss, last_map

__all__ = ["MaskedPretraining", "Predicted", "block_mask", "cosine_loss", "last_map", "random_mask"]
