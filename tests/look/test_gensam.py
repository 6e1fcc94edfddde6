"""GenSAM: CLIP surgery, consensus and the loop, held to the authors' code; and what images without a thing give."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from attnlib.look.segment import GenSAM, NameChain, Segmenter, fuse, grown_box, largest_box
from attnlib.look.segment.gensam import clean, dimmed
from attnlib.look.segment.segmenter import Segments
from attnlib.look.surgery import SurgeryMaps, consensus, surgery_features, surgery_maps
from attnlib.ops.points import min_max

transformers = pytest.importorskip("transformers")
F64 = torch.float64

with safe_open(Path(__file__).parents[1] / "fixtures" / "gensam.safetensors", "pt") as f:
    GIVEN = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    CONFIG = json.loads(f.metadata()["config"])


def clip_model(layers=7, **changes):
    small = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, projection_dim=16)
    vision = {**CONFIG["clip"], "num_hidden_layers": layers, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config={**vision, **changes}, text_config=dict(**small, vocab_size=60, max_position_embeddings=16),
        projection_dim=16,
    )  # fmt: skip
    return transformers.CLIPModel(config).eval()


def released_clip():
    """The authors' image tower in transformers' names."""
    theirs = {n.removeprefix("clip/sd/"): t.double() for n, t in GIVEN.items() if n.startswith("clip/sd/")}
    model, used = clip_model().double(), set()
    own = {n: p for n, p in model.state_dict().items() if n.startswith(("vision_model.", "visual_projection"))}

    def take(name):
        used.add(name)
        return theirs[name]

    new = {
        "vision_model.embeddings.class_embedding": take("class_embedding"),
        "vision_model.embeddings.patch_embedding.weight": take("conv1.weight"),
        "vision_model.embeddings.position_embedding.weight": take("positional_embedding"),
        "visual_projection.weight": take("proj").T,
    }
    for ours, name in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        new |= {f"vision_model.{ours}.{part}": take(f"{name}.{part}") for part in ("weight", "bias")}
    for layer in range(7):
        at, to = f"transformer.resblocks.{layer}.", f"vision_model.encoder.layers.{layer}."
        for part in ("weight", "bias"):
            for name, value in zip("qkv", take(f"{at}attn.in_proj_{part}").chunk(3), strict=True):
                new[f"{to}self_attn.{name}_proj.{part}"] = value
            for ours, name in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                new[f"{to}{ours}.{part}"] = take(f"{at}{name}.{part}")
    assert used == set(theirs) and set(new) == {n for n in own if not n.endswith("position_ids")}
    model.load_state_dict({**model.state_dict(), **new})
    return model


@pytest.mark.parametrize("path", ["kk", "vv"])
def test_the_released_image_tower(path):
    ours = surgery_features(released_clip(), GIVEN["clip/kk/x"], path=path)
    theirs = GIVEN[f"clip/{path}/y"]
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_the_released_consensus():
    text = {n.removeprefix("consensus/text/"): t for n, t in GIVEN.items() if n.startswith("consensus/text/")}
    rows = lambda *names: torch.stack([text[n] for n in names])  # noqa: E731
    features, empty = GIVEN["consensus/features"], text[""][None]
    maps = [surgery_maps(features, rows(*n), empty, compat="authors") for n in (("frog", "toad"), ("leaf", "moss"))]
    for case in ("plain", "clamp"):
        found = consensus(*maps, clamp=case == "clamp")[0]
        assert (found - GIVEN[f"consensus/{case}"]).abs().max() < 1e-9
        wide = torch.nn.functional.interpolate(found.view(1, 1, 7, 7), (30, 45), mode="bilinear")[0, 0]
        assert (min_max(wide, (0, 1)) - GIVEN[f"consensus/{case}_wide"]).abs().max() < 1e-9
    assert surgery_maps(features, rows("frog", "toad"), empty).shape == (1, 49, 2)


H, W = 60, 84
Y, X = torch.meshgrid(torch.arange(H, dtype=F64), torch.arange(W, dtype=F64), indexing="ij")


def brightness(image, *names):
    small = torch.nn.functional.adaptive_avg_pool2d(image.mean(-1)[None, None], (14, 14))[0, 0]
    return min_max(small, (0, 1))


class Stub:
    """Where points are, the thing is."""

    def __init__(self):
        self.log = []

    def __call__(self, image):
        return self.predict

    def predict(self, points=None, labels=None, box=None, mask=None):
        self.log.append((points, labels, box))
        base = torch.full((H, W), -1.0, dtype=F64)
        for (x, y), label in zip(() if points is None else points, () if labels is None else labels, strict=True):
            base = base + (1 if label == 1 else -1) * 3 * (-((X - x) ** 2 + (Y - y) ** 2) / 18.0).exp()
        if box is not None:
            inside = (X >= box[0]) & (X < box[2]) & (Y >= box[1]) & (Y < box[3])
            base = base + torch.where(inside, 0.5, -0.5)
        return Segments(torch.stack([base - 1, base, base + 0.7]), torch.tensor([0.2, 0.9, 0.4]))


@pytest.mark.parametrize("case", ["loop", "notrunning"])
def test_the_released_loop(case):
    stub = Stub()
    image = GIVEN["loop/image"].double() / 255
    rounds = 6 if case == "loop" else 4
    out = GenSAM(
        stub, brightness, (["frog"], ["leaf"]), rounds, update_names=False, running=case == "loop", compat="authors"
    )(image)
    assert len(out.steps) == rounds and out.chosen == int(GIVEN[f"{case}/chosen"])
    for number, (points, labels, box) in enumerate(stub.log):
        assert (box is None) == (f"{case}/box/{number}" not in GIVEN)
        if box is not None:
            assert box.double().equal(GIVEN[f"{case}/box/{number}"]), (number, box)
        order = lambda p, s: sorted(map(tuple, torch.cat([p.double(), s.double()[:, None]], 1).tolist()))  # noqa: E731
        assert order(points, labels) == order(GIVEN[f"{case}/points/{number}"], GIVEN[f"{case}/labels/{number}"])
    torch.testing.assert_close(out.steps[-1].logits[None], GIVEN[f"{case}/logits"], rtol=1e-9, atol=1e-9)
    assert out.mask.equal(GIVEN[f"{case}/mask"].bool())
    seen = image  # the image that the last round looked at
    for step in out.steps[:-1]:
        seen = dimmed(image, seen, step.map, 0.3, case == "loop")
    torch.testing.assert_close(seen[..., 0] * 255, GIVEN[f"{case}/last_image"], rtol=1e-9, atol=1e-7)


def test_a_patch_that_is_the_thing_and_not_its_surroundings_is_highest():
    x = torch.nn.functional.normalize(torch.randn(1, 26, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    fg, bg = torch.eye(6)[:1], torch.eye(6)[1:2]
    x[..., :2] *= 0.3
    x[0, 9] = (fg - 0.3 * bg)[0]  # patch 8
    maps = consensus(surgery_maps(x, fg, torch.zeros(1, 6)), surgery_maps(x, bg, torch.zeros(1, 6)))
    assert maps[0].argmax() == 8 and maps.max() == 1
    same = consensus(surgery_maps(x, fg, torch.zeros(1, 6)), surgery_maps(x, fg, torch.zeros(1, 6)))
    assert same.eq(0).all()  # nothing tells them apart, and nothing is NaN


def test_many_texts_share_nothing_but_their_mean():
    x, texts = torch.randn(2, 5, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    maps = surgery_maps(x, texts)
    assert maps.shape == (2, 4, 3) and maps.sum(-1).abs().max() < 1e-12


def test_keys_among_keys_keep_tokens_where_they_are():
    model = clip_model(layers=1, num_attention_heads=1)
    attention = model.vision_model.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.load_state_dict(attention.k_proj.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    plain = surgery_features(model, pixels, layers=1, path="qk")
    torch.testing.assert_close(surgery_features(model, pixels, layers=1), plain)
    orthogonal = 30 * torch.eye(6, dtype=F64)[None, None]
    from attnlib.ops import attention as attend

    v = torch.randn(1, 1, 6, 3, dtype=F64)
    torch.testing.assert_close(attend(orthogonal, orthogonal, v), v)


def test_dimming():
    image, white = torch.rand(8, 10, 3), torch.ones(4, 5)
    white[0, 0] = 0
    now = image
    for _ in range(3):
        now = dimmed(image, now, white, 0.3)
    torch.testing.assert_close(now[4:, 6:], image[4:, 6:])  # where the map is 1, nothing changes
    torch.testing.assert_close(now[0, 0], image[0, 0] * 0.7**3)
    assert dimmed(image, image, torch.zeros(4, 5), 0.3).equal(image)


def test_fusion():
    logits = torch.tensor([[[3.0, -1.0, -1.0]], [[1.0, 1.0, -1.0]], [[-1.0, -1.0, 5.0]]])
    mask, mean, chosen = fuse(logits[:1])
    assert chosen == 0 and mask.equal(logits[0] > 0)
    mask, mean, chosen = fuse(logits)
    assert mean.equal(logits.mean(0)) and chosen == int((logits > 0).ne(mean > 0).flatten(1).sum(1).argmin())
    with pytest.raises(ValueError, match="at least one round"):
        fuse(logits[:0])


def test_boxes_of_masks():
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[2:8, 2:8] = True  # 36 pixels
    mask[10, 10:28] = mask[10:18, 10] = True  # a thin hook of a larger box
    assert largest_box(mask).tolist() == [2, 2, 8, 8] and largest_box(mask, "authors").tolist() == [10, 10, 28, 18]
    assert largest_box(mask & False).tolist() == [0, 0, 30, 20]
    box = torch.tensor([2.0, 2.0, 32.0, 8.0])
    assert grown_box(box, 0.1, (20, 33)).tolist() == pytest.approx([0, 1.4, 33, 8.6])
    assert grown_box(box, 0.1, (20, 30), "authors").tolist() == [-1, 2, 36, 9]


def test_names_are_asked_in_one_dialogue_and_read_out_of_sentences():
    heard = []

    def ask(image, question, history):
        heard.append((question, len(history)))
        return ["A frog sits.", 'The name is "tree frog".', "tree frog", "A", "", "The place is a pond."][
            len(heard) - 1
        ]

    chain = NameChain(ask, ["hidden animal", "disguised animal"])
    assert chain(torch.zeros(2, 2, 3)) == (["tree frog"], ["pond"])
    assert [n for _, n in heard] == [0, 1, 2, 0, 1, 2] and "hidden animal" in heard[0][0]
    assert NameChain(lambda *a: "", ["x"])(torch.zeros(2, 2, 3)) == ([], ["background"])
    assert clean("<im_end> It is an owl.</s>") == "owl"


def test_a_speaker_is_given_the_dialogue():
    from attnlib.look.speak import CallableSpeaker

    heard = []

    def answer(pictures, text):
        heard.append(text)
        return ["a frog", "Frog.", "Pond."][len(heard) - 1]

    assert NameChain(CallableSpeaker(answer), ["animal"])(torch.rand(4, 4, 3)) == (["Frog"], ["Pond"])
    assert [len(text) for text in heard] == [1, 3, 5] and heard[2][1] == ("assistant", "a frog")
    with pytest.raises(TypeError, match="ask must be a Speaker, or callable"):
        NameChain("llava")


def test_nothing_to_see_still_has_a_prompt_and_stops_early():
    stub = Stub()
    out = GenSAM(stub, lambda *a: torch.zeros(14, 14), (["frog"], []), rounds=5, stop=0.003)(torch.rand(H, W, 3))
    points, labels, box = stub.log[0]
    assert points is None and box.tolist() == [0, 0, W, H] and len(out.steps) < 5 and out.logits.isfinite().all()
    with pytest.raises(ValueError, match="names gave no name"):
        GenSAM(stub, brightness, lambda image: ([], ["x"]))(torch.rand(H, W, 3))


def tiny_sam():
    small = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    torch.manual_seed(0)
    return transformers.SamModel(
        transformers.SamConfig(
            vision_config=dict(
                **small, output_channels=16, image_size=64, patch_size=16, mlp_dim=16, global_attn_indexes=[0],
                window_size=2, num_pos_feats=8,
            ),
            prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4),
            mask_decoder_config=dict(**small, mlp_dim=16, iou_head_hidden_dim=8),
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("size", [(48, 64), (90, 31)])
def test_on_models_of_transformers(size):
    def tokenize(texts):
        rows = [[1, *(3 + ord(c) % 50 for c in text[:12]), 59] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [59] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    maps = SurgeryMaps(clip_model(), tokenize, layers=3)
    image = torch.rand(*size, 3, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    segmenter = Segmenter(tiny_sam())
    state = torch.get_rng_state()
    out = GenSAM(segmenter, maps, (["frog"], ["leaf"]), rounds=2, upsample=4)(image)
    assert out.mask.shape == size and out.logits.isfinite().all() and image.equal(before)
    assert torch.get_rng_state().equal(state)
    for step in out.steps:
        assert step.map.shape == (4, 4) and (step.points >= 0).all()
        assert (step.points < torch.tensor([size[1], size[0]])).all()
        assert (step.labels == 1).sum() == (step.labels == 0).sum()


def test_what_texts_share_may_be_another_text():
    """``rdd_str`` of the release."""

    def tokenize(texts):
        rows = torch.tensor([[3 + ord(c) % 50 for c in text.ljust(6)[:6]] for text in texts])  # the first is pooled
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    clip, image = clip_model(), torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    plain, other = (SurgeryMaps(clip, tokenize, 3, templates=("{}",), shared=text) for text in ("", "leaf"))
    features = surgery_features(clip, other.pixels(image), 3)
    expected = consensus(surgery_maps(features, other.text(["frog"]), other.text(["leaf"])))[0]
    assert torch.equal(other(image, ["frog"]).flatten(), expected)
    assert not torch.allclose(plain(image, ["frog"]).flatten(), expected, atol=1e-3)
    with pytest.raises(TypeError, match="shared must be"):
        SurgeryMaps(clip, tokenize, shared=None)


def test_the_segmenter_is_the_models_own():
    sam = tiny_sam()
    image = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(1))
    segmenter = Segmenter(sam)
    out = segmenter(image)(torch.tensor([[10.0, 20.0]]), torch.tensor([1]), torch.tensor([5.0, 5.0, 30.0, 40.0]))
    plain = sam(
        pixel_values=segmenter.pixels(image), input_points=torch.tensor([[[[10.0, 20.0]]]]),
        input_labels=torch.tensor([[[1]]]), input_boxes=torch.tensor([[[5.0, 5.0, 30.0, 40.0]]]),
    )  # fmt: skip
    torch.testing.assert_close(out.low, plain.pred_masks[0, 0])
    torch.testing.assert_close(out.scores, plain.iou_scores[0, 0])
    again = segmenter(image)(torch.tensor([[10.0, 20.0]]), torch.tensor([1]), mask=out.low[0])
    assert again.logits.shape == (3, 64, 64)


def test_bad_input_is_refused_by_name():
    predict = Segmenter(tiny_sam())
    with pytest.raises(ValueError, match=r"image must lie in \[0, 1\], got values from 0 to 255"):
        predict(torch.tensor([0.0, 255.0]).repeat_interleave(24).view(4, 4, 3))
    with pytest.raises(ValueError, match="image"):
        predict(torch.rand(3, 4, 4))
    with pytest.raises(TypeError, match="image must be"):
        predict("image.png")
    with pytest.raises(ValueError, match="at least one point or a box"):
        predict(torch.rand(8, 8, 3))()
    with pytest.raises(ValueError, match="box must be x1 < x2"):
        predict(torch.rand(8, 8, 3))(box=torch.tensor([4.0, 0.0, 2.0, 5.0]))
    with pytest.raises(ValueError, match="labels must be 1 like points"):
        predict(torch.rand(8, 8, 3))(torch.rand(1, 2))
    nothing = GenSAM(lambda image: None, lambda *a: torch.full((4, 4), float("nan")), (["frog"], ["leaf"]))
    with pytest.raises(ValueError, match="maps must give finite scores"):
        nothing(torch.rand(8, 8, 3))
    with pytest.raises(TypeError, match="maps must be callable"):
        GenSAM(predict, None, (["a"], []))
    with pytest.raises(TypeError, match="names must be callable or a pair"):
        GenSAM(predict, brightness, ["frog"])
    with pytest.raises(ValueError, match="rounds must be"):
        GenSAM(predict, brightness, (["a"], []), rounds=0)
    with pytest.raises(ValueError, match="keys must hold"):
        NameChain(lambda *a: "", [])
    with pytest.raises(TypeError, match="clip must be transformers' CLIPModel"):
        surgery_features(torch.nn.Identity(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="layers must be"):
        surgery_features(clip_model(), torch.rand(1, 3, 32, 32), layers=9)
    with pytest.raises(ValueError, match="foreground must hold"):
        consensus(torch.zeros(1, 4, 0))
    with pytest.raises(TypeError, match="lists of names"):
        SurgeryMaps(clip_model(), lambda t: t)(torch.rand(8, 8, 3), "frog")
    with pytest.raises(ValueError, match=r"templates\[0\] must hold \{\}, got 'a photo'"):
        SurgeryMaps(clip_model(), lambda t: t, templates="a photo")
