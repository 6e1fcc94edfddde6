# model: unet
from attnlib.steer import SoftPAG, guide

with torch.no_grad():
    plain = model(noise, 3, encoder_hidden_states=prompt).sample
    with attnlib.attach(model, SoftPAG(0.5)):
        perturbed = model(noise, 3, encoder_hidden_states=prompt).sample
print(guide(plain, perturbed, weight=3.0).shape)
