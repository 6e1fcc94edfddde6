"""READ against its release: points, masks through SAM, losses and gradients; and masks that tokens ask for."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

transformers = pytest.importorskip("transformers")

from hooks.llava import IMAGE_ID, llava, llava_inputs  # noqa: E402
from hooks.qwen_vl import qwen_vl, qwen_vl_inputs  # noqa: E402

import attnlib  # noqa: E402
from attnlib.models.multimodal.losses import box_loss, check_target_boxes, generalized_iou, mask_loss  # noqa: E402
from attnlib.models.multimodal.read_seg import READ  # noqa: E402
from attnlib.models.multimodal.segmenter import PromptedMasks, resized_size  # noqa: E402

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "read-seg.safetensors"
SEG = 55


def sam(side=64, patch=8, seed=0, **decoder):
    """A tiny SAM that reads square images of ``side`` pixels."""
    torch.manual_seed(seed)
    config = transformers.SamConfig(
        vision_config=dict(
            hidden_size=16, num_attention_heads=2, num_hidden_layers=1, mlp_dim=16, image_size=side, patch_size=patch,
            output_channels=16, window_size=4, global_attn_indexes=[0], num_pos_feats=8,
        ),
        prompt_encoder_config=dict(hidden_size=16, image_size=side, patch_size=patch, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16, **decoder),
    )  # fmt: skip
    return transformers.SamModel(config).eval()


@pytest.fixture(scope="module")
def theirs():
    with safe_open(FIXTURE, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])  # noqa: SIM118


def close(ours, want, tolerance=1e-5):
    scale = max(float(want.abs().max()), 1e-12)
    assert float((ours - want).abs().max()) <= tolerance * scale, float((ours - want).abs().max()) / scale


@pytest.fixture(scope="module")
def loaded(theirs):
    """Our READ with the release's weights."""
    held, config = theirs
    segmenter = sam(1024, 128, layer_norm_eps=1e-5)  # the release's; transformers' default is a tenth of it
    read = READ(segmenter, SEG, IMAGE_ID, config["dim"], compat="authors")
    sd = {k[3:]: v for k, v in held.items() if k.startswith("sd/")}
    read.load_state_dict(READ.convert_state_dict(sd, seg_token=3))
    assert torch.equal(read.tokens.rows[0], sd["model.embed_tokens.weight"][3])
    prompts = segmenter.prompt_encoder
    pe = {k[3:]: v for k, v in held.items() if k.startswith("pe/")}
    with torch.no_grad():
        matrix = pe["pe_layer.positional_encoding_gaussian_matrix"]
        prompts.shared_embedding.positional_embedding.copy_(matrix)
        segmenter.shared_image_embedding.positional_embedding.copy_(matrix)
        for i, e in enumerate(prompts.point_embed):
            e.weight.copy_(pe[f"point_embeddings.{i}.weight"])
        prompts.not_a_point_embed.weight.copy_(pe["not_a_point_embed.weight"])
        prompts.no_mask_embed.weight.copy_(pe["no_mask_embed.weight"])
    return read


def test_points_masks_losses_and_gradients_are_the_release_s(theirs, loaded):
    held, config = theirs
    states = held["states"].clone().requires_grad_()
    asked, image = states[:, -1], states[:, :-1]
    found = []
    for b, rows in enumerate(config["rows"]):
        # Tokens of one image, in conversations of their own: the map of each is over its own image tokens.
        parts = [
            loaded.segment(
                asked[r : r + 1], torch.zeros(1).long(), torch.zeros(1).long(), [image[r]], [config["sizes"][b]], None,
                held["embeddings"][b : b + 1],
            )[0]
            for r in rows
        ]  # fmt: skip
        found.append(type(parts[0])(*(torch.cat(p) for p in zip(*parts, strict=True))))
        close(found[b].points.detach(), held[f"points/{b}"])
        assert torch.equal(found[b].labels, held[f"labels/{b}"])
        close(found[b].masks.detach(), held[f"masks/{b}"])
        with torch.no_grad():
            shown = loaded.masks.point_prompts(held[f"points/{b}"], held[f"labels/{b}"], config["sizes"][b])
            prompts = torch.cat([shown, loaded.tokens.heads["seg"](asked[rows]).unsqueeze(1)], 1)
            low = loaded.masks.decode(held["embeddings"][b], prompts)
            close(loaded.masks.full_size(low, config["sizes"][b]), held[f"masks/{b}"])
    terms = loaded.loss(found, [held[f"gt/{b}"].float() for b in range(2)])
    close(terms["mask_bce"].detach(), held["bce"][0])
    close(terms["mask_dice"].detach(), held["dice"][0])
    loaded.zero_grad()
    sum(terms.values()).backward()
    close(states.grad, held["dstates"])
    for name, p in loaded.named_parameters():
        if f"dw/{name}" in held:
            close(p.grad, held[f"dw/{name}"])
    close(loaded.masks.mask_decoder.mask_tokens.weight.grad, held["dw/iou"])


