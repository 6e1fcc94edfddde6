# model: language
from attnlib.cache import SnapKV

with attnlib.attach(model, SnapKV(ratio=0.5, window_size=8)):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False))
