# model: video
from attnlib.steer.diffusion.video import AdaSpa

with attnlib.attach(model, BlockSparse(AdaSpa(searches=(0,), block=4))) as session:
    for step in range(2):
        with session.at(step=step), torch.no_grad():
            print(model(**inputs).sample.shape)
print(session.results["block-sparse"])  # share of the map that was read
