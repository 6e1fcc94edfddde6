# model: pictures
from transformers import SamConfig, SamModel

from attnlib.models.multimodal.read_seg import READ

sizes = dict(image_size=64, patch_size=8)
sam = SamModel(SamConfig(  # stands for any SAM of transformers
    vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=16, output_channels=16,
                       num_pos_feats=8, **sizes),
    prompt_encoder_config=dict(hidden_size=16, **sizes),
    mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16),
))  # fmt: skip
read = READ(sam, seg_token=61, image_token=62, dim=32)
inputs["input_ids"][:, -1] = 61  # "... it is [SEG]"
target = torch.zeros(1, 48, 64)
target[:, 10:30, 20:50] = 1
with attnlib.attach(model, use := read.use()):
    text = model(**inputs, labels=inputs["input_ids"]).loss
    found = read(*use.last, sizes=[(48, 64)], pixel_values=torch.randn(1, 3, 64, 64))
losses = {"text": text, **read.loss(found, [target])}
sum(losses.values()).backward()
print({k: round(v.item(), 2) for k, v in losses.items()}, found[0].masks.shape, found[0].labels[0, :8].tolist())
