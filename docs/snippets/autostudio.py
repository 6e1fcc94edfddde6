# model: pipeline
import torch

from attnlib.steer import AutoStudio, Scene, Subject

scene = Scene("a meadow", [Subject("a red cat", (0, 0, 0.5, 1)), Subject("a dog", (0.5, 0, 1, 1))])
studio = AutoStudio.of(pipe.unet, scale=0.7).stage(scene)
studio.refer(torch.randn(1, 2, 4, pipe.unet.config.cross_attention_dim))  # tokens of an IP-Adapter, per subject
print(scene.prompt)  # with a text encoder: with attnlib.attach(pipe, studio): pipe(scene.prompt)
