# model: pictures
from attnlib.steer import VisualRedistribution

with attnlib.attach(model, VisualRedistribution(sink_dims=(3, 17), rho=0.9, summ=0.01, tau=1.0), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
