import torch

from attnlib.steer import ViMAEdit

edit = ViMAEdit(torch.zeros(1, 4, 64, 64), blend=[["cat"], ["dog"]])  # clean latents of the source image
print(edit.cross, edit.self_maps, edit.image_maps, edit.thresholds)
