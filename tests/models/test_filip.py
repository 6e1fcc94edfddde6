"""FILIP against its equations, CLIP where there is one token each, and what users do with encoders of transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlib.models.protocol import Optimizers, train_batch
from attnlib.models.retrieval import contrast as losses
from attnlib.models.retrieval.filip import FILIP, Tokens, same_words, strongest


class Words(nn.Module):
    def __init__(self, vocab=12, dim=10):
        super().__init__()
        self.table = nn.Embedding(vocab, dim)

    def forward(self, ids, valid):
        return self.table(ids)


class Patches(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.map = nn.Linear(3, dim)

    def forward(self, images):
        return self.map(images)


def model(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    settings = {"image_skip": 1, "text_skip": 1, "dim": 8, **settings}
    return FILIP(Patches(), Words(), 6, 10, **settings).to(dtype)


def batch(b=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(b, 7, 3, dtype=dtype, generator=g)
    texts = torch.randint(0, 12, (b, 6), generator=g)
    valid = torch.arange(6) < torch.tensor([6, 3, 4, 2])[:b, None]
    return images, texts, valid


def oracle(m, images, texts, valid):
    """The equations, pair by pair; no word of padding is ever touched."""
    b, tau = len(images), 1 / m.scale.log.exp()
    by_patch, by_word = images.new_zeros(b, b), images.new_zeros(b, b)
    for i in range(b):
        patches = F.normalize(m.image_projection(m.image_encoder(images[i : i + 1]))[0, 1:], dim=-1)
        for j in range(b):
            ids = texts[j][valid[j]][1:]
            words = F.normalize(m.text_projection(m.text_encoder.table(ids)), dim=-1)
            products = patches @ words.T
            by_patch[i, j], by_word[i, j] = products.amax(1).mean(), products.amax(0).mean()
    at = torch.arange(b)
    return (
        by_patch / tau,
        by_word / tau,
        (F.cross_entropy(by_patch / tau, at) + F.cross_entropy(by_word.T / tau, at)) / 2,
    )


def test_scores_loss_and_gradients_are_the_equations():
    m, given = model(), batch()
    ours = m(*given)
    total = m.loss(ours)["contrast"]
    image, text, want = oracle(m, *given)
    torch.testing.assert_close(ours.image, image, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.text, text, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
    params = list(m.parameters())
    for a, b in zip(torch.autograd.grad(total, params), torch.autograd.grad(want, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_token_each_is_clip():
    m = model(image_skip=0, text_skip=0)
    images, texts, _ = batch()
    prediction = m(images[:, :1], texts[:, :1])
    torch.testing.assert_close(prediction.image, prediction.text)
    assert torch.equal(
        m.predict(images[:, :1], texts[:, :1]), m.rank(m.encode_images(images[:, :1]), m.encode_texts(texts[:, :1]))
    )
    at = torch.arange(4)
    clip = (F.cross_entropy(prediction.text.mT, at) + F.cross_entropy(prediction.image, at)) / 2
    torch.testing.assert_close(m.loss(prediction)["contrast"], clip)


def test_padding_never_changes_a_score_on_either_side():
    m, (images, texts, valid) = model(), batch()
    want = m(images, texts, valid)
    other = torch.where(valid, texts, torch.randint(0, 12, texts.shape, generator=torch.Generator().manual_seed(9)))
    for a, b in zip(want, m(images, other, valid), strict=True):
        assert torch.equal(a, b)
    longer, mask = F.pad(texts, (0, 3), value=5), F.pad(valid.long(), (0, 3))  # masks of tokenizers are numbers
    left = torch.stack([torch.cat([t[~v], t[v]]) for t, v in zip(texts, valid, strict=True)])
    for a, b, c in zip(want, m(images, longer, mask), m(images, left, valid.flip(1)), strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def test_order_of_tokens_does_not_matter_and_equal_words_are_whole_scores():
    m, (images, texts, _) = model(), batch()
    x, y = m.encode_images(images), m.encode_texts(texts)
    want = m.compare(x, y)
    got = m.compare(Tokens(x.values[:, torch.randperm(6)]), Tokens(y.values[:, torch.randperm(5)]))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(m.compare(x, Tokens(x.values)).image.diagonal(), torch.ones(4, dtype=torch.float64))


def test_two_objects_are_told_apart_where_means_are_not():
    """A patch shows a colour and a thing; swapping them between two patches changes no mean."""
    red, blue, dog, cat = torch.eye(4)
    bind = lambda *pairs: F.normalize(torch.stack([a + b for a, b in pairs]), dim=-1)  # noqa: E731
    scenes = torch.stack([bind((red, dog), (blue, cat)), bind((red, cat), (blue, dog))])
    means = F.normalize(scenes.mean(1), dim=1)
    torch.testing.assert_close(means @ means.T, torch.ones(2, 2))
    found = FILIP(nn.Identity(), nn.Identity(), 4, 4).compare(Tokens(scenes), Tokens(scenes.flip(1)))
    for score in found:
        torch.testing.assert_close(score, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert losses.recall(found.image) == losses.recall(found.text) == 1


def test_the_strongest_quarter():
    m, (images, texts, valid) = model(), batch()
    x, y = m.encode_images(images), m.encode_texts(texts, valid)
    for chunk in (1, 1 << 20):
        kept = strongest(y.values, x.values, 0.25, valid=y.valid, chunk=chunk)
        assert (kept.sum(1) == (y.valid.sum(1) * 0.25).ceil()).all() and not (kept & ~y.valid).any()
        products = torch.einsum("pnd,qmd->pnqm", y.values, x.values).amax((2, 3)).masked_fill(~y.valid, -9)
        assert kept[torch.arange(4), products.argmax(1)].all()
    assert torch.equal(strongest(y.values, x.values, 1.0, valid=y.valid), y.valid)
    few = model(share=0.25)
    few.loss(few(images, texts, valid))["contrast"].backward()
    assert all(bool(p.grad.isfinite().all()) for p in few.parameters())


def test_templates_are_averaged_as_scores():
    m, (images, texts, valid) = model(), batch()
    x, one, two = m.encode_images(images), m.encode_texts(texts, valid), m.encode_texts(texts.flip(0))
    found = m.rank(x, [one, two])
    want = [(a + b) / 2 for a, b in zip(m.compare(x, one), m.compare(x, two), strict=True)]
    torch.testing.assert_close(found, (want[0] + want[1]) / 2)
    assert torch.equal(m.rank(x, one, "image"), m.compare(x, one).image)
    assert torch.equal(m.rank(x, one, direction="text"), m.compare(x, one).text)


def test_texts_of_two_images_belong_to_both():
    m, (images, texts, _) = model(), batch()
    texts[2] = texts[0]
    same = same_words(texts)
    assert same.sum() == 6
    scores = m(images, texts)
    each = scores.image.log_softmax(1)
    torch.testing.assert_close(
        losses.contrast(scores.image, same), -(each * same).sum(1).div(same.sum(1)).mean(), rtol=1e-12, atol=1e-12
    )


def test_decoupled_leaves_the_positive_out():
    s = torch.randn(5, 5, dtype=torch.float64)
    rest = s.masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(losses.contrast(s, decoupled=True), (rest.logsumexp(1) - s.diagonal()).mean())


def test_recall_shares_places_among_equals():
    s = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.2], [0.7, 0.1, 0.3]])
    assert losses.recall(s).item() == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert losses.recall(s, at=2).item() == pytest.approx((1 + 2 / 3 + 1) / 3)
    same = torch.tensor([[True, True, False], [False, False, False], [False, False, True]])
    assert losses.recall(s, same).item() == pytest.approx(0.5)


def test_encoders_of_transformers_train_with_padding():
    transformers = pytest.importorskip("transformers")
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**tower, image_size=16, patch_size=8))
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**tower, vocab_size=20, max_position_embeddings=8))
    m = FILIP(vision, text, 16, 16, dim=8)
    ids = torch.tensor([[1, 5, 6, 2, 2], [1, 7, 2, 2, 2], [1, 8, 9, 3, 2]])
    made = {
        "images": torch.randn(3, 3, 16, 16),
        "texts": ids,
        "text_valid": torch.tensor([[1, 1, 1, 1, 0]] * 3),
        "target": None,
    }
    optimizers = Optimizers(lambda name, params: torch.optim.AdamW(params, 1e-2))
    seen = [train_batch(m, made, optimizers)["all"]["contrast"] for _ in range(12)]
    assert seen[-1] < seen[0] / 2
    twin = copy.deepcopy(m).eval()
    m.eval()
    found = [n(made["images"], ids, made["text_valid"]).image for n in (m, twin)]
    assert torch.equal(*found)
    half = twin.bfloat16()(made["images"].bfloat16(), ids, made["text_valid"])
    assert bool(half.image.isfinite().all())


def test_traces_and_takes_empty_batches():
    m, (images, texts, valid) = model(), batch()
    run = torch.compile(m, backend="eager")
    torch.testing.assert_close(run(images, texts, valid).image, m(images, texts, valid).image)
    assert m(images[:0], texts[:0], valid[:0]).image.shape == (0, 0)


def test_bad_input():
    m, (images, texts, valid) = model(), batch()
    with pytest.raises(ValueError, match=r"\[1\] have no word"):
        m(images, texts, valid & (torch.arange(4)[:, None] != 1))
    with pytest.raises(ValueError, match=r"\[2\] have no word"):  # the start alone is no word
        m(images, texts, torch.arange(6) < torch.tensor([6, 3, 1, 2])[:, None])
    with pytest.raises(ValueError, match="1 tokens, of which 1 are left out"):
        m(images[:, :1], texts)
    with pytest.raises(ValueError, match="width 3, not 6"):
        FILIP(nn.Identity(), Words(), 6, 10).encode_images(images.float())
    with pytest.raises(ValueError, match="valid"):
        m(images, texts, valid[:, :4])
    with pytest.raises(ValueError, match="direction='words' is not possible"):
        m.rank(m.encode_images(images), m.encode_texts(texts), "words")
    with pytest.raises(ValueError, match="share"):
        model(share=0)
    with pytest.raises(ValueError, match="temperature"):
        model(temperature=0)
    with pytest.raises(ValueError, match="not square"):
        losses.contrast(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no positive pair"):
        losses.contrast(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="back must have the shape"):
        losses.symmetric_contrast(torch.zeros(3, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="hold NaN"):
        losses.recall(torch.full((2, 2), float("nan")))
