"""Models that compare: two encoders, or one space per question, and losses between what belongs together."""
