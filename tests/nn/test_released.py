"""Every converter accounts for every entry, and what it gives loads strictly: a table over all recorded classes."""

import functools

import pytest
import torch
from parity import HERE, Fixture, Options
from safetensors.torch import load_file
from torch import nn

import attnlib
from attnlib.grids import Layout
from attnlib.nn.dense.softmax_attention import SoftmaxAttention
from attnlib.nn.multimodal.croc import ReconstructionHead
from attnlib.nn.multimodal.p_adapter import PLaplacianAdapter
from attnlib.nn.multimodal.wings_lorra import LayerWings
from attnlib.nn.registry import find, list_mechanisms
from attnlib.nn.released import Released, unwrapped

HEADS = dict(num_heads=lambda c: c["num_heads"], num_kv_heads=lambda c: c.get("num_kv_heads"))
#: Slugs whose recordings ``parity.Fixture`` reads, with the options of their converters.
RECORDED = {
    "agent-attention": {},
    "attention-sink-empirical": HEADS,
    "biformer": {},
    "bimamba": {},
    "bivit": {},
    "dinat": {},
    "gaussian-adaptive-attention": {},
    "hedgehog": {},
    "illama": {},
    "key-driven-gqa": {},
    "lightning-attention-2": {},
    "lolcats": {},
    "mamba": {},
    "mamba2": {},
    "moh-mixture-of-heads": {},
    "moh-vit-aggregated-attention": {},
    "moh-vit-attention": {},
    "pldr-llm-plga": {},
    "probsparse": {},
    "quantizable-transformers": {},
    "rcmha": {},
    "selective-self-attention": HEADS,
    "sigmoid-attention": {},
}


def entries(name, prefix):
    return {k[len(prefix) :]: v for k, v in load_file(HERE / f"{name}.safetensors").items() if k.startswith(prefix)}


