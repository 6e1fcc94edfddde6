# model: pictures
from attnlib.steer import DualAttention, SoftImageGuidance

null = torch.zeros(16, 32)  # a trained attnlib.steer.NullImage has one
with attnlib.attach(model, DualAttention(), SoftImageGuidance(null, 1.5), token_types=types):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[62]))
