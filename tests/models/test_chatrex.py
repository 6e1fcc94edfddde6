"""UPN against its release; object tokens, indices and their boxes; decoding that knows how many objects there are."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from attnlib.models.multimodal.chatrex import (
    ChatRex,
    DualVision,
    Grounded,
    KnownObjects,
    ObjectFeatures,
    ObjectIndex,
    to_shares,
)
from attnlib.models.multimodal.proposals import UPN, Proposals, chosen

transformers = pytest.importorskip("transformers")

from hooks.models import language_model, prompt  # noqa: E402
from hooks.qwen_vl import qwen_vl, qwen_vl_inputs  # noqa: E402
from hooks.test_reading import padded_llava  # noqa: E402

import attnlib  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "chatrex-upn.safetensors"


@pytest.fixture(scope="module")
def theirs():
    with safe_open(FIXTURE, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])  # noqa: SIM118


def full_state(held):
    """With the copies of the shared head that the release's state dict has besides."""
    sd = {k[3:]: v.double() for k, v in held.items() if k.startswith("sd/")}
    for name, value in list(sd.items()):
        if name.startswith("bbox_embed.0."):
            for copied in (name.replace("d.0.", "d.1."), f"transformer.decoder.{name}"):
                sd[copied] = value
            sd["transformer.decoder." + name.replace("d.0.", "d.1.")] = value
    return sd


def loaded(theirs):
    held, config = theirs
    upn = UPN(**config).double()
    upn.load_state_dict(UPN.convert_state_dict(full_state(held)))
    return upn, held


def maps_of(x):
    return [F.avg_pool2d(x, k) for k in (4, 8, 16)]


def close(ours, want, tolerance=1e-9):
    assert ours.shape == want.shape
    assert float((ours - want).detach().abs().max()) <= tolerance * max(float(want.abs().max()), 1e-12)


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
def test_upn_is_the_release_s(theirs, granularity):
    upn, held = loaded(theirs)
    case = f"{granularity}_grained_prompt"
    x = held["x"].double().requires_grad_()
    found = upn(maps_of(x), valid=~held["mask"], granularity=granularity)
    close(found.logits, held[f"{case}/logits"][..., 0])
    close(found.boxes, held[f"{case}/boxes"])
    ((found.logits * held[f"{case}/g_logits"][..., 0]).sum() + (found.boxes * held[f"{case}/g_boxes"]).sum()).backward()
    close(x.grad[:, :, ::4, ::4], held[f"{case}/dx"])
    want = {k.split("/dw/")[1]: v for k, v in held.items() if k.startswith(f"{case}/dw/")}
    mine = dict(upn.named_parameters())
    names = {
        "transformer.level_embed": "level_embed", "bbox_embed.0.layers.2.weight": "box.4.weight",
        "bbox_embed.0.layers.2.bias": "box.4.bias", "transformer.decoder.ref_point_head.layers.0.bias": "place.0.bias",
        "input_proj.3.1.weight": "input_proj.3.1.weight",
    }  # fmt: skip
    held_to = 0
    for theirs_name, value in want.items():
        ours = names.get(theirs_name, theirs_name.removeprefix("transformer.").replace(".layers.", "."))
        if theirs_name.endswith("grained_prompt.weight"):
            close(upn.prompts.grad[int(granularity == "coarse")], value[0])
        elif ours in mine:
            got = torch.zeros_like(value) if mine[ours].grad is None else mine[ours].grad
            close(got, value)
        else:
            continue
        held_to += 1
    assert held_to == 10


def test_upn_l_has_its_parameters_and_initial_values():
    with torch.device("meta"):
        upn = UPN()
    # The release's 22,437,256 without its backbone and without a head that is multiplied by zero.
    assert sum(p.numel() for p in upn.parameters()) == 22_305_672 == 22_437_256 - 131_584
    small = UPN((3, 3), 16, 2, 2, 2, 16, 1, 1, 4, groups=4)
    assert not small.box[-1].weight.any() and not small.enc_box[-1].bias.any()
    assert not small.encoder[0].self_attn.sampling_offsets.weight.any()


