"""Initial values are those of the authors' classes: how every parameter is drawn, a table.

A rule is ``constant(c)``, ``exactly(f)`` with the values themselves, or a distribution: ``uniform(bound)``,
``normal(std)``, ``truncated(std)`` (at two absolute units, as ``trunc_normal_`` has it). What no rule names is drawn as
torch's own layers draw it.
"""

import math

import pytest
import torch
from torch import nn

import attnlib
from attnlib.nn.multimodal.croc import PromptTokenPool, ReconstructionHead
from attnlib.nn.multimodal.wings_lorra import LayerWings


def constant(value):
    def check(name, p, module):
        assert torch.equal(p, torch.full_like(p, value)), f"{name} is not {value} everywhere"

    return check


def exactly(values):
    def check(name, p, module):
        expected = values(module).to(p)
        torch.testing.assert_close(p, expected.expand_as(p), rtol=1e-6, atol=0, msg=lambda m: f"{name}: {m}")

    return check


def drawn(std, largest):
    """Mean zero, this deviation within four of its own standard errors, and nothing beyond ``largest``."""

    def check(name, p, module):
        n = p.numel()
        limit = largest(p, module)
        assert 0 < float(p.abs().max()) <= limit * (1 + 1e-6), f"{name}: {float(p.abs().max()):.4g} beyond {limit:.4g}"
        if n < 24:  # too few to tell a deviation
            return
        # of a normal distribution; a uniform one scatters less
        off = 4 / math.sqrt(2 * n)
        found, expected = float(p.square().mean().sqrt()), std(p, module)
        assert abs(found / expected - 1) < off, f"{name}: deviation {found:.4g}, expected {expected:.4g} +- {off:.0%}"
        assert abs(float(p.mean())) < 4 * expected / math.sqrt(n), f"{name}: mean {float(p.mean()):.4g}"

    return check


def uniform(bound):
    value = bound if callable(bound) else lambda p, m: bound
    return drawn(lambda p, m: value(p, m) / math.sqrt(3), value)


def normal(std):
    return drawn(lambda p, m: std, lambda p, m: 6 * std)


def truncated(std):
    return drawn(lambda p, m: std, lambda p, m: min(2.0, 6 * std))


def fan_in(p, module):
    """Bound of torch's layers: ``1 / sqrt(fan_in)``, also for their biases."""
    owner = module.weight if isinstance(getattr(module, "weight", None), torch.Tensor) else p
    return owner[0].numel() ** -0.5


def xavier(p, module):
    return math.sqrt(6 / (p.shape[0] + p.shape[1]))


def xavier_heads(p, module):
    """``xavier_normal_`` of (H, D, D): fans are H D and D D."""
    return math.sqrt(2 / (p.shape[1] * p.shape[2] + p.shape[0] * p.shape[2]))


def he(p, module):
    """``kaiming_uniform_`` of (H, D, F), whose fan-in is D F."""
    return math.sqrt(6 / (p.shape[1] * p[0, 0].numel()))


def rays(module):
    """MSDeformAttn: head h looks along its angle, scaled to the unit square; point p starts p + 1 steps out."""
    angle = torch.arange(4) * (2 * math.pi / 4)
    grid = torch.stack([angle.cos(), angle.sin()], -1)
    grid = grid / grid.abs().amax(-1, keepdim=True)
    return (grid[:, None, None] * torch.arange(1.0, 4)[:, None]).expand(4, 2, 3, 2).reshape(-1)


def depth_rays(module):
    angle = torch.arange(4) * (2 * math.pi / 4)
    mean = torch.stack([angle.cos(), angle.sin()], -1).mean(-1)
    return (mean[:, None] * torch.arange(1.0, 3)).reshape(-1)


def lrpe(module):
    """``10000 ** (-2 i / dim)`` over the channels of all heads."""
    return torch.tensor([10000 ** (-2 * i / 64) for i in range(64)]).view(4, 1, 16)


