from attnlib.theory import svm

data = svm.samples(seed=0, n=3, tokens=4, dim=6)
trained = svm.train(data, steps=300)
chosen = trained.probabilities.argmax(-1)
solution = svm.attention_svm(data.x, data.z, chosen)
print(svm.correlation(trained.w, solution), svm.margins(solution, data.x, data.z, chosen).min())
