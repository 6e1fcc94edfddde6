import torch

from attnlib.models.label_head import LabelClassifier, LabelCrossAttentionHead, switch

frozen = torch.nn.Embedding(100, 32)  # in place of a language model that is only run forward
model = LabelClassifier(lambda ids, valid: frozen(ids), LabelCrossAttentionHead(dim=32, num_heads=4))
sentences, texts = torch.randint(100, (3, 8)), torch.randint(100, (5, 12))
model.describe(sentences, sentences >= 0)
print(model(texts, texts >= 0).shape)  # a logit per sentence, however many there are
written_for, teacher = torch.tensor([0, 1, 2]), torch.eye(3)[[0, 1, 1]]
print(switch(written_for, teacher))  # texts that a teacher trusts