BIG = dict(dim=64, num_heads=4)
LINEARS = {"": uniform(fan_in)}
TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)
ROWS = {
    "sigmoid": ("sigmoid-attention", BIG, {"norm.weight": constant(1.0), "norm.bias": constant(0.0)}),
    "selective": (
        "selective-self-attention",
        BIG,
        {"tau": constant(0.0), "beta": constant(-6.0)},
    ),
    "selective-double": (
        "ssa",
        dict(BIG, position="double_exponential", per_head=True),
        {"tau": constant(0.0), "beta": constant(2.0)},
    ),
    "selective-linear": ("ssa", dict(BIG, position="linear"), {"tau": constant(0.0), "beta": constant(1e-5)}),
    "selective-whole-number": ("ssa", dict(BIG, init=-1), {"tau": constant(0.0), "beta": constant(-1.0)}),
    "sink": (
        "attention-sink-empirical",
        dict(BIG, k_bias=True, v_bias=True),
        {"k_bias": normal(0.02), "v_bias": normal(0.02)},
    ),
    "gate": (
        "quantizable-transformers",
        dict(BIG, gate="conditional_per_token", gate_hidden=8),
        {"gate.w1": uniform(16**-0.5), "gate.b1": uniform(16**-0.5), "gate.w2": uniform(8**-0.5), "gate.b2": None},
    ),
    "gate-linear": (
        "quantizable-transformers",
        dict(BIG, gate="conditional_per_head", gate_init=0.25),
        {"gate.w2": uniform(16**-0.5), "gate.b2": constant(-math.log(3))},
    ),
    "gate-tuned": (
        "quantizable-transformers",
        dict(BIG, gate="conditional_per_token", fine_tuning=True, gate_init=0.5, gate_std=0.001),
        {"gate.w2": normal(0.001), "gate.b2": constant(0.0)},
    ),
    "gate-head": ("quantizable-transformers", dict(BIG, gate="unconditional_per_head"), {"gate.alpha": constant(0.0)}),
    "relative": ("quantizable-transformers", dict(BIG, relative="key"), {"distance_keys": normal(1.0)}),
    "rcmha": ("rcmha", BIG, {"distance": constant(0.0), "query_bias": constant(0.0)}),
    "psa": (
        "polarized-self-attention",
        dict(dim=64),
        {"up.weight": uniform(fan_in), "weight": normal((2 / 64) ** 0.5)},
    ),
    "ulsam": (
        "ulsam",
        dict(dim=128, num_splits=2),
        {
            "scale": uniform(1.0),
            "shift": uniform(1.0),
            "score": uniform(64**-0.5),
            "bias": None,
            "weight": constant(1.0),
        },
    ),
    "shvit": (
        "shvit",
        dict(dim=64, partial_dim=32),
        {
            "pre_norm.weight": constant(1.0),
            "pre_norm.bias": constant(0.0),
            "norm.bias": constant(0.0),
            "qkv.norm.weight": constant(1.0),
            "proj.norm.weight": constant(0.0),
        },
    ),
    "pldr": (
        "pldr-llm-plga",
        dict(BIG, metric_hidden=24, residual_units=1),
        {
            "learner.W": drawn(xavier_heads, lambda p, m: 1e9),
            "learner.p": drawn(xavier_heads, lambda p, m: 1e9),
            "learner.a": drawn(xavier_heads, lambda p, m: 1e9),
            "learner.b": constant(0.0),
            "learner.b_a": constant(0.0),
            "norm.weight": constant(1.0),
            "bias": constant(0.0),
            "weight": uniform(xavier),
        },
    ),
    "transnormer": (
        "lightning-attention-tnl",
        dict(BIG, init_std=0.02),
        {"lrpe.theta": exactly(lrpe), "weight": normal(0.02)},
    ),
    "lightning": ("lightning-attention-2", dict(BIG, lrpe=True), {"lrpe.theta": exactly(lrpe)}),
    "lolcats": (
        "lolcats",
        dict(BIG, feature_options=dict(bias=True)),
        {
            "window_factor": constant(-2.1972245773362196),
            "phi_q.weight": uniform(he),
            "phi_k.weight": uniform(he),
            "bias": None,
        },
    ),
    "lolcats-identity": (
        "lolcats",
        dict(BIG, feature_options=dict(identity=True), window_factor=0.0),
        {"window_factor": constant(0.0), "phi": exactly(lambda m: torch.eye(16))},
    ),
    "lolcats-adapter": (
        "lolcats",
        dict(BIG, feature_options=dict(hidden=4)),
        {"window_factor": constant(-2.1972245773362196), "phi": constant(0.0)},
    ),
    "maxvit": (
        "maxvit",
        dict(BIG, window_size=4),
        {"rel_bias": normal(0.02), "norm.weight": constant(1.0), "norm.bias": constant(0.0)},
    ),
    "dinat": ("dinat", dict(BIG, kernel_size=5), {"rpb": truncated(0.02)}),
    "agent": ("agent-attention", dict(BIG, num_agents=9, grid=6), {"_bias": truncated(0.02)}),
    "agent-sd": ("agent-sd", BIG, {}),
    "cswin": ("cswin-attention", BIG, {}),
    "attention-lepe": ("attention-lepe", dict(BIG, qkv_bias=True), {}),
    "sg-former": (
        "sg-former",
        dict(BIG, sr_ratio=4),
        {
            "sr.weight": normal(math.sqrt(2 / (16 * 64))),
            "lepe_conv.weight": normal(math.sqrt(2 / 9)),
            "norm.weight": constant(1.0),
            "bias": constant(0.0),
            "weight": truncated(0.02),
        },
    ),
    "favit": (
        "favit",
        dict(dim=128, num_heads=2, sr_ratio=2),
        {
            "pool.weight": normal(math.sqrt(2 / (4 * 16))),
            "pointwise.weight": normal(math.sqrt(2 / 112)),
            "conv.weight": normal(math.sqrt(2 / 9)),
            "depthwise.weight": normal(math.sqrt(2 / 9)),
            "norm.weight": constant(1.0),
            "bias": constant(0.0),
            "weight": truncated(0.02),
        },
    ),
    "medvitv2": ("medvitv2", dict(BIG, sr_ratio=2), {"norm.weight": constant(1.0), "norm.bias": constant(0.0)}),
    "soft": (
        "soft-softmax-free-transformer",
        BIG,
        {"landmark_norm.weight": constant(1.0), "landmark_norm.bias": constant(0.0)},
    ),
    "hilo": ("hilo-litv2", dict(BIG, qkv_bias=True), {}),
    "biformer": ("biformer", dict(BIG, n_win=2, topk=2), {}),
    "sparsifiner": (
        "sparsifiner",
        dict(BIG),
        {"reduce": truncated(0.02), "expand": truncated(0.02)},
    ),
    "focalnet": ("focalnet", dict(dim=64), {}),
    "davit": ("davit", dict(BIG), {}),
    "mambaout": ("mambaout", dict(dim=64), {}),
    "cga": (
        "cga",
        dict(dim=64),
        {
            "attention_bias": constant(0.0),
            "proj.norm.weight": constant(0.0),
            "norm.weight": constant(1.0),
            "norm.bias": constant(0.0),
        },
    ),  # fmt: skip
    "van": ("van-large-kernel-attention", dict(dim=64), {}),
    "spectformer": ("spectformer", dict(dim=64), {"filter": normal(0.02)}),
    "patnet-partial": (
        "patnet-partial-attention",
        dict(dim=64),
        {"norm.weight": constant(1.0), "bias": constant(0.0), "conv.weight": truncated(0.02)},
    ),
    "patnet-self": (
        "patnet-self-attention",
        dict(dim=64),
        {"norm.weight": constant(1.0), "bias": constant(0.0), "weight": truncated(0.02)},
    ),
    "smt": (
        "smt-scale-aware-modulation",
        dict(dim=64),
        {
            "norm.weight": constant(1.0),
            "local.0.weight": normal(math.sqrt(2 / 9)),
            "local.1.weight": normal(math.sqrt(2 / 25)),
            "local.2.weight": normal(math.sqrt(2 / 49)),
            "local.3.weight": normal(math.sqrt(2 / 81)),
            "within.conv.weight": normal(math.sqrt(2 / 8)),
            "across.conv.weight": normal(math.sqrt(2 / 64)),
            "bias": constant(0.0),
            "v.weight": truncated(0.02),
            "s.weight": truncated(0.02),
            "proj.weight": truncated(0.02),
        },
    ),
    "uniformer": ("uniformer", dict(dim=64), {}),
    "contmix": (
        "overlock-contmix",
        dict(dim=64),
        {
            "rpb": truncated(0.02),
            "norm.weight": constant(1.0),
            "norm.bias": constant(0.0),
            "pre.weight": constant(1.0),
            "pre.bias": constant(0.0),
        },
    ),  # fmt: skip
    "dynamicvis": (
        "dynamicvis",
        dict(dim=64, reduction=2),
        {
            "A_log": exactly(lambda m: torch.arange(1.0, 17).log()),
            "scan.D": constant(1.0),
            "norm.weight": constant(1.0),
        },
    ),
    "mhs-vm": (
        "mhs-vm",
        dict(dim=64, state_dim=2),
        {
            "A_log": exactly(lambda m: torch.arange(1.0, 3).log()),
            "scan.D": constant(1.0),
            "x_proj": uniform(16**-0.5),
            "step_weight": uniform(1.0),
            "step_bias": None,
            "norm.weight": constant(1.0),
            "norm.bias": constant(0.0),
        },
    ),
    "msvmamba": (
        "msvmamba",
        dict(dim=64, state_dim=2),
        {
            "A_log": exactly(lambda m: torch.arange(1.0, 3).log()),
            "scan.D": constant(1.0),
            "x_proj": uniform(128**-0.5),
            "step_weight": uniform(4**-0.5),
            "step_bias": None,
            "layer.weight": constant(1.0),
            "layer.bias": constant(0.0),
        },
    ),
    "vmamba": (
        "vmamba",
        dict(dim=64),
        {
            "A_log": exactly(lambda m: torch.arange(1.0, 17).log()),
            "scan.D": constant(1.0),
            "x_proj": uniform(128**-0.5),
            "step_weight": uniform(4**-0.5),
            "step_bias": lambda name, p, m: drawn(lambda q, n: 1.33, lambda q, n: math.log(10) + 1e-3)(
                name, torch.nn.functional.softplus(p).log() - math.log(1e-2), m
            ),
            "layer.weight": constant(1.0),
            "layer.bias": constant(0.0),
        },
    ),
    "deformable": (
        "deformable-attention",
        dict(dim=32, num_heads=4, num_levels=2, num_points=3),
        {
            "sampling_offsets.weight": constant(0.0),
            "sampling_offsets.bias": exactly(rays),
            "attention_weights": constant(0.0),
            "proj.bias": constant(0.0),
            "proj.weight": uniform(xavier),
        },
    ),
    "dfa3d": (
        "dfa3d",
        dict(dim=32, num_heads=4, num_points=2, depth_bins=4, reference="grid"),
        {
            "sampling_offsets_depth.weight": constant(0.0),
            "sampling_offsets_depth.bias": exactly(depth_rays),
            "sampling_offsets": None,
            "attention_weights": constant(0.0),
            "proj.bias": constant(0.0),
            "proj.weight": uniform(xavier),
        },
    ),
    "gaussian": (
        "gaussian-adaptive-attention",
        dict(dim=64, num_heads=16, num_gaussians=40),
        {"offset": constant(0.0), "width": lambda name, p, m: normal(1.0)(name, p.log(), m)},
    ),
    "moh": ("moh-mixture-of-heads", BIG, {}),
    "moh-vit": (
        "moh-vit-aggregated-attention",
        dict(dim=64, num_heads=4),
        {
            "temperature": constant(TEMPERATURE),
            "query_embedding": truncated(0.02),
            "learnable_tokens": truncated(0.02),
            "relative_pos_bias_local": truncated(0.0004),
            "learnable_bias": constant(0.0),
            "norm.weight": constant(1.0),
            "norm.bias": constant(0.0),
        },
    ),
    "p-adapter": ("p-adapter", BIG, {"adapter.p": constant(1.25), "adapter.theta": constant(0.0)}),
    "wings": ("wings-lorra", dict(BIG, rank=8), {".0.weight": truncated(0.02), ".1.weight": constant(0.0)}),
    "nprf": ("nprf-rpe-fft-attention", BIG, {"bias": None}),
    "key-driven": ("key-driven-gqa", BIG, {}),
    "illama": ("illama", BIG, {}),
    "activator": ("activator-geglu", dict(dim=64), {"norm.weight": constant(1.0), "norm.bias": constant(0.0)}),
}


