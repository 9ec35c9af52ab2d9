"""Answers with text: whole ones, put together from the results of all jobs, and the chunks of streams."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, NamedTuple

from headrace.client.batch.endpoints import CHAT, COMPLETIONS, Endpoint
from headrace.client.batch.openai import logprobs_fields
from headrace.client.batch.openai_chat import ROLE, chat_logprobs
from headrace.client.http.completion_request import CompletionRequest
from headrace.client.http.jobs import JobRunner, SubmittedJobs
from headrace.client.http.responses import encode_json
from headrace.client.http.sse import encode_event
from headrace.client.jobs.stream import Event
from headrace.client.wire.results import Result, Usage

# --- whole answers ---------------------------------------------------------------------------------------------------


class AnswerPart(NamedTuple):
    """The part of an answer that one result gives: its choices as JSON, and the other fields."""

    choices: list[bytes]
    fields: dict[str, Any]


def encode_part(
    prompt_index: int, result: Result, *, endpoint: Endpoint = COMPLETIONS, as_token_ids: bool = False
) -> AnswerPart:
    """Encode a result. Choices are numbered across prompts."""
    fields = endpoint.answer(result, as_token_ids=as_token_ids)
    choices = fields.pop("choices")
    for index, choice in enumerate(choices):
        choice["index"] = prompt_index * len(choices) + index
    return AnswerPart([encode_json(choice).encode() for choice in choices], fields)


def encode_answer(parts: Sequence[AnswerPart]) -> bytes:
    """OpenAI's completion object as JSON, of one part for each prompt.

    Of several prompts, each choice names the seed with which its prompt gives the same text again; see `join_results`.
    """
    whole = dict(parts[0].fields)
    whole["usage"] = Usage.total(Usage(**part.fields["usage"]) for part in parts).as_openai()
    for name in ("system_fingerprint", "seed"):
        whole[name] = _shared(part.fields[name] for part in parts)
    choices = [choice for part in parts for choice in part.choices]
    if len(parts) > 1:
        seeds = (part.fields["seed"] for part in parts for _ in part.choices)
        choices = [b'%s,"seed":%d}' % (choice[:-1], seed) for choice, seed in zip(choices, seeds, strict=True)]
    return b'{"choices":[' + b",".join(choices) + b"]," + encode_json(whole).encode()[1:]


def total_usage(results: Sequence[Result]) -> dict[str, Any]:
    """OpenAI's usage object of all prompts together."""
    return Usage.total(result.usage for result in results).as_openai()


