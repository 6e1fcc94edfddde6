"""Tiny random models, and attention calls without a model, for the hook tests."""

import torch

from attnlib.hooks import Intervention
from attnlib.hooks.call import run_attention
from attnlib.hooks.intervention import Stages
from attnlib.hooks.site import PairMask, Site

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def release():
    """The release of transformers, as numbers; (0,) without it."""
    try:
        import transformers
    except ImportError:
        return (0,)
    return tuple(int(n) for n in transformers.__version__.split(".")[:2])


def image_prompt(image_id, side, batch=2, seed=1):
    """Inputs of a vision-language model: 14 tokens a row, of which four are those of a picture (3, side, side)."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (batch, 14))
    ids[:, 3:7] = image_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, side, side),
    }


def language_model(family="llama", seed=0, **changes):
    import transformers

    config = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[family]
    torch.manual_seed(seed)
    extra = {"mistral": {"sliding_window": None}}.get(family, {})
    settings = getattr(transformers, f"{config}Config")(**{**SIZES, **extra, **changes})
    model = getattr(transformers, f"{config}ForCausalLM")(settings).eval()
    # Random weights of the usual size attend almost uniformly; larger ones make choices that can be told apart.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                p.mul_(12)
    return model


def prompt(batch=2, length=20, pad=(5, 0), seed=1):
    """Ids (B, N) with padding on the left, and their mask."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 60, (batch, length))
    for row, count in enumerate(pad):
        ids[row, :count] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def scores(model, inputs, new=5, **kwargs):
    """(steps, rows, V) logits that ``generate`` saw, and the sequences."""
    out = model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    return torch.stack(out.logits), out.sequences


def call_site(q, k, causal=True, types=None, allowed=None, offset=0, phase="prefill", layer=2, kind="self", **fields):
    """A site for tensors without a model."""
    n, m = q.shape[2], k.shape[2]
    if allowed is None and causal:
        allowed = (torch.arange(m) <= torch.arange(offset, offset + n)[:, None])[None, None]
    return Site(
        layer=layer, name="none", module=torch.nn.Identity(), kind=kind, heads=q.shape[1], kv_heads=k.shape[1],
        head_dim=q.shape[3], scale=q.shape[3] ** -0.5, n_queries=n, n_keys=m, mask=PairMask(n, m, allowed),
        q_pos=torch.arange(offset, offset + n), k_pos=torch.arange(m), offset=offset, phase=phase,
        q_types=None if types is None else types[:, offset : offset + n], k_types=types, **fields,
    )  # fmt: skip


def dense_attention(q, k, v, allowed=None):
    """The oracle: (output, weights), rows without keys give zeros."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if allowed is not None:
        s = s.masked_fill(~allowed, float("-inf"))
    w = torch.softmax(s, -1).nan_to_num(0.0)
    return w @ v, w


def run(intervention, site, q, k, v):
    """One attention call through an intervention, beside a plain kernel."""
    allowed = site.mask.allowed
    return run_attention(
        site, q, k, v, Stages([intervention]), lambda q, k, v: dense_attention(q, k, v, allowed)[0]
    )  # fmt: skip


class NoOp(Intervention):
    """Every call goes through the stages and comes out as it went in."""

    name = "no-op"

    def __init__(self, layers=None):
        self.layers, self.sites = layers, []

    def around_attention(self, site, q, k, v, call):
        self.sites.append(site)
        return call(q, k, v)

    def on_weights(self, site, weights, rows):
        return weights * 1.0

    def on_qkv(self, site, q, k, v):
        return q, k, v


class Watch(Intervention):
    """Keeps the sites and tensors of every call, and goes through the weights without changing them."""

    name = "watch"

    def __init__(self, layers=None):
        self.layers, self.calls = layers, []

    def around_attention(self, site, q, k, v, call):
        out = call(q, k, v)
        self.calls.append((site, q, k, v, out))
        return out

    def on_weights(self, site, weights, rows):
        return weights * 1.0


def predict(model, inputs):
    """What a denoiser predicts."""
    with torch.no_grad():
        return model(**inputs).sample
