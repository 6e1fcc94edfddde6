# model: language
from attnlib.hooks import Node
from attnlib.look import logit_difference, paths

other = {**inputs, "input_ids": ids.roll(1, 1)}
effects = paths(model, inputs, other, logit_difference([4], [9]), receivers=[Node("q", 2, 1)], freeze_mlps=True)
print(effects.grid("share"))  # (layers, heads): what each head does to the answer through that query
