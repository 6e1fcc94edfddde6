"""Every bad value at the doors of ``attach`` and ``session.at`` is named, with what was given and what is possible."""

import functools

import pytest
import torch

import attnlib
from attnlib.hooks import Intervention, TokenTypes
from hooks.families import FAMILIES
from hooks.models import NoOp, language_model, prompt

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


@functools.cache
def model_of(family):
    return family.make()


class Halve(Intervention):
    def __init__(self, layers=None):
        self.layers = layers

    def on_output(self, site, out):
        return out * 0.5


class Typed(NoOp):
    needs_types = True


PARTS = [("", ValueError), ("nowhere", ValueError), ("model.layers.99", ValueError), (".", ValueError),
         (3, TypeError), (True, TypeError), (["model"], TypeError), (torch.nn.Identity(), TypeError)]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize(("part", "error"), PARTS, ids=lambda v: repr(v)[:20])
def test_part(family, part, error):
    model = model_of(family)
    with pytest.raises(error, match=r"^part(=| must be).*(it has|has) \["):
        attnlib.attach(model, Halve(), part=part)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_a_part_without_attention(family):
    model = model_of(family)
    name = next(n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)))
    with pytest.raises(TypeError, match="has no attention that can be reached"):
        attnlib.attach(model, Halve(), part=name)


ROWS = ["cond", 3, True, (), (1, 2), ("cond", None), ("",), {"cond": 1}, {"cond", "uncond"}, torch.ones(2),
        (name for name in ("a", "b"))]  # fmt: skip


@pytest.mark.parametrize("rows", ROWS, ids=lambda v: type(v).__name__)
def test_rows(rows):
    model = language_model()
    with pytest.raises(TypeError, match=r"^rows must be a sequence of names.*; got "):
        attnlib.attach(model, Halve(), rows=rows)
    with attnlib.attach(model, Halve()) as session:
        with pytest.raises(TypeError, match=r"^rows must be a sequence of names"), session.at(rows=rows):
            pass
        assert session.rows is None


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_rows_of_another_number(family):
    model = model_of(family)
    with torch.no_grad(), attnlib.attach(model, Halve(), rows=("a", "b", "c")):
        with pytest.raises(ValueError, match=r"rows names 3 rows of the batch .* got a batch of \d"):
            family.call(model)


LAYERS = [(0, TypeError), ("*", TypeError), ({}, TypeError), (iter([0]), TypeError), (torch.tensor([0]), TypeError),
          ([], ValueError), ([True], TypeError), ([0.0], TypeError), ([None], TypeError), ([[0]], TypeError),
          ([99], ValueError), ([-99], ValueError), (["nowhere*"], ValueError), ([0, 99], ValueError)]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize(("layers", "error"), LAYERS, ids=lambda v: repr(v)[:16])
def test_layers(family, layers, error):
    model = model_of(family)
    with pytest.raises(error, match=r"Halve: layer"):
        attnlib.attach(model, Halve(layers))
    assert not model._forward_pre_hooks


TYPES = [
    ([[1, 2]], TypeError, "token_types must be"),
    ("image", TypeError, "token_types must be"),
    (TokenTypes, TypeError, r"make one: TokenTypes\(...\)"),
    (torch.ones(20, dtype=torch.long), ValueError, r"must be \(B, N\) integers"),
    (torch.ones(2, 20), ValueError, r"must be \(B, N\) integers"),
    (torch.ones(2, 20, dtype=torch.bool), ValueError, r"must be \(B, N\) integers"),
    (torch.full((2, 20), -1), ValueError, "must lie between 0 and 5"),
    (torch.full((2, 20), 6), ValueError, "must lie between 0 and 5"),
    (torch.ones(2, 19, dtype=torch.long), ValueError, "tells of 19 tokens, but the prompt has 20"),
    (torch.ones(3, 20, dtype=torch.long), ValueError, "token_types has 3 rows"),
    (lambda ids: None, ValueError, "gave NoneType"),
    (lambda ids: ids.float(), ValueError, "gave torch.float32"),
    (lambda ids: ids[:, 1:] * 0, ValueError, r"gave torch.int64 \(2, 19\)"),
    (lambda ids: ids * 0 - 1, ValueError, "gave types from -1 to -1"),
    (lambda ids: ids * 0 + 6, ValueError, "gave types from 6 to 6"),
]


@pytest.mark.parametrize(("types", "error", "said"), TYPES, ids=[str(n) for n in range(len(TYPES))])
def test_token_types(types, error, said):
    model, inputs = language_model(), prompt()
    with pytest.raises(error, match=f"token_types.*{said}" if "token_types" not in said else said):
        with torch.no_grad(), attnlib.attach(model, Typed(), token_types=types):
            model(**inputs)
    assert not model._forward_pre_hooks


AT = [{"step": -1}, {"step": 1.5}, {"step": "one"}, {"pass_name": 3}, {"branch": 0}, {"branch": ("a",)},
      {"prompt_length": 0}, {"prompt_length": 2.0}, {"token_types": torch.ones(2, 3, dtype=torch.long)}]  # fmt: skip


@pytest.mark.parametrize("said", AT, ids=str)
def test_at(said):
    model, name = language_model(), next(iter(said))
    with attnlib.attach(model, Halve()) as session:
        with pytest.raises((TypeError, ValueError), match=name), session.at(**said):
            pass
        assert (session.step, session.pass_name, session.branch) == (None, None, None)
