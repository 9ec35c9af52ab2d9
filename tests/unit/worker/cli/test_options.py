"""Every option of every command, under each of its names, reaches the backend of the command.

The cases are click's own lists of options and the fields of the schema: a new option fails here until it has a value.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from headrace.client import InvalidRequest, SamplingParams
from headrace.client.batch.run import BatchReport
from headrace.client.batch.window import MAX_INFLIGHT
from headrace.client.wire.redis import connect
from headrace.client.wire.requests import parse_request
from headrace.client.wire.results import Result as JobResult
from headrace.client.wire.results import Tokenized
from headrace.config import Settings, load_settings
from headrace.config.directories import redis_dir
from headrace.worker.cli import main
from headrace.worker.cli.backends import Backends
from headrace.worker.cli.local_stack import ServingStack
from headrace.worker.cli.options import ADAPTER_OPTION, EFFECTS, PROMPT_OPTIONS, given_params, value_type
from headrace.worker.jobs.redis_store import RedisStore

#: Sampling parameter -> the typed value (empty for a flag, a list for several), and the value in the request.
SAMPLING: dict[str, tuple[list[str], Any]] = {
    "max_tokens": (["24"], 24),
    "temperature": (["0.5"], 0.5),
    "top_p": (["0.9"], 0.9),
    "top_k": (["40"], 40),
    "min_p": (["0.05"], 0.05),
    "n": (["3"], 3),
    "stop": (["one", "a=b"], ["one", "a=b"]),
    "seed": (["7"], 7),
    "logprobs": (["2"], 2),
    "prompt_logprobs": (["2"], 2),
    "logit_bias": (["50256=-100", "11=0.5"], {50256: -100.0, 11: 0.5}),
    "presence_penalty": (["-1"], -1.0),
    "frequency_penalty": (["0.5"], 0.5),
    "repetition_penalty": (["1.1"], 1.1),
    "echo": ([], True),
    "min_tokens": (["4"], 4),
    "ignore_eos": ([], True),
    "stop_token_ids": (["13", "50256"], [13, 50256]),
    "structured_outputs": (['{"regex": "[a-z]+"}'], {"regex": "[a-z]+"}),
    "allowed_token_ids": (["13", "50256"], [13, 50256]),
    "bad_words": (["one", "two words"], ["one", "two words"]),
    "skip_special_tokens": ([], False),
}

#: (command, parameter) -> the typed value, and the value that the command's backend receives under that name.
VALUES: dict[tuple[str, str], tuple[list[str], Any]] = {
    **{("generate", name): value for name, value in SAMPLING.items()},
    ("generate", "parse_special_tokens"): ([], True),
    ("generate", "add_special_tokens"): ([], True),
    ("generate", "adapter"): (["pirate"], "pirate"),
    ("generate", "chat"): ([], True),
    ("generate", "system"): (["Be brief."], "Be brief."),
    ("generate", "prompt"): (["Once"], "Once"),
    ("generate", "model"): (["gpt2"], "gpt2"),
    ("generate", "timeout"): (["2.5"], 2.5),
    ("generate", "as_json"): ([], True),
    ("tokenize", "parse_special_tokens"): ([], True),
    ("tokenize", "add_special_tokens"): ([], True),
    ("tokenize", "prompt"): (["Once"], "Once"),
    ("tokenize", "model"): (["gpt2"], "gpt2"),
    ("tokenize", "timeout"): (["2.5"], 2.5),
    ("tokenize", "as_json"): ([], True),
    **{("batch", name): value for name, value in SAMPLING.items()},
    ("batch", "parse_special_tokens"): ([], True),
    ("batch", "add_special_tokens"): ([], True),
    ("batch", "adapter"): (["pirate"], "pirate"),
    ("batch", "kind"): (["csv"], "csv"),
    ("batch", "output_format"): (["flat"], "flat"),
    ("batch", "prompt_column"): (["text"], "text"),
    ("batch", "id_column"): (["key"], "key"),
    ("batch", "params_columns"): (["n,seed"], ["n", "seed"]),
    ("batch", "skip_invalid"): ([], True),
    ("batch", "shard"): (["1/3"], (1, 3)),
    ("batch", "source"): (["other.jsonl"], "other.jsonl"),
    ("batch", "output"): (["results.jsonl.gz"], "results.jsonl.gz"),
    ("batch", "errors"): (["errors.jsonl"], "errors.jsonl"),
    ("batch", "model"): (["gpt2"], "gpt2"),
    ("batch", "text"): ([], True),
    ("batch", "params"): (["max_tokens=20", "stop=end"], {"max_tokens": 20, "stop": "end"}),
    ("batch", "resume"): ([], True),
    ("batch", "retry_errors"): ([], True),
    ("batch", "overwrite"): ([], True),
    ("batch", "cancel"): ([], True),
    ("batch", "max_inflight"): (["32"], 32),
    ("batch", "ordered"): ([], True),
    ("batch", "limit"): (["10"], 10),
    ("batch", "dry_run"): ([], True),
    ("batch", "as_json"): ([], True),
    ("serve", "host"): (["0.0.0.0"], "0.0.0.0"),
    ("serve", "port"): (["0"], 0),
    ("serve", "api_keys"): (["a" * 20, "b" * 20], ("a" * 20, "b" * 20)),
    ("serve", "insecure"): ([], True),
    ("serve", "cors"): (["http://a", "http://b"], ("http://a", "http://b")),
    ("serve", "files"): (["store"], "store"),
    ("serve", "timeout"): (["1.5"], 1.5),
    ("serve", "requests_per_minute"): (["60"], 60),
    ("serve", "max_body_bytes"): (["1000"], 1000),
    ("serve", "max_file_bytes"): (["2000"], 2000),
    ("serve", "max_files_bytes"): (["3000"], 3000),
    ("validate", "model"): (["gpt2"], "gpt2"),
    ("validate", "references"): (["transformers", "mine.npz"], ("transformers", "mine.npz")),
    ("validate", "dtype"): (["bfloat16"], "bfloat16"),
    ("validate", "adapter"): (["."], Path(".")),
    ("validate", "prompts"): (["One", "Two"], ("One", "Two")),
    ("validate", "plot"): (["difference.png"], "difference.png"),
    ("validate", "as_json"): ([], True),
    ("up", "repair_redis"): ([], True),
    ("status", "here"): ([], True),
    ("status", "as_json"): ([], True),
}

RESULT = JobResult.model_validate(
    {
        "id": "a-job",
        "model": "demo",
        "choices": [{"index": 0, "text": " there", "token_ids": [612], "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "seed": 7,
        "timings": {"waiting_s": 0.0, "prefill_s": 0.1, "decode_s": 0.1},
    }
)


class RecordingBackends:
    """A local stack, a batch, a server and a validation that only record their arguments."""

    def __init__(self) -> None:
        self.received: dict[str, Any] = {}
        self.client = self

    def backends(self) -> Backends:
        return Backends(
            find_or_start_stack=self._stack,
            start_local_stack=self._stack,
            open_batch=self._open_batch,  # type: ignore[arg-type]
            serve_http=self._serve_http,
            validation=self._validation,  # type: ignore[arg-type]
        )

    @contextlib.contextmanager
    def _stack(self, settings: Settings) -> Iterator[ServingStack]:
        self.received |= {"model": settings.model_name, "dtype": settings.dtype}
        yield ServingStack(self, lambda: None, local=True)  # type: ignore[arg-type]

    # The client, and the job it returns.

    def submit(self, prompt: str = "", *, messages: Any = None, **params: Any) -> RecordingBackends:
        self.received |= {"prompt": prompt, "chat": messages is not None, **params}
        if messages is not None and messages[0]["role"] == "system":
            self.received["system"] = messages[0]["content"]
        return self

    def tokenize(self, prompt: str, **params: Any) -> Tokenized:
        self.received |= {"prompt": prompt, **params}
        return Tokenized(tokens=[5, 6], token_strs=["a", "b"], count=2, max_model_len=8)

    def result(self, timeout: float) -> JobResult:
        self.received["timeout"] = timeout
        return RESULT

    # A batch, and a validation, which both have a `run`.

    def _open_batch(self, client: Any, source: Any, params: dict[str, Any], **options: Any) -> RecordingBackends:
        self.received |= {**params, "source": source, "params": params, "dry_run": True, **options}
        self.received["kind"] = options["format"]
        if columns := options["columns"]:
            chosen = {"prompt_column": columns.prompt, "id_column": columns.custom_id, "params_columns": columns.params}
            self.received |= chosen
        self.received["model"] = client.model_name
        return self

    def rows(self) -> Iterator[Any]:
        return iter(())

    def _validation(self, settings: Settings, references: Any, prompts: Any, adapter: Any) -> RecordingBackends:
        self.received |= {"references": references, "prompts": prompts, "adapter": adapter}
        return self

    def run(self, output: Any, progress: Any = None, **options: Any) -> list[Any]:
        if "on_progress" in options:
            options["on_progress"](BatchReport())
        self.received |= {"output": output, "dry_run": False, **options}
        return BatchReport() if options.get("cancel") else []  # type: ignore[return-value]

    def draw(self, path: str) -> None:
        self.received["plot"] = path

    def _serve_http(self, settings: Settings, **options: Any) -> None:
        self.received |= options


#: The required arguments of each command: parameter -> words.
NEEDED: dict[str, dict[str, list[str]]] = {
    "generate": {"prompt": ["Hello."]},
    "tokenize": {"prompt": ["Hello."]},
    "batch": {"source": ["-i", "in.jsonl"], "output": ["-o", "out.jsonl"]},
    "serve": {},
    "validate": {},
    "status": {},
    "up": {},
}


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """Runs a command with recording backends; returns click's result and the recorded arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://localhost:1/0")  # a command that connected to it would fail

    def run(command: str, *words: str) -> tuple[Result, dict[str, Any]]:
        recording = RecordingBackends()
        done = CliRunner().invoke(main, [command, *words], obj=recording.backends(), catch_exceptions=False)
        received = dict(recording.received)
        with contextlib.suppress(ValueError):
            received["as_json"] = isinstance(json.loads(done.stdout), (dict, list))
        return done, received

    return run


