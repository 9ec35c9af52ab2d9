"""What to do about each error code, in Markdown; docs/errors.md is made from these tables.

The codes are stable: programs may depend on them.
"""

from __future__ import annotations

#: The codes of the classes in `client.wire.errors`, in the order of the page.
ERRORS: dict[str, str] = {
    "invalid_request": "correct the field it names; [these models](deployment.md#several-models) may be named",
    "invalid_batch": "correct the lines it lists",
    "input_changed": "restore the input of the batch, then resume",
    "output_refused": "choose another output, or `resume` or `overwrite`, as the message says",
    "queue_full": "try again later, add workers, or raise `HEADRACE_MAX_QUEUE`",
    "redis_unreachable": "do as it says, or correct `HEADRACE_REDIS_URL`; `.accepted` has the jobs queued before",
    "redis_refused": "check Redis' memory limit, its disk, and the rights of the user (`config/redis-users.acl`)",
    "redis_unsuitable": "change the setting of Redis that it names; `HEADRACE_REDIS_UNSUITABLE=allow` uses it as it is",
    "unknown_job": "check the id and `HEADRACE_REDIS_URL`; records expire after `HEADRACE_RESULT_TTL_S`",
    "job_lost": "submit the job again, and find out [how Redis lost it](troubleshooting.md#and-redis-has-it-no-more)",
    "unreadable_record": "find out what else writes to this Redis; the job may still run: its result has another key",
    "no_checkpoints": 'submit with `checkpoints="all"`, and read within `HEADRACE_CHECKPOINT_TTL_S`',
    "stream_changed": "discard what was streamed and take `job.result()`",
    "result_timeout": "wait again, since the job continues; or cancel it",
    "no_worker": "start a worker with the command it names",
    "cancelled": "nothing: the job was cancelled, or revoked through Celery",
    "result_not_kept": "nothing, or send the job without `ignore_result=True`: it succeeded, its text was not kept",
    "expired": "give the job a longer `timeout_s`, a higher priority, or more workers",
}

#: The codes of `JobFailed`: the worker could not compute the job.
JOB_FAILURES: dict[str, str] = {
    "invalid_request": "correct the field it names; the message was not written by this version of the client",
    "context_length_exceeded": "shorten the prompt or lower `max_tokens`",
    "empty_prompt": "submit a prompt that is not empty: this model has no start token",
    "invalid_token_id": "use only token ids of this model's vocabulary",
    "no_chat_template": "send a prompt; or put the model's `chat_template.jinja` into its directory",
    "invalid_chat_template": "correct the model's chat template: jinja2 cannot read it",
    "chat_template_failed": "correct the messages if the template says what is wrong with them, else the template",
    "no_tokenizer": "send token ids, or put a tokenizer that can be computed into the model's directory",
    "too_many_logprobs": "lower `n`, `max_tokens` or `logprobs`, or submit several jobs",
    "checkpoints_off": "raise the worker's `HEADRACE_CHECKPOINT_MAX_BYTES`",
    "checkpoints_too_large": "request fewer checkpoints, or raise `HEADRACE_CHECKPOINT_MAX_BYTES`",
    "checkpoints_not_stored": "free memory in Redis and submit again",
    "result_too_large": "request fewer samples or log probabilities",
    "structured_outputs_missing": "install the extra `structured` on the worker",
    "grammar_too_complex": "simplify the pattern, schema or grammar of `structured_outputs`",
    "adapter_not_found": "name [an adapter](adapters.md) of the list in the message, or add yours",
    "adapter_failed": "correct the files of [the adapter](adapters.md#what-is-refused); other jobs are not affected",
    "no_token_allowed": "loosen `structured_outputs`, `allowed_token_ids`, `bad_words` or `min_tokens`",
    "nan_logits": "check the model's weights: for this prompt some logits are NaN",
    "out_of_memory": "shorten the prompt, or give the worker more memory (`HEADRACE_KV_CACHE_BYTES`)",
    "internal_error": "read the worker's log, which has the traceback under the job's id",
    "max_attempts": "find out why the worker process ended each time; submit again under another id",
    "bad_signature": "give the client the first key of the worker's `HEADRACE_SIGNING_KEY`",
    "unsupported_version": "upgrade the workers before the clients",
    "unreadable_message": "find out what else writes to the queue; the list `headrace:dead` has the message",
    "unreadable_result": "find out what else writes results; submit again under another id",
    "worker_error": "read the worker's log: Celery failed the task",
}
