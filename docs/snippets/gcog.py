from attnlib.bench.data.gcog import World, encode, trials
from attnlib.models.gcog import gcog_model

world = World(side=5, shapes=4, colors=4, features=4)
batch = encode(trials("distractor", "train", 64, seed=0, world=world), world)
model = gcog_model("cross", dim=32, classes=world.classes)  # or "two-stream", "perceiver", "single-stream", "gru", ...
model.loss(batch.rule, batch.grid, batch.answer, batch.rule_valid)["answer"].backward()
print(model(batch.rule, batch.grid, batch.rule_valid).exp().shape)
