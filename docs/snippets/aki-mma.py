# model: pictures
from attnlib.hooks import MaskByType, modality_mutual

asked = TokenTypes(image=62, answer=61)  # the answer's marker tells the question from what came before
inputs["input_ids"][:, -1] = 61
with attnlib.attach(model, MaskByType(modality_mutual()), token_types=asked):
    print(model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[61, 62]))
