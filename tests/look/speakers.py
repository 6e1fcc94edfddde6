"""Tiny vision-language models of several families with their processors, for techniques that ask."""

import torch
from hooks.models import SIZES

WORDS = (
    "<pad> <s> </s> <unk> Yes No yes no is there a an red blue circle square what where the in image picture ? : A B C "
    "D USER ASSISTANT zoom of and object objects none one two three color colour left right top bottom find it answer"
).split()
MARKS = ("<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<fake>")
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate((*WORDS, *MARKS))}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(MARKS), padding_side="right",
    )  # fmt: skip


def _sizes(words, **changes):
    return {**SIZES, "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}


def _lively(model, *parts):
    """Random models hardly look at pictures: make what they see count."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
        for part in parts:
            for p in part.parameters():
                p.mul_(20)
    return model.eval()


def llava(seed=0, side=16):
    import transformers as hf

    words = tokenizer()
    torch.manual_seed(seed)
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=8
    )
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_sizes(words)), vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<image>"), image_seq_length=(side // 8) ** 2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config)
    reader = hf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = hf.LlavaProcessor(
        reader, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    )  # fmt: skip
    return _lively(model, model.model.multi_modal_projector), processor


def qwen(seed=0, side=32):
    import transformers as hf

    words = tokenizer()
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = _sizes(words, rope_parameters=rope)
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config=dict(depth=2, embed_dim=16, hidden_size=text["hidden_size"], num_heads=2, patch_size=8),
        **{f"{name}_id": words.convert_tokens_to_ids(token) for name, token in (
            ("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>"),
            ("vision_start_token", "<|vision_start|>"), ("vision_end_token", "<|vision_end|>"),
        )},
    )  # fmt: skip
    model = hf.Qwen2VLForConditionalGeneration(config)
    reader = hf.Qwen2VLImageProcessor(patch_size=8, min_pixels=16 * 16, max_pixels=side * side)

    class Processor(hf.Qwen2VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            """Processors of videos need torchvision; there are no videos here."""

    processor = Processor(
        reader, words, video_processor=None,
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return _lively(model, model.model.visual.merger), processor


FAMILIES = {"llava": llava, "qwen2_vl": qwen}
