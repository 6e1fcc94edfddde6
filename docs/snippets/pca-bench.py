from attnlib.bench.exams import pca

cases = pca.own_instances(20)  # or pca.load_instances("Domestic-Robot-test_open-meta.json")
answers = [pca.oracle(c, seen=i % 4 > 0, acted=i % 4 > 0) for i, c in enumerate(cases)]  # your model's texts
judge = pca.rule_judge(cases)  # or pca.make_judge(call, "name and version of your judge", keep="reviews.jsonl")
report = pca.score(cases, answers, judge)
print(report.action.share, report.genuine.share, report.errors)
print(pca.action_scores(cases, answers).mean("right"))  # by letter, without a judge
