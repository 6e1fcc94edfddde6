import torch

import attnlib
from attnlib.models.pretrain.croco import CroCoBinocular

small = dict(img_size=64, dim=64, depth=2, num_heads=2, decoder_dim=32, decoder_depth=2, decoder_heads=2)
model = attnlib.create_model("croco_v2_base", **small)  # the settings of the paper without `small`
view1, view2 = torch.randn(2, 2, 3, 64, 64)

found = model(view1, view2)  # 90 % of the first view are hidden
print(found.mask.sum(1), model.loss(found, view1)["pixels"].item(), model.predict(view1, view2).shape)

stereo = CroCoBinocular(model, out_channels=1)  # fine-tuned for disparity; head="dpt" has the release's head
print(stereo(view1, view2).shape)
