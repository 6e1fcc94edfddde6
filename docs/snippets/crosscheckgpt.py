from attnlib.bench.exams import crosscheck

# or your systems' answers and samples, and a judge: crosscheck.Support(Judge(call, id, crosscheck.read_support))
world = crosscheck.simulate({"a": 0.1, "b": 0.3, "c": 0.5, "d": 0.6}, queries=10)
found = crosscheck.explicit(world.responses, world.passages, crosscheck.same_claim).rank()
print(found.order, found.scores, found.correlation(world.errors).value, found.coverage)
