# model: language
from attnlib.steer import SinkCalibration

with attnlib.attach(model, SinkCalibration({2: [0, 3]}, beta=0.4)):  # layer 2, heads 0 and 3
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False))
