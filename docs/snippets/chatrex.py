# model: pictures
from attnlib.models.multimodal.chatrex import ChatRex, ObjectFeatures, ObjectIndex
from attnlib.models.multimodal.proposals import UPN, chosen

maps = [torch.randn(1, 16, 8, 8), torch.randn(1, 32, 4, 4)]  # of any backbone
small = dict(dim=32, num_levels=3, num_heads=4, hidden=64, encoder_depth=1, decoder_depth=1, num_queries=8, groups=8)
upn = UPN((16, 32), **small)
boxes, scores = chosen(upn(maps, granularity="fine"), sizes=[(64, 64)], min_score=0.0, threshold=0.8, most=2)[0]

words = ObjectIndex(4)  # <obj0> .. <obj3>, here tokens 55 to 58; 59 is the place of an object's features
rex = ChatRex([55, 56, 57, 58], placeholder=59, features=ObjectFeatures((16, 32), 32), dim=32)
inputs["input_ids"][:, -2 * len(boxes) :] = torch.tensor([55, 59, 56, 59])[: 2 * len(boxes)]
with attnlib.attach(model, *rex.use(maps, [boxes.detach()], units="pixel", sizes=[(64, 64)])):
    print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:].tolist())  # never <obj2>, <obj3>

text = "<ground>a kite</ground><objects><obj1><obj0></objects>"
print(words.listed(2), [(phrase, found.shape) for phrase, found in words.boxes(text, boxes)])
