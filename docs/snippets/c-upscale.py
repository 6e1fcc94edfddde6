# model: pipeline
from attnlib.steer import CUpscale

structure = torch.randn(1, 4, 8, 8)  # latents of a small image: CUpscale.encode(pipe, image, (1024, 1024))
with attnlib.attach(pipe, CUpscale(structure)):
    latents = pipe(**prompt, height=128, width=192, num_inference_steps=2, output_type="latent").images
print(latents.shape)
