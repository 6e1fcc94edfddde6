import torch

from attnlib.grids import log_polar_windows
from attnlib.models.perception import FoveatedTransfer, decoder, encoder

transfer = FoveatedTransfer(encoder(8, pools=2), decoder(8, pools=2)).eval()  # .released(...) has the authors' weights
windows = log_polar_windows((128, 128), scale=0.6, fixation=(40, 90), fovea=10, reduce=4)
image = torch.rand(1, 3, 128, 128)
metamer, reference = transfer(image, windows), transfer.reference(image)
print(len(windows.weights), metamer.shape, reference.shape)
