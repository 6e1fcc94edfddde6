"""hyperattention: sorted hashes and a sample, one test per acceptance criterion of the card."""

import json

import pytest
import torch
from parity import HERE
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.ops.hyper import DRAWS, angular_hash, hyper_attention, hyper_codes

F64 = torch.float64


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def draws(*shape, seed=2):
    return torch.randint(DRAWS, shape, generator=torch.Generator().manual_seed(seed))


def plain(q, k, v, causal=False):
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return s.softmax(-1) @ v


def oracle(q, k, v, directions, sample, block, strict=False):
    """(N, D) and (M, D), query by query: its block exactly, the sample outside of it M / s times each."""
    scale, m = q.shape[-1] ** -0.5, k.shape[0]
    codes = [angular_hash(t, directions, strict) for t in (q, k)]
    order = codes[1].argsort(stable=True)
    rank = codes[0].argsort(stable=True).argsort()
    out = []
    for i in range(q.shape[0]):
        if strict:
            own = min(int((codes[1] < codes[0][i]).sum()), m - 1) // block
        else:
            own = int(rank[i]) // (block if q.shape[0] == m else -(-q.shape[0] // -(-m // block)))
        keys = list(range(own * block, min((own + 1) * block, m)))
        weights = torch.exp(k[order[keys]] @ q[i] * scale)
        num, den = weights @ v[order[keys]], weights.sum()
        for j in (sample * m // DRAWS).tolist():
            if j // block != own:
                w = torch.exp(k[order[j]] @ q[i] * scale) * m / len(sample)
                num, den = num + w * v[order[j]], den + w
        out.append(num / den)
    return torch.stack(out)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("n", "m"), [(24, 24), (21, 21), (13, 30)])
def test_output_equals_the_sum_over_block_and_sample(n, m, strict):
    q, k, v, directions, sample = (
        noise(1, 2, n, 6),
        noise(1, 2, m, 6, seed=3),
        noise(1, 2, m, 4, seed=4),
        noise(6, 3),
        draws(2, 7),
    )
    out = hyper_attention(q, k, v, directions, sample, block_size=5, sample_size=7, min_seq_len=4, strict=strict)
    for h in range(2):
        torch.testing.assert_close(out[0, h], oracle(q[0, h], k[0, h], v[0, h], directions, sample[h], 5, strict))


def test_causal_attention_by_halves():
    q, k, v, directions, sample = *noise(3, 1, 1, 22, 6), noise(6, 3), draws(1, 5)
    settings = dict(block_size=4, sample_size=5, min_seq_len=6)
    out = hyper_attention(q, k, v, directions, sample, causal=True, **settings)[0, 0]
    # 22 = 11 + 11, and 11 = 6 + 5: exact up to 6 tokens, the second half of everything reads the first.
    torch.testing.assert_close(out[:6], plain(q, k, v, True)[0, 0, :6])
    part = hyper_attention(
        q[:, :, 11:], k[:, :, :11], v[:, :, :11], directions, sample, strict=True, partial=True, **settings
    )
    own = hyper_attention(
        q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], directions, sample, causal=True, partial=True, **settings
    )
    torch.testing.assert_close(out[11:], own.merge(part).finish()[0, 0])


def test_short_sequences_and_single_blocks_are_exact():
    q, k, v = noise(3, 2, 2, 20, 6)
    for causal in (False, True):
        out = hyper_attention(q, k, v, noise(6, 3), draws(2, 4), sample_size=4, min_seq_len=20, causal=causal)
        torch.testing.assert_close(out, plain(q, k, v, causal))
        out = hyper_attention(
            q, k, v, noise(6, 3), draws(2, 4), sample_size=4, block_size=20, min_seq_len=3, causal=causal
        )
        torch.testing.assert_close(out, plain(q, k, v, causal))


