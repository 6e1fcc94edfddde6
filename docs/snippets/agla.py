# model: pictures
from attnlib.steer import AGLA

with attnlib.attach(model, AGLA(lambda pixels: pixels.flip(-1)), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
