# model: unet
from attnlib.steer import UniformMaps

with attnlib.attach(model, UniformMaps()), torch.no_grad():
    print(model(noise, 3, encoder_hidden_states=prompt).sample.shape)
