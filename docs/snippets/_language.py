import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnlib

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()  # stands for any decoder of transformers
ids = torch.randint(1, 64, (1, 48))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
