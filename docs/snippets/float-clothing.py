# model: pipeline
import torch

from attnlib.steer import FlowAttention

flow = torch.zeros(2, 2, 16, 16)  # of frames 2 and 3: where each pixel was in the frame before
flow[:, 0] = -3.0  # everything moves three pixels to the right
with attnlib.attach(pipe, FlowAttention(flow, weight=0.5)):
    frames = pipe(**prompt, num_images_per_prompt=3, num_inference_steps=2, output_type="latent").images
print(frames.shape)
