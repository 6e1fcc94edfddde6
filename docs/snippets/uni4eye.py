import torch

from attnlib.models.pretrain.uni4eye import EyeClassifier, Uni4Eye

small = dict(dim=48, depth=2, num_heads=2, decoder_dim=24, decoder_depth=1, decoder_heads=2)
model = Uni4Eye(img_size=64, patch_size=16, **small)  # without `small` it is a ViT-B

fundus, oct_volume = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64, 32)
for x in (fundus, oct_volume):  # one kind a step; three quarters of the patches are hidden
    found = model(x)
    print(found.patches.shape, {name: term.item() for name, term in model.loss(found, x).items()})

classifier = EyeClassifier(model, num_classes=5)
print(classifier(fundus).shape, classifier(oct_volume).shape)
