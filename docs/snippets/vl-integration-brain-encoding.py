import torch

from attnlib.look.encoding import bootstrap, folds, integration, resamples

vision, language = torch.randn(2, 120, 4)  # features of two models, event by event
responses = (vision * language).repeat_interleave(10, 1) + torch.randn(120, 40)  # 4 sites of 10 time bins
models = {"vision": vision, "language": language, "side by side": torch.cat([vision, language], 1)}
models["both"] = torch.cat([vision, language, vision * language], 1)
rows = resamples(folds(120, 4, gap=1), 120, 19)  # the same draws for all models
scores = {name: bootstrap(x, responses, rows, split=4, gap=1, alphas=[1.0, 100.0]) for name, x in models.items()}
found = integration(
    scores, 10, multimodal=["both"], unimodal=["vision", "language"], concat="side by side", test="bins"
)
print(found.sites, {name: control.gap for name, control in found.controls.items()})
