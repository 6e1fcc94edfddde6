"""Language models that answer with more than words: tokens with heads, boxes and masks, and their losses."""
