# model: pictures
from attnlib.reduce import ATP, atp_gates

gates = atp_gates(model, (2,), 0.0625)  # to be trained; see attnlib.reduce.atp_losses
with attnlib.attach(model, ATP(gates), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