def rows():
    """id -> (converter, their state dict, our module)."""
    found = {}

    def add(key, convert, theirs, build):
        found[key] = (convert, theirs, build)

    for slug, options in RECORDED.items():
        fixture = Fixture(slug, **options)
        for case, config in fixture.config.items():
            theirs = fixture.under(f"{case}/sd")
            given = {k: v(config) if callable(v) else v for k, v in options.items()}
            if theirs and not {"num_classes", "img_size", "ffn", "hidden_dim"} & set(config) and case != "block":
                convert = functools.partial(attnlib.convert_state_dict, slug, **given)
                add(
                    f"{slug}-{case}",
                    convert,
                    theirs,
                    functools.partial(attnlib.create, slug, **config),
                )

    for slug, case in Options.all():
        recorded = Options(slug)
        if "class" not in recorded.config[case]:
            theirs = recorded.under(f"{case}/sd")
            convert, create = functools.partial(recorded.convert, case), functools.partial(recorded.create, case)
            add(f"{slug}/{case}", convert, theirs, create)

    def plain(slug, theirs, build, **options):
        add(slug, functools.partial(attnlib.convert_state_dict, slug.split("/")[0], **options), theirs, build)

    create = attnlib.create
    plain(
        "activator-geglu",
        Fixture("activator-geglu").under("unit/sd"),
        lambda: create("activator", dim=6, hidden_dim=10),
    )
    levels = Layout((("a", (3, 4)), ("b", (2, 2))))
    plain(
        "deformable-attention", entries("deformable-attention", "sd."),
        lambda: create("msda", dim=8, num_heads=2, num_levels=2, num_points=3, context_layout=levels),
    )  # fmt: skip
    plain(
        "efficientvit-cascaded-group-attention", entries("efficientvit-cascaded-group-attention", "a/sd/"),
        lambda: create("cga", dim=12, num_heads=2, key_dim=4, window_size=3, kernel_sizes=(5, 3)),
    )  # fmt: skip
    for part in ("partial", "self"):
        slug = f"patnet-{part}-attention"
        plain(slug, entries(slug, "a/sd/"), functools.partial(create, slug, dim=16))
    plain(
        "smt-scale-aware-modulation", entries("smt-scale-aware-modulation", "a/sd/"),
        lambda: create("scale-aware-modulation", dim=8),
    )  # fmt: skip
    plain("uniformer", entries("uniformer", "image/sd/"), lambda: create("uniformer", dim=6))
    plain("van-large-kernel-attention", entries("van-large-kernel-attention", "a/sd/"), lambda: create("lka", dim=6))
    plain("spectformer", entries("spectformer", "a/sd/"), lambda: create("spectformer", dim=6, grid=(5, 7)))
    plain(
        "overlock-contmix", entries("overlock-contmix", "window/sd/"),
        lambda: create("overlock-contmix", dim=16, num_heads=2, kernel_size=5),
    )  # fmt: skip
    plain("focalnet", entries("focalnet", "a.sd."), lambda: create("focalnet", dim=6, focal_window=3, focal_level=2))
    spt = create("spt-sparse-finetuning", dim=16, num_heads=2)
    theirs = {k.replace("codebook.", "quantizer."): v for k, v in spt.state_dict().items()}
    plain("spt-sparse-finetuning", theirs, lambda: create("spt-sparse-finetuning", dim=16, num_heads=2))
    sla = entries("scatterformer", "sla/sd/")
    plain("scatterformer", sla, lambda: create("scatterformer", dim=sla["proj.weight"].shape[0], num_heads=2))
    plain("shvit", entries("shvit", "sd."), lambda: create("shvit", dim=12, qk_dim=4, partial_dim=6))
    for role, ratio in (("hybrid", 2), ("guided", 2), ("global", 2)):
        key = "guided2" if role == "guided" else role
        plain(
            f"sg-former/{role}", entries("sg-former", f"{key}.sd."),
            functools.partial(create, "sg-former", dim=8, num_heads=4, role=role, sr_ratio=ratio),
        )  # fmt: skip
    for variant, first in (("tf", False), ("rw", True)):
        plain(
            f"maxvit/{variant}", entries("maxvit", f"{variant}.sd."),
            lambda: create("maxvit", dim=8, num_heads=2, window_size=2), head_first=first,
        )  # fmt: skip
    mha = nn.MultiheadAttention(8, 2).state_dict()
    plain("softmax-attention", mha, lambda: create("mha", dim=8, num_heads=2))
    plain(
        "bam-soft-moa-upcycling",
        mha,
        lambda: create("bam", dim=8, num_heads=2, num_experts=2),
        num_heads=2,
        num_experts=2,
    )
    for which in ("position", "channel"):
        key = {"position": "pam", "channel": "cam"}[which]
        slug = f"danet-{which}-attention"
        plain(slug, entries("danet", f"{key}.state."), functools.partial(create, slug, dim=16))
    dfa3d = functools.partial(create, "dfa3d", dim=8, num_heads=2, depth_bins=4, reference="grid")
    inside = {k if k.startswith("output") else f"deformable_attention.{k}": v for k, v in dfa3d().state_dict().items()}
    plain("dfa3d", inside, dfa3d)
    wings = entries("wings-lorra", "image/sd/")
    plain("wings-lorra", wings, lambda: create("lorra", dim=16, num_heads=2, rank=3, rotary=1e4))
    layer = {f"attn_pool.{k}": v for k, v in wings.items()}
    add("wings-layer", LayerWings.convert_state_dict, layer, lambda: LayerWings(16, 2, rank=3, textual=False))
    adapter = entries("p-adapter", "self/sd/")
    add("p-adapter", PLaplacianAdapter.convert_state_dict, adapter, lambda: PLaplacianAdapter(16, 2, 4))
    bert = {
        f"self.{n}.{k}": torch.rand(*((16, 16) if k == "weight" else (16,)))
        for n in ("query", "key", "value")
        for k in ("weight", "bias")
    } | {f"output.{k}": v for k, v in adapter.items()}
    plain("p-adapter/attention", bert, lambda: create("p-adapter", dim=16, num_heads=2, reduction=4))
    conv = {"qkv_conv.weight": torch.rand(24, 8, 1, 1), "qkv_conv.bias": torch.rand(24)}
    conv["mlp.weight"] = torch.rand(8, 8, 3, 3)
    plain("tic-msa-conv", conv, lambda: create("tic-msa-conv", dim=8))
    head = entries("croc", "head/sd/")
    add("croc", ReconstructionHead.convert_state_dict, head, lambda: ReconstructionHead(16, 9, 1, 8))
    return found


