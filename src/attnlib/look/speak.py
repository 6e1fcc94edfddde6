"""Speakers: ask a vision-language model about pictures, read how much it thinks of words, and what it sees.

Techniques that look at a picture several times need no hooks, only three questions: ``ask`` (an answer), ``logits`` (of
words at the next position) and ``features`` (a vector for a picture). :class:`Speaker` puts them to any vision-language
model of transformers with its processor; :class:`CallableSpeaker` to functions. Prompts are plain strings, where
``<image>`` marks the place of a picture. Every call of the model is counted; what was asked before is remembered by
picture and text, as long as the weights are the same and nothing is attached.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..checks import check_flag, check_int, check_real, check_type, describe
from ..extras import need
from ..hooks.hf.names import cache_argument, cache_out, parameters_of
from ..hooks.session import _sessions
from .pixels import Picture, digest, to_bytes, to_picture, to_pictures

MARK = "<image>"
#: Models whose prompt tokens also see what comes after them.
BOTH_WAYS = frozenset({"paligemma"})
#: A prompt, or a conversation of ``("user" | "assistant" | "system", text)`` that ends with the user.
Text: TypeAlias = str | Sequence[tuple[str, str]]


def check_text(name: str, text: Any) -> Text:
    """``text`` as a prompt or a conversation."""
    if isinstance(text, str):
        if not text.strip():
            raise ValueError(f"{name} must hold a prompt, got {text!r}")
        return text
    if isinstance(text, (list, tuple)) and text:
        for turn in text:
            if not (
                isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
            ) or turn[0] not in ("user", "assistant", "system"):
                raise TypeError(
                    f"{name} must be a string or pairs (role, text) of strings, got a turn {describe(turn)}"
                )
        if text[-1][0] != "user":
            raise ValueError(f"{name} must end with what the user says, got a last turn of {text[-1][0]!r}")
        return tuple((role, said) for role, said in text)
    raise TypeError(f"{name} must be a string or pairs (role, text), got {describe(text)}")


def _said(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(said for _, said in text)


class Remembered:
    """What was found before, the latest ``size`` of it.

    >>> memory = Remembered(1)
    >>> memory.put("a", 1), memory.put("b", 2), memory.get("a"), memory.get("b")
    (None, None, None, 2)
    """

    def __init__(self, size: int):
        self.size = check_int("cache", size, least=0)
        self.found: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        if key in self.found:
            self.found.move_to_end(key)
            return self.found[key]
        return None

    def put(self, key: Hashable, value: Any) -> None:
        if not self.size:
            return
        self.found[key] = value
        while len(self.found) > self.size:
            self.found.popitem(last=False)


class BaseSpeaker:
    """What all speakers share: pictures are made arrays, questions are remembered, calls are counted.

    ``calls`` counts prompts that the model really read, by ``"ask"``, ``"logits"``, ``"score"`` and ``"features"``;
    ``remembered`` counts those that were answered from memory.
    """

    def __init__(self, cache: int = 4096, batch_size: int = 8):
        self.memory = Remembered(cache)
        self.batch_size = check_int("batch_size", batch_size, least=1)
        self.calls: Counter[str] = Counter()
        self.remembered: Counter[str] = Counter()

    # What a kind of speaker says about itself and does.

    #: Side of the pictures that the model reads, where it has one.
    input_size: int | None = None
    #: Mean colour of its training pictures, which pads.
    background: tuple[float, float, float] = (0.5, 0.5, 0.5)
    #: ``model_type`` of transformers.
    family: str | None = None

    def _state(self) -> Hashable | None:
        """What answers depend on besides the question; ``None``: they cannot be remembered."""
        return ()

    def _ask(self, asked: list[tuple[tuple[Picture, ...], Text]], settings: dict[str, Any]) -> list[str]:
        raise NotImplementedError

    def _logits(self, asked: list[tuple[tuple[Picture, ...], Text]], words: tuple[str, ...]) -> list[Tensor]:
        raise NotImplementedError

    def _score(self, images: tuple[Picture, ...], text: Text, answer: str) -> float:
        raise NotImplementedError

    def _features(self, pictures: list[Picture]) -> list[Tensor]:
        raise NotImplementedError

    def check_words(self, words: Sequence[str]) -> tuple[str, ...]:
        """Words whose scores can be read; ``ValueError`` says which cannot, and why."""
        if isinstance(words, str) or not isinstance(words, (list, tuple)) or not words:
            raise TypeError(f'words must be a list of words, e.g. ("Yes", "No"), got {describe(words)}')
        for word in words:
            check_type("words", word, str, "strings")
        if len(set(words)) != len(words):
            raise ValueError(f"words must differ, got {list(words)}")
        return tuple(words)

    # What users call.

    def ask(
        self, image: Any, text: Text, *, max_new_tokens: int | None = None, temperature: float = 0.0, sample: int = 0
    ) -> str:
        """What the model answers.

        Args:
            image: ``None``, a picture or a list of pictures, see :func:`attnlib.look.pixels.to_picture`.
            text: the prompt; ``<image>`` marks the places of pictures, otherwise they come first. Or a conversation.
            max_new_tokens: longest answer; ``None`` for the speaker's own.
            temperature: 0 for the likeliest words; above, words are drawn from the distribution at this temperature.
            sample: number of the draw: the same number gives the same answer.

        Returns:
            The answer without blanks around it.
        """
        return self.ask_each(
            [(image, text)], max_new_tokens=max_new_tokens, temperature=temperature, sample=sample
        )[0]  # fmt: skip

    def ask_each(
        self,
        asked: Sequence[tuple[Any, Text]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        sample: int = 0,
    ) -> list[str]:
        """Answers to several ``(image, text)``, ``batch_size`` at a time."""
        if max_new_tokens is not None:
            check_int("max_new_tokens", max_new_tokens, least=1)
        check_real("temperature", temperature, least=0)
        check_int("sample", sample, least=0)
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "sample": sample}

        def run(part: list[Any]) -> list[str]:
            return self._ask(part, settings)

        # Words that are drawn depend on who else is in the batch, so that draws are made one by one.
        return self._all("ask", self._asked(asked), tuple(settings.values()), run, 1 if temperature else None)

    def logits(self, image: Any, text: Text, words: Sequence[str]) -> Tensor:
        """Scores of words at the next position, before any softmax: (len(words),) float32 on the CPU.

        Raises:
            ValueError: a word that is several tokens, unknown, or the same token as another.
        """
        return self.logits_each([(image, text)], words)[0]

    def logits_each(self, asked: Sequence[tuple[Any, Text]], words: Sequence[str]) -> Tensor:
        """Scores of words after several prompts: (B, len(words))."""
        words = self.check_words(words)
        found = self._all("logits", self._asked(asked), words, lambda part: self._logits(part, words))
        return torch.stack(found) if found else torch.zeros(0, len(words))

    def score(self, image: Any, text: Text, answers: Sequence[str]) -> Tensor:
        """Mean cross-entropy of each answer after the prompt: (len(answers),); the smallest is the likeliest."""
        if isinstance(answers, str) or not isinstance(answers, (list, tuple)) or not answers:
            raise TypeError(f"answers must be a list of answers, got {describe(answers)}")
        for answer in answers:
            check_type("answers", answer, str, "strings")
            if not answer.strip():
                raise ValueError(f"answers must not be empty, got {list(answers)}")
        ((images, text),) = self._asked([(image, text)])
        keys = [(images, text, answer) for answer in answers]
        found = self._all("score", keys, (), lambda part: [self._score(*one) for one in part])
        return torch.tensor(found, dtype=torch.float32)

    def features(self, image: Any) -> Tensor:
        """A vector (D,) for a picture, or (B, D) for a list of pictures."""
        pictures = to_pictures(image)
        if not pictures:
            raise ValueError("image must be a picture or pictures, got none")
        keys = [((picture,),) for picture in pictures]
        found = self._all("features", keys, (), lambda part: self._features([one[0][0] for one in part]))
        return torch.stack(found) if isinstance(image, (list, tuple)) else found[0]

    def clear(self) -> None:
        """Forget all answers; the counts stay."""
        self.memory.found.clear()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """A counter that holds, when the block ends, the model calls that were made in it."""
        before = Counter(self.calls)
        made: Counter[str] = Counter()
        try:
            yield made
        finally:
            made.update({k: n - before[k] for k, n in self.calls.items() if n > before[k]})

    # The machinery.

    def _asked(self, asked: Sequence[tuple[Any, Text]]) -> list[Any]:
        found = []
        for number, one in enumerate(asked):
            if not isinstance(one, (tuple, list)) or len(one) != 2:
                raise TypeError(f"asked[{number}] must be a pair (image, text), got {describe(one)}")
            image, text = one
            images, text = to_pictures(image), check_text("text", text)
            marks = _said(text).count(MARK)
            if marks and marks != len(images):
                raise ValueError(f"text marks {marks} places with {MARK}, but {len(images)} pictures are given")
            found.append((images, text))
        return found

    def _all(
        self, kind: str, asked: list[Any], settings: Hashable, run: Callable[[list[Any]], list[Any]],
        batch_size: int | None = None,
    ) -> list[Any]:  # fmt: skip
        """Answers from memory, and of the model where there are none; equal questions are put once."""
        state = self._state() if self.memory.size else None
        found: list[Any] = [None] * len(asked)
        waiting: OrderedDict[Hashable, list[int]] = OrderedDict()
        for i, (images, *rest) in enumerate(asked):
            key: Hashable = i
            if state is not None:
                key = (kind, settings, state, tuple(map(digest, images)), *rest)
                found[i] = self.memory.get(key)
            if found[i] is None:
                waiting.setdefault(key, []).append(i)
            else:
                self.remembered[kind] += 1
        # Prompts with as many pictures go together: processors want a batch to be alike.
        alike: dict[int, list[Hashable]] = {}
        for key, places in waiting.items():
            alike.setdefault(len(asked[places[0]][0]), []).append(key)
        for keys in alike.values():
            size = batch_size or self.batch_size
            for start in range(0, len(keys), size):
                part = keys[start : start + size]
                answers = run([asked[waiting[key][0]] for key in part])
                self.calls[kind] += len(part)
                for key, value in zip(part, answers, strict=True):
                    if state is not None:
                        self.memory.put(key, value)
                    self.remembered[kind] += len(waiting[key]) - 1
                    for i in waiting[key]:
                        found[i] = value
        return [value.clone() if isinstance(value, Tensor) else value for value in found]


class CallableSpeaker(BaseSpeaker):
    """Functions as a speaker; each is needed only where it is called.

    Args:
        ask: ``ask(pictures, text) -> answer``; ``pictures`` is a tuple of arrays (H, W, 3). A function that takes
            ``temperature`` and ``sample`` is told them.
        logits: ``logits(pictures, text, words)``, numbers (len(words),).
        features: ``features(picture)``, numbers (D,).
        score: ``score(pictures, text, answer)``, a number, smaller for the likelier answer.
        input_size, background, family, cache: as in :class:`Speaker`.

    >>> CallableSpeaker(lambda pictures, text: f"{len(pictures)} picture").ask(torch.zeros(4, 4, 3), "how many ?")
    '1 picture'
    """

    def __init__(
        self,
        ask: Callable[..., str] | None = None,
        *,
        logits: Callable[..., Any] | None = None,
        features: Callable[..., Any] | None = None,
        score: Callable[..., Any] | None = None,
        input_size: int | None = None,
        background: tuple[float, float, float] = (0.5, 0.5, 0.5),
        family: str | None = None,
        cache: int = 4096,
    ):
        super().__init__(cache)
        self.functions = {"ask": ask, "logits": logits, "features": features, "score": score}
        for name, function in self.functions.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {describe(function)}")
        self.input_size, self.background, self.family = input_size, background, family

    def _function(self, name: str) -> Callable[..., Any]:
        function = self.functions[name]
        if function is None:
            has = [key for key, value in self.functions.items() if value is not None]
            raise TypeError(f"this speaker has no function {name!r}, give CallableSpeaker({name}=...); it has {has}")
        return function

    def _ask(self, asked: list[Any], settings: dict[str, Any]) -> list[str]:
        ask = self._function("ask")
        known = inspect.signature(ask).parameters if not isinstance(ask, type) else {}
        told = {k: v for k, v in settings.items() if k in known}
        answers = [ask(images, text, **told) for images, text in asked]
        for answer in answers:
            check_type("an answer of ask", answer, str, "a string")
        return [answer.strip() for answer in answers]

    def _logits(self, asked: list[Any], words: tuple[str, ...]) -> list[Tensor]:
        logits = self._function("logits")
        found = [torch.as_tensor(logits(*one, words), dtype=torch.float32).flatten() for one in asked]
        for value in found:
            if len(value) != len(words):
                raise ValueError(f"logits must give {len(words)} numbers for {list(words)}, got {len(value)}")
        return found

    def _score(self, images: tuple[Picture, ...], text: Text, answer: str) -> float:
        return float(self._function("score")(images, text, answer))

    def _features(self, pictures: list[Picture]) -> list[Tensor]:
        features = self._function("features")
        return [torch.as_tensor(features(picture), dtype=torch.float32).flatten() for picture in pictures]


class Speaker(BaseSpeaker):
    """A vision-language model of transformers and its processor.

    Args:
        model: a model with ``generate``.
        processor: what makes its inputs from ``text=`` and ``images=``, with a ``tokenizer``.
        template: ``None`` for the processor's chat template, or the bare prompt where it has none; a string with
            ``{prompt}``, or with ``{images}`` and ``{text}``; a function of ``[(role, text), ...]`` that gives the
            whole prompt, where ``<image>`` marks pictures.
        image_token: what stands for one picture in the prompt; ``None`` for the processor's own.
        max_new_tokens: longest answer.
        generation: further settings of ``generate``, for instance ``{"num_beams": 3}``; it applies to ``ask``.
        features: ``features(model, inputs) -> (B, D)`` to use instead of the mean of ``get_image_features``.
        batch_size: prompts that go through the model together, padded on the left.
        cache: answers that are remembered, 0 for none.
        share_prompts: read what prompts on one picture have in common once, and go on from its keys; scores differ by
            rounding. For decoders that read prompts from left to right.
        keep_prompts: pictures, or sets of pictures, whose keys are kept for later prompts on them, the latest ones;
            needs ``share_prompts``. It takes the memory of so many caches.

    The model is read in evaluation mode and without gradients; nothing is drawn from the global generators. Pictures in
    floating numbers are rounded to bytes, unless the processor says ``takes_floats = True``.

    Raises:
        TypeError: no model that generates, no processor.
        ValueError: a template without a place for the prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        template: str | Callable[[Sequence[tuple[str, str]]], str] | None = None,
        image_token: str | None = None,
        max_new_tokens: int = 64,
        generation: Mapping[str, Any] | None = None,
        features: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
        batch_size: int = 8,
        cache: int = 4096,
        share_prompts: bool = False,
        keep_prompts: int = 0,
    ):
        super().__init__(cache, batch_size)
        self.share_prompts = check_flag("share_prompts", share_prompts)
        if not isinstance(model, nn.Module) or not callable(getattr(model, "generate", None)):
            raise TypeError(f"model must be a model of transformers that generates, got {describe(model)}")
        if not callable(processor):
            raise TypeError(f"processor must be the model's processor, got {describe(processor)}")
        if isinstance(template, str) and "{prompt}" not in template and "{text}" not in template:
            raise ValueError(f"template must have a place {{prompt}}, or {{images}} and {{text}}, got {template!r}")
        if template is not None and not isinstance(template, str) and not callable(template):
            raise TypeError(f"template must be a string, a function or None, got {describe(template)}")
        taken = {"max_new_tokens", "do_sample", "temperature"} & set(generation or {})
        if taken:
            raise ValueError(f"generation must not hold {sorted(taken)}: they are arguments of Speaker and of ask")
        if share_prompts and getattr(getattr(model, "config", None), "model_type", None) in BOTH_WAYS:
            raise ValueError(
                f"share_prompts must be False for {type(model).__name__}: it reads prompts in both directions, so that "
                "their starts differ"
            )
        if check_int("keep_prompts", keep_prompts, least=0) and not share_prompts:
            raise ValueError(f"keep_prompts={keep_prompts} keeps starts of prompts that are shared: share_prompts=True")
        self.starts = Remembered(keep_prompts)
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.template = template
        self.image_token = image_token or getattr(processor, "image_token", None) or MARK
        self.max_new_tokens = check_int("max_new_tokens", max_new_tokens, least=1)
        self.generation = dict(generation or {})
        self.pool = features
        config: Any = getattr(model, "config", None)
        self.family = getattr(config, "model_type", None)
        reader = getattr(processor, "image_processor", processor)
        if not hasattr(reader, "min_pixels") and not hasattr(reader, "merge_size"):  # those keep areas, not sides
            self.input_size = _side(getattr(reader, "crop_size", None)) or _side(getattr(reader, "size", None))
        mean = getattr(reader, "image_mean", None)
        if isinstance(mean, (list, tuple)) and len(mean) == 3:
            self.background = (float(mean[0]), float(mean[1]), float(mean[2]))

    # Prompts

    def prompt(self, images: int, text: Text) -> str:
        """The whole prompt, as the processor gets it."""
        turns: list[tuple[str, str]] = [("user", text)] if isinstance(text, str) else list(text)
        marked = MARK in _said(text)
        if callable(self.template):
            said = self.template(turns)
            return (said if MARK in said or not images else MARK * images + said).replace(MARK, self.image_token)
        if self.template is None and getattr(self.processor, "chat_template", None):
            return self._chat(turns, 0 if marked else images)
        template, rows = self.template or "{prompt}", []
        for i, (role, said) in enumerate(turns):
            first = self.image_token * images if i == 0 and not marked else ""
            said = said.replace(MARK, self.image_token)
            if role == "assistant":
                rows.append(said)
            elif "{prompt}" in template:
                rows.append(template.replace("{prompt}", f"{first}\n{said}" if first else said))
            else:
                rows.append(template.replace("{images}", first).replace("{text}", said))
        return "\n".join(rows)

    def _chat(self, turns: list[tuple[str, str]], before: int) -> str:
        messages = []
        for i, (role, said) in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "image"}] * before if i == 0 else []
            content = list(content)
            for place, piece in enumerate(said.split(MARK)):
                if place:
                    content.append({"type": "image"})
                if piece.strip():
                    content.append({"type": "text", "text": piece.strip("\n") if MARK in said else piece})
            messages.append({"role": role, "content": content})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _inputs(self, asked: list[tuple[tuple[Picture, ...], Text]], suffix: str = "") -> dict[str, Any]:
        """What the model takes, padded on the left, where the model is."""
        prompts = [self.prompt(len(images), text) + suffix for images, text in asked]
        settings: dict[str, Any] = {"text": prompts, "return_tensors": "pt"}
        if asked[0][0]:
            settings["images"] = [[self._picture(image) for image in images] for images, _ in asked]
        if len(prompts) > 1:
            settings |= {"padding": True, "padding_side": "left"}
        start = getattr(self.tokenizer, "bos_token", None)
        if start and all(prompt.startswith(start) for prompt in prompts):
            settings["add_special_tokens"] = False
        return self._placed(self.processor(**settings))

    def _picture(self, image: Picture) -> Any:
        if getattr(self.processor, "takes_floats", False):
            return image
        return need("PIL.Image", "a processor of transformers").fromarray(to_bytes(image))

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        parameter = next(iter(self.model.parameters()))
        found = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value = value.to(parameter.device)
                value = value.to(parameter.dtype) if value.is_floating_point() else value
            found[name] = value
        return found

    # Calls

    def _state(self) -> Hashable | None:
        attached = {id(module) for module in list(_sessions)}
        if attached and any(id(module) in attached for module in self.model.modules()):
            return None  # what is attached may keep a state of its own
        held = [*self.model.parameters(), *self.model.buffers()]
        try:
            weights = hash(tuple((t.data_ptr(), t._version, t.dtype) for t in held))
        except RuntimeError:  # tensors made in inference mode have no version
            return None
        return weights, self.max_new_tokens, repr(self.generation), self.image_token, str(self.template)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def _ask(self, asked: list[Any], settings: dict[str, Any]) -> list[str]:
        inputs = self._inputs(asked)
        longest, temperature = settings["max_new_tokens"] or self.max_new_tokens, settings["temperature"]
        chosen = {**self.generation, "max_new_tokens": longest, "do_sample": False}
        place = inputs["input_ids"].device
        with self._reading(), contextlib.ExitStack() as stack:
            if temperature:
                chosen |= {"do_sample": True, "temperature": float(temperature)}
                stack.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else []))
                torch.manual_seed(settings["sample"])
            tokens = self.model.generate(**inputs, **chosen)  # type: ignore[operator]
        length = inputs["input_ids"].shape[1]
        if tokens.shape[1] >= length and torch.equal(tokens[:, :length], inputs["input_ids"].to(tokens.device)):
            tokens = tokens[:, length:]  # encoder-decoders give the answer alone
        return [answer.strip() for answer in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def check_words(self, words: Sequence[str]) -> tuple[str, ...]:
        words = super().check_words(words)
        self.word_ids(words)
        return words

    def word_ids(self, words: Sequence[str]) -> list[int]:
        """The token of each word; ``ValueError`` unless each is one token of its own."""
        found: dict[int, str] = {}
        for word in words:
            ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
            if len(ids) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(ids)
                raise ValueError(
                    f"words must be single tokens of the model, but {word!r} is {len(ids)}: {pieces}; choose others"
                )
            if ids[0] == getattr(self.tokenizer, "unk_token_id", None):
                raise ValueError(f"words must be known to the model, but {word!r} is not; choose other words")
            if ids[0] in found:
                raise ValueError(f"words must be tokens of their own, but {word!r} and {found[ids[0]]!r} are the same")
            found[ids[0]] = word
        return list(found)

    def _logits(self, asked: list[Any], words: tuple[str, ...]) -> list[Tensor]:
        ids = self.word_ids(words)
        found: dict[int, Tensor] = {}
        state = self._state() if self.share_prompts else None
        if state is not None:  # what is attached expects whole prompts
            alike: dict[Hashable, list[int]] = {}
            for i, (images, _) in enumerate(asked):
                alike.setdefault(tuple(map(digest, images)), []).append(i)
            for pictures, places in alike.items():
                some = [asked[i] for i in places]
                scores = self._shared(some, (state, pictures)) if len(places) > 1 or self.starts.size else None
                found.update(zip(places, [] if scores is None else scores, strict=scores is not None))
        rest = [i for i in range(len(asked)) if i not in found]
        if rest:
            with self._reading():  # generate() knows how each model counts positions of padded prompts
                out = self.model.generate(  # type: ignore[operator]
                    **self._inputs([asked[i] for i in rest]), max_new_tokens=1, do_sample=False, num_beams=1,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            found.update(zip(rest, out.logits[0], strict=True))
        return [found[i][ids].float().cpu() for i in range(len(asked))]

    def _shared(self, asked: list[tuple[tuple[Picture, ...], Text]], key: Hashable) -> list[Tensor] | None:
        """Scores at the next position after prompts on the same pictures, whose common start is read once.

        Starts that are kept, by ``key``, end with their last picture: any prompt goes on from there.

        ``None`` where nothing is saved: no picture, or one after the prompts part.
        """
        config: Any = getattr(self.model, "config", None)
        slot = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        if not asked[0][0] or slot is None:
            return None
        inputs = [self._inputs([one]) for one in asked]
        rows = [of["input_ids"][0] for of in inputs]
        common = min(map(len, rows)) - 1
        for row in rows[1:]:
            same = (row[:common] == rows[0][:common]).long().cumprod(0)
            common = int(same.sum())
        if not common or any((row[common:] == slot).any() for row in rows):
            return None
        if self.starts.size:
            common = int((rows[0] == slot).nonzero().max()) + 1
        tails = [row[common:] for row in rows]
        ids = nn.utils.rnn.pad_sequence(tails, batch_first=True)  # nobody reads what is padded behind the last word
        with self._reading():
            keys = self._start(inputs[0], common, key)
            keys.batch_repeat_interleave(len(rows))
            logits = self.model(input_ids=ids, use_cache=True, **cache_argument(self.model, keys)).logits
        return [logits[i, len(tail) - 1] for i, tail in enumerate(tails)]

    def _start(self, inputs: dict[str, Any], common: int, key: Hashable) -> Any:
        """The cache of the first ``common`` tokens of a prompt (1, N), read or as it was kept."""
        held = [m for m in self.model.modules() if hasattr(m, "rope_deltas")]  # positions of what was read last
        begins = inputs["input_ids"][:, :common]
        kept = self.starts.get(key)
        if kept is not None and torch.equal(kept[0], begins):
            for module, deltas in zip(held, kept[2], strict=True):
                module.rope_deltas = deltas
            return copy.deepcopy(kept[1])
        whole = tuple(inputs["input_ids"].shape)
        start = {
            k: v[:, :common] if isinstance(v, Tensor) and tuple(v.shape[:2]) == whole else v for k, v in inputs.items()
        }
        if "logits_to_keep" in parameters_of(self.model):
            start["logits_to_keep"] = 1  # nobody asks what comes after words of the start
        keys = cache_out(self.model(**start, use_cache=True))
        if self.starts.size:
            self.starts.put(key, (begins, copy.deepcopy(keys), [module.rope_deltas for module in held]))
        return keys

    def clear(self) -> None:
        super().clear()
        self.starts.found.clear()

    def _score(self, images: tuple[Picture, ...], text: Text, answer: str) -> float:
        before = self._inputs([(images, text)])["input_ids"].shape[1]
        blank = "" if self.prompt(len(images), text)[-1:].isspace() else " "
        inputs = self._inputs([(images, text)], blank + answer)
        with self._reading():
            logits = self.model(**inputs).logits[0]
        ids = inputs["input_ids"][0, before:]
        end = getattr(self.tokenizer, "eos_token_id", None)
        if len(ids) > 1 and ids[-1] == end:  # of tokenizers that close what they read
            ids = ids[:-1]
        if not len(ids):
            raise ValueError(f"answers must be tokens of the model, but {answer!r} is none")
        return float(nn.functional.cross_entropy(logits[before - 1 : before - 1 + len(ids)].float(), ids))

    def _features(self, pictures: list[Picture]) -> list[Tensor]:
        with self._reading():
            if self.pool is not None:
                return list(self.pool(self.model, self._inputs([((p,), "?") for p in pictures])).float().cpu())
            reader = getattr(self.model, "get_image_features", None)
            if reader is None:
                raise TypeError(
                    f"{type(self.model).__name__} has no get_image_features; give Speaker(features=...) a function"
                )
            known = inspect.signature(reader).parameters
            found = []
            for picture in pictures:  # one by one: pictures of several sizes have several numbers of tokens
                inputs = self._inputs([((picture,), "?")])
                out = reader(
                    **{k: v for k, v in inputs.items() if k in known and k not in ("input_ids", "attention_mask")}
                )
                out = getattr(out, "pooler_output", out)
                rows = torch.cat([part.flatten(0, -2) for part in ([out] if isinstance(out, Tensor) else out)])
                found.append(rows.float().mean(0).cpu())
            return found


def _side(size: Any) -> int | None:
    """The side of a square that an image processor makes, from its ``size`` or ``crop_size``."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    get = getattr(size, "get", None) or (lambda name: getattr(size, name, None))
    for name in ("height", "shortest_edge"):
        value = get(name) if size is not None else None
        if isinstance(value, int):
            return value
    return None


def need_speaker(speaker: Any, name: str = "speaker") -> BaseSpeaker:
    """``speaker``, or one made of a function ``(pictures, text) -> answer``."""
    if isinstance(speaker, BaseSpeaker):
        return speaker
    if speaker is not None and callable(speaker) and not isinstance(speaker, nn.Module):
        return CallableSpeaker(speaker)
    raise TypeError(
        f"{name} must be a Speaker(model, processor), or a function (pictures, text), got {describe(speaker)}"
    )


__all__ = [
    "BaseSpeaker",
    "CallableSpeaker",
    "Remembered",
    "Speaker",
    "check_text",
    "need_speaker",
    "to_picture",
]
