"""Two branches recomputed from scratch at every step, as a logits processor on the untouched model."""

import torch

from attnlib.steer import contrast


class Scratch:
    """``other(ids)`` gives the scores (B, V) of the second branch for whole sequences."""

    def __init__(self, other, a, b, cutoff=0.0, normalize=False, beams=1, interval=None):
        self.other, self.settings, self.beams = other, (a, b, cutoff, normalize), beams
        self.interval, self.step = interval, -1

    def __call__(self, ids, scores):
        self.step += 1
        if self.interval is not None and self.step > self.interval:
            return scores
        out = contrast(scores, self.other(ids), *self.settings)
        return out.log_softmax(-1) if self.beams > 1 else out


def generated(model, inputs, mode=None, new=5, processor=None, seed=3):
    """Scores (steps, rows, V) after processors, and sequences."""
    mode = dict(mode or {})
    make = model._get_logits_processor

    def with_ours_first(*args, **kwargs):
        made = make(*args, **kwargs)
        made.insert(0, processor)
        return made

    if processor:
        model._get_logits_processor = with_ours_first
    torch.manual_seed(seed)
    try:
        # From scratch, a new padding or image token would be taken for one of the prompt.
        settings = {"do_sample": False, "suppress_tokens": [0, 61, 62], **mode}
        if settings["do_sample"]:
            settings["top_k"] = 0
        out = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, output_scores=True, return_dict_in_generate=True,
            **settings,
        )  # fmt: skip
    finally:
        if processor:
            del model._get_logits_processor
    return torch.stack(out.scores), out.sequences


def equal(got, want, atol=1e-5):
    """Same support, same scores there, same tokens."""
    (mine, sequences), (theirs, expected) = got, want
    assert torch.equal(sequences, expected)
    assert torch.equal(mine.isinf(), theirs.isinf())
    torch.testing.assert_close(mine.nan_to_num(neginf=0.0), theirs.nan_to_num(neginf=0.0), atol=atol, rtol=1e-5)


def by_rows(model, rows):
    """(B, V) scores after each row's own tokens, read alone."""
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits[:, -1] for row in rows]).float()