def tiny(**changes):
    torch.manual_seed(0)
    settings = dict(dim=16, num_levels=3, num_heads=2, num_points=2, hidden=16, encoder_depth=1, decoder_depth=2)
    return UPN((4, 6), **{**settings, "num_queries": 6, "groups": 4, **changes})


def two_maps(batch=2):
    torch.manual_seed(1)
    return [torch.randn(batch, 4, 8, 6), torch.randn(batch, 6, 4, 3)]


def test_the_prompt_changes_scores_and_none_gives_one_half():
    upn = tiny()
    fine, coarse = upn(two_maps()), upn(two_maps(), granularity="coarse")
    assert not torch.allclose(fine.logits, coarse.logits) and fine.boxes.shape == coarse.boxes.shape == (2, 6, 4)
    none = upn(two_maps(), granularity=None)
    assert bool((none.logits.sigmoid() == 0.5).all()) and bool(((none.boxes >= 0) & (none.boxes <= 1)).all())


def test_absent_pixels_change_norms_alone_and_images_alone_are_as_in_a_batch():
    upn, maps = tiny(num_levels=2).double(), [m.double() for m in two_maps()]
    valid = torch.ones(2, 32, 24, dtype=torch.bool)
    valid[1, :, 12:] = False
    before = [m.clone() for m in maps]
    found = upn(maps, valid)
    first = upn([m[:1] for m in maps], valid[:1])
    torch.testing.assert_close(found.boxes[:1], first.boxes)
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))
    for m in before:
        m[1, :, :, (m.shape[3] + 1) // 2 :] += 5
    assert not torch.equal(upn(before, valid).boxes[1], found.boxes[1])  # norms of whole maps, as released
    for proj in upn.input_proj:
        proj[1] = torch.nn.Identity()
    assert all(torch.equal(a, b) for a, b in zip(upn(maps, valid)[:2], upn(before, valid)[:2], strict=True))


def test_training_lowers_the_loss_of_planted_boxes():
    torch.manual_seed(0)
    upn, maps = tiny(num_queries=8, num_levels=2), two_maps()
    target = [torch.tensor([[0.1, 0.1, 0.5, 0.6]]), torch.zeros(0, 4)]
    optimizer, curve = torch.optim.Adam(upn.parameters(), 3e-3), []
    for _ in range(25):
        loss = sum(upn.loss(upn(maps), target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert curve[-1] < 0.7 * curve[0]
    upn.eval()
    one = tiny(decoder_depth=1, num_levels=2).eval()
    torch.testing.assert_close(torch.compile(one, backend="eager")(maps).boxes, one(maps).boxes)
    half = upn.bfloat16()([m.bfloat16() for m in maps])
    assert bool(half.boxes.isfinite().all())


def test_proposals_are_chosen_by_score_and_overlap():
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.39], [0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]]])
    logits = torch.tensor([[0.0, 1.0, 2.0, -5.0]])
    (found, scores), (none, _) = chosen(
        Proposals(torch.cat([boxes, boxes]), torch.cat([logits, logits * 0 - 9])), [(100, 200), (10, 10)]
    )
    torch.testing.assert_close(found, torch.tensor([[20.0, 10, 60, 30], [60, 30.5, 140, 69.5]]))
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0]).sigmoid())
    assert none.shape == (0, 4)
    assert len(chosen(Proposals(boxes, logits), [(9, 9)], most=1)[0][0]) == 1
    with pytest.raises(ValueError, match=r"sizes\[0\] must be \(height, width\)"):
        chosen(Proposals(boxes, logits), [(9,)])
    with pytest.raises(ValueError, match="most must be an integer of at least 1"):
        chosen(Proposals(boxes, logits), [(9, 9)], most=-1)


# ---- objects


