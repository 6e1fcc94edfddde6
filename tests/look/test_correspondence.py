"""CHM-Corr: the authors' network, points, scores and votes; edited masks without a forward; decisions by arm."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from attnlib.bench.decisions import Decision, arms_differ, decision_accuracy, read_decisions
from attnlib.look.correspondence import (
    CHMMatcher,
    CorrespondenceClassifier,
    Correspondences,
    MutualNearest,
    Sinkhorn,
    compared,
)
from attnlib.models.chmnet import CHMNet, conv4d, conv6d, load_chmnet, transfer


@pytest.fixture(scope="module")
def recorded():
    path = Path(__file__).parents[1] / "fixtures" / "chm-corr-interactive.safetensors"
    with safe_open(str(path), "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["keys"])  # noqa: SIM118


def released_weights(shapes, learner):
    """The state dict that was recorded with: waves, by the number of each entry among all names in order."""
    shapes = {k: v for k, v in shapes.items() if not k.startswith("learner")} | learner
    out = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        if name.startswith(("backbone.layer4", "backbone.fc")) or name.endswith("num_batches_tracked"):
            out[name] = torch.zeros(())  # never read
            continue
        n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        w = torch.sin(n * 0.7391 + i + 0.13 * (n % 7))
        norm = any(name.endswith(end) for end in ("bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight"))
        if name.endswith("running_var") or norm:
            w = 1 + 0.3 * w
        elif len(shape) == 4 and not name.startswith("learner.chm"):
            w = w * (2 / torch.Size(shape[1:]).numel()) ** 0.5 * 1.2
        else:
            w = 0.02 * (w + 0.4) if "chm" in name else 0.1 * w
        out[name] = w.view(shape)
    return out


def pictures():
    g = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 64, 64, generator=g, dtype=torch.float64) for _ in range(2)], g


@pytest.mark.parametrize("kernel", ["psi", "iso", "full"])
def test_network_equals_the_authors_with_their_weights(recorded, kernel):
    tensors, keys = recorded
    (source, target), _ = pictures()
    theirs = released_weights(keys["all"], keys[kernel])
    net = CHMNet(kernel, depths=(1, 1, 2)).double().eval()
    net.load_state_dict(net.convert_state_dict(theirs))  # strictly
    with torch.no_grad():
        if kernel == "psi":
            features = net.source.forward_features(source).permute(0, 3, 1, 2)
            torch.testing.assert_close(features[:, ::64], tensors["features"])
        y = net(source, target)
    torch.testing.assert_close(y[:, ::7], tensors[f"{kernel}/y"], rtol=1e-9, atol=1e-12)
    shared = sum(torch.Size(v).numel() for k, v in keys[kernel].items() if "chm" in k)
    assert sum(p.numel() for part in (net.sizes, net.places) for p in part.parameters()) == shared
    with pytest.raises(ValueError, match="does not have"):
        net.convert_state_dict({**theirs, "learner.more": torch.zeros(1)})
    with pytest.raises(ValueError, match="choose kernel= among"):
        CHMNet("iso" if kernel != "iso" else "psi", depths=(1, 1, 2)).convert_state_dict(theirs)


def test_released_size_and_initial_kernels():
    with torch.device("meta"):
        net = CHMNet()
    assert sum(p.numel() for p in net.convs.parameters()) == 3 * 9 * 1024 * 256
    assert net.sizes.weight.shape == (4, 55) and net.places.weight.shape == (1, 55)
    trunk = sum(p.numel() for p in net.source.parameters())
    assert trunk == 44_549_160 - 14_964_736 - 2_049_000  # ResNet-101 without its fourth stage and its classifier
    torch.manual_seed(0)
    for _ in range(3):  # every place gets an even share, and all entries are positive
        kernel = CHMNet("psi", (4, 4, 4), (1, 1, 1), 4).sizes()
        assert kernel.shape == (3, 3, 5, 5, 5, 5) and bool((kernel > 0).all()) and float(kernel.detach().max()) < 6e-3


def test_convolutions_over_four_and_six_axes_are_sums_over_shifts():
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 2, 3, 4, 3, 2, generator=g).double(), torch.randn(3, 2, 3, 3, 3, 3, generator=g).double()
    padded = F.pad(x, [1] * 8)
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).unfold(5, 3, 1)
    torch.testing.assert_close(conv4d(x, w), torch.einsum("bchwijpqrs,dcpqrs->bdhwij", windows, w))
    x, w = torch.randn(1, 3, 3, 2, 3, 2, 2, generator=g).double(), torch.randn(3, 3, 3, 3, 3, 3, generator=g).double()
    windows = F.pad(x, [1] * 12)
    for axis in range(1, 7):
        windows = windows.unfold(axis, 3, 1)
    torch.testing.assert_close(conv6d(x, w), torch.einsum("zuvhwijabpqrs,abpqrs->zuvhwij", windows, w))


def test_points_are_carried_as_the_authors_do(recorded):
    tensors, _ = recorded
    _, g = pictures()
    confidence = torch.rand(1, 900, 900, generator=g, dtype=torch.float64) ** 40 * 30
    torch.testing.assert_close(confidence[0, :2, :5], tensors["transfer/seedcheck"])
    x, y = torch.meshgrid(*[torch.linspace(18, 222, 7, dtype=torch.float64)] * 2, indexing="ij")
    points = torch.stack([y.flatten(), x.flatten()], 1) / 120 - 1  # theirs run over x first
    found = transfer(confidence, points)
    torch.testing.assert_close(found[0].T.flip(0), tensors["transfer/y"][0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no place lies within"):
        transfer(confidence, torch.tensor([[3.0, 0.0]]))
    with pytest.raises(ValueError, match="grid must be"):
        transfer(confidence[:, :10], points)


def of_the_authors(tensors, **settings):
    given = {k[5:]: v for k, v in tensors.items() if k.startswith("corr/")}
    query, support = given["fq"][0].permute(1, 2, 0), given["fs"].permute(0, 2, 3, 1)
    partners = given["partners"].view(12, 7, 7, 2)
    similarity, along = compared(query, support, partners)
    torch.testing.assert_close(similarity, given["maps"])
    shares, theirs = ((t - t.amin((1, 2), True)) for t in (along, given["relevant"]))
    torch.testing.assert_close(shares / shares.amax((1, 2), True), theirs / theirs.amax((1, 2), True))
    return Correspondences(similarity, partners, along, given["labels"], torch.arange(12), **settings), given


def test_scores_ranks_and_votes_equal_the_authors(recorded):
    found, given = of_the_authors(recorded[0], votes=5)
    auto, user = found.predict(), found.predict(given["mask"])
    torch.testing.assert_close(auto.scores, given["auto/scores"])
    torch.testing.assert_close(user.scores, given["user/scores"])
    assert auto.order.tolist() == given["auto/order"].tolist()
    assert [auto.label, auto.votes] == given["auto/label"].tolist()
    assert [user.label, user.votes] == given["user/label"].tolist()
    # No selection is the automatic one, and so is the same mask by the same scoring.
    for other in (found.predict(torch.zeros(7, 7)), found.predict(found.automatic, scoring="top_k")):
        assert torch.equal(other.scores, auto.scores) and other.label == auto.label
    # All places rank by the mean of M; a factor changes no rank.
    everything = found.predict(torch.ones(7, 7))
    torch.testing.assert_close(everything.scores, found.similarity.mean((1, 2)))
    assert torch.equal(found.predict(0.25 * given["mask"]).order, user.order)
    by_number = found.scores(given["mask"], "mean_selected") * given["mask"].sum() / 49
    torch.testing.assert_close(by_number, user.scores)
    lines = found.lines(3, given["mask"], most=4)
    assert len(lines) == 4 and all(given["mask"][r, c] > 0 for r, c, *_ in lines.tolist())
    assert all(found.partners[3, r, c].tolist() == there for r, c, *there in lines.tolist())
    worth = [float(found.similarity[3, r, c]) for r, c, *_ in lines.tolist()]
    assert worth == sorted(worth, reverse=True)


def test_ties_are_the_lowest_label_or_more_votes():
    similarity = torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)
    found = Correspondences(
        similarity, torch.zeros(3, 1, 1, 2).long(), similarity, torch.tensor([5, 2, 5]), torch.arange(3), votes=2
    )
    ones = torch.ones(1, 1)
    assert found.predict(ones).label == 2
    more = found.predict(ones, ties="enlarge")
    assert (more.label, more.votes, more.of) == (5, 2, 3)
    with pytest.raises(ValueError, match="same everywhere"):
        found.predict()


def planted(cells=4, dim=24, seed=0):
    """A query that shares one patch with class 0, at (1, 2), and three others with class 1."""
    g = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(3 * cells * cells, dim, generator=g), dim=-1).view(3, cells, cells, dim)
    rows[1, 3, 0] = rows[0, 1, 2]
    for r, c in ((0, 0), (0, 1), (3, 3)):
        rows[2, r, c] = rows[0, r, c]
    return rows.permute(0, 3, 1, 2)


@pytest.mark.parametrize("matcher", ["mutual", "nearest", "sinkhorn"])
def test_an_edited_mask_flips_the_answer_and_costs_no_forward(matcher):
    images = planted()
    calls = []

    def encode(x):
        calls.append(len(x))
        return x.permute(0, 2, 3, 1)

    classifier = CorrespondenceClassifier(encode, images[1:], torch.tensor([0, 1]), matcher, votes=1)
    found = classifier.match(images[0])
    before = list(calls)
    mask = torch.zeros(4, 4)
    mask[[0, 0, 3], [0, 1, 3]] = 1
    at = torch.zeros(4, 4)
    at[1, 2] = 1
    assert found.predict(mask).label == 1 and found.predict(at).label == 0
    found.predict()
    assert calls == before  # three answers, nothing encoded
    image = found.index.tolist().index(0)
    assert found.lines(image, at).tolist() == [[1, 2, 3, 0]]
    with pytest.raises(ValueError, match=r"mask must be \(4, 4\)"):
        found.predict(torch.ones(3, 3))
    with pytest.raises(ValueError, match="at least 0"):
        found.predict(-torch.ones(4, 4))


def test_matchers_by_their_definitions():
    g = torch.Generator().manual_seed(2)
    query, support = torch.randn(2, 3, 8, generator=g), torch.randn(4, 3, 2, 8, generator=g)
    found = MutualNearest()(query, support)
    for n in range(4):
        c = torch.nn.functional.cosine_similarity(query.view(6, 1, 8), support[n].view(1, 6, 8), dim=-1)
        for s in range(6):
            t = int(c[s].argmax())
            wanted = [t // 2, t % 2] if int(c[:, t].argmax()) == s else [-1, -1]
            assert found[n, s // 3, s % 3].tolist() == wanted
    plan = Sinkhorn(0.2, 200).plan(query, support)
    for axis in (1, 2):
        torch.testing.assert_close(plan.sum(axis), torch.full((4, 6), 1 / 6), rtol=1e-3, atol=1e-5)
    sharp = Sinkhorn(0.01, 400).plan(query.double(), support.double())  # the assignment of most similarity
    from scipy.optimize import linear_sum_assignment

    c = torch.nn.functional.cosine_similarity(query.double().view(6, 1, 8), support[0].double().view(1, 6, 8), dim=-1)
    assert sharp[0].argmax(1).tolist() == linear_sum_assignment(c.numpy(), maximize=True)[1].tolist()


def test_hough_matcher_reads_images_and_the_released_axes_are_swapped():
    torch.manual_seed(0)
    net = CHMNet(embed_dims=(4, 4, 4), depths=(1, 1, 1), stem_dim=4).eval()
    query, support = torch.rand(3, 64, 64), torch.rand(2, 3, 64, 64)
    ours = CHMMatcher(net, size=64)(query, support, (3, 3))
    theirs = CHMMatcher(net, size=64, compat="authors")(query, support, (3, 3))
    assert ours.shape == (2, 3, 3, 2) and int(ours.min()) >= 0 and int(ours.max()) <= 2
    for i in range(3):
        for j in range(3):  # the point at x of i and y of j, whose x becomes the row
            assert theirs[0, i, j].tolist() == ours[0, j, i].flip(0).tolist()
    classifier = CorrespondenceClassifier(
        lambda x: F.avg_pool2d(x, 16).permute(0, 2, 3, 1), support, [1, 0], CHMMatcher(net, size=64), votes=1
    )
    assert classifier.match(query).predict().label in (0, 1)
    again = load_chmnet_roundtrip(net)
    torch.testing.assert_close(again(query[None], support[:1]), net(query[None], support[:1]))


def load_chmnet_roundtrip(net):
    copy = CHMNet(embed_dims=(4, 4, 4), depths=(1, 1, 1), stem_dim=4)
    copy.load_state_dict(net.state_dict())
    return copy.eval()


def test_bad_input_is_named():
    images, encode = torch.rand(3, 3, 4, 4), lambda x: x.permute(0, 2, 3, 1)
    for change, error in (
        ({"matcher": "best"}, "matcher"),
        ({"labels": [0, 1]}, "one per image"),
        ({"labels": [0, 1, -1]}, "at least 0"),
        ({"encode": lambda x: x.flatten(1)}, r"encode must give \(B, h, w, C\)"),
        ({"shortlist": 0}, "shortlist"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            CorrespondenceClassifier(**{"encode": encode, "images": images, "labels": [0, 1, 2], **change})
    with pytest.raises(ValueError, match="it must be that of|state_dict has no"):
        load_chmnet({"learner.conv2ds.0.weight": torch.zeros(1)}, embed_dims=(4, 4, 4), depths=(1, 1, 1), stem_dim=4)


def test_decisions_by_arm(tmp_path):
    log = [Decision("a", "x", "x", True), Decision("a", "x", "x", False), Decision("a", "x", "y", False),
           Decision("a", "x", "y", True), Decision("a", "y", "y", True), Decision("b", "x", "x", True)]  # fmt: skip
    found = decision_accuracy(log)
    assert (found["a"].trials, found["a"].right, found["a"].share) == (5, 3, 0.6)
    assert found["a"].model == 0.6 and found["a"].when_right[0] == 2 / 3 and found["a"].when_wrong[0] == 0.5
    assert found["b"].when_wrong is None and found["b"].share == 1
    assert 0.3 < arms_differ(found["a"], found["b"]) <= 1
    draw = random.Random(0)
    coin = [Decision("coin", "x", draw.choice("xy"), draw.random() < 0.5) for _ in range(4000)]
    low, high = decision_accuracy(coin)["coin"].interval
    assert low < 0.5 < high and high - low < 0.04
    path = tmp_path / "log.jsonl"
    trials = [
        ("Western_Gull", "060 Western_Gull", "Accept"), ("Western_Gull", "072 Pomarine_Jaeger", "Accept"),
        ("Nighthawk", "092 Nighthawk", "Submit as the final prediction"),
    ]  # fmt: skip
    lines = [json.dumps({"gt-label": g, "ai-prediction": {"label": p}, "decision": d}) for g, p, d in trials]
    path.write_text("\n".join(lines))
    rows = read_decisions(path, "static")
    assert [r.right for r in rows] == [True, False]
    with pytest.raises(ValueError, match="is no trial"):
        path.write_text("{}")
        read_decisions(path, "static")
    with pytest.raises(ValueError, match="log is empty"):
        decision_accuracy([])
    with pytest.raises(FileNotFoundError, match="there is no log"):
        read_decisions(tmp_path / "none", "static")
