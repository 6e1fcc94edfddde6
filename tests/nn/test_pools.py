"""Pools: held to the released classes, to the conformance kit, and to what the card of efficient probing asks."""

import json

import pytest
import torch
import torch.nn.functional as F
from parity import HERE
from safetensors import safe_open

import attnlib
from attnlib.check import Case, check
from attnlib.nn.pools import Pool
from attnlib.nn.registry import find, list_mechanisms

F64 = torch.float64
ROWS = [
    Case("mean-pool", dict(dim=8), (7,)),
    Case("efficient-probing", dict(dim=16, num_queries=4), (7,)),
    Case("efficient-probing", dict(dim=16, num_queries=2, d_out=4, qkv_bias=True), (7,), "narrow"),
    Case("acmil", dict(dim=8, num_branches=2, hidden_dim=4, top_k=0), (7,)),
    Case("acmil-mha", dict(dim=8, num_branches=2, num_heads=2, top_k=0), (7,)),
    Case("abmilp", dict(dim=8), (7,)),
    Case("simpool", dict(dim=8), (7,)),
    Case("esimpool", dict(dim=8, num_heads=4), (7,)),
    Case("aim-pool", dict(dim=8, num_heads=2), (7,)),
    Case("siglip-pool", dict(dim=8, num_heads=2), (7,)),
    Case("jepa-pool", dict(dim=8, num_heads=2), (7,)),
    Case("cae-pool", dict(dim=8, num_heads=2), (7,)),
    Case("coca-pool", dict(dim=8, num_heads=2, head_dim=4), (7,)),
    Case("cait-pool", dict(dim=8, num_heads=2), (7,)),
    Case("clip-pool", dict(dim=8, num_tokens=7, num_heads=2), (7,), grid_setting="num_tokens"),
    Case("dino-vit-pool", dict(dim=8, num_heads=2), (7,)),
    Case("dolg-pool", dict(dim=8), (7,)),
]


#: What every pool is held to; efficient probing is held to all there is.
CLAIMS = (
    "traits", "resolution", "extras", "permutation", "validity", "batch", "batch sizes", "work", "memory", "gradient",
    "bfloat16", "export", "inputs untouched",
)  # fmt: skip


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_conformance(case):
    report = check(case, select=None if case.name == "efficient-probing" else CLAIMS)
    assert report.ok, "\n" + "\n".join(f"{f.claim}: {f.why}" for f in report.failed)
    for claim in ("validity", "gradient", "batch sizes", "export"):
        assert report[claim].status == "pass", report[claim].why
    if attnlib.create(case.name, **case.config).traits.permutation_equivariant:
        assert report["permutation"].status == report["resolution"].status == "pass"


def test_every_pool_has_a_row():
    assert set(list_mechanisms("pool")) <= {row.name for row in ROWS} | {"cbam-pool"}
    for name in list_mechanisms("pool"):
        assert issubclass(find(name), Pool) and name not in list_mechanisms()


# ---- the released classes


def recorded():
    with safe_open(HERE / "pools.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        return tensors, json.loads(f.metadata()["config"])


TENSORS, CONFIG = recorded()


def under(prefix):
    return {k[len(prefix) :]: v for k, v in TENSORS.items() if k.startswith(prefix)}


@pytest.mark.parametrize("case", CONFIG)
def test_output_and_gradients_equal_the_released_class(case):
    name = case.split("/")[0]
    m = attnlib.create(name, **CONFIG[case]["settings"])
    convert = find(name).convert_state_dict
    m.load_state_dict(convert(under(f"{case}:sd/")))
    m.double().train(CONFIG[case]["train"])
    x = TENSORS[f"{case}:x"].double().requires_grad_()
    y = m(x)
    near = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, TENSORS[f"{case}:y"].double(), **near)
    (y * TENSORS[f"{case}:g"].double()).sum().backward()
    torch.testing.assert_close(x.grad, TENSORS[f"{case}:dx"].double(), **near)
    theirs = convert({**under(f"{case}:sd/"), **under(f"{case}:dw/")})
    held = dict(m.named_parameters())
    assert held.keys() <= theirs.keys()
    for key, p in held.items():
        torch.testing.assert_close(p.grad, theirs[key].double(), **near, msg=lambda said, key=key: f"{key}: {said}")


# ---- efficient probing


def build(name, **settings):
    torch.manual_seed(0)
    return attnlib.create(name, **settings).double().eval()


