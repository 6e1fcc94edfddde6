# model: language
from attnlib.look import logit_attribution

said = logit_attribution(model, inputs, tokens=[4])
print(said.ranked()[:3])  # the heads and feed-forwards that say the token most
