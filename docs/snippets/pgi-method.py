from attnlib.bench.exams.prompts import Prompt, Source
from attnlib.bench.stats import wilson

prompt = Prompt(
    persona="You answer a shop's customers.",
    groups={"prices": ["What is a pen?", "What is a book?"], "hours": ["When do you open?"]},
    intelligence="Answer in one line. Say so where you do not know.",
    external=[Source("pen 2.50, book 12.00; open from 9", "the list of May")],
)
print(prompt.build()["prices"])
print(wilson(126, 4000))