def test_the_estimate_is_unbiased_and_its_error_falls_with_the_sample():
    q, k, v, directions = *(0.5 * noise(3, 1, 1, 32, 6)), noise(6, 3)
    codes = [angular_hash(t[0, 0], directions) for t in (q, k)]
    mass = torch.exp(q @ k.mT * 6**-0.5)[0, 0].sum(-1)
    errors = {}
    for size in (8, 32):
        found = []
        for seed in range(200):
            part = hyper_attention(
                q,
                k,
                v,
                directions,
                draws(1, size, seed=seed),
                block_size=4,
                sample_size=size,
                min_seq_len=4,
                partial=True,
            )
            found.append(part.lse().exp()[0, 0])
        found = torch.stack(found)
        assert len(codes[0]) == 32
        torch.testing.assert_close(found.mean(0), mass, rtol=0.06, atol=0)
        errors[size] = ((found - mass) ** 2).mean().sqrt()
    assert errors[8] / errors[32] == pytest.approx(2, rel=0.2)


def test_planted_heavy_pairs_are_found():
    generator = torch.Generator().manual_seed(0)
    k = 3 * torch.nn.functional.normalize(noise(1, 1, 512, 16), dim=-1)
    order = torch.randperm(512, generator=generator)
    q = k[:, :, order]
    v = noise(1, 1, 512, 8, seed=5)
    q, exact = 6 * q, plain(6 * q, k, v)

    def error(block, sample, bits):
        out = hyper_attention(
            q, k, v, noise(16, bits), draws(1, sample), block_size=block, sample_size=sample, min_seq_len=8
        )
        return ((out - exact).norm() / exact.norm()).item()

    hashed, sampled = error(64, 64, 6), error(1, 127, 6)
    assert hashed < 0.5 * error(64, 64, 0) and hashed < 0.5 * error(64, 64, 1)
    assert sampled > 0  # blocks of one key find what the hash sorts exactly side by side, and no more
    causal = 6 * k
    out = hyper_attention(
        causal, k, v, noise(16, 6), draws(1, 64), block_size=64, sample_size=64, min_seq_len=32, causal=True
    )
    far = plain(causal, k, v, True)
    assert (out - far).norm() < 0.5 * far.norm()


def test_work_is_linear_in_block_and_sample():
    def work(n, block, sample):
        q, k, v = torch.randn(3, 1, 1, n, 8, dtype=F64)  # the kernel that serves float32 is not counted
        with FlopCounterMode(display=False) as counter:
            hyper_attention(q, k, v, noise(8, 0), draws(1, sample), block_size=block, sample_size=sample, min_seq_len=8)
        return counter.get_total_flops()

    assert work(1024, 16, 16) == 2 * work(512, 16, 16) == 4 * 1024 * (16 + 16) * 8
    assert work(512, 32, 16) - work(512, 16, 16) == work(512, 16, 32) - work(512, 16, 16)


def test_later_tokens_change_nothing_unless_ranks_align_them():
    torch.manual_seed(0)
    settings = dict(dim=8, num_heads=2, num_projs=3, block_size=4, sample_size=3, min_seq_len=6, causal=True)
    x = noise(1, 32, 8)
    other = x.clone()
    other[:, 24:] = noise(1, 8, 8, seed=9) * 5
    for strict in (True, False):
        m = attnlib.create("hyperattention", **settings, strict=strict).double()
        y, z = m(x), m(other)
        assert torch.allclose(y[:, :24], z[:, :24], atol=1e-12) is strict
        assert ("causal-self" in m.traits.patterns) is strict