def test_a_map_teaches_the_points_where_to_be(loaded, theirs):
    held, config = theirs
    states = held["states"][:1].clone().requires_grad_()
    found = loaded.segment(
        states[:, -1], torch.zeros(1).long(), torch.zeros(1).long(), [states[0, :-1]], [(40, 60)], None,
        held["embeddings"][:1],
    )[0]  # fmt: skip
    found.points.sum().backward()
    assert float(states.grad.abs().sum()) > 0


def grid_llava(seed=0):
    model = llava(seed)
    inputs = llava_inputs(model)
    ids = inputs["input_ids"]
    ids[ids == SEG] = 5
    ids[0, :2], inputs["attention_mask"][0, :2] = 0, 0
    return model, inputs


FAMILIES = {"llava": grid_llava, "qwen2-vl": lambda: (qwen_vl(), qwen_vl_inputs())}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    model, inputs = FAMILIES[request.param]()
    inputs["input_ids"][inputs["input_ids"] == SEG] = 5
    inputs["input_ids"][0, -2:] = SEG  # two masks of the first, none of the second
    return model, inputs


def reader(**changes):
    torch.manual_seed(1)
    return READ(sam(), SEG, IMAGE_ID, 32, **{"downsample": 1, "count": 4, **changes})


SIZES = [(40, 60), (64, 33)]


