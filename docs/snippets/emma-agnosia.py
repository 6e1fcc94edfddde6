from attnlib.bench.exams import agnosia

graphs = agnosia.painted(300)  # or your own SceneGraph and Vocabulary
asked = agnosia.questions(graphs, agnosia.PAINTED, per_kind=20)
blind = agnosia.answerer(graphs, blind=("colour",))  # your model: (prompts, items) -> texts, pictures in item.image
report = agnosia.examine(asked, blind)
print(asked[0].prompt, report.degrees())
print(report.weaknesses(agnosia.examine(asked, agnosia.answerer(graphs))))  # where it is worse than another