def test_features_follow_the_box_and_the_order():
    torch.manual_seed(0)
    features = ObjectFeatures((4, 6), 32, cells=3)
    boxes = [torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.2, 0.9, 0.8], [0.1, 0.1, 0.5, 0.5]]), torch.zeros(0, 4)]
    one, two = features(two_maps(), boxes)
    assert two.shape == (0, 32) and torch.equal(one[0], one[2]) and not torch.allclose(one[0], one[1])
    moved = features(two_maps(), [boxes[0] + torch.tensor([0.05, 0, 0.05, 0]), boxes[1]])[0]
    assert not torch.allclose(moved, one)
    turned = features(two_maps(), [boxes[0].flip(0), boxes[1]])[0]
    torch.testing.assert_close(turned, one.flip(0))
    assert ObjectFeatures((6, 6), 8, merge="sum", place_dim=0)([two_maps()[1]] * 2, boxes)[0].shape == (3, 8)
    assert DualVision(4, 6, 8)(torch.randn(1, 6, 4), torch.randn(1, 6, 9, 9), grid=(2, 3)).shape == (1, 6, 8)


def test_text_boxes_and_back():
    index, boxes = ObjectIndex(12), torch.rand(4, 4)
    said = [Grounded("a person", (2, 0)), Grounded("two\nkites", (3,)), Grounded("nothing", ())]
    text = "There is " + index.written(said[:1]) + " and " + index.written(said[1:])
    assert index.read(text, 4) == said
    assert index.written(index.read(index.written(said), 4)) == index.written(said)
    (phrase, first), *_ = index.boxes(text, boxes)
    assert phrase == "a person" and torch.equal(first, boxes[[2, 0]])
    order = torch.tensor([3, 1, 0, 2])  # another order of the proposals gives other indices and the same boxes
    place = order.argsort()
    other = index.written([Grounded(p, tuple(int(place[i]) for i in o)) for p, o in said])
    again = index.boxes(other, boxes[order])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again, index.boxes(text, boxes), strict=True))
    own = ObjectIndex(3, {"object": "[{}]", "phrase": "({})", "objects": "{}"})
    assert own.read("(cat)[2][0]", 3) == [Grounded("cat", (2, 0))]
    assert len(index.names()) == 12 and index.listed(0) == ""


OBJECTS, PLACE = list(range(50, 56)), 56
FAMILIES = {
    "llama": lambda: (language_model(), prompt()),
    "llava": padded_llava,
    "qwen2-vl": lambda: (qwen_vl(), qwen_vl_inputs()),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}])
def test_decoding_never_names_an_object_that_is_not_there(family, mode):
    model, inputs = FAMILIES[family]()
    ids = inputs["input_ids"]
    ids[(ids >= 50) & (ids < 57)] = 5
    ids[0, -4:] = torch.tensor([50, PLACE, 51, PLACE])
    rex = ChatRex(OBJECTS, PLACE, ObjectFeatures((4, 6), 32), 32)
    with torch.no_grad():
        rex.tokens.out_rows.normal_().mul_(3)
        rex.tokens.out_rows[-1] = 0
    boxes = [torch.tensor([[1.0, 1, 20, 30], [5, 5, 40, 40]]), torch.zeros(0, 4)]
    with torch.no_grad(), attnlib.attach(model, *rex.use(two_maps(), boxes, "pixel", [(48, 64), (48, 64)])):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, **mode)[:, ids.shape[1] :]
        free = [int(((out[b] >= 50) & (out[b] < 56)).sum()) for b in range(2)]
    assert not bool((out[0] >= 52).logical_and(out[0] < 56).any()) and free[1] == 0
    with torch.no_grad(), attnlib.attach(model, rex.use(two_maps(), boxes, "pixel", [(48, 64)] * 2)[0]):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, **mode)[:, ids.shape[1] :]
    assert bool(((out >= 52) & (out < 56)).any())  # without the mask some are named


