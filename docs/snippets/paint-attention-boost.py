# model: pictures
from attnlib.steer import VisualBoost

with attnlib.attach(model, VisualBoost(alpha=0.5, beta=0.3, sets="all"), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
