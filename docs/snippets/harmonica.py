# model: pipeline
from attnlib.cache import HarmoniCa, Router, train_router

with attnlib.attach(pipe, attnlib.cache.StepCache(attnlib.cache.steps.every(2))) as session:
    pipe(**prompt, num_inference_steps=4, output_type="latent")
columns = session.interventions[0].columns
router = Router(steps=4, modules=len(columns), threshold=0.5)
train_router(pipe, router, lambda epoch: dict(prompt), epochs=1, refresh=4)
with attnlib.attach(pipe, HarmoniCa(router)) as session:
    latents = pipe(**prompt, num_inference_steps=4, output_type="latent").images
print(latents.shape, int(session.results["harmonica"]["executed"].sum()), "of", router.table().numel())
