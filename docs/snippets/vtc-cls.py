# model: pictures
from attnlib.reduce import VTCCLS

with attnlib.attach(model, VTCCLS(keep=5, start=1), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
