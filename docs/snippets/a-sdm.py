# model: unet
from attnlib.convert import a_sdm

batch = {"sample": noise, "timestep": torch.tensor([500]), "encoder_hidden_states": prompt}
least = list(a_sdm.redundancy(model, [batch]))[:2]
light = a_sdm.remove(model, least, batch)
print(light)
loss = sum(a_sdm.alignment_losses(light.model, model, batch, torch.randn_like(noise)).values())
loss.backward()  # the student learns to do without
with attnlib.attach(light.model, a_sdm.GlobalRegionalAttention(window_size=2, pool=2)):
    print(light.model(**batch).sample.shape)
