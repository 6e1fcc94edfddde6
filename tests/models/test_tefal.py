"""TEFAL's blocks against X-Pool's, and scores of videos with and without sound."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, Fixture

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval.tefal import TEFAL, TextConditionedPool, from_xpool


class Models(Fixture):
    folder = HERE / "models"


XPOOL = Models("tefal-xpool")


@pytest.mark.parametrize("case", ["one", "four"])
def test_the_block_and_the_loss_are_xpools(case):
    f = XPOOL
    pool = TextConditionedPool(**f.config[case]).double().eval()
    state = f.under(f"{case}/sd")
    pool.load_state_dict(from_xpool(state))
    pool.load_state_dict(from_xpool({f"pool_frames.{k}": v for k, v in state.items()} | {"clip.x": torch.ones(1)}))
    text, frames = (f.tensors[f"{case}/x/{n}"].requires_grad_() for n in ("text", "frames"))
    y = pool(text, frames)
    torch.testing.assert_close(y, f.tensors[f"{case}/y"], rtol=1e-9, atol=1e-9)
    model = TEFAL(**f.config[case]).double().eval()
    model.video.load_state_dict(state)
    model.scale.log.data.fill_(2.0)
    loss = model.loss(model(text, frames))["contrast"]
    torch.testing.assert_close(loss, f.tensors[f"{case}/loss"], rtol=1e-9, atol=1e-9)
    ((y * f.tensors[f"{case}/g"]).sum() + loss).backward()
    for name, t in (("text", text), ("frames", frames)):
        torch.testing.assert_close(t.grad, f.tensors[f"{case}/dx/{name}"], rtol=1e-9, atol=1e-9)
    both = dict(pool.named_parameters())
    for name, p in model.video.named_parameters():
        got = both[name].grad + p.grad
        torch.testing.assert_close(got, f.tensors[f"{case}/dw/{name}"], rtol=1e-9, atol=1e-9)


def test_initial_values_are_identities():
    """Out of the box the block is LN3(2 LN2(weighted LN1 of frames))."""
    pool = TextConditionedPool(8).double().eval()
    text, frames = torch.randn(3, 8).double(), torch.randn(2, 5, 8).double()
    ln = lambda x: F.layer_norm(x, (8,))  # noqa: E731
    a = (ln(text) @ ln(frames).mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(pool(text, frames), ln(2 * ln(a @ ln(frames))), rtol=1e-9, atol=1e-9)
    one = pool(text, frames[:, :1])
    torch.testing.assert_close(one, one[:, :1].expand_as(one))  # of one frame, whatever the text says


def given(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=dtype)  # noqa: E731
    return make(4, 8), make(3, 5, 8), make(3, 7, 6)


def built(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = TEFAL(8, audio_dim=6, **settings).to(dtype).eval()
    for p in model.sound.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


@pytest.mark.parametrize("combine", ["sum", "scores"])
def test_videos_without_sound_are_scored_by_their_frames(combine):
    model, (text, frames, audio) = built(combine=combine), given()
    silent = model.compare(text, frames)
    there = torch.ones(3, 7, dtype=torch.bool)
    there[1] = False
    broken = audio.clone()
    broken[1] = float("nan")
    mixed = model.compare(text, frames, broken, audio_valid=there)
    assert torch.equal(mixed[:, 1], silent[:, 1]) and not torch.allclose(mixed[:, 0], silent[:, 0])
    torch.testing.assert_close(mixed[:, [0, 2]], model.compare(text, frames, audio)[:, [0, 2]])
    assert torch.equal(model.compare(text, frames, audio[:, :0]), silent)
    audio = broken.requires_grad_()
    model.compare(text, frames, audio, audio_valid=there).sum().backward()
    assert bool(audio.grad.isfinite().all()) and not audio.grad[1].any()


def test_a_muted_branch_is_xpool():
    model, (text, frames, audio) = built(), given()
    for p in model.sound.layer_norm3.parameters():
        p.data.zero_()
    torch.testing.assert_close(model.compare(text, frames, audio), model.compare(text, frames))


def test_scores_do_not_depend_on_company_order_or_padding():
    model, (text, frames, audio) = built(), given()
    want = model.compare(text, frames, audio)
    for chunk in (1, 2, 100):
        model.chunk = chunk
        torch.testing.assert_close(model.predict(text, frames, audio), want)
    torch.testing.assert_close(model.compare(text[2:3], frames[1:2], audio[1:2]), want[2:3, 1:2])
    torch.testing.assert_close(model.compare(text, frames[:, torch.randperm(5)], audio[:, torch.randperm(7)]), want)
    longer = torch.cat([frames, torch.full((3, 2, 8), float("nan"), dtype=torch.float64)], 1)
    valid = torch.arange(7).expand(3, 7) < 5
    torch.testing.assert_close(model.compare(text, longer, audio, valid), want)


def test_it_trains_and_copies():
    torch.manual_seed(0)
    model = TEFAL(8, audio_dim=6, drop=0.0)
    frames = torch.randn(1, 5, 8).expand(4, 5, 8)  # all look alike, sound tells them apart
    batch = {"text": torch.randn(4, 8), "frames": frames, "audio": torch.randn(4, 7, 6), "target": None}
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 1e-2))
    seen = [train_batch(model, batch, optimizers)["all"]["contrast"] for _ in range(60)]
    assert seen[-1] < 0.1 < seen[0]
    inputs = {k: v for k, v in batch.items() if k != "target"}
    assert torch.equal(copy.deepcopy(model).predict(**inputs), model.predict(**inputs))
    run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(**inputs), model(**inputs))
    assert model.bfloat16().predict(**{k: v.bfloat16() for k, v in inputs.items()}).isfinite().all()


def test_bad_input():
    model, (text, frames, audio) = built(), given()
    with pytest.raises(ValueError, match=r"frames_valid leaves the videos \[1\] without"):
        model(text, frames, frames_valid=torch.tensor([True, False, True])[:, None].expand(3, 5))
    with pytest.raises(ValueError, match="audio must be .V, A, 6. for 3 videos"):
        model(text, frames, audio[:2])
    with pytest.raises(ValueError, match="audio_dim"):
        model(text, frames, audio[..., :5])
    with pytest.raises(ValueError, match="audio_valid is given without audio"):
        model(text, frames, audio_valid=torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one frame"):
        model(text, frames[:, :0])
    with pytest.raises(ValueError, match="combine"):
        TEFAL(8, combine="product")
    with pytest.raises(ValueError, match="num_heads"):
        TEFAL(8, num_heads=3)
