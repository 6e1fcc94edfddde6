import torch
from torch import nn

from attnlib.theory.stiffness import GatedStep, StepGate, block_stiffness

model = nn.Sequential(*(GatedStep(nn.Linear(32, 32), StepGate(32, look_ahead=True)) for _ in range(3)))
for name, index in block_stiffness(model, ["0", "1", "2"], torch.randn(4, 7, 32)).items():
    print(name, index)
