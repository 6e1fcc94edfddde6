import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def untrained_generators(tmp_path_factory):
    """A folder with untrained small generators and a tiny judge, where trained ones are looked for."""
    pytest.importorskip("diffusers")
    import torch
    from safetensors.torch import save_file

    from attnlib.bench.worlds import models
    from attnlib.bench.worlds.judge import Judge

    made = tmp_path_factory.mktemp("generators")
    for name in models.PARTS:
        torch.manual_seed(0)
        models.build(name).half().save_pretrained(str(made / name))
    (made / "judge").mkdir()
    save_file(Judge(16, 1).state_dict(), str(made / "judge" / "model.safetensors"))
    return made


@pytest.fixture(scope="session")
def diffusion_figures():
    """What writes the tables of docs/diffusion.md."""
    pytest.importorskip("matplotlib")
    path = Path(__file__).parents[2] / "examples" / "diffusion" / "figures.py"
    spec = importlib.util.spec_from_file_location("diffusion_figures", path)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    return figures
