"""torch.compile around or inside a session: what is attached acts, and is gone afterwards."""

import pytest
import torch

import attnlib
from attnlib.hooks import Intervention
from hooks.families import FAMILIES

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


class Halve(Intervention):
    def on_output(self, site, out):
        return out * 0.5


#: The denoiser takes 20 seconds to trace; its runtime goes the same way.
SOME = [f for f in FAMILIES if f.name in ("transformers", "multihead", "timm", "native")]


@pytest.mark.parametrize("how", ["around", "inside", "method"])
@pytest.mark.parametrize("family", SOME, ids=repr)
def test_compiled_models(family, how):
    if how == "method" and family.name == "transformers":
        pytest.skip("traced twice already")
    model = family.make()
    torch._dynamo.reset()
    with torch.no_grad():
        plain = family.call(model)
        compiled = model
        if how == "around":
            compiled = torch.compile(model, backend="eager")
            assert torch.equal(family.call(compiled), plain)
        elif how == "method":
            model.compile(backend="eager")
            assert torch.equal(family.call(model), plain)
        with attnlib.attach(model, Halve()):
            if how == "inside":
                compiled = torch.compile(model, backend="eager")
            got = family.call(compiled)
            other = family.make()
            with attnlib.attach(other, Halve()):
                torch.testing.assert_close(got, family.call(other), rtol=0, atol=1e-6)
            assert (got - plain).abs().max() > 1e-3
        torch.testing.assert_close(family.call(compiled), plain, rtol=0, atol=1e-6)


def test_one_graph_is_refused_for_the_true_reason():
    family = next(f for f in SOME if f.name == "timm")
    model = family.make()
    with torch.no_grad(), attnlib.attach(model, Halve()):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="stages of an attnlib session are run as they are"):
            family.call(torch.compile(model, backend="eager", fullgraph=True))
