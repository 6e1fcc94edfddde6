# model: pictures
from attnlib.steer import DAMRO

with attnlib.attach(model, DAMRO(alpha=0.5, k=4), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