def rule_of(rules, name):
    """The first rule whose text stands in the name; ``None`` in the table leaves a parameter to other tests."""
    for part, rule in {**rules, "": uniform(fan_in)}.items():
        if part in name:
            return rule
    raise AssertionError(name)


@pytest.mark.parametrize("row", ROWS)
def test_initial_values(row):
    slug, settings, rules = ROWS[row]
    torch.manual_seed(0)
    module = attnlib.create(slug, **settings)
    held = 0
    for prefix, owner in module.named_modules():
        for leaf, p in owner.named_parameters(recurse=False):
            rule = rule_of(rules, f"{prefix}.{leaf}" if prefix else leaf)
            if rule is not None:
                rule(f"{prefix}.{leaf}", p.detach(), owner)
                held += 1
    assert held, "no parameter was held"
    for part in rules:
        assert any(part in name for name, _ in module.named_parameters()), f"the rule {part!r} names nothing"


def test_a_wrong_exponent_is_caught():
    """The mutant that once lived: frequencies of exponent -1 i / dim instead of -2 i / dim."""
    module = attnlib.create("lightning-attention-2", **BIG, lrpe=True)
    with torch.no_grad():
        module.lrpe.theta.copy_(module.lrpe.theta.sqrt())
    with pytest.raises(AssertionError, match="lrpe.theta"):
        ROWS["lightning"][2]["lrpe.theta"]("lrpe.theta", module.lrpe.theta.detach(), module.lrpe)