def test_masks_of_any_model_with_padding_and_several_tokens(family):
    model, inputs = family
    read, pixels = reader(), torch.randn(2, 3, 64, 64)
    with attnlib.attach(model, use := read.use()):
        out = model(**inputs, labels=inputs["input_ids"])
        found = read(*use.last, SIZES, pixel_values=pixels)
        again = read(*use.last, SIZES, embeddings=read.masks.encode(pixels))
    assert found[0].masks.shape == (2, 40, 60) and found[1].masks.shape == (0, 64, 33)
    assert torch.equal(found[0].masks, again[0].masks)
    assert set(found[0].labels.unique().tolist()) <= {-1, 0, 1} and found[0].points.shape == (2, 4, 2)
    target = [torch.zeros(2, 40, 60), torch.zeros(0, 64, 33)]
    target[0][:, 5:20, 5:20] = 1
    terms = read.loss(found, target)
    (out.loss + sum(terms.values())).backward()
    assert float(read.tokens.rows.grad.abs().sum()) > 0
    assert float(model.get_input_embeddings().weight.grad.abs().sum()) > 0  # the loss reaches the language model
    frozen = [p for n, p in read.masks.segmenter.named_parameters() if not n.startswith("mask_decoder")]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_masks_behind_generate(family, mode):
    model, inputs = family
    read, pixels = reader(outputs=True), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        read.tokens.out_rows.copy_(torch.randn(1, 32) * 4)
        with attnlib.attach(model, use := read.use()):
            sequences = model.generate(**inputs, max_new_tokens=5, do_sample=False, **mode)
            found = read.answer(use, sequences, SIZES, pixel_values=pixels)
    copies = len(sequences) // 2
    assert len(found) == len(sequences)
    for row, segmented in enumerate(found):
        asked = (sequences[row, :-1] == SEG).nonzero()[:, 0]
        assert torch.equal(segmented.slots, asked)
        assert segmented.masks.shape == (len(asked), *SIZES[row // copies])
    # The prompt's own tokens ask for the same masks as without generate().
    with torch.no_grad(), attnlib.attach(model, use := read.use()):
        model(**inputs)
        alone = read(*use.last, SIZES, pixel_values=pixels)
    for row in range(copies):
        torch.testing.assert_close(found[row].masks[: len(alone[0].masks)], alone[0].masks, atol=1e-3, rtol=1e-3)


def test_removed_image_tokens_are_refused_by_name(family):
    from attnlib.reduce import ReduceByAttention

    model, _ = family
    types = attnlib.hooks.TokenTypes(image=IMAGE_ID)
    with pytest.raises(ValueError, match="UseTaskTokens and ReduceByAttention cannot both act.*removes tokens"):
        attnlib.attach(model, reader().use(), ReduceByAttention({1: 2}), token_types=types)


def test_no_token_gives_the_plain_model_and_no_masks(family):
    model, inputs = family
    inputs["input_ids"][inputs["input_ids"] == SEG] = 5
    read = reader()
    with torch.no_grad():
        want = model(**inputs).logits
        with attnlib.attach(model, use := read.use()):
            got = model(**inputs).logits
            found = read(*use.last, SIZES, pixel_values=torch.randn(2, 3, 64, 64))
    assert torch.equal(got, want) and [len(f.masks) for f in found] == [0, 0]
    assert all(float(t) == 0 for t in read.loss(found, [f.masks for f in found]).values())


def test_constant_maps_and_the_seg_token_alone():
    read = reader()
    ids = torch.tensor([[IMAGE_ID] * 16 + [SEG]])
    states = torch.ones(1, 17, 32, requires_grad=True)
    found = read(ids, states, [(40, 40)], pixel_values=torch.randn(1, 3, 64, 64))[0]
    assert bool((found.labels == -1).all()) and bool(found.masks.isfinite().all())
    found.masks.sum().backward()
    assert bool(states.grad.isfinite().all())
    alone = reader(points=False)(ids, states, [(40, 40)], pixel_values=torch.randn(1, 3, 64, 64))[0]
    assert alone.points.shape == (1, 0, 2) and alone.masks.shape == (1, 40, 40)


def test_patches_that_look_like_the_token_are_marked():
    read = reader(side=64)
    patches = torch.cat([torch.eye(16), torch.zeros(16, 16)], 1)
    ids, states = torch.tensor([[IMAGE_ID] * 16 + [SEG]]), torch.cat([patches, patches[6:7]])[None]
    found = read(ids, states, [(64, 64)], pixel_values=torch.randn(1, 3, 64, 64))[0]
    assert found.labels[0, 0] == 1 and torch.allclose(found.points[0, 0], torch.tensor([40.0, 24.0]), atol=1)
    assert int(read.similarity(patches, patches[6:7]).argmax()) == 6


def test_saved_and_loaded_without_the_models():
    read = reader()
    names = {k.split(".")[0] for k in read.state_dict()}
    assert names == {"masks", "tokens"}
    assert all(k.startswith(("masks.mask_decoder", "tokens")) for k in read.state_dict())
    assert not any("masks" in k for k in reader(train_decoder=False).state_dict())
    torch.manual_seed(9)
    other = READ(sam(), SEG, IMAGE_ID, 32, downsample=1, count=4)
    other.load_state_dict(read.state_dict())
    ids, states = torch.tensor([[IMAGE_ID] * 16 + [SEG]]), torch.randn(1, 17, 32)
    pixels = torch.randn(1, 3, 64, 64)
    want = read(ids, states, [(40, 60)], pixel_values=pixels)[0].masks
    for one in (other, copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        torch.testing.assert_close(one(ids, states, [(40, 60)], pixel_values=pixels)[0].masks, want)
    decoder = copy.deepcopy(read).masks
    assert decoder.mask_decoder is decoder.segmenter.mask_decoder


def test_bfloat16_states():
    read = reader()
    read.tokens.to(torch.bfloat16)
    ids, states = torch.tensor([[IMAGE_ID] * 16 + [SEG]]), torch.randn(1, 17, 32).bfloat16()
    found = read(ids, states, [(40, 60)], pixel_values=torch.randn(1, 3, 64, 64))[0]
    assert bool(found.masks.isfinite().all()) and found.points.dtype == torch.float32


def test_boxes_prompt_and_sizes_go_back():
    masks = PromptedMasks(sam())
    assert resized_size((40, 60), 64) == (43, 64) and masks.place(torch.tensor([60.0, 40.0]), (40, 60)).tolist() == [
        64,
        43,
    ]
    want = masks.segmenter.prompt_encoder(None, None, torch.tensor([[[0.0, 0, 32, 64]]]), None)[0][0]
    assert torch.allclose(masks.box_prompts(torch.tensor([[0.0, 0, 32, 64]]), (64, 64)), want)
    image = masks.encode(torch.randn(1, 3, 64, 64))[0]
    low = masks.decode(image, want)
    assert masks.full_size(low, (40, 60)).shape == (1, 40, 60) and masks.full_size(low[:0], (4, 6)).shape == (0, 4, 6)
    direct = masks.segmenter(
        image_embeddings=image[None], input_boxes=torch.tensor([[[0.0, 0, 32, 64]]]), multimask_output=False
    )
    torch.testing.assert_close(low, direct.pred_masks[0, :, 0])


IDS, STATES = torch.tensor([[IMAGE_ID] * 16 + [SEG]]), torch.zeros(1, 17, 32)
PIXELS, ONE = torch.zeros(1, 3, 64, 64), [(40, 60)]
POINTS, LABELS = torch.ones(1, 2, 2), torch.ones(1, 2, dtype=torch.long)
NAN = float("nan")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda r: r(IDS, STATES[:, :9], ONE, PIXELS), ValueError, r"states must be .*\(B=1, N=17, C=32\)"),
        (lambda r: r(IDS, STATES[..., :9], ONE, PIXELS), ValueError, "states must be .*C=32"),
        (lambda r: r(IDS, STATES.repeat(2, 1, 1), ONE, PIXELS), ValueError, "states must be .*B=1"),
        (lambda r: r(IDS, None, ONE, PIXELS), TypeError, "states must be .*got None"),
        (lambda r: r(IDS, STATES.long(), ONE, PIXELS), TypeError, "states must be a floating-point tensor"),
        (lambda r: r(IDS, STATES * NAN, ONE, PIXELS), ValueError, "states must be finite"),
        (lambda r: r(IDS.float(), STATES, ONE, PIXELS), TypeError, "ids must be an integer tensor"),
        (lambda r: r(IDS, STATES, ONE, PIXELS[:, :, :32]), ValueError, "pixel_values must be .*height=64"),
        (lambda r: r(IDS, STATES, ONE, None, PIXELS), ValueError, r"image must be .*C=16, h=8, w=8"),
        (lambda r: r.similarity(STATES[0, :16], STATES[0, :2, :9]), ValueError, "asked must be .*C=32"),
        (lambda r: r.answer(reader().use(), IDS, ONE, PIXELS), ValueError, "use must be what use"),
        (lambda r: r.answer(None, IDS, ONE, PIXELS), TypeError, "use must be what use"),
        (lambda r: r.loss(3, []), TypeError, "prediction must be a sequence"),
        (lambda r: r.masks.point_prompts(POINTS.long(), LABELS, (20, 30)), TypeError, "points must be a floating"),
        (lambda r: r.masks.point_prompts(POINTS * NAN, LABELS, (20, 30)), ValueError, "points must be finite"),
        (lambda r: r.masks.point_prompts(POINTS[..., :1], LABELS, (20, 30)), ValueError, "points must be .*xy=2"),
        (lambda r: r.masks.point_prompts(POINTS, LABELS[:, :1], (20, 30)), ValueError, "labels must be .*P=2"),
        (lambda r: r.masks.point_prompts(POINTS, LABELS.float(), (20, 30)), TypeError, "labels must be an integer"),
        (lambda r: r.masks.point_prompts(POINTS, LABELS * 7, (20, 30)), ValueError, r"labels must be 1, 0 or -1, got"),
        (lambda r: r.masks.point_prompts(POINTS, LABELS, 5), TypeError, "size must be"),
        (lambda r: r.masks.place(POINTS, (0, 3)), ValueError, r"size\[0\] must be .*at least 1, got 0"),
        (lambda r: r.masks.place([1, 2], (20, 30)), TypeError, "points must be a floating"),
        (lambda r: r.masks.box_prompts(torch.ones(1, 5), (20, 30)), ValueError, "boxes must be .*corners=4"),
        (lambda r: r.masks.box_prompts(LABELS.repeat(1, 2), (20, 30)), TypeError, "boxes must be a floating"),
        (lambda r: r.masks.box_prompts(torch.ones(1, 4), (20, 30)), ValueError, "boxes must be .*x2 > x1"),
        (lambda r: r.masks.decode(PIXELS[0], POINTS), ValueError, "image must be .*C=16"),
        (lambda r: r.masks.full_size(POINTS[0], (20, 30)), ValueError, "low must be .*K, h, w"),
    ],
)
def test_states_points_and_boxes_that_do_not_fit_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call(reader())


