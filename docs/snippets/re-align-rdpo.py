# model: pictures
from attnlib.convert import preference

images = preference.retrieve(torch.randn(3, 8))  # by features of any image encoder: the nearest other
retrieved = torch.randn(1, 3, 16, 16)
pair = {**inputs, "chosen": [5, 6, 7], "rejected": [5, 9, 7], "retrieved": retrieved}
trained = preference.train(model, [pair], recipe=preference.rdpo(beta=0.1), steps=2, rank=4)
print(trained.history[-1]["margin/image"])
trained.restore()
