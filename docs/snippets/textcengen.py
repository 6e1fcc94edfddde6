# model: pipeline
from attnlib.steer import TextCenGen

with attnlib.attach(pipe, TextCenGen(region=(0.0, 0.0, 0.5, 1.0), words=[[2], [5]])):  # the upper half stays free
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
print(latents.shape)
