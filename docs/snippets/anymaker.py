# model: pipeline
from attnlib.steer import AnyMaker
from attnlib.steer.diffusion.anymaker import IdentityEncoder

width = pipe.unet.config.cross_attention_dim
encoder = IdentityEncoder([32, 24], out_dim=width, dim=16, id_tokens=4, non_tokens=4, depth=1, heads=2)
maker = AnyMaker.of(pipe, encoder)
features = [torch.randn(1, 1, 16, 32), torch.randn(1, 1, 9, 24)]  # of two encoders, the object cut out
maker.refer(features, words=[[2]])  # with a tokenizer: words=["dog"]
with attnlib.attach(pipe, maker):
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
print(latents.shape)
