# model: video
from attnlib.steer.diffusion.video import PARO

paro = PARO(density=0.5, block=4, half=None)
for _ in range(2):  # first dense, to choose orders and blocks; then with them
    with attnlib.attach(model, BlockSparse(paro)) as session:
        with session.at(step=0), torch.no_grad():
            print(model(**inputs).sample.shape)
    if not paro.frozen:
        paro.freeze()
print(session.results["block-sparse"])
