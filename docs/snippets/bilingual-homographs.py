from attnlib.bench.evaluate import evaluate
from attnlib.bench.exams.homographs import form_only, own_words, same_meaning

items = same_meaning(own_words("es"), shots=4)
found = evaluate(items, form_only(items))  # or Speaker(model, tokenizer, chat=True), or a file of answers
print(found.table("type"))
