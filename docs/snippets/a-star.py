# model: pipeline
from attnlib.steer import AStar

subjects = [[2], [5]]  # tokens; with a tokenizer, words: AStar(("circle", "square"))
with attnlib.attach(pipe, AStar(subjects, resolution=4)):
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
print(latents.shape)
