import torch

from attnlib.look.encoding import AttentionReadout, SpatialReadout, fit_readout, pearson

features = torch.randn(200, 8, 8, 64)  # patches of a frozen backbone, such as DINOv2's
left, right = torch.eye(4, dtype=torch.bool).repeat_interleave(5, 1), torch.ones(1, 7, dtype=torch.bool)
responses = [torch.randn(200, 20), torch.randn(200, 7)]  # of two hemispheres: 4 areas, and one
for model in (AttentionReadout(64, [left, right], num_heads=4), SpatialReadout(64, [left, right], (8, 8))):
    fit_readout(model, features[:150], [r[:150] for r in responses], epochs=1)
    read = model(features[150:], weights=True)
    print(type(model).__name__, pearson(read.responses[0], responses[0][150:]).mean(), read.weights.shape)
