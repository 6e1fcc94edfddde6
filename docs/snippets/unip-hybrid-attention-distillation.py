import torch

import attnlib
from attnlib.convert import MapLoss, distill
from attnlib.look import hybrid_layer, information_by_layer

small = dict(patch_size=4, img_size=16, num_classes=0)
teacher = attnlib.create_model("vit_tiny_patch16_224", embed_dim=24, depth=3, num_heads=4, **small).eval()
student = attnlib.create_model("vit_tiny_patch16_224", embed_dim=12, depth=2, num_heads=3, last_heads=4, **small)
images = torch.randn(8, 3, 16, 16)

information = information_by_layer(teacher, images.split(4))  # 1: local, 0: all queries read alike
lesson = distill(student, teacher, MapLoss(teacher=hybrid_layer(information, target=0.09)))
optimizer = torch.optim.AdamW(lesson.parameters(), 1.5e-4)
for batch in images.split(4):
    optimizer.zero_grad()
    lesson(batch)["total"].backward()
    optimizer.step()
print(student(images).shape)  # as it was before
