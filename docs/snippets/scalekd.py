import torch

import attnlib
from attnlib.convert import LogitLoss, ScaleKD, distill

small = dict(num_classes=5, img_size=64)
teacher = attnlib.create_model(
    "swinv2_tiny_window8_256", embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2, **small
)
student = attnlib.create_model("resnet10t", embed_dims=(8, 12, 16, 24), **small)
lesson = distill(student, teacher, ScaleKD(student, teacher, 64, num_heads=(2, 4)), LogitLoss(), task=0.5)
losses = lesson(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))
losses["total"].backward()  # through the teacher's last stage, which stays frozen
print(sorted(losses))
print(sum(p.numel() for p in lesson.student.parameters()))  # what is left in the end
