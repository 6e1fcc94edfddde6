# model: pipeline
import torch

from attnlib.steer import RealCustom

tokens = torch.randn(1, 1, 4, pipe.unet.config.cross_attention_dim)  # of CrossScaleProjector, one reference
custom = RealCustom.of(pipe.unet, words=[[2]]).refer(tokens)  # numbers of tokens, or a word of the prompt
with attnlib.attach(pipe, custom):
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
print(latents.shape)