@pytest.mark.parametrize("wrong", [0.018, 0.0225])
def test_a_wrong_deviation_is_caught(wrong):
    p = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * wrong
    with pytest.raises(AssertionError, match="deviation"):
        normal(0.02)("p", p, None)


def test_layers_of_wings_start_with_a_router_of_linear_layers():
    router = LayerWings(32, 4, rank=2).router
    uniform(fan_in)("linear.weight", router.linear.weight.detach(), router.linear)
    assert isinstance(router.linear, nn.Linear)


def test_croc_starts_as_its_authors_classes_alone():
    """Every layer is drawn anew, as linear maps are; positions and the pool are normal."""
    head = ReconstructionHead(64, 9, num_layers=2, head_dim=16, out_dim=32)
    for name, p in head.named_parameters():
        p = p.detach()
        if "norm" in name:
            constant(float(name.endswith("weight")))(name, p, None)
        elif name == "positions.weight":
            normal(1.0)(name, p, None)
        else:
            owner = head.get_submodule(name.rpartition(".")[0])
            bound = 64**-0.5 if "self_attn" in name else None
            uniform(fan_in if bound is None else bound)(name, p, owner)
    first, second = head.layers.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    normal(1.0)("entries", PromptTokenPool(64, 50).entries.detach(), None)
