import torch

from attnlib.bench.data.mazes import padded, random_maze, score, search, thinned, words
from attnlib.models.dualformer import Dualformer

maze, vocabulary = random_maze(6, 6, seed=0), words(6, 6)
trace, plan = search(maze, seed=0)
prompt = torch.tensor([vocabulary.encode(["bos", *maze.prompt, "eos"])])
responses, valid = padded([vocabulary.encode(["bos", *thinned(trace, level), *plan, "eos"]) for level in range(5)])

model = Dualformer(len(vocabulary), dim=32, depth=1, num_heads=2, multiple_of=8)  # or dualformer("s", len(vocabulary))
model.loss(prompt.expand(5, -1), responses, response_valid=valid)["words"].backward()
for mode in ("fast", "slow", "auto"):
    said = model.generate(prompt, vocabulary.prefix(mode), max_len=40)[0]
    print(mode, score(maze, vocabulary.decode(said)))
