"""Evaluate a model by EleutherAI's lm-evaluation-harness, which keeps hundreds of tasks, through this package's engine.

    simple_evaluate(model=EffmlLM(model, tokenizer), tasks=["hellaswag"])

The numbers are those of the harness's own backend for transformers, its conventions included: a tokenizer that puts a
beginning-of-sequence token first must predict it in rolling likelihoods, and the written form of the end-of-text token
is a stop string. Where that backend fails, here is an answer: contexts of white space alone, empty prompts, and models
that are not of transformers. What is left out: beams, penalties and whatever else `sampling_params` does not know.

Importing this module registers the class, so that `simple_evaluate(model="effml", model_args={"model": ...,
"tokenizer": ...})` finds it. Cost: that of `LMScorer`; one batch at a time goes into the harness's cache of answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from effml_shared.distributed import rank, world_size
from effml_shared.errors import ConfigError, require
from torch import Tensor, nn

from effml_eval.scoring import GenerationRequest, LMScorer, SamplingParams
from effml_eval.scoring.rolling_windows import rolling_windows

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm  # type: ignore[import-untyped]
except ModuleNotFoundError:
    require("lm_eval", extra="effml-eval[harness]", purpose="by effml_eval.harness")
    raise

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["EffmlLM", "sampling_params"]

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_FILTERS = ("top_k", "top_p", "min_p")

Question = TypeVar("Question")
Answer = TypeVar("Answer")


def sampling_params(
    gen_kwargs: Mapping[str, Any], *, max_gen_toks: int = 256, more_stops: Sequence[str] = ()
) -> SamplingParams:
    """Return what a task's `generation_kwargs` ask for; greedy unless they ask for a temperature above 0.

    >>> sampling_params({"until": "\\n", "do_sample": False, "temperature": 0.7, "max_tokens": 8})
    SamplingParams(max_new_tokens=8, stop=('\\n',), temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)

    Args:
        gen_kwargs: `until` (a text or several), one of `max_gen_toks`, `max_new_tokens`, `max_tokens` and
            `max_completion_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`.
        max_gen_toks: the limit where none is given.
        more_stops: stop strings of every request.

    Raises:
        ConfigError: something else is asked for, a value is out of range, or `do_sample` has no temperature.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    until = given.pop("until", ())
    stops = [until] if isinstance(until, str) else list(until)
    limits = [given.pop(name) for name in _LIMITS if name in given]
    do_sample, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if do_sample and temperature is None:
        raise ConfigError("generation_kwargs: got do_sample without a temperature, expected one above 0 with it")
    filters = {name: given.pop(name) for name in _FILTERS if name in given}
    if given.pop("num_beams", 1) != 1 or given:
        known = ", ".join(("until", *_LIMITS, "do_sample", "temperature", *_FILTERS))
        raise ConfigError(f"generation_kwargs: got {dict(gen_kwargs)}, expected nothing but {known}")
    sampled = do_sample is not False and temperature
    return SamplingParams(
        max_new_tokens=int(limits[0]) if limits else max_gen_toks,
        stop=tuple(text for text in (*stops, *more_stops) if text),
        temperature=temperature if sampled else 0.0,
        **(filters if sampled else {}),
    )


