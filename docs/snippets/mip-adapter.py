# model: pipeline
from attnlib.steer import MIPAdapter

adapter = MIPAdapter.of(pipe)
width = pipe.unet.config.cross_attention_dim
names = torch.randn(1, 2, 5, width)  # with a tokenizer: adapter.refer(images, names=["dog", "hat"])
adapter.refer(torch.randn(1, 2, 4, width), entities=names, lengths=[1, 2], empty_entities=torch.zeros(5, width))
with attnlib.attach(pipe, adapter):
    latents = pipe(**prompt, num_inference_steps=2, output_type="latent").images
print(latents.shape)
