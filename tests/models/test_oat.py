"""OAT against the authors' model, and measures of scanpaths against theirs."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, Fixture, synthetic
from whole import Recorded, Whole, renamer

from attnlib.models.perception import oat
from attnlib.models.perception.oat import (
    OAT,
    PatchNet,
    fit_table,
    gaussian,
    gaussian_table,
    sharpened_places,
    sinusoid_table,
    table_loss,
)
from attnlib.models.perception.scanpaths import (
    behaviour,
    behaviour_gap,
    behaviour_rates,
    edit_distance,
    multimatch,
    sequence_score,
)
from attnlib.models.protocol import Optimizers, train_batch


class Models(Fixture):
    folder = HERE / "models"


THEIRS = Models("oat-scanpath")
METRICS = json.loads(THEIRS.meta["metrics"])
PATH = torch.tensor([[0, 3, 3, 4], [5, 1, -1, -1]])


def wave(*shape, k):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k).reshape(shape)


@pytest.mark.parametrize(
    ("theirs", "kind", "alpha"),
    [("original", "geometric", 0.9), ("linear", "linear", 0.9), ("exp1", "power", 0.9), ("exp2", "share-power", 0.7)],
)
def test_sines_of_places_are_the_authors(theirs, kind, alpha):
    """Every place of their shelf of 3 x 11, marked or not, against what a model with our table gives them."""
    want = Recorded("oat-sinusoids").tensors[theirs]  # (3, 11, 2, 20)
    table = sinusoid_table(14, 8, kind, alpha)
    model = OAT(40, 2, 16, (1, 1), table=table, compat="authors")
    rows, columns, flags = torch.meshgrid(torch.arange(3), torch.arange(11), torch.arange(2), indexing="ij")
    ours = model.codes(torch.stack([rows, columns], -1).float(), flags)
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-6)  # theirs rounds angles to float32
    for wrong, match in ((dict(kind="sine"), "kind"), (dict(dim=7), "2 .sines")):
        with pytest.raises(ValueError, match=match):
            sinusoid_table(**{"count": 4, "dim": 8, **wrong})


@pytest.mark.parametrize("case", ["pyramid2", "pyramid3", "flat"])
def test_logits_loss_and_gradients_are_the_authors(case, monkeypatch):
    waves = oat._waves

    def recorded_waves(length, dim, device):
        """Of the fixations, in float32, as they were: their last bit depends on the machine."""
        torch.testing.assert_close(waves(length, dim, device), THEIRS.tensors["waves"][:length])
        return THEIRS.tensors["waves"][:length]

    monkeypatch.setattr(oat, "_waves", recorded_waves)
    config = THEIRS.config[case]
    size, table = config["size"], THEIRS.tensors[f"{case}/table"].float()
    model = OAT(
        24, 2, 20, (2, 2), config["heads"], scale=512**-0.5, patch_size=None if config["pyramid"] else size,
        levels=config["pyramid"] or 1, table=table, compat="authors",
    )  # fmt: skip
    state = synthetic(config["shapes"])
    model.load_state_dict(OAT.convert_state_dict(state, table))
    model = model.double().eval()
    images = ((wave(2, 6, *size, 3, k=0.377) + 1) / 2).requires_grad_()
    places = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], -1).double().expand(2, 6, 2)
    found = model(images, places, torch.tensor([4, 1]), PATH)
    theirs = THEIRS.tensors[f"{case}/y"]
    for b, length in enumerate((5, 3)):
        torch.testing.assert_close(found.logits[b, :length], theirs[b, :length, :7], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.blank.expand(length), theirs[b, :length, 7], rtol=1e-9, atol=1e-9)
    loss = model.loss(found, PATH, compat="authors")["next"]
    torch.testing.assert_close(loss, THEIRS.tensors[f"{case}/loss"], rtol=1e-9, atol=1e-9)
    loss.backward()
    torch.testing.assert_close(images.grad.flatten(2).sum(-1), THEIRS.tensors[f"{case}/dx"], rtol=1e-8, atol=1e-10)
    spread = {n: torch.full(s, torch.nan, dtype=torch.float64) for n, s in config["shapes"].items()}
    recorded = THEIRS.under(f"{case}/dw")
    for name, some in recorded.items():
        flat = spread[name].view(-1)
        flat[torch.arange(len(flat))[:: max(1, len(flat) // 7)][:7]] = some
    held, seen = dict(model.named_parameters()), 0
    for name, expected in OAT.convert_state_dict(spread, table).items():
        known = ~expected.isnan()
        if name in held:
            torch.testing.assert_close(held[name].grad[known], expected[known], rtol=1e-7, atol=1e-10)
            seen += int(known.sum())
    assert seen == sum(len(some) for some in recorded.values())


@pytest.mark.parametrize(("case", "kind", "step"), [("shelf", "geometric", 1.0), ("stretched", "linear", 1.6)])
def test_a_classifier_over_one_shelf_is_the_authors(case, kind, step, monkeypatch):
    """Their ``CA_version`` 0, with sines of places, of rows 1.6 apart in one of both."""
    whole = Whole("oat-shelf")
    monkeypatch.setattr(oat, "_waves", lambda length, dim, device: THEIRS.tensors["waves"][:length])
    table = whole.tensors[f"{case}/table"].float()  # of whole places, (3, 4, 2, 12)
    sines = torch.stack([sinusoid_table(4, 4, kind, step=s) for s in (step, 1.0, 1.0)])
    by_axis = OAT(24, 2, 20, (1, 1), table=sines, compat="authors")
    rows, columns, flags = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(2), indexing="ij")
    codes = by_axis.codes(torch.stack([rows, columns], -1).float(), flags)
    torch.testing.assert_close(codes, table, rtol=0, atol=2e-6)  # theirs rounds angles to float32
    model = OAT(24, 2, 20, (2, 2), levels=2, table=table, compat="authors", classes=6)
    places = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], -1).double().expand(2, 6, 2)

    def rule(state):
        return OAT.convert_state_dict(state, table)

    def call(model, inputs):
        found = model(inputs["images"], places, torch.tensor([4, 1]), PATH)
        logits = torch.cat(found, -1)
        loss = model.loss(found, PATH, compat="authors")["next"]
        return {"first": logits[0], "second": logits[1, :3], "loss": loss}

    def trained(state):
        return {name: value for name, value in rule(state).items() if name != "table"}

    whole.holds(case, model, rule, call, renamer(trained, whole.state(case)))
    found = model.float()(torch.zeros(2, 6, 20, 20, 3), places.float(), torch.tensor([4, 1]), PATH)
    plain = model.loss(found, PATH)["next"]
    assert bool(plain < model.loss(found, PATH, compat="authors")["next"])  # padding takes no share
    with pytest.raises(ValueError, match="6 objects that classes says"):
        model(torch.zeros(2, 5, 20, 20, 3), places[:, :5].float(), torch.tensor([4, 1]), PATH)


def test_codes_are_turned_away_from_the_centre():
    table = sinusoid_table(5, 6).double()
    codes = torch.cat([table[:3, None, None].expand(3, 5, 2, 6), table[:5, None].expand(3, 5, 2, 6)], -1)
    new = sharpened_places(codes, (1, 2), 15)
    before, after = (torch.cosine_similarity(x, x[1, 2], -1) for x in (codes, new))
    torch.testing.assert_close(after.square(), before**15)
    torch.testing.assert_close(new.norm(dim=-1), codes.norm(dim=-1))
    assert torch.equal(new[1, 2], codes[1, 2]) and not torch.allclose(new[0, 0], codes[0, 0])
    inside = torch.stack([new[0, 0, 0], codes[0, 0, 0], codes[1, 2, 0]])
    assert int(torch.linalg.matrix_rank(inside, atol=1e-8)) == 2  # it stays in the plane
    model = OAT(24, 2, 16, (1, 1), table=new.float())
    halfway = model.codes(torch.tensor([[0.5, 1.0], [1.0, 2.5], [2.0, 4.0]]), torch.tensor([0, 1, 1]))
    wanted = torch.stack([(new[0, 1, 0] + new[1, 1, 0]) / 2, (new[1, 2, 1] + new[1, 3, 1]) / 2, new[2, 4, 1]])
    torch.testing.assert_close(halfway, wanted.float())
    for arguments, match in (
        ((codes, (3, 0)), "centre must be a place of 3 x 5"),
        ((codes, (1, 1, 1)), "centre must be a row and a column"),
        ((torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.5]]]]), (0, 0), 0.5), "order must be a whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            sharpened_places(*arguments)
    with pytest.raises(ValueError, match="places must lie between 0 and 2 .rows. and 4 .columns."):
        model(torch.zeros(1, 1, 20, 20, 3), torch.tensor([[[2.5, 1.0]]]), torch.tensor([0]), PATH[:1, :1])


def test_count():
    with torch.device("meta"):
        model = OAT(patch_size=(150, 93), table=torch.empty(14, 86))
    dead = 3 * 256 + 256  # a map of places that is never called
    assert sum(p.numel() for p in model.parameters()) + dead == THEIRS.config["full"]["count"] == 18256867


@pytest.mark.parametrize("row", METRICS, ids=str)
def test_measures_are_the_authors(row):
    a, b = row["a"], row["b"]
    assert sequence_score(a, b) == pytest.approx(row["nw"], abs=1e-6)
    xy = [torch.tensor([[i % 4, i // 4] for i in path]).double() for path in (a, b)]
    assert list(multimatch(*xy, (4, 3))) == pytest.approx(row["mm"], abs=1e-12)
    rates = behaviour_rates([a], [row["target"]])
    assert rates.tolist() == pytest.approx(row["behaviour"], abs=1e-12)
    counts = behaviour(a, row["target"])
    assert counts.search + counts.refixation + counts.revisit == counts.length == len(a)
    assert behaviour_gap(rates, rates) == 0


def test_edit_distance():
    assert edit_distance([1, 2, 3, 4], [1, 3, 4]) == 1 and edit_distance([], [1, 2]) == 2
    assert edit_distance(torch.tensor([1, 2, -1]), [2, 1]) == 2 and edit_distance([5, 5], [5, 5]) == 0


def test_measures_refuse_what_has_no_answer():
    for call, match in (
        (lambda: sequence_score([], []), "nothing to compare"),
        (lambda: behaviour_rates([[]], [1]), "has none"),
        (lambda: behaviour_rates([], []), "at least one path"),
        (lambda: multimatch(torch.zeros(2, 2), torch.zeros(3, 2), (4, 3)), "one has 2 fixations"),
        (lambda: multimatch(torch.zeros(3, 2), torch.zeros(3, 2), (0, 3)), "size"),
        (lambda: behaviour([1, -1, 2], 1), "goes on behind its end"),
        (lambda: behaviour_gap(torch.ones(5), torch.zeros(5)), "all rates are 0"),
        (lambda: behaviour_gap(torch.ones(5), torch.full((5,), math.nan)), "people must hold finite rates"),
        (lambda: behaviour_rates([[1], [2]], [1]), "sought must be one object for each of 2 paths, got 1"),
        (lambda: multimatch(torch.full((3, 2), math.nan), torch.zeros(3, 2), (4, 3)), "one must hold finite places"),
        (lambda: multimatch(torch.zeros(3, 2), torch.zeros(3, 2), 4), "size must be a width and a height"),
        (lambda: sequence_score([1], [2], gap=math.nan), "gap must be"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="whole numbers"):
        behaviour([0.5], 1)
    with pytest.raises(TypeError, match="path must hold whole numbers"):
        behaviour(3, 1)


@pytest.mark.parametrize(
    "make", [gaussian_table, lambda n, d: fit_table(n, d, steps=700, lr=0.03)], ids=["root", "fitted"]
)
def test_cosines_of_the_table_are_gaussian(make):
    table = make(11, 86)
    cosines = torch.cosine_similarity(table[:, None], table[None], -1)
    torch.testing.assert_close(cosines, gaussian(11).float(), rtol=0, atol=1e-2)


def test_the_loss_of_the_table_is_its_loops():
    table = torch.randn(5, 7, dtype=torch.float64)
    unit = F.normalize(table, dim=1)
    total = sum(((unit[i] @ unit[j]) - math.exp(-((i - j) ** 2) / 8)) ** 2 for i in range(5) for j in range(5))
    norms = table.norm(dim=1)
    torch.testing.assert_close(table_loss(table), (total + ((norms - norms.mean()) ** 2).mean()) / 20)


def given(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(2, count, 20, 20, 3, generator=g)
    return images, 4 * torch.rand(2, count, 2, generator=g), torch.tensor([4, 1])


def small(**settings):
    torch.manual_seed(0)
    return OAT(24, 2, 16, (1, 1), **{"table_size": 8, **settings}).eval()


def test_places_between_rows_are_between_their_codes():
    model = small()
    whole = torch.tensor([[0, 0], [1, 0], [1, 3], [7, 7]])
    flag = torch.tensor([0, 1, 0, 1])
    codes = model.codes(whole.float(), flag)
    for code, (r, c), f in zip(codes, whole.tolist(), flag.tolist(), strict=True):
        assert torch.equal(code, torch.cat([model.table[r], model.table[c], model.table[f]])[:12])
    middle = model.codes(torch.tensor([[0.5, 0.0]]), flag[:1])
    torch.testing.assert_close(middle[0, :4], (model.table[0] + model.table[1]) / 2)
    cut = small(compat="authors").codes(torch.tensor([[0.5, 2.9]]), flag[:1])
    assert torch.equal(cut[0, 4:8], model.table[2])


def test_permuting_objects_permutes_logits():
    model, (images, places, sought) = small(), given()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    back = order.argsort()
    moved = model(images[:, order], places[:, order], back[sought], torch.where(PATH < 0, -1, back[PATH])).logits
    want = model(images, places, sought, PATH).logits
    torch.testing.assert_close(moved[..., :-1], want[..., order])
    torch.testing.assert_close(moved[..., -1], want[..., -1])


def test_later_fixations_change_nothing_before_them():
    model, (images, places, sought) = small(), given()
    one = model(images, places, sought, torch.tensor([[0, 3, 3, 4], [5, 1, 2, 2]])).logits
    other = model(images, places, sought, torch.tensor([[0, 3, 1, 1], [5, 1, 0, -1]])).logits
    assert torch.equal(one[:, :3], other[:, :3]) and not torch.allclose(one[:, 3], other[:, 3])


def test_any_number_of_objects_alone_or_padded():
    model = small()
    images, places, sought = given(9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 6:] = False
    images[0, 6:], places[0, 6:] = float("nan"), float("nan")
    images = images.requires_grad_()
    path = PATH.clone()
    both = model(images, places, sought, path, valid)
    alone = model(images[:1, :6], places[:1, :6], sought[:1], path[:1]).logits
    torch.testing.assert_close(both.logits[:1, :, :6], alone[..., :6])
    torch.testing.assert_close(both.logits[:1, :, -1], alone[..., -1])
    assert both.logits[0, :, 6:9].eq(float("-inf")).all()
    model.loss(both, path)["next"].backward()
    assert bool(images.grad.isfinite().all()) and not images.grad[0, 6:].any()
    drawn = model.predict(images, places, sought, valid=valid, samples=20, generator=torch.Generator().manual_seed(0))
    assert drawn[0].max() < 6 and drawn[1].max() >= 6
    single = model.predict(*(t[:, :1] for t in given(1)[:2]), torch.zeros(2, dtype=torch.long))
    assert (single[:, 0] == 0).all()  # one object: it is fixated


def test_answers_begin_with_a_fixation_and_stop_for_good():
    model, args = small(max_steps=7), given()
    with torch.no_grad():
        model.point_at.bias.zero_()
    state = torch.random.get_rng_state()
    greedy = model.predict(*args)
    drawn = model.predict(*args, samples=50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert greedy.shape == (2, 7) and drawn.shape == (2, 50, 7)
    assert (greedy[:, 0] >= 0).all() and (drawn[..., 0] >= 0).all() and (drawn < 0).any()
    ended = drawn < 0
    assert not (ended[..., :-1] & ~ended[..., 1:]).any()
    again = model.predict(*args, samples=50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, drawn)
    logits = model(*args, greedy[:, :3]).logits
    assert torch.equal(logits[:, 0, :-1].argmax(-1), greedy[:, 0])
    assert torch.equal(logits[:, 1].argmax(-1), greedy[:, 1].masked_fill(greedy[:, 1] < 0, 6))  # the last one: stop


def test_bad_input():
    model, (images, places, sought) = small(), given()
    absent = torch.ones(2, 6, dtype=torch.bool)
    absent[1, 1] = False
    for args, match in (
        ((images, places[:, :5], sought, PATH), "places"),
        ((images, places + 6, sought, PATH), "places must lie between 0 and 7"),
        ((images, places * float("nan"), sought, PATH), "places must lie"),
        ((images, places, sought + 3, PATH), "sought points at object 7"),
        ((images, places, sought, PATH + 1), "path points at object 6"),
        ((images, places, sought, torch.tensor([[-1, 2], [0, 1]])), "goes on behind its end"),
        ((images, places, sought, PATH, absent), "sought must exist"),
        ((images[:, :, :10], places, sought, PATH), "at least 19 x 19"),
        ((images[:, :0], places[:, :0], sought, PATH), "at least one object"),
        ((images, places, sought, PATH, None, torch.full((2, 2), 9.0)), "start must lie"),
    ):
        with pytest.raises(ValueError, match=match):
            model(*args)
    for settings, match in (
        (dict(table=torch.zeros(8, 3)), "3 W"),
        (dict(patch_size=(20, 20)), "at least 29"),
        (dict(compat="mine"), "compat"),
        (dict(table_size=1), "table_size"),
        (dict(patch_size=(30, 30, 30)), "patch_size must have 2 axes"),
    ):
        with pytest.raises(ValueError, match=match):
            small(**settings)
    with pytest.raises(ValueError, match="depth must be two"):
        OAT(24, 2, 16, (1, 1, 1), table_size=8)
    with pytest.raises(ValueError, match="images has 4 channels"):
        PatchNet(8)(torch.zeros(1, 20, 20, 4))
    with pytest.raises(ValueError, match=r"table must be a tensor of shape \(R, W\)"):
        table_loss(torch.zeros(3))
    with pytest.raises(ValueError, match="patch_size says"):
        small(patch_size=(31, 40))(images, places, sought, PATH)
    with pytest.raises(TypeError, match="path"):
        model(images, places, sought, PATH.float())
    with pytest.raises(ValueError, match="no cross_attentions"):
        OAT.convert_state_dict({"readout.weight": torch.ones(1, 2)}, torch.zeros(8, 4))


def test_copies_types_and_empty_batches():
    model, args = small(), given()
    want = model.predict(*args)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.train().predict(*args), want) and other.training
    empty = [t[:0] for t in args]
    assert model.predict(*empty, samples=3).shape == (0, 3, 32) and model(*empty, PATH[:0]).logits.shape == (0, 5, 7)
    with pytest.raises(ValueError, match="empty"):
        model.loss(model(*empty, PATH[:0]), PATH[:0])
    half = model.bfloat16()
    found = half(args[0].bfloat16(), args[1], args[2], PATH)
    assert found.logits.dtype == torch.bfloat16 and half.loss(found, PATH)["next"].isfinite()


def test_codes_are_the_releases_loops():
    """Of a shelf of 84 books and the one that is sought, for a batch of 20: 20 x 85 look-ups at once."""
    model = OAT(512, 4, 8, (1, 1)).eval()
    places, flag = torch.randint(0, 14, (20, 85, 2)), torch.randint(0, 2, (20, 85))
    out = torch.zeros(20, 85, 256)
    for i in range(20):
        for j in range(85):
            r, c, f = *places[i, j], flag[i, j]
            out[i, j] = torch.cat((model.table[r], model.table[c], model.table[f]))[:256]
    torch.testing.assert_close(model.codes(places.float(), flag), out)


def test_it_learns_a_policy_for_shelves_of_other_sizes():
    """Read along a row until the object sought is reached: trained on six objects, asked about eight."""
    g = torch.Generator().manual_seed(0)

    def shelves(count, size):
        sought = torch.randint(1, size, (count,), generator=g)
        images = torch.rand(count, size, 1, 1, 3, generator=g).expand(-1, -1, 20, 20, -1)
        places = torch.stack([torch.zeros(size), torch.arange(size).float()], -1).expand(count, -1, -1)
        path = torch.arange(size).expand(count, -1)
        path = path.masked_fill(path > sought[:, None], -1)
        return {"images": images, "places": places, "sought": sought, "path": path, "target": path}

    torch.manual_seed(0)
    model = OAT(48, 4, 48, (1, 1), table_size=10, drop=0.0, levels=1)
    optimizers = Optimizers(lambda name, params: torch.optim.Adam(params, 3e-3))
    losses = [train_batch(model, shelves(16, 6), optimizers, clip=1.0)["all"]["next"] for _ in range(60)]
    model.eval()
    scores = []
    for size in (6, 8):
        test = shelves(24, size)
        paths = model.predict(test["images"], test["places"], test["sought"], max_steps=12)
        scores.append(sum(map(sequence_score, paths, test["path"])) / 24)
    assert losses[-1] < 0.2 * losses[0] and scores[0] > 0.9
    assert scores[1] > 0.8
