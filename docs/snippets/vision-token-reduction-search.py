# model: pictures
from attnlib.reduce import ScheduledPruning

with attnlib.attach(model, ScheduledPruning(counts=[16, 16, 8, 4]), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
