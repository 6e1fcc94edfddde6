# model: pictures
from attnlib.reduce import CMAI, VMTC

with attnlib.attach(model, VMTC(keep=4, merge=2), CMAI(0.2), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