def test_features_reach_the_model_and_learn(tmp_path):
    model, inputs = language_model(), prompt()
    inputs["input_ids"][inputs["input_ids"] >= 50] = 5
    inputs["input_ids"][:, -5:-3] = torch.tensor([50, PLACE])
    rex = ChatRex(OBJECTS, PLACE, ObjectFeatures((4, 6), 32), 32)
    boxes = [torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.3, 0.2, 0.9, 0.8]])]
    with attnlib.attach(model, *rex.use(two_maps(), boxes, "share", [(48, 64)] * 2)):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in rex.parameters())
    assert float(rex.features.mlp[0].weight.grad.abs().sum()) > 0
    torch.save(rex.state_dict(), tmp_path / "rex.pt")
    other = ChatRex(OBJECTS, PLACE, ObjectFeatures((4, 6), 32), 32)
    other.load_state_dict(torch.load(tmp_path / "rex.pt"))
    plain = {**inputs, "input_ids": torch.where(inputs["input_ids"] >= 50, 5, inputs["input_ids"])}
    none = [torch.zeros(0, 4)] * 2
    with torch.no_grad():
        want = model(**plain).logits
        with attnlib.attach(model, *other.use(two_maps(), none, "share", [(48, 64)] * 2)):
            got = model(**plain).logits
    assert torch.equal(got[..., :50], want[..., :50])  # plain chat, but for the scores of the new tokens


def test_bad_boxes_indices_and_counts_are_told():
    index = ObjectIndex(4)
    with pytest.raises(ValueError, match="5 objects need as many index tokens, and there are 4"):
        index.listed(5)
    for text in ("<ground>a</ground><objects><obj7></objects>", "<ground>a</ground><objects><obj-1></objects>"):
        with pytest.raises(ValueError, match=r"text names <obj(7|-1)>; possible: 0 to 1"):
            index.read(text, 2)
    with pytest.raises(ValueError, match="possible: none"):
        index.read("<ground>a</ground><objects><obj0></objects>", 0)
    with pytest.raises(ValueError, match="objects must be"):
        index.written([Grounded("a", (4,))])
    with pytest.raises(ValueError, match="must have one"):
        ObjectIndex(3, {"object": "<obj>"})
    with pytest.raises(ValueError, match="units='inch' is not possible"):
        to_shares(torch.rand(1, 4), "inch", (4, 4))
    with pytest.raises(ValueError, match="x2 <= x1"):
        to_shares(torch.tensor([[5.0, 1, 5, 4]]), "pixel", (8, 8))
    with pytest.raises(ValueError, match="no shares of an image"):
        to_shares(torch.tensor([[1.0, 1, 5, 4]]), "share", (8, 8))
    rex = ChatRex(OBJECTS[:2], PLACE, ObjectFeatures((4, 6), 32), 32)
    many = [torch.tensor([[0.1, 0.1, 0.5, 0.5]] * 3)]
    with pytest.raises(ValueError, match="3 objects need as many index tokens, and there are 2"):
        rex.use([m[:1] for m in two_maps()], many, "share", [(8, 8)])
    with pytest.raises(ValueError, match="counts"):
        KnownObjects(OBJECTS, 7)
    with pytest.raises(ValueError, match="index_tokens holds one id twice"):
        KnownObjects([3, 3], 1)
    with pytest.raises(ValueError, match="low has 5 image tokens, which fill no square"):
        DualVision(4, 6, 8)(torch.randn(1, 5, 4), torch.randn(1, 6, 9, 9))
    with pytest.raises(ValueError, match="maps of 64 tokens give at most as many boxes"):
        tiny(num_queries=99)(two_maps())
    with pytest.raises(ValueError, match="valid must be boolean"):
        tiny()(two_maps(), valid=[[True]])
    with pytest.raises(ValueError, match="granularity='medium' is not possible"):
        tiny()(two_maps(), granularity="medium")
    with pytest.raises(ValueError, match="maps must hold 2 maps"):
        tiny()(two_maps()[:1])
    with pytest.raises(ValueError, match="merge='sum' needs maps of one width"):
        ObjectFeatures((4, 6), 8, merge="sum")
    with pytest.raises(ValueError, match="x2 <= x1"):
        tiny().loss(tiny()(two_maps()), [torch.tensor([[0.5, 0.1, 0.5, 0.2]])] * 2)
