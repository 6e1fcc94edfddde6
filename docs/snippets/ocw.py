from attnlib.bench.exams.walls import own_walls, randomized, score_groups

walls = own_walls(8, seed=0)  # or load_walls("folder"), the quiz's
plain = randomized(walls)  # the same groups without red herrings
clues = sorted(walls[0].clues)
print(score_groups([clues[i : i + 4] for i in range(0, 16, 4)], walls[0]))
