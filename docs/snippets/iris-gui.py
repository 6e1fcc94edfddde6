import torch

from attnlib.look.zoom import InformationCrops, dual_learn

screen = torch.full((400, 600, 3), 245, dtype=torch.uint8)
screen[40:72:4, 64:128] = 20  # a button with a label
screen[300:340:8, 400:560] = 60
crops = InformationCrops(k_min=48, size=96)(screen)
print([crop.box for crop in crops], crops[0].to_picture([[48.0, 48.0]]).tolist())

buttons = {"menu": (64, 40, 128, 72), "table": (400, 300, 560, 340)}  # a stand-in for a model that grounds and refers
names = {box: name for name, box in buttons.items()}
print(dual_learn(lambda image, text: buttons[text], lambda image, box: names[tuple(box)], screen, "menu"))
