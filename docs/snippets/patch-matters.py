import torch

from attnlib.look.zoom import CaptionAggregator, Groups, PatchDivider

image = torch.rand(80, 100, 3)


def describe(pictures, text, sample=0):  # a stand-in for Speaker(model, processor)
    return ["a dog", "a dog and a ball", "a dog and a unicorn"][sample]


def statements(said):  # a stand-in for a language model
    return Groups(
        ["a dog"], [], [(word, n) for n, text in enumerate(said, 1) for word in ("ball", "unicorn") if word in text]
    )


aggregator = CaptionAggregator(
    describe,
    llm=lambda pictures, text: text.split("Facts: ")[-1].split("\n")[0],
    scorer=lambda picture, text: 0.8 if text == "ball" else 0.1,
    divider=PatchDivider(lambda picture: [((30, 10, 70, 30), 0.9, "dog")]),
    group=statements,
)
found = aggregator.describe(image)
print(found.patches.four, found.reliable["patch 0"], dict(found.calls))
