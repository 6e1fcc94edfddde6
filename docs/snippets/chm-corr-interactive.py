import torch

from attnlib.look.correspondence import CorrespondenceClassifier

torch.manual_seed(0)
images, labels = torch.rand(6, 3, 32, 32), [0, 0, 0, 1, 1, 1]
patches = torch.nn.Conv2d(3, 8, 8, stride=8)  # in place of a network: 4 x 4 places
classifier = CorrespondenceClassifier(lambda x: patches(x).permute(0, 2, 3, 1), images, labels, "sinkhorn", votes=3)
found = classifier.match(torch.rand(3, 32, 32))  # the only forward
mask = torch.zeros(4, 4)
mask[1:3, 1:3] = 1  # look here
print(found.predict().label, found.predict(mask).label, found.lines(0, mask).tolist())
