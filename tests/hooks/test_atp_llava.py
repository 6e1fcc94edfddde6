"""ATP: its equations, soft masks that train and removals that save, and a budget that is learned."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hooks.models import call_site, scores

pytest.importorskip("transformers")

import attnlib  # noqa: E402
from attnlib.cache import SnapKV  # noqa: E402
from attnlib.hooks import IMAGE, PAD, TEXT, Intervention, TokenTypes  # noqa: E402
from attnlib.hooks import call as hooks_call  # noqa: E402
from attnlib.reduce import ATP, ATPGate, DyVTE, adaptive_rate, atp_gates, atp_losses, spatial_scores  # noqa: E402
from attnlib.reduce.base import grid_size  # noqa: E402
from hooks.pictures import IMAGE_ID, TOKENS, image_slots, picture_inputs, picture_model  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "atp-llava.safetensors"
TYPES = TokenTypes(IMAGE_ID)


@pytest.fixture(scope="module")
def model():
    return picture_model()


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


class Forbid(Intervention):
    """The oracle: nothing is removed, but nobody reads removed keys behind their layer. ``{layer: (B, N) stays}``."""

    kinds = ("self",)

    def __init__(self, stays):
        self.stays = stays

    def around_attention(self, site, q, k, v, call):
        allowed = site.mask.dense()
        for layer, keep in self.stays.items():
            if site.layer > layer:
                wide = torch.ones(q.shape[0], site.n_keys, dtype=torch.bool)
                wide[:, : keep.shape[1]] = keep.repeat_interleave(q.shape[0] // len(keep), 0)
                allowed = allowed & wide[:, None, None]
        return call(q, k, v, mask=allowed)


def gates_of(model, layers=(0, 1), seed=0, rate=0.0625, theta_r=0.0, theta_s=0.0):
    """Gates whose thresholds lie near chosen values, by their biases."""
    torch.manual_seed(seed)
    gates = atp_gates(model, layers, rate)
    with torch.no_grad():
        for gate in gates.values():
            gate.redundant_threshold_head.bias.fill_(theta_r)
            gate.spatial_threshold_head.bias.fill_(theta_s)
    return gates


# ---- the re-implementation


@pytest.mark.parametrize("case", ["quarter", "sparse", "half"])
def test_scores_thresholds_masks_losses_and_gradients_equal_the_reimplementation(case):
    with safe_open(FIXTURE, "pt") as f:
        config = json.loads(f.metadata()["config"])[case]
        t = {k[len(case) + 1 :]: f.get_tensor(k) for k in f.keys() if k.startswith(case)}  # noqa: SIM118
    n, tokens = t["q"].shape[2], config["tokens"]
    types = torch.full((2, n), TEXT)
    types[:, :tokens] = IMAGE
    gate = ATPGate(config["dim"], config["rate"], temperature=config["temperature"])
    gate.load_state_dict({k[3:]: v for k, v in t.items() if k.startswith("sd/")})
    site = call_site(t["q"], t["k"], causal=False, types=types)
    own, cross = ATP({0: gate}).statistics(site, t["q"], t["k"])
    close(own[:, :tokens], t["own"])
    close(cross[:, :tokens], t["cross"])
    red, image = (own + cross) / 2, types == IMAGE
    close(red[:, :tokens], t["red"])
    spatial = spatial_scores(torch.arange(tokens), (4, 4), config["rate"])
    close(spatial, t["spa"])
    theta_r, theta_s = gate(own, cross, image)
    close(theta_r, t["theta_r"])
    close(theta_s, t["theta_s"])
    soft = gate.log_mask(red[:, :tokens], spatial, theta_r, theta_s).exp()
    close(soft, t["soft"])
    hard = (red[:, :tokens] > theta_r) | (spatial > theta_s)
    assert torch.equal(hard, t["hard"])
    kept = [soft.sum(1), (soft * 0.5).sum(1)]
    losses = atp_losses(kept, [4, 14], torch.tensor([tokens, tokens]), target=4)
    for name in ("atp", "target", "total"):
        close(losses[name], t[name])
    ((soft * t["g"]).sum() + losses["total"]).backward()
    for name, p in gate.named_parameters():
        close(p.grad, t[f"dw/{name}"])


# ---- equations


@pytest.mark.parametrize("elements", [1 << 22, 40])
def test_statistics_equal_an_oracle_under_a_causal_mask(elements, monkeypatch):
    """Only pairs that may meet count; blocks of rows give the same."""
    monkeypatch.setattr(hooks_call, "BLOCK_ELEMENTS", elements)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 10, 8, dtype=torch.float64), torch.randn(2, 2, 10, 8, dtype=torch.float64)
    types = torch.full((2, 10), TEXT)
    types[:, 2:7] = IMAGE
    types[1, :3] = PAD
    allowed = (torch.arange(10) <= torch.arange(10)[:, None]) & (types != PAD)[:, None, None]
    site = call_site(q, k, types=types, allowed=allowed)
    own, cross = ATP({0: ATPGate(4)}).statistics(site, q, k)
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    a = s.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    for b in range(2):
        for j in range(10):
            if types[b, j] != IMAGE:
                assert own[b, j] == 0 and cross[b, j] == 0
                continue
            seen = [i for i in range(10) if types[b, i] == IMAGE and i <= j]
            torch.testing.assert_close(own[b, j], s[b, :, j, seen].mean())
            readers = [t for t in range(10) if types[b, t] == TEXT and t >= j]
            torch.testing.assert_close(cross[b, j], a[b, :, readers, j].mean())


def test_grid_and_rates():
    place = torch.arange(24)
    grid = spatial_scores(place, (4, 6), 0.25)
    assert (grid > 0).nonzero().flatten().tolist() == [0, 2, 4, 12, 14, 16]
    close(grid[0], torch.tensor(0.25))
    assert (spatial_scores(place, (4, 6), 1 / 16) > 0).nonzero().flatten().tolist() == [0, 4]
    # A rate of 0.5 has a stride of 1 and a score of nothing: every token is sampled, none counts.
    assert (spatial_scores(place, (4, 6), 0.5) == 0).all() and (spatial_scores(place, (4, 6), 0.32) > 0).sum() == 6
    assert [adaptive_rate(n, 32) for n in (4, 14, 24)] == [0.5, 0.25, 0.0625]
    assert sum(p.numel() for p in ATPGate(4096).parameters()) == 20482


def test_losses():
    of = torch.tensor([576, 576])
    at = [torch.tensor([100.0, 188.0]), torch.tensor([144.0, 144.0])]
    assert atp_losses(at, [4, 14], of)["target"] == 0
    assert atp_losses(at, [4, 14], of, target=0.25)["target"] == 0
    assert atp_losses([k + 1 for k in at], [4, 14], of)["target"] == 1
    shallow, deep = (atp_losses(at, layers, of)["atp"] for layers in ([4, 14], [5, 15]))
    close(deep - shallow, torch.tensor(0.5))


# ---- inference


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_removal_equals_masks(family, mode):
    """Kept sets computed here, from the model's own states; the masked model gives the same logits."""
    model = picture_model(family)
    inputs = picture_inputs((1, 2))
    gates = gates_of(model, (0, 1), theta_r=-0.3, theta_s=0.5)
    image = image_slots(inputs)
    types = TYPES(inputs["input_ids"]).masked_fill(inputs["attention_mask"] == 0, PAD)
    stays = {}

    class Decide(Intervention):
        """The equations, densely, on what the masked model computes."""

        kinds = ("self",)
        layers = (0, 1)

        def around_attention(self, site, q, k, v, call):
            if site.phase == "prefill" and site.layer not in stays:
                here = image & stays[0] if site.layer else image
                allowed = site.mask.dense() & (here | ~image)[:, None, None]
                s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * site.scale
                a = s.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0).mean(1)
                pair = allowed[:, 0] & here[:, None] & here[:, :, None]
                own = (s.mean(1) * pair).sum(2) / pair.sum(2).clamp(min=1)
                read = allowed[:, 0] & (types == TEXT)[:, :, None]
                cross = (a * read).sum(1) / read.sum(1).clamp(min=1) * here
                gate = gates[str(site.layer)]
                theta_r, theta_s = gate(own, cross, here)
                place = (image.long().cumsum(1) - 1).clamp(min=0) % TOKENS
                spa = spatial_scores(place, (4, 4), 0.0625)
                keep = (((own + cross) / 2 > theta_r) | (spa > theta_s)) & here
                assert keep.any(1).all() and (site.layer or not torch.equal(keep, here))
                stays[site.layer] = keep | ~image
            return call(q, k, v)

    with torch.no_grad(), attnlib.attach(model, Decide(), Forbid(stays)):
        model(**inputs, use_cache=False)
    with attnlib.attach(model, Forbid(dict(stays))):
        want, _ = scores(model, inputs, **mode)
    with attnlib.attach(model, ATP(gates), token_types=TYPES) as session:
        got, _ = scores(model, inputs, **mode)
    if mode != {"use_cache": False}:
        close(got, want)
        rows = mode.get("num_beams", 1)
        for layer, keep in stays.items():
            count = (keep & image).sum(1).repeat_interleave(rows)
            assert torch.equal(session.results["atp"]["kept"][layer], count)
        assert session.results["atp"]["saved"] > 0
    else:
        close(got[0], want[0])  # later steps decide again, with more text


