from attnlib.bench.exams.consistency import Box, Sample, compare, records

sample = Sample("s", "What is the total?", "1,250", Box(10, 20, 60, 30, "pixels"), others=("Invoice",))
report = compare([sample], {"s": "1250"}, {"s": "Total: 1,250"}, mode="contained")  # your model's answers and readings
print(report.consistency, report.cognition, report.perception, report.named())
print([(r.kind, r.prompt, r.target) for r in records([sample])])  # to tune on, with link tokens