# ---- losses


def test_generalized_iou_is_that_of_every_pair():
    from attnlib.models.detect.boxes import overlaps

    torch.manual_seed(0)
    a, b = (torch.cat([x[:, :2], x[:, :2] + x[:, 2:] + 0.05], 1) for x in torch.rand(2, 20, 4).double())
    want = overlaps(a, b)[1].diagonal()
    torch.testing.assert_close(generalized_iou(a, b), want, atol=1e-12, rtol=1e-12)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: generalized_iou(x, b), (a,))
    point = torch.zeros(4, requires_grad=True)
    generalized_iou(point, torch.zeros(4)).backward()
    assert float(generalized_iou(point.detach(), torch.zeros(4))) == 1 and bool(point.grad.isfinite().all())


def test_boxes_turned_over_have_no_overlap_term_and_stay_finite():
    target = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8]])
    turned = torch.tensor([[0.5, 0.2, 0.1, 0.6], [0.3, 0.9, 0.9, 0.1]], requires_grad=True)
    terms = box_loss(turned, target)
    assert float(terms["box_giou"]) == 0 and float(terms["box_l1"].detach()) == pytest.approx(
        2 * float((turned - target).abs().mean())
    )
    assert float(box_loss(turned, target, compat="authors")["box_giou"]) == pytest.approx(0.4)
    sum(terms.values()).backward()
    assert bool(turned.grad.isfinite().all())
    half = torch.cat([turned[:1].detach(), target[1:] + 0.1])
    want = 0.2 * (1 - generalized_iou(half[1], target[1]))
    torch.testing.assert_close(box_loss(half, target)["box_giou"], want)  # columns, not rows, say what is turned over
    assert {k: float(v) for k, v in box_loss(half[:0], target[:0]).items()} == {"box_l1": 0, "box_giou": 0}