def cases() -> list[tuple[str, str, str]]:
    """(command, parameter, one of its spellings) for all that click knows."""
    return [
        (name, str(param.name), spelling)
        for name, command in main.commands.items()
        for param in command.params
        for spelling in (*param.opts, *param.secondary_opts)
    ]


def words_for(command: str, name: str, spelling: str) -> list[str]:
    """The command line that gives this parameter, with the other arguments that the command requires."""
    values, _ = VALUES[command, name]
    needed = [word for other, words in NEEDED[command].items() if other != name for word in words]
    if not spelling.startswith("-"):
        return [*needed, *values]
    return [*needed, *([word for value in values for word in (spelling, value)] or [spelling])]


def option_of(name: str) -> str:
    """The option that gives a sampling parameter its value in SAMPLING."""
    return ("--no-" if SAMPLING[name][1] is False else "--") + name.replace("_", "-")


#: Commands whose options other tests check: of status and up below, of convert in tests/unit/model/test_convert.py, of
#: the others in test_jobs.py.
TESTED_ELSEWHERE = ("status", "up", "convert", "jobs", "job", "cancel", "purge")


@pytest.mark.parametrize(("command", "name", "spelling"), [case for case in cases() if case[0] not in TESTED_ELSEWHERE])
def test_every_option_reaches_what_is_behind_the_command(
    invoke: Callable[..., tuple[Result, dict[str, Any]]], command: str, name: str, spelling: str
) -> None:
    assert (command, name) in VALUES, "give the new option a value to test it with"
    done, received = invoke(command, *words_for(command, name, spelling))
    assert done.exit_code == 0, done.output
    expected = VALUES[command, name][1]
    if isinstance(expected, bool) and f"--no-{name.replace('_', '-')}" in {s for *of, s in cases() if of[1] == name}:
        expected = not spelling.startswith("--no-")
    assert received[name] == expected
    assert type(received[name]) is type(expected)


