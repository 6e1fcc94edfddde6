# model: pictures
from attnlib.models.multimodal.task_preference import TaskPreference
from attnlib.models.multimodal.task_tokens import UseTaskTokens

tpo = TaskPreference({"boxes": 60, "box_begin": 61}, dim=32)
inputs["input_ids"][:, -2:] = torch.tensor([61, 60])  # "... <box_begin><boxes>"
with attnlib.attach(model, use := UseTaskTokens(tpo)):
    text = model(**inputs, labels=inputs["input_ids"]).loss
    said = use.read()
losses = {"text": text, **tpo.losses(said, {"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.7]])})}
sum(losses.values()).backward()
print({k: round(v.item(), 2) for k, v in losses.items()}, said["boxes"].output.shape, tpo.rows.grad.abs().sum(1) > 0)
