# model: pictures
from attnlib.reduce import DyVTE

with attnlib.attach(model, DyVTE(exit_layer=2), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