def test_format_flat_is_the_format_of_the_output(invoke: Callable[..., tuple[Result, dict[str, Any]]]) -> None:
    done, received = invoke("batch", "-i", "in.csv", "-o", "out.jsonl", "--format", "flat")
    assert done.exit_code == 0, done.output
    assert (received["format"], received["output_format"]) == (None, "flat")


@pytest.mark.parametrize("words", [[], ["--repair-redis"]])
def test_up_repairs_the_embedded_redis_before_the_worker_starts_if_that_is_requested(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("headrace.worker.cli.up.run_worker", lambda: 7)
    done = CliRunner().invoke(main, ["up", *words], catch_exceptions=False)
    assert done.exit_code == 7
    assert (f"nothing in {redis_dir()} is damaged" in done.output.replace("\n", "")) == bool(words)


@pytest.mark.parametrize("command", sorted(set(NEEDED) - {"status", "up"}))
def test_without_an_option_its_default_applies(
    invoke: Callable[..., tuple[Result, dict[str, Any]]], command: str
) -> None:
    done, received = invoke(command, *(word for words in NEEDED[command].values() for word in words))
    assert done.exit_code == 0, done.output
    given = {name for (of, name), _ in VALUES.items() if of == command and name in received}
    assert {name for name in given if received[name] == VALUES[command, name][1]} == set()
    if command == "generate":
        assert given & SAMPLING.keys() == set(), "only what the user gave is in the request"
        assert received["timeout"] == 300
    if command == "batch":
        assert received["max_inflight"] == MAX_INFLIGHT


def test_options_of_status_against_a_real_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = redis_url.replace("db=0", "db=7")
    connect(own).flushdb()
    monkeypatch.setenv("HEADRACE_REDIS_URL", own)
    record = {"model": "demo", "slots": 4, "running": 0, "waiting": 0, "tokens_per_s": 0.0}
    RedisStore(connect(own), result_ttl_s=60, checkpoint_ttl_s=60).heartbeat("elsewhere-7", record)
    assert {name for of, name, _ in cases() if of == "status"} == {"here", "as_json"}
    shown = CliRunner().invoke(main, ["status", "--json"])
    assert (shown.exit_code, len(json.loads(shown.stdout)["workers"])) == (0, 1)
    shown = CliRunner().invoke(main, ["status", "--json", "--here"])
    assert (shown.exit_code, len(json.loads(shown.stdout)["workers"])) == (3, 0)


@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_a_sampling_option_gives_the_request_that_the_schema_gives(
    invoke: Callable[..., tuple[Result, dict[str, Any]]], name: str
) -> None:
    assert name in SAMPLING, "give the new parameter a value to test it with"
    value = SAMPLING[name][1]
    _, received = invoke("generate", *words_for("generate", name, option_of(name)))
    sent = parse_request({name: value for name, value in received.items() if name in {"prompt", *SAMPLING}})
    assert sent == parse_request({"prompt": "Hello.", name: value})
    assert sent != parse_request({"prompt": "Hello."}), "the value of the test must not be the default"


@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_a_parameter_of_a_batch_gives_the_request_that_the_schema_gives(
    invoke: Callable[..., tuple[Result, dict[str, Any]]], name: str
) -> None:
    value = SAMPLING[name][1]
    _, received = invoke("batch", "-i", "in.jsonl", "-o", "out.jsonl", "-p", f"{name}={json.dumps(value)}")
    assert parse_request({"prompt": "a", **received["params"]}) == parse_request({"prompt": "a", name: value})


def test_every_option_has_a_help_text() -> None:
    assert {*SamplingParams.model_fields, *PROMPT_OPTIONS, ADAPTER_OPTION} == set(EFFECTS)
    for name, command in main.commands.items():
        assert command.help, name
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts[0]}"
                assert "None" not in option.help