def test_bad_boxes_masks_and_settings_are_told():
    with pytest.raises(ValueError, match="x2 <= x1"):
        check_target_boxes("boxes", torch.tensor([[0.5, 0.1, 0.5, 0.4]]))
    with pytest.raises(ValueError, match="no shares of an image"):
        check_target_boxes("boxes", torch.tensor([[5.0, 1, 50, 40]]), "share")
    with pytest.raises(ValueError, match="x2 <= x1"):
        box_loss(torch.zeros(1, 4), torch.full((1, 4), float("nan")))
    with pytest.raises(ValueError, match="as many boxes"):
        box_loss(torch.zeros(2, 4), torch.tensor([[0.0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"a must be \(\.\.\., 4\)"):
        generalized_iou([0, 0, 1, 1], torch.zeros(4))
    with pytest.raises(ValueError, match="as many boxes"):
        box_loss([[0.0, 0, 1, 1]], torch.tensor([[0.0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"\(K, H, W\) alike"):
        mask_loss(torch.zeros(1, 4, 4), torch.zeros(2, 4, 4))
    read, pixels = reader(), torch.randn(1, 3, 64, 64)
    ids, states = torch.tensor([[IMAGE_ID] * 15 + [SEG]]), torch.randn(1, 16, 32)
    with pytest.raises(ValueError, match="15 image tokens, which fill no square"):
        read(ids, states, [(40, 40)], pixel_values=pixels)
    with pytest.raises(ValueError, match="either pixel_values or embeddings"):
        read(ids, states, [(40, 40)])
    with pytest.raises(ValueError, match="sizes must hold .height, width. of 1 images"):
        read(ids, states, [(40, 40)] * 2, pixel_values=pixels)
    with pytest.raises(ValueError, match=r"sizes\[0\]"):
        read(ids, states, [(0, 40)], pixel_values=pixels)
    ids = torch.tensor([[IMAGE_ID] * 16 + [SEG]])
    found = read(ids, torch.randn(1, 17, 32), [(40, 40)], pixel_values=pixels)
    with pytest.raises(ValueError, match=r"target\[0\] must hold 1 masks of \(40, 40\)"):
        read.loss(found, [torch.zeros(2, 40, 40)])
    with pytest.raises(ValueError, match="both 5"):
        READ(sam(), 5, 5, 8)
    with pytest.raises(TypeError, match="segmenter must be transformers' SamModel"):
        READ(torch.nn.Linear(2, 2), 5, 6, 8)
    with pytest.raises(ValueError, match="negative must be below positive=0.1"):
        READ(sam(), 5, 6, 8, positive=0.1)
