# model: pictures
from attnlib.convert import preference

pair = {**inputs, "chosen": [5, 6, 7], "rejected": [5, 9, 7], "standard": [8, 6]}  # token ids, or text with processor=
trained = preference.train(model, [pair], recipe="opa-dpo", steps=2, align_steps=2, rank=4)
print(trained.terms, trained.history[0]["loss"])
trained.restore()  # the model without the adapter; trained.save(path) writes the adapter alone