def test_thresholds_that_keep_everything_are_the_untouched_model(model):
    inputs = picture_inputs((1, 2))
    before = scores(model, inputs)
    with attnlib.attach(model, ATP(gates_of(model), thresholds=(float("-inf"), 0.0)), token_types=TYPES) as session:
        after = scores(model, inputs)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert session.results["atp"]["kept"][0].tolist() == [TOKENS, 2 * TOKENS]


def test_only_the_grid_stays_when_everything_is_redundant(model):
    inputs = picture_inputs((1, 2))
    image = image_slots(inputs)
    atp = ATP(gates_of(model, (0,), rate=0.25), thresholds=(float("inf"), 0.1))
    with attnlib.attach(model, atp, token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    slots = session.results["atp"]["slots"]
    for b in range(2):
        kept = [s for s in slots[b].tolist() if s >= 0 and image[b, s]]
        place = [(int(image[b, :s].sum()) % TOKENS) for s in kept]
        assert place == [0, 2, 8, 10] * (b + 1)


def test_at_least_one_token_stays(model):
    inputs = picture_inputs((1, 2, 0))
    atp = ATP(gates_of(model, (0, 1)), thresholds=(float("inf"), 1.0))
    with attnlib.attach(model, atp, token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    assert session.results["atp"]["kept"][0].tolist() == [1, 1, 0]
    assert session.results["atp"]["kept"][1].tolist() == [1, 1, 0]


def test_images_that_are_not_square(model):
    inputs = picture_inputs((1,))
    atp = ATP(gates_of(model, (0,), rate=0.25), size=(2, 8), thresholds=(float("inf"), 0.1))
    with attnlib.attach(model, atp, token_types=TYPES) as session, torch.no_grad():
        model(**inputs)
    assert session.results["atp"]["kept"][0].tolist() == [4]
    slots = [s - 3 for s in session.results["atp"]["slots"][0].tolist() if 3 <= s < 19]
    assert slots == [0, 2, 4, 6]
    with attnlib.attach(model, ATP(gates_of(model, (0,)), size=(3, 3)), token_types=TYPES):
        with pytest.raises(ValueError, match=r"images of size=\(3, 3\) do not fit the \[16\] visual tokens"):
            model(**inputs)
    with pytest.raises(ValueError, match="8 visual tokens are no square"):
        grid_size(torch.tensor([8, 24]), None)
    assert grid_size(torch.tensor([32]), None, 16) == (4, 4) and grid_size(torch.tensor([0]), None) == (1, 1)


def test_composes(model):
    inputs = picture_inputs((1, 1))
    parts = [ATP(gates_of(model, (0,), theta_r=-0.3)), DyVTE(exit_layer=1), SnapKV(cap=9, window_size=3)]
    with attnlib.attach(model, *parts, token_types=TYPES) as session:
        got, _ = scores(model, inputs)
    assert torch.isfinite(got).all()
    lengths = session.results["atp"]["lengths"]
    assert lengths[0] > lengths[1] > lengths[2] == 8
    assert session.results["atp"]["flops"] == session.results["dyvte"]["flops"]


# ---- training


def test_soft_masks_turn_into_the_removal(model):
    """For large temperatures the weighted model is the pruned one; for small ones it is neither."""
    inputs = picture_inputs((1, 1))
    gates = gates_of(model, (0, 1), theta_r=-0.3, theta_s=0.5)
    with attnlib.attach(model, ATP(gates), token_types=TYPES), torch.no_grad():
        hard = model(**inputs).logits[:, -1]
    gaps = []
    try:
        model.train()
        for temperature in (10.0, 1e2, 1e5):
            for gate in gates.values():
                gate.temperature = temperature
            with attnlib.attach(model, ATP(gates), token_types=TYPES), torch.no_grad():
                gaps.append(float((model(**inputs).logits[:, -1] - hard).abs().max()))
    finally:
        model.eval()
    assert gaps[0] > gaps[2] and gaps[2] < 1e-4 < gaps[0]


def test_soft_masks_multiply_weights_of_later_layers(model):
    inputs = picture_inputs((1, 2))
    gates = gates_of(model, (0, 1))
    atp = ATP(gates)
    plain = {}

    class Look(Intervention):
        kinds = ("self",)

        def __init__(self, log):
            self.log = log

        def on_weights(self, site, weights, rows):
            self.log.setdefault(site.layer, []).append(weights)
            return weights

    log = {}
    try:
        model.train()
        with attnlib.attach(model, Look(plain)), torch.no_grad():
            model(**inputs)
        with attnlib.attach(model, atp, Look(log), token_types=TYPES), torch.no_grad():
            model(**inputs)
    finally:
        model.eval()
    assert torch.equal(plain[0][0], log[0][0])
    mask = atp._masks[0].exp()
    assert 0 < mask[image_slots(inputs)].min() < 0.9 and (mask[~image_slots(inputs)] == 1).all()
    want = plain[1][0] * mask[:, None, None]
    want = want / want.sum(-1, keepdim=True).clamp(min=1e-9)
    # Layer 1 reads the same states in both, since layer 0 was left alone.
    close(log[1][0], want)


def test_gradients_reach_the_gates_and_the_loss_counts_tokens(model):
    inputs = picture_inputs((1, 2, 0), after=8)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    gates = gates_of(model, (0, 1))
    atp = ATP(gates, target=0.25)
    try:
        model.train().requires_grad_(False)
        with attnlib.attach(model, atp, token_types=TYPES):
            loss = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward(retain_graph=True)
            for gate in gates.values():
                for p in gate.parameters():
                    assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0
            losses = atp.losses()
    finally:
        model.eval().requires_grad_(True)
    kept = torch.stack([atp._soft[n][:2] for n in (0, 1)])
    of = torch.tensor([16.0, 32.0])
    close(losses["atp"], (kept[1] / of).mean() * 1)
    close(losses["target"], (kept.mean(1).mean() - 6.0).abs())
    close(losses["total"], 0.05 * losses["atp"] + 0.2 * losses["target"])
    with pytest.raises(RuntimeError, match="no prompt with an image was read in training"):
        ATP(gates).losses()


def test_a_short_training_meets_its_budget_and_adapts_to_the_prompt():
    """Only the budget's loss: the mean count comes near the target, and different images keep different numbers."""
    model = picture_model(seed=3).requires_grad_(False)
    inputs = picture_inputs((1, 1), seed=5)
    inputs["pixel_values"][1] *= 0.02  # a nearly uniform picture
    gates = gates_of(model, (0, 1), rate=0.0625)
    for gate in gates.values():
        gate.temperature = 40.0
    atp = ATP(gates, target=6)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
    model.train()
    first = None
    with attnlib.attach(model, atp, token_types=TYPES):
        for _ in range(40):
            model(**inputs, use_cache=False)
            loss = atp.losses()["target"]
            first = loss.item() if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(**inputs)
        kept = atp.results()["kept"]
    assert loss.item() < 0.5 < first
    assert any(len(set(counts.tolist())) == 2 for counts in kept.values())
    assert abs(float(torch.stack(list(kept.values())).float().mean()) - 6) < 3


# ---- limits


def test_prompts_without_images_are_left_alone(model):
    inputs = picture_inputs((0, 0))
    before = scores(model, inputs)
    with attnlib.attach(model, ATP(gates_of(model)), token_types=TYPES):
        after = scores(model, inputs)
    assert torch.equal(before[0], after[0])


def test_bad_settings_and_use(model):
    with pytest.raises(ValueError, match="rate must lie in"):
        ATPGate(4, rate=0.0)
    with pytest.raises(ValueError, match="temperature"):
        ATPGate(4, temperature=0)
    with pytest.raises(ValueError, match="gates must name at least one layer"):
        ATP({})
    with pytest.raises(ValueError, match="target"):
        ATP({0: ATPGate(4)}, target=-1)
    with pytest.raises(ValueError, match="scores"):
        ATP({0: ATPGate(4)}, scores="probabilities")
    with pytest.raises(ValueError, match=r"gates name layers \[2, 7\]; possible: 0 to 1"):
        attnlib.attach(model, ATP({1: ATPGate(32), 2: ATPGate(32), 7: ATPGate(32)}), token_types=TYPES)
    with pytest.raises(ValueError, match="token_types"):
        attnlib.attach(model, ATP(gates_of(model)))
    with pytest.raises(ValueError, match="rate"):
        atp_gates(model, (0,), rate="any")
    assert [g.rate for g in atp_gates(model, (0, 1), rate="adaptive").values()] == [0.5, 0.25]
