# model: pipeline
from attnlib.steer import DynamicPrompt

learn = DynamicPrompt(("circle", "square"), inner=2, resolution=4)  # of a prompt in words
print(learn.thresholds(0), learn.thresholds(10))