@register_model("effml")
class EffmlLM(TemplateLM):
    """Answer the harness's requests by an `LMScorer`.

    Repeated requests to sample are told apart by their number and each has its own random numbers, so that an answer
    depends on its request, that number and the seed alone.

    Args:
        model: a `Transformer`, a causal model of transformers, or any module that `LMScorer` takes; on its device.
        tokenizer: of `effml_shared.data` or of transformers.
        max_gen_toks: new tokens at most, where a task does not say.
        seed: base seed of what is sampled.
        data_parallel: share the documents among the processes of the initialised process group, each of which must
            hold the whole model and call `simple_evaluate`; otherwise every process that calls it does everything.
        scoring: options of `LMScorer`, such as max_length, batch_tokens, dtype and prefix_token_id.

    Raises:
        ConfigError: as `LMScorer`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_gen_toks: int = 256,
        seed: int = 0,
        data_parallel: bool = False,
        **scoring: Any,
    ) -> None:
        super().__init__()
        self.scorer = LMScorer(model, tokenizer, **scoring)
        self.tokenizer = tokenizer  # the harness asks it for its special tokens
        self.max_gen_toks, self.seed = max_gen_toks, seed
        if data_parallel:
            self._rank, self._world_size = rank(), world_size()

    # What the harness asks of a model

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its nats and whether it is what greedy decoding would write.

        Raises:
            ConfigError, NonFiniteError: as `LMScorer.score`.
        """

        def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
            return [(score.logprob, score.greedy) for score in self.scorer.score(pairs)]

        return self._answer("loglikelihood", requests, [request.args for request in requests], score, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the nats of each document, every one of its tokens being predicted exactly once.

        Raises:
            ConfigError, NonFiniteError: as `LMScorer.rolling`.
        """

        def score(documents: Sequence[str]) -> list[float]:
            windows = [self._windows(document) for document in documents]
            scores = iter(self.scorer.score_token_pairs([pair for pairs in windows for pair in pairs]))
            return [sum((next(scores).logprob for _ in pairs), 0.0) for pairs in windows]

        documents = [request.args[0] for request in requests]
        return self._answer("loglikelihood_rolling", requests, documents, score, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return for each (prompt, generation_kwargs) what the model writes, without the stop string.

        Raises:
            ConfigError: as `sampling_params` and `LMScorer.generate`.
            NonFiniteError: as `LMScorer.generate`.
        """
        end: Any = getattr(self.tokenizer, "eos_token", None)
        options: dict[str, Any] = {"max_gen_toks": self.max_gen_toks, "more_stops": (end,) if end else ()}
        asked: Counter[tuple[str, SamplingParams]] = Counter()
        prompts = []
        for request in requests:
            prompt, sampling = request.args[0], sampling_params(request.args[1], **options)
            prompts.append(GenerationRequest(prompt, sampling, asked[prompt, sampling], self.seed))
            asked[prompt, sampling] += 1

        def write(some: Sequence[GenerationRequest]) -> list[str]:
            return [generation.text for generation in self.scorer.generate(some)]

        return self._answer("generate_until", requests, prompts, write, disable_tqdm)

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        questions: Sequence[Question],
        ask: Callable[[Sequence[Question]], list[Answer]],
        disable_tqdm: bool,
    ) -> list[Answer]:
        """Ask batch by batch, let the harness keep what is known so far, and return the answers in request order."""
        answers: dict[int, Answer] = {}
        plan: Any = self.scorer.plan
        with tqdm(total=len(requests), desc=kind, disable=disable_tqdm or self.rank != 0) as bar:
            for batch in plan(questions):
                for i, answer in zip(batch, ask([questions[i] for i in batch]), strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial(kind, requests[i].args, answer)
                bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def _windows(self, document: str) -> list[tuple[Sequence[int], Sequence[int]]]:
        slots = [self.prefix_token_id, *self.tok_encode(document)]
        windows = rolling_windows(len(slots) - 1, self.scorer.max_length, self.scorer.rolling_context)
        parts = [(window.start, window.stop - window.n_scored, window.stop) for window in windows]
        return [(slots[start:middle], slots[middle:stop]) for start, middle, stop in parts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.score_token_pairs([(context, continuation) for _, context, continuation in requests])
        return [(score.logprob, score.greedy) for score in scores]

    # The tokenizer

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text; None: there is none."""
        return self.scorer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on."""
        return self.scorer.prefix_token_id

    @property
    def max_length(self) -> int:
        """The most tokens the model reads at once."""
        return self.scorer.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, behind the tokenizer's opening token unless add_special_tokens is False."""
        return list(self.scorer.tokenizer.encode(string, opened=add_special_tokens is not False))

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer, by which the harness tells its caches of rendered requests apart."""
        names = (getattr(self.tokenizer, name, None) for name in ("name_or_path", "name"))
        return next((str(name) for name in names if name), type(self.tokenizer).__name__).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as one prompt; without the generation prompt its last message is left open.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            kind = type(self.tokenizer).__name__
            raise ConfigError(f"tokenizer: got a {kind} without a chat template, expected one for apply_chat_template")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    # The processes

    @property
    def device(self) -> torch.device:
        """Where the model is, and where the harness puts what it sends among processes."""
        return self.scorer.model.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, one behind the other; a single process gets its own back."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat([torch.atleast_1d(part) for part in parts])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes to one of them, None to the others."""
        if self.world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness notes about the model beside its results."""
        model = self.scorer.model.model
        parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in parameters),
            "model_dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else "",
            "scoring": self.scorer.settings,
        }
