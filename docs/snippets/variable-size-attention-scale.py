# model: pipeline
from attnlib.steer import VariableSizeScale

with attnlib.attach(pipe, VariableSizeScale()):  # trained at 8 by 8 latents
    latents = pipe(**prompt, height=96, width=128, num_inference_steps=2, output_type="latent").images
print(latents.shape)
