"""TPO against its release: embeddings, losses, gradients, spans; and what holds of tasks in a model that trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from attnlib.models.multimodal.task_preference import (
    MomentHead,
    Prompted,
    TaskPreference,
    TrackHead,
    best_spans,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "task-preference-optimization.safetensors"


@pytest.fixture(scope="module")
def theirs():
    with safe_open(FIXTURE, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])  # noqa: SIM118


def close(ours, want, tolerance=1e-9):
    assert ours.shape == want.shape
    assert float((ours - want).detach().abs().max()) <= tolerance * max(float(want.abs().max()), 1e-12)


def released(theirs, case):
    held, config = theirs
    names = list(config["tokens"])
    tpo = TaskPreference(config["tokens"], config["dim"], config["prompts"], config["prompt_dim"], compat="authors")
    tpo.double().eval()
    sd = {k.removeprefix(f"{case}/sd/"): v for k, v in held.items() if k.startswith(f"{case}/sd/")}
    tpo.load_state_dict(TaskPreference.convert_state_dict(sd, names))
    return tpo, names


@pytest.mark.parametrize("case", ["some", "none"])
def test_losses_and_gradients_are_the_release_s(theirs, case):
    held, config = theirs
    tpo, names = released(theirs, case)
    total = 0
    states = []
    for b in range(2):
        ids = held["ids"][b : b + 1]
        features = {"track_box": [tpo.encode_boxes(held["input_boxes"][b : b + 1])]}
        embeds = tpo.embed(ids, held["table"][ids], features)
        close(embeds, held[f"{case}/embeds"][b : b + 1])
        h = torch.tanh(embeds.cumsum(1) @ held["mix"])
        h.retain_grad()
        states.append(h)
        close(h, held[f"{case}/states"][b : b + 1])
        said = tpo(ids, h, names=["boxes", "tracking"])
        target = {
            "boxes": held[f"boxes/{b}"],
            "tracking": Prompted(held["gt_prompts"][b : b + 1], held["input_boxes"][b : b + 1]),
        }
        loss = h.square().mean() + sum(tpo.losses(said, target).values())
        close(loss.reshape(1), held[f"{case}/loss/{b}"])
        total = total + loss
    total.backward()
    close(torch.cat([h.grad for h in states]), held[f"{case}/dstates"])
    want = {k.removeprefix(f"{case}/dw/"): v for k, v in held.items() if k.startswith(f"{case}/dw/")}
    want = TaskPreference.convert_state_dict(want, names)
    for name, p in tpo.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        if name == "rows":  # their table has no row for boxes that are given, and none is read here
            got = got.clone()
            assert not got[names.index("track_box")].any()
        close(got, want[name])


def test_spans_of_frames_are_the_release_s(theirs):
    held, _ = theirs
    tpo, _ = released(theirs, "some")
    scores = tpo.heads["temp"](held["temporal/x"])
    close(scores[..., :2], held["temporal/logits"])
    close(scores[..., 2:], held["temporal/action"])
    first, last = best_spans(scores[..., :2]).unbind(-1)
    assert torch.equal(torch.stack([first * 5, last * 5 + 1], -1), held["temporal/spans"])
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[:, 4:] = False
    assert torch.equal(best_spans(scores[..., :2], valid), best_spans(scores[:, :4, :2]))


def tpo_of(**changes):
    torch.manual_seed(0)
    settings = {"num_prompts": 2, "prompt_dim": 16, **changes}
    return TaskPreference({"boxes": 55, "tracking": 56, "temp": 57, "track_box": 58}, 32, **settings)


BOX = torch.tensor([[0.1, 0.2, 0.5, 0.7]])


def test_absent_tasks_add_nothing_and_perfect_boxes_cost_nothing():
    tpo = tpo_of()
    ids, states = torch.tensor([[55, 1, 2]]), torch.randn(1, 3, 32)
    said = tpo(ids, states)
    assert set(said) == {"boxes"} and tpo.losses({}, {}) == {}
    sum(tpo.losses(said, {"boxes": BOX}).values()).backward()
    assert all(p.grad is None for p in tpo.heads["tracking"].parameters())
    exact = said["boxes"]._replace(output=BOX)
    assert all(float(t) == 0 for t in tpo.losses({"boxes": exact}, {"boxes": BOX}).values())
    turned = said["boxes"]._replace(output=BOX[:, [2, 3, 0, 1]])
    terms = tpo.losses({"boxes": turned}, {"boxes": BOX})
    assert float(terms["box_giou"]) == 0 and bool(terms["box_l1"].isfinite())


def test_any_module_is_a_head():
    tpo = tpo_of(heads={"boxes": nn.Linear(32, 4)})
    assert isinstance(tpo.heads["boxes"], nn.Linear) and isinstance(tpo.heads["tracking"], TrackHead)
    with pytest.raises(ValueError, match="token 'counts' has no head"):
        TaskPreference({"counts": 3}, 32)
    own = TaskPreference({"counts": 3}, 32, heads={"counts": nn.Linear(32, 1)})
    assert own(torch.tensor([[3, 3]]), torch.randn(1, 2, 32))["counts"].output.shape == (2, 1)


def test_moments_are_found_and_their_loss_falls():
    torch.manual_seed(0)
    head = MomentHead(32, 8, width=16, num_heads=2, depth=1, num_queries=4)
    video = torch.randn(2, 12, 8)
    asked, target = torch.randn(2, 32), [torch.tensor([[0.25, 0.5]]), torch.tensor([[0.0, 0.25], [0.5, 1.0]])]
    for b, spans in enumerate(target):
        for s, e in spans.tolist():
            video[b, int(s * 12) : int(e * 12)] += 3
    valid = torch.ones(2, 12, dtype=torch.bool)
    optimizer, found = torch.optim.Adam(head.parameters(), 3e-3), []
    for _ in range(60):
        loss = sum(head.loss(head.ground(head(asked), video, valid), target, valid=valid).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.5 * found[0]
    longer = torch.cat([video, torch.full((2, 3, 8), float("nan"))], 1).nan_to_num(7.0)
    more = torch.cat([valid, torch.zeros(2, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        head.ground(head(asked), longer, more).spans, head.ground(head(asked), video).spans, atol=1e-5, rtol=1e-5
    )
    tpo = tpo_of(heads={"temp": head})
    said = tpo(torch.tensor([[57, 1, 57]]), torch.randn(1, 3, 32))
    terms = tpo.losses(said, {"temp": target}, video=video)
    assert set(terms) == {"temp_span", "temp_span_giou", "temp_span_label", "temp_saliency"}
    with pytest.raises(ValueError, match="moments are found in video"):
        tpo.losses(said, {"temp": target})


def test_frames_have_a_loss_of_their_own():
    tpo = tpo_of()
    said = tpo(torch.tensor([[57] * 5 + [1], [1] + [57] * 5]), torch.randn(2, 6, 32))
    terms = tpo.losses(said, {"temp": torch.tensor([[0, 3], [2, 4]])})
    terms["temp_ends"].backward()
    with pytest.raises(ValueError, match=r"\(3, 3\) for a sample of 5 frames"):
        tpo.losses(said, {"temp": torch.tensor([[3, 3], [2, 4]])})


def test_stages_say_what_learns():
    tpo, lora = tpo_of(), [nn.Parameter(torch.zeros(2))]
    assert {id(p) for p in tpo.stage("assign", lora)} == {id(p) for p in (*lora, tpo.rows)}
    assert not any(p.requires_grad for p in tpo.heads.parameters()) and lora[0].requires_grad
    tpo.stage("heads", lora)
    assert all(p.requires_grad for p in tpo.heads.parameters()) and not lora[0].requires_grad
    assert len(tpo.stage("joint", lora)) == 1 + len(list(tpo.parameters()))
    with pytest.raises(ValueError, match="name=.four. is not possible"):
        tpo.stage("four", lora)


def test_bad_targets_are_told_by_name():
    tpo = tpo_of()
    said = tpo(torch.tensor([[55, 56]]), torch.randn(1, 2, 32))
    for target, what in (
        ({"boxes": BOX}, "token 'tracking' was read 1 times, and target has none"),
        ({"counts": BOX}, "target names 'counts'"),
    ):
        with pytest.raises(ValueError, match=what):
            tpo.losses(said, target)
    boxes = {"boxes": said["boxes"]}
    with pytest.raises(ValueError, match="x2 <= x1"):
        tpo.losses(boxes, {"boxes": BOX[:, [2, 1, 0, 3]]})
    with pytest.raises(ValueError, match="no shares of an image"):
        tpo.losses(boxes, {"boxes": BOX * 100})
    with pytest.raises(ValueError, match="target has 'boxes', and no such token was read"):
        tpo.losses({}, {"boxes": BOX})
    with pytest.raises(ValueError, match="as many boxes as target"):
        tpo.losses(boxes, {"boxes": BOX.repeat(2, 1)})
    with pytest.raises(ValueError, match="no shares of an image"):
        tpo.encode_boxes(BOX * 100)
    with pytest.raises(ValueError, match="needs video_dim"):
        tpo_of(temporal="moments")
    with pytest.raises(ValueError, match="start before end"):
        MomentHead.loss(None, [torch.tensor([[0.5, 0.5]])])
    with pytest.raises(ValueError, match="two frames or more"):
        best_spans(torch.zeros(1, 1, 2))


def test_a_model_learns_to_say_and_to_place(tmp_path):
    """Places told in words, in a tiny language model: losses of text and boxes fall together, its weights stay."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

    import attnlib
    from attnlib.models.multimodal.task_tokens import UseTaskTokens

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, eos_token_id=None, initializer_range=0.2,
        )
    )  # fmt: skip
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    tpo = TaskPreference({"boxes": 55, "box_begin": 56}, 32, outputs=True)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    learns = tpo.stage("joint", adapters)
    frozen = {n: p.clone() for n, p in base.named_parameters() if "lora_" not in n}
    corner = torch.randint(0, 4, (16, 2))
    ids = torch.cat([torch.full((16, 1), 1), 10 + corner, torch.full((16, 1), 56), torch.full((16, 1), 55)], 1)
    boxes = torch.cat([corner, corner + 1], 1) / 5.0
    optimizer, curve = torch.optim.Adam(learns, 1e-2), []
    labels = ids.masked_fill(ids < 50, -100)
    with attnlib.attach(model, use := UseTaskTokens(tpo)):
        for _ in range(60):
            text = model(input_ids=ids, labels=labels).loss
            box = sum(tpo.losses(use.read(), {"boxes": boxes}).values())
            optimizer.zero_grad()
            (text + box).backward()
            optimizer.step()
            curve.append((float(text.detach()), float(box.detach())))
        with torch.no_grad():
            out = model.generate(input_ids=ids[:, :3], max_new_tokens=3, do_sample=False)
            said = use.found(out)["boxes"]
    assert curve[-1][0] < 0.2 * curve[0][0] and curve[-1][1] < 0.3 * curve[0][1]
    assert torch.equal(out[:, 3:5], ids[:, 3:5]) and len(said.output) >= 16
    first = torch.stack([said.output[said.sample == i][0] for i in range(16)])
    assert float((first - boxes).abs().mean()) < 0.12
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters() if "lora_" not in n)
    torch.save(tpo.state_dict(), tmp_path / "tpo.pt")
    other = TaskPreference({"boxes": 55, "box_begin": 56}, 32, outputs=True)
    other.load_state_dict(torch.load(tmp_path / "tpo.pt"))
