"""Picks tokens so that a request's text depends on its own prompt and seed alone, whatever else runs beside it.

Sampling is done as argmax over logits plus Gumbel noise, which draws from the same distribution as softmax sampling.
The noise comes from the seed and the token's position, so there is no generator state that requests could share.
"""

from __future__ import annotations

import hashlib

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omni.spec import SamplingSpec

SEED = "seed"
"""Name under which a request's seed travels through the continuous batch."""


class Picker:
    """Turns logits into scores whose argmax is the next token."""

    def __init__(self, sampling: SamplingSpec) -> None:
        steps: list[LogitsProcessor] = []
        if sampling.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._samples = sampling.temperature > 0
        if self._samples:
            steps.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                steps.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                steps.append(TopPLogitsWarper(sampling.top_p))
        self._steps = LogitsProcessorList(steps)

    @property
    def is_plain(self) -> bool:
        """True when the scores are the logits themselves."""
        return not self._samples and not self._steps

    def scores(self, ids: torch.Tensor, logits: torch.Tensor, seed: int, index: int) -> torch.Tensor:
        """`ids` (1, n) int64: prompt and answer so far; `logits` (1, vocabulary) float32; `index` of the new token."""
        scores: torch.Tensor = self._steps(ids, logits)
        return scores + gumbel_noise(scores, seed, index) if self._samples else scores


def gumbel_noise(like: torch.Tensor, seed: int, index: int) -> torch.Tensor:
    """Noise of the shape and device of `like`, float32, the same for the same seed and index."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little") >> 1)
    exponential = torch.empty(like.shape, device=like.device).exponential_(generator=generator)
    return -exponential.clamp_min_(torch.finfo(torch.float32).tiny).log_()


class OneRequestPicker(LogitsProcessor):
    """A Picker for `generate` with one request."""

    def __init__(self, picker: Picker, num_prompt_tokens: int, seed: int) -> None:
        self._picker = picker
        self._num_prompt_tokens = num_prompt_tokens
        self._seed = seed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Scores (1, vocabulary) for the next token of `input_ids` (1, n)."""
        return self._picker.scores(input_ids, scores, self._seed, input_ids.shape[1] - self._num_prompt_tokens)


class BatchPicker(ContinuousBatchingLogitsProcessor):
    """A Picker for the continuous batch: one row per request.

    The batch calls `prepare_tensor_args` and then, in the same thread, `__call__` for the same requests: so it is as
    long as neither asynchronous batching nor CUDA graphs are on.
    """

    supported_kwargs = {SEED: int}  # noqa: RUF012  (declared like this by the base class)
    ignored_kwargs = ()

    def __init__(self, picker: Picker) -> None:
        self._picker = picker
        self._rows: list[tuple[list[int], int, int]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        self._rows = []
        for request in requests_with_new_token:
            state = request.state
            ids = state.initial_tokens + state.generated_tokens
            # A request that had to leave a full cache comes back with its own tokens as part of its prompt.
            num_prompt_tokens = state._true_initial_tokens or len(state.initial_tokens)
            self._rows.append((ids, state.logit_processor_kwargs[SEED], len(ids) - num_prompt_tokens))
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores (requests, vocabulary) for the requests prepared last."""
        rows = [
            self._picker.scores(torch.tensor([ids], device=scores.device), scores[row : row + 1], seed, index)
            for row, (ids, seed, index) in enumerate(self._rows)
        ]
        return torch.cat(rows)
