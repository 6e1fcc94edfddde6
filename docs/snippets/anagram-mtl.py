# model: pipeline
from attnlib.steer import Anagram
from attnlib.steer.diffusion.tiles import identity_view, jigsaw

cat, dog = torch.randn(2, 7, 12)  # embeddings; with a text encoder, prompts: ["a drawing of a cat", ...]
views = [identity_view(), jigsaw()]
with attnlib.attach(pipe, Anagram(views, [cat, dog], words=[[5], [5]], resolution=4, latent=True)):
    latents = pipe(**prompt, num_inference_steps=3, output_type="latent").images  # pipe: better a model of pixels
print(latents.shape)