def test_several_options_at_once_are_one_request(invoke: Callable[..., tuple[Result, dict[str, Any]]]) -> None:
    words = [word for name in SAMPLING for word in words_for("generate", name, option_of(name))[1:]]
    done, received = invoke("generate", "Hello.", *words)
    assert done.exit_code == 0, done.output
    assert {name: received[name] for name in SAMPLING} == {name: value for name, (_, value) in SAMPLING.items()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "7.5"], "'7.5' is not a valid integer"),
        (["--logprobs", "x"], "'x' is not a valid integer"),
        (["--top-p", "x"], "'x' is not a valid float"),
        (["--logprobs", "21"], "a whole number from 0 to 20"),
        (["--logit-bias", "11"], "ID=BIAS"),
        (["--n", "0"], "a whole number from 1 to 128"),
    ],
)
def test_a_wrong_value_starts_nothing(
    invoke: Callable[..., tuple[Result, dict[str, Any]]], words: list[str], message: str
) -> None:
    done, received = invoke("generate", "Hello.", *words)
    assert (done.exit_code, received) == (2, {})
    assert message in done.stderr


def test_the_type_of_an_annotation_is_found_at_any_depth() -> None:
    fields = SamplingParams.model_fields
    assert [value_type(fields[name].annotation) for name in ("seed", "logprobs", "top_p", "echo")] == [
        int,
        int,
        float,
        bool,
    ]
    with pytest.raises(TypeError, match="no option"):
        value_type(int | str)


def test_parameters_that_were_not_given_are_left_to_the_worker() -> None:
    assert given_params({"seed": None, "stop": (), "n": 2, "stop_token_ids": (1, 2)}) == {
        "n": 2,
        "stop_token_ids": [1, 2],
    }
    with pytest.raises(InvalidRequest, match="ID=BIAS"):
        given_params({"logit_bias": ("eleven=1",)})
    with pytest.raises(InvalidRequest, match=r"structured_outputs: got .*; expected JSON"):
        given_params({"structured_outputs": "{"})


def test_up_takes_options_as_the_worker_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("headrace.worker.cli.up.check_worker_packages", lambda: None)
    monkeypatch.setattr(
        "headrace.worker.cli.up.run_worker", lambda: seen.append(load_settings().generation_config) or 0
    )
    monkeypatch.setenv("HEADRACE_GENERATION_CONFIG", "none")  # restored after the test
    for flags in (["--generation-config", "auto"], ["--generation-config=none"]):
        assert CliRunner().invoke(main, ["up", *flags]).exit_code == 0
    assert seen == ["auto", "none"]
    assert CliRunner().invoke(main, ["up", "--generation-config", "vllm"]).exit_code == 2
    monkeypatch.setattr("headrace.worker.cli.up.run_worker", lambda: seen.append(load_settings().models) or 0)
    monkeypatch.setenv("HEADRACE_MODEL", "gpt2")
    monkeypatch.setenv("HEADRACE_SERVED_NAME", "prod")
    for model in ("prod", "chat=./m", "a,b"):
        assert CliRunner().invoke(main, ["up", "--model", model]).exit_code == 0
    assert seen[2:] == [{"prod": "gpt2"}, {"chat": "./m"}, {"a": "a", "b": "b"}]