ROWS = rows()
#: What a converter leaves out, so that it is no fault when it is missing.
SETTINGS_OF_THEIRS = {"attn_bias", "attn_temp"}
SETTINGS_OF_THEIRS |= {"unfold.weights", "fold.weights", "relative_position_index"}  # constants
SETTINGS_OF_THEIRS |= {f"rel_pos_bias.relative_position_{axis}_index" for axis in ("high", "width")}

SETTINGS_OF_THEIRS |= {"attn.attention_bias_idxs"}


def constant(key):
    """What does not decide what a module computes, so that it may be missing or anything."""
    return key in SETTINGS_OF_THEIRS or key.rpartition(".")[2] == "num_batches_tracked"


#: Buffers that the authors' class makes in its first call, or draws beside its state dict, which may lack them.
MADE_BY_THE_FIRST_CALL = {(f"selective-self-attention-sparse_{how}", "beta") for how in ("power", "count")}
MADE_BY_THE_FIRST_CALL |= {(f"performer/{case}", "directions") for case in ("self", "cross", "learned and zero keys")}


def refused(convert, theirs, build):
    """The error of converting and loading strictly, as text."""
    with pytest.raises((ValueError, RuntimeError)) as error:
        build().load_state_dict(convert(theirs))
    return str(error.value)


@pytest.mark.parametrize("row", ROWS)
def test_it_loads_strictly_whatever_wraps_the_names(row):
    convert, theirs, build = ROWS[row]
    module = build()
    ours = convert(theirs)
    module.load_state_dict(ours)
    for wrapper in ("module.", "model.", "module.model.", "_orig_mod."):
        wrapped = convert({wrapper + key: value for key, value in theirs.items()})
        assert wrapped.keys() == ours.keys()
        assert all(torch.equal(wrapped[key], ours[key]) for key in ours if "router" not in key)  # a random start
    total = sum(v.numel() for k, v in theirs.items() if k not in SETTINGS_OF_THEIRS)
    loaded = sum(v.numel() for v in ours.values())
    if row.split("/")[0] not in (
        "maxvit",
        "bam-soft-moa-upcycling",
        "p-adapter",
        "ulsam",
    ):  # which leave parts out, or repeat
        assert loaded == total, f"{total} numbers went in, {loaded} came out"


@pytest.mark.parametrize("row", ROWS)
def test_an_entry_that_nobody_knows_is_refused_by_name(row):
    convert, theirs, build = ROWS[row]
    first = next(iter(theirs))
    for unknown in ("surprise", "surprise.weight", first + "_extra", "blocks.0." + first):
        assert ".".join(unknown.split(".")[-2:]) in refused(convert, {**theirs, unknown: torch.zeros(1)}, build)


@pytest.mark.parametrize("row", ROWS)
def test_a_missing_entry_is_refused(row):
    convert, theirs, build = ROWS[row]
    for key in theirs:
        if not constant(key) and not (row.startswith(("maxvit", "p-adapter")) and _left_out(row, key)):
            if (row, key) in MADE_BY_THE_FIRST_CALL:
                build().load_state_dict(convert({k: v for k, v in theirs.items() if k != key}))
                continue
            assert refused(convert, {k: v for k, v in theirs.items() if k != key}, build)


