# model: pipeline
from attnlib.steer import IRDiffusion

left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
isolate = IRDiffusion(masks=[[left, right]], references=())  # a series: prompts, and IRDiffusion(["cat", "dog"])
with attnlib.attach(pipe, isolate):
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
print(latents.shape)
