# model: pipeline
import torch

from attnlib.steer import JointModalities

joint = JointModalities.of(pipe, num_heads=2)  # starts as the plain denoiser; to be trained with dual_modal_loss
both = {name: torch.cat([value, value]) for name, value in prompt.items()}  # a video, and its depth
with attnlib.attach(pipe, joint):
    latents = pipe(**both, num_inference_steps=2, output_type="latent").images
video, depth = latents.chunk(2)
print(video.shape, depth.shape)