@pytest.mark.parametrize("row", ROWS)
def test_an_entry_of_another_shape_is_refused_by_name(row):
    """By the converter, or by torch when it is loaded; never by an error of the arithmetic in between."""
    convert, theirs, build = ROWS[row]
    for key, value in theirs.items():
        if constant(key) or row.startswith(("maxvit", "p-adapter")) and _left_out(row, key) or not value.dim():
            continue
        shapes = [torch.cat([value, value[:1]]), value[None, None], value[:0], value.sum()]
        for wrong in shapes + ([torch.cat([value, value[:, :1]], 1)] if value.dim() > 1 else []):
            try:
                ours = convert({**theirs, key: wrong})
                build().load_state_dict(ours)
            except (TypeError, ValueError, RuntimeError) as error:
                says = str(error)
                assert "loading state_dict" in says or key in says or "state_dict" in says, says
            else:  # another shape of the same numbers
                assert wrong.numel() == value.numel(), f"{key} is loaded as {tuple(wrong.shape)}"
                assert all(torch.equal(ours[k], v) for k, v in convert(theirs).items() if "router" not in k)


@pytest.mark.parametrize("row", ROWS)
def test_numbers_for_names_are_refused(row):
    convert, theirs, _ = ROWS[row]
    with pytest.raises(TypeError, match="state_dict"):
        convert(dict(enumerate(theirs.values())))


def _left_out(row, key):
    names = ("dense.", "LayerNorm.") if row == "p-adapter" else ("conv.", "attn_block.norm1.")
    return key.startswith(names) or ".norm2." in key or ".mlp." in key or ".ls2" in key


@pytest.mark.parametrize("row", ROWS)
def test_nothing_and_what_is_no_state_dict_are_refused(row):
    convert, theirs, _ = ROWS[row]
    with pytest.raises(ValueError, match="empty"):
        convert({})
    with pytest.raises((ValueError, TypeError)):
        convert({"state_dict": theirs})


def test_every_converter_is_in_the_table():
    held = {Options(slug)._class(case) for slug, case in Options.all()}
    known = {row.split("/")[0] for row in ROWS} | set(RECORDED)
    known |= {slug for slug in list_mechanisms() if find(slug) in held}
    own = {
        slug for slug in list_mechanisms()
        if (convert := getattr(find(slug), "convert_state_dict", None)) is not None
        and convert is not SoftmaxAttention.convert_state_dict
    }  # fmt: skip
    # the neighborhood family shares one converter, which dinat's recordings test
    shared = {"fused-neighborhood-attention", "generalized-neighborhood-attention"}
    assert own - shared <= known, sorted(own - shared - known)


def test_one_layer_of_a_whole_model():
    dense = nn.MultiheadAttention(8, 2)
    whole = {f"module.blocks.{i}.attn.{k}": v + i for i in range(2) for k, v in dense.state_dict().items()}
    whole["module.head.weight"] = torch.zeros(3, 8)
    got = attnlib.convert_state_dict("mha", whole, prefix="blocks.1.attn")
    torch.testing.assert_close(got["q.weight"], dense.in_proj_weight[:8] + 1)
    with pytest.raises(ValueError, match=r"no entries below prefix='blocks.7.attn.'.*blocks.1.attn."):
        attnlib.convert_state_dict("mha", whole, prefix="blocks.7.attn")
    with pytest.raises(ValueError, match="does not have"):
        attnlib.convert_state_dict("mha", whole)
    with pytest.raises(TypeError, match="head_first.*takes"):
        attnlib.convert_state_dict("mha", dense.state_dict(), head_first=True)


def test_wrappers_come_off_only_when_all_entries_have_them():
    assert unwrapped({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    assert unwrapped({}) == {}


def test_two_entries_cannot_become_one():
    theirs = Released({"a.w": torch.ones(1), "b.w": torch.ones(1)}, "a test")
    with pytest.raises(ValueError, match="both become 'c'"):
        theirs.renamed({r"[ab]\.w": "c"})


def test_a_part_of_a_fused_projection_is_refused():
    parts = {f"{n}.weight": torch.ones(4, 4) for n in ("query", "key")}
    with pytest.raises(ValueError, match="no 'value.weight'"):
        attnlib.convert_state_dict("dinat", parts)
    with pytest.raises(ValueError, match="does not split|do not split"):
        attnlib.convert_state_dict("mha", {"qkv.weight": torch.ones(7, 2)})
