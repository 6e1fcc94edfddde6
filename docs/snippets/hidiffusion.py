# model: pipeline
from attnlib.steer import HiDiffusion
from attnlib.steer.diffusion.hidiffusion import Place, Table

table = Table(2, Place("conv", 0))  # Stable Diffusion 1.5, 2.1, SDXL and Turbo have tables already: HiDiffusion()
with attnlib.attach(pipe, HiDiffusion(table)):
    latents = pipe(**prompt, height=128, width=128, num_inference_steps=5, output_type="latent").images
print(latents.shape)