def _shared(values: Iterable[Any]) -> Any:
    """The value, if all are the same; else None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


# --- streams ---------------------------------------------------------------------------------------------------------


class ChunkEncoder(ABC):
    """Encodes the chunks of one stream.

    Args:
        request_id: id of the first job.
        samples: number of choices for each prompt (`n`).
        include_usage: whether the stream ends with the token counts.
        continuous_usage: whether each chunk has the token counts of its prompt and choice so far, as in vLLM.
        echo: whether choices begin with their prompts.
        as_token_ids: whether log probabilities name tokens by their ids.
    """

    #: The `object` of a chunk, and how its id begins.
    kind: str
    id_prefix: str

    def __init__(
        self,
        request_id: str,
        model: str,
        samples: int,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        echo: bool = False,
        as_token_ids: bool = False,
    ) -> None:
        created = int(time.time())
        self._common = {"id": self.id_prefix + request_id, "object": self.kind, "created": created, "model": model}
        self._samples, self._include_usage, self._as_token_ids = samples, include_usage, as_token_ids
        self._continuous_usage, self._echo = continuous_usage, echo
        self._tokens: Counter[int] = Counter()

    @abstractmethod
    def _choices(self, index: int, event: Event) -> list[dict[str, Any]]:
        """The new text of the choice `index`: for each chunk its choice."""

    def encode(self, prompt_index: int, event: Event, result: Result | None = None) -> bytes:
        """The chunks with the new text of one choice.

        Args:
            result: of the prompt, if its last chunk is among them: that chunk then names seed and fingerprint.
        """
        index = prompt_index * self._samples + event.index
        usage: dict[str, Any] = {"usage": self._usage_so_far(index, event)} if self._include_usage else {}
        chunks = [{**self._common, "choices": [choice], **usage} for choice in self._choices(index, event)]
        if result is not None:
            chunks[-1] |= {"system_fingerprint": result.fingerprint, "seed": result.seed}
        return b"".join(encode_event(encode_json(chunk)) for chunk in chunks)

    def _usage_so_far(self, index: int, event: Event) -> dict[str, int] | None:
        """The token counts of one prompt and choice; None if they were not requested, or an old worker gives none."""
        self._tokens[index] += len(event.token_ids)
        if not self._continuous_usage or (prompt := event.prompt_tokens) is None:
            return None
        new = self._tokens[index] - (prompt if self._echo else 0)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def encode_end(self, results: Sequence[Result]) -> bytes:
        """The end of a complete stream: `[DONE]`, after the token counts if they were requested."""
        done = encode_event("[DONE]")
        if not self._include_usage:
            return done
        same = {"system_fingerprint": _shared(r.fingerprint for r in results), "seed": _shared(r.seed for r in results)}
        return encode_event(encode_json({**self._common, "choices": [], **same, "usage": total_usage(results)})) + done


class CompletionChunks(ChunkEncoder):
    """The chunks of `/v1/completions`."""

    kind, id_prefix = "text_completion", "cmpl-"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._text_offsets: dict[int, int] = {}  # for the scores of older workers, which have none

    def _choices(self, index: int, event: Event) -> list[dict[str, Any]]:
        logprobs = None
        if event.logprobs is not None:
            offset = self._text_offsets.get(index, 0)
            self._text_offsets[index] = offset + sum(len(score.token) for score in event.logprobs)
            logprobs = logprobs_fields(event.logprobs, as_token_ids=self._as_token_ids, at=offset)
        choice = {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish_reason}
        return [{**choice, **_ended(event)}]


class ChatChunks(ChunkEncoder):
    """The chunks of `/v1/chat/completions`: for each choice first its role, then its text, then why it ended."""

    kind, id_prefix = "chat.completion.chunk", "chatcmpl-"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._begun: set[int] = set()

    def _choices(self, index: int, event: Event) -> list[dict[str, Any]]:
        plain = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
        choices: list[dict[str, Any]] = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append({**plain, "delta": {"role": ROLE, "content": "", "refusal": None}})
        logprobs = chat_logprobs(event.logprobs, as_token_ids=self._as_token_ids)
        if event.text or event.logprobs or event.finish_reason is None:
            choices.append({**plain, "delta": {"content": event.text}, "logprobs": logprobs})
        if event.finish_reason is not None:
            choices.append({**plain, "finish_reason": event.finish_reason, **_ended(event)})
        return choices


def _ended(event: Event) -> dict[str, Any]:
    """The fields of the last chunk of a choice, beside `finish_reason`; none in other chunks."""
    if event.finish_reason is None:
        return {}
    return {"stop_reason": event.stop_reason, **({} if event.complete is None else {"complete": event.complete})}


_CHUNKS: dict[str, type[ChunkEncoder]] = {COMPLETIONS.path: CompletionChunks, CHAT.path: ChatChunks}


def chunks_for(parsed: CompletionRequest, submitted: SubmittedJobs) -> ChunkEncoder:
    """The encoder for the stream of a request."""
    return _CHUNKS[parsed.endpoint.path](
        submitted.jobs[0].id,
        submitted.openai_model,
        parsed.params.get("n", 1),
        include_usage=parsed.include_usage,
        continuous_usage=parsed.continuous_usage,
        echo=parsed.params.get("echo") is True,
        as_token_ids=parsed.as_token_ids,
    )


async def stream_chunks(
    jobs: JobRunner, submitted: SubmittedJobs, encoder: ChunkEncoder, samples: int
) -> AsyncGenerator[bytes]:
    """The whole stream of a request. Closing it cancels the jobs. Raises like `JobRunner.events`."""
    unfinished = dict.fromkeys(range(len(submitted.jobs)), samples)
    last: dict[int, Event] = {}  # of each prompt: waits for the result, which has the seed and the fingerprint
    async with contextlib.aclosing(jobs.events(submitted)) as events:
        async for prompt_index, event in events:
            unfinished[prompt_index] -= event.finish_reason is not None
            if event.result is not None:
                if prompt_index in last:
                    yield encoder.encode(prompt_index, last.pop(prompt_index), event.result)
            elif event.finish_reason is not None and not unfinished[prompt_index]:
                last[prompt_index] = event
            else:
                yield encoder.encode(prompt_index, event)
    yield encoder.encode_end([await job.result() for job in submitted.jobs])
