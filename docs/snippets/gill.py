import torch
from transformers import OPTConfig, OPTForCausalLM

from attnlib.models.diffusion.gill import GILL

lm = OPTForCausalLM(  # stands for a pretrained language model
    OPTConfig(vocab_size=60, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
              num_attention_heads=2, max_position_embeddings=64)
)  # fmt: skip
image = (60, 61, 62, 63)  # numbers of [IMG0] .. [IMG3], behind its table
gill = GILL(lm, image, vision_dim=12, out_dim=24, num_tokens=7, hidden=64, depth=1)

captions = torch.tensor([[2, 8, 9, *image], [2, 30, 31, *image]])
target = torch.randn(2, 7, 24)  # what the denoiser's text encoder makes of them
losses = gill.losses(captions, pad=1, target=target, features=torch.randn(2, 12))
sum(losses.values()).backward()

written = gill.eval().write([captions[:1, :3]], max_steps=3, scale=1e6)
prompt = gill.prompt_embeds(written.states)  # pipe(prompt_embeds=prompt[:1], ...)
print({k: round(v.item(), 2) for k, v in losses.items()}, written.ids.tolist(), prompt.shape)
