# model: pipeline
import torch

from attnlib.steer import PointTemporalAttention

tracks = PointTemporalAttention.of(pipe, frames=3, num_heads=2)  # starts as the plain denoiser; to be trained
points = torch.rand(3, 5, 2)  # five points in three frames, x first, as shares of the sides
tracks.track(points, visible=torch.rand(3, 5) > 0.2)
with attnlib.attach(pipe, tracks):
    frames = pipe(**prompt, num_images_per_prompt=3, num_inference_steps=2, output_type="latent").images
print(frames.shape)