def test_the_authors_arithmetic_is_reproduced_and_mended():
    with safe_open(HERE / "hyperattention.safetensors", "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        config = json.loads(f.metadata()["config"])
    for case, settings in config.items():
        held = {k.split("/")[1]: t for k, t in tensors.items() if k.startswith(f"{case}/")}
        q, k, v = (held[name].clone().requires_grad_() for name in "qkv")
        settings.pop("num_projs")
        torch.manual_seed(9)  # of their sample
        part = hyper_attention(q, k, v, held["directions"], partial=True, **settings)
        y = part.finish()
        (y * held["g"]).sum().backward()
        for name, found in dict(y=y, lse=part.lse(), dq=q.grad, dk=k.grad, dv=v.grad).items():
            torch.testing.assert_close(
                found, held[name], rtol=1e-5, atol=5e-6, msg=lambda m, c=case, n=name: f"{c} {n}: {m}"
            )
    # Where the own block holds all keys, what counts twice and what pads it is a difference.
    q, k, v = noise(3, 1, 1, 11, 6)
    call = dict(block_size=8, sample_size=0, min_seq_len=2)
    theirs = hyper_attention(q, k, v, noise(6, 0), draws(1, 0), compat="authors", **call)
    ours = hyper_attention(q, k, v, noise(6, 0), draws(1, 0), **call)
    torch.testing.assert_close(ours[..., :8, :], theirs[..., :8, :])
    assert (ours - theirs)[..., 8:, :].abs().max() > 1e-2


def test_far_apart_parts_merge_without_loss():
    q = torch.full((1, 1, 16, 4), 12.0)
    k, v = torch.randn(2, 1, 1, 16, 4, generator=torch.Generator().manual_seed(0))
    k[..., :8, :] -= 4
    call = dict(block_size=8, sample_size=400, min_seq_len=4)
    part = hyper_attention(q, k, v, torch.eye(4)[:, :0], draws(1, 400), partial=True, **call)
    assert part.lse().isfinite().all() and part.finish().isfinite().all()


def test_samples_are_the_same_in_every_call_until_they_are_drawn_again():
    m = attnlib.create("hyperattention", dim=8, num_heads=2, block_size=4, sample_size=3, min_seq_len=4).double()
    x = noise(1, 24, 8)
    y = m(x)
    torch.testing.assert_close(m(x), y)
    m.redraw(torch.Generator().manual_seed(3))
    assert not torch.allclose(m(x), y)
    fresh = attnlib.create("hyperattention", dim=8, num_heads=2, block_size=4, sample_size=3, min_seq_len=4, fresh=True)
    fresh = fresh.double()
    assert not torch.allclose(fresh(x), fresh(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(block_size=0), "block_size must be an integer of at least 1"),
        (dict(sample_size=-1), "sample_size"),
        (dict(min_seq_len=0), "min_seq_len"),
        (dict(num_projs=-1), "num_projs"),
        (dict(compat="cuda"), "compat='cuda' is not possible"),
        (dict(compat="authors", causal=True, strict=True), "strict=True is not what the authors"),
        (dict(alibi=True), "alibi is not possible"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        attnlib.create("hyperattention", dim=8, num_heads=2, **settings)


def test_bad_calls_are_refused():
    q = noise(1, 2, 12, 4)
    with pytest.raises(ValueError, match="directions must be"):
        hyper_attention(q, q, q, noise(5, 3))
    with pytest.raises(ValueError, match="as many queries as keys"):
        hyper_attention(q[:, :, :6], q, q, noise(4, 3), causal=True)
    with pytest.raises(ValueError, match="draws must be"):
        hyper_attention(q, q, q, noise(4, 3), draws(2, 5), sample_size=6)
    with pytest.raises(ValueError, match="equally many blocks"):
        hyper_attention(q[:, :, :5], q, q, noise(4, 3), block_size=4, sample_size=2, min_seq_len=1, compat="authors")
    m = attnlib.create("hyperattention", dim=8, num_heads=2)
    with pytest.raises(ValueError, match="takes no mask"):
        m(noise(1, 6, 8).float(), mask=torch.ones(6, 6, dtype=torch.bool))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("n", "block", "sample", "absent"),
    [(64, 8, 12, 0), (61, 8, 5, 0), (64, 8, 12, 40), (50, 16, 3, 50), (40, 64, 4, 3), (64, 8, 0, 9)],
)
def test_the_kernel_of_float32_gives_what_plain_products_give(causal, strict, n, block, sample, absent):
    q, k, v = noise(3, 2, 2, n, 4, seed=5)
    directions, drawn = noise(4, 3), draws(2, sample)
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, n - absent :] = False
    codes = hyper_codes(q, k, directions, strict)
    call = dict(block_size=block, sample_size=sample, min_seq_len=8, causal=causal, strict=strict, codes=codes)
    call["valid"] = valid if absent else None
    expected = hyper_attention(q, k, v, directions, drawn, **call)
    single = [t.float() for t in (q, k, v, directions)]
    out = hyper_attention(*single, drawn, **call)
    rows = valid[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[rows].double(), expected[rows], atol=2e-5, rtol=2e-5)
    assert torch.isfinite(out).all()
    watched = hyper_attention(single[0].requires_grad_(), *single[1:], drawn, **call)
    torch.testing.assert_close(watched[rows].detach(), out[rows], atol=2e-5, rtol=2e-5)