def tokens(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def test_ep_has_the_parameters_of_the_paper():
    def count(**settings):
        return sum(p.numel() for p in attnlib.create("efficient-probing", dim=768, **settings).parameters())

    assert count() == 614_400 and count(d_out=8) == 98_304 and count(num_queries=1) == 768 + 768**2


@pytest.mark.parametrize("settings", [dict(num_queries=4), dict(num_queries=2, d_out=4), dict(num_queries=1)])
def test_ep_is_attention_with_the_tokens_for_keys(settings):
    m, x = build("efficient-probing", dim=16, qkv_bias=True, **settings), tokens(2, 9, 16)
    torch.nn.init.normal_(m.queries)
    out, maps = [], []
    values = m.v(x).unflatten(-1, (m.num_queries, -1))
    for j, u in enumerate(m.queries):
        a = torch.stack([x[:, n] @ u / 4 for n in range(9)], 1).softmax(1)
        out.append((a[..., None] * values[:, :, j]).sum(1))
        maps.append(a)
    found = m(x, returns=("weights",))
    torch.testing.assert_close(found.y, torch.cat(out, -1))
    torch.testing.assert_close(found.weights.squeeze(2), torch.stack(maps, 1))
    torch.testing.assert_close(m(x), found.y)
    m.v.register_forward_hook(lambda layer, args, y: None)  # called then, not only read
    torch.testing.assert_close(m(x), found.y)


def test_ep_of_zero_queries_is_mean_pooling():
    m, x = build("efficient-probing", dim=16, num_queries=4), tokens(2, 9, 16)
    torch.nn.init.zeros_(m.queries)
    torch.testing.assert_close(m(x), m.v(x.mean(1)))


def test_ep_projects_queries_and_not_tokens():
    """Counted: at 192 channels less than a quarter of the work of multi-head pooling, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for name in ("efficient-probing", "aim-pool"):
        module = attnlib.create(name, dim=192)
        x = torch.randn(2, 196, 192, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.25 * counts[1]


def test_ep_finds_one_patch_where_the_mean_does_not():
    """A class is a direction that one random token carries; queries of several maps end up apart."""
    torch.manual_seed(0)
    directions = 4 * F.normalize(torch.randn(6, 32), dim=-1)

    def batch(n):
        labels = torch.randint(6, (n,))
        x = torch.randn(n, 24, 32)
        x[torch.arange(n), torch.randint(24, (n,))] += directions[labels]
        return x, labels

    scores = {}
    for name, settings in (("efficient-probing", dict(num_queries=8)), ("mean-pool", {})):
        model = torch.nn.Sequential(
            attnlib.create(name, dim=32, **settings), torch.nn.BatchNorm1d(32, affine=False), torch.nn.Linear(32, 6)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            x, labels = batch(128)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        x, labels = batch(1000)
        scores[name] = float((model.eval()(x).argmax(1) == labels).float().mean())
        if name == "efficient-probing":
            maps = model[0](x, returns=("weights",)).weights.squeeze(2)
            overlap = (F.normalize(maps, dim=-1) @ F.normalize(maps, dim=-1).transpose(1, 2)).mean(0)
            apart = (overlap.sum() - overlap.trace()) / (8 * 7)
    assert scores["efficient-probing"] > scores["mean-pool"] + 0.2, scores
    assert apart < 0.8


def test_bad_input():
    with pytest.raises(ValueError, match="d_out.*num_queries=32.*dim=48"):
        attnlib.create("efficient-probing", dim=48)
    with pytest.raises(TypeError, match="num_heads"):
        attnlib.create("efficient-probing", dim=64, num_heads=2)
    pool = attnlib.create("mean-pool", dim=4)
    valid = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"samples \[1\] have none"):
        pool(torch.randn(2, 2, 4), valid=valid)
    with pytest.raises(ValueError, match="at least one token"):
        pool(torch.randn(2, 0, 4))
    assert pool(torch.randn(0, 3, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match="cannot return"):
        pool(torch.randn(2, 2, 4), returns=("weights",))
    with pytest.raises(ValueError, match="num_tokens=9"):
        attnlib.create("clip-pool", dim=8, num_tokens=9)(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="square map"):
        attnlib.create("cbam-pool", dim=8)(torch.randn(1, 5, 8))


def test_cbam_reads_a_square_map_of_the_tokens_that_exist():
    m, x = build("cbam-pool", dim=8), tokens(2, 9, 8)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 6:] = False
    clean = m(x.masked_fill(~valid[..., None], 0.0), valid=valid)
    torch.testing.assert_close(m(x.masked_fill(~valid[..., None], float("nan")), valid=valid), clean)
    torch.testing.assert_close(m(x, valid=torch.ones_like(valid)), m(x))
