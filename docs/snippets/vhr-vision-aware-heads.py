# model: pictures
from attnlib.steer import HeadReinforcement

with attnlib.attach(model, HeadReinforcement(alpha=2.0, layers=[1, 2]), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
