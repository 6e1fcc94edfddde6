import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnlib.convert.rotation import rotate
from attnlib.convert.rsq import Weighting, expand, quantize

config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
model = LlamaForCausalLM(config).eval()  # or a pretrained one
tokens = torch.randint(100, (4, 32))  # calibration text
print(rotate(model))  # the same function, without channels that stand out
print(quantize(model, expand(tokens, 2), bits=3, weighting=Weighting("attncon", low=0.005)))
