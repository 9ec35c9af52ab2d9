"""config/redis-users.acl grants what client and worker need, and nothing else."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.client import Client, InvalidRequest, RedisRefused, RedisUnreachable
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.queue.permissions import MissingPermissions, check_permissions, required_commands
from tests.integration.processes import WorkerProcess, wait_until
from tests.integration.servers import redis_on_a_port
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
QUEUE = keys.queue_lists("demo")[1]
ACL = ROOT / "config" / "redis-users.acl"
#: How SECURITY.md says to put passwords in: the first shell block that names the file.
RECIPE = re.search(r"```sh\n(.*?redis-users\.acl.*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)

Connect = Callable[[str], redis.Redis]
Url = Callable[[str], str]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("users")


@pytest.fixture(scope="module")
def passwords(directory: Path) -> dict[str, str]:
    """Prepare the file with the commands of SECURITY.md."""
    assert RECIPE is not None
    (directory / "config").mkdir()
    (directory / "config" / ACL.name).write_text(ACL.read_text())
    done = subprocess.run(["sh", "-euc", RECIPE[1]], cwd=directory, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^headrace-(\w+): (\w{32,})$", done.stdout, re.MULTILINE))
    assert set(found) == {"client", "worker", "operator", "admin"}
    return found


@pytest.fixture(scope="module")
def port(directory: Path, passwords: dict[str, str]) -> Iterator[int]:
    with redis_on_a_port(directory, "--aclfile", str(directory / "redis-users.acl")) as number:
        yield number


@pytest.fixture(scope="module")
def url(port: int, passwords: dict[str, str]) -> Url:
    return lambda user: f"redis://headrace-{user}:{passwords[user]}@127.0.0.1:{port}/0"


@pytest.fixture(scope="module")
def lost(url: Url) -> str:
    """A job whose message a worker held when it died."""
    with Client(redis_url=url("client")) as client, connect(url("admin")) as admin:
        job = client.submit("Hello.", max_tokens=5)
        admin.hset(keys.unacked(), "lost", f'[{admin.rpop(QUEUE)}, "", "headrace.demo"]')
        admin.zadd(keys.unacked_index(), {"lost": 1})
        return job.id


@pytest.fixture(scope="module")
def worker(url: Url, directory: Path, lost: str) -> Iterator[WorkerProcess]:
    environment = {"HEADRACE_REDIS_URL": url("worker"), "HEADRACE_SLOTS": "2", "HEADRACE_LEASE_S": "3"}
    with WorkerProcess(directory / "worker.log", **environment) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def client(url: Url) -> Iterator[Client]:
    with Client(redis_url=url("client")) as made:
        yield made


def denied(url: Url) -> set[tuple[str, str]]:
    entries = connect(url("admin")).acl_log()
    return {(entry["username"].removeprefix("headrace-"), entry["object"]) for entry in entries}


def test_redis_refuses_the_acl_file_without_passwords(tmp_path: Path) -> None:
    """This prevents servers with a password from the repository."""
    with (
        pytest.raises(AssertionError, match="password hash must be exactly 64 characters"),
        redis_on_a_port(tmp_path, "--aclfile", str(ACL)),
    ):
        pass


def test_client_and_worker_do_all_they_do_with_the_rights_they_have(
    client: Client, worker: WorkerProcess, url: Url, lost: str
) -> None:
    assert client.submit("Hello.", max_tokens=5, temperature=0).result(PATIENCE_S).text == '\n\n"I am'
    named = client.submit("Hello.", id="users:named", max_tokens=5, temperature=0, checkpoints="all")
    assert named.result(PATIENCE_S).text == '\n\n"I am'
    assert "logits" in named.checkpoints()
    streamed = list(client.submit("Hello.", max_tokens=5, temperature=0, stream=True).stream(PATIENCE_S))
    assert "".join(event.text for event in streamed) == '\n\n"I am'
    jobs = client.submit_many(["Hello."] * 20, max_tokens=100, ignore_eos=True, priority="bulk")
    assert jobs[-1].cancel()
    with pytest.raises(InvalidRequest, match="expected an adapter of demo: none"):
        client.submit("Hello.", adapter="nobody")
    status = client.status()
    assert status.serves("demo")
    assert status.queues[0].bulk <= 2, "twenty jobs are two messages, and who may not look inside counts messages"
    assert {job.status() for job in client.as_completed(jobs, 60)} == {"succeeded", "cancelled"}
    assert client.job(lost).result(PATIENCE_S)
    client._app.send_task("headrace.unheard", task_id="users:unheard", declare=[])
    wait_until(lambda: client._redis.exists(keys.result("users:unheard")))
    ignored = {(user, "client") for user in ("client", "worker")}  # redis-py says its name; it goes on without
    counted = {
        ("client", command) for command in ("lrange", "hlen", "hrandfield", "info")
    }  # client.status and the first job ask, and do without
    # Neither may read the lists in which other programs leave messages by mistake; the worker asks once.
    counted |= {(user, "headrace.demo") for user in ("client", "worker")}
    saved = {("worker", "config|get"), ("worker", "config")}  # whether this server without a log writes snapshots
    assert denied(url) <= ignored | counted | saved
    assert "NoPermission" not in worker.text()


def test_an_operator_lists_and_purges_jobs_and_a_client_does_neither(client: Client, url: Url) -> None:
    jobs = client.submit_many(["A secret."] * 20, model="demo", priority="bulk")
    with Client(redis_url=url("operator"), model="demo") as operator:
        assert {job.id for job in jobs} <= {job.id for job in operator.jobs(newer_than=600)}
        assert operator.job_details(jobs[0]).owner == ""
        assert operator.reader.find_lost([job.id for job in jobs]) == []
        waiting = operator.submit("A secret.", model="demo", max_tokens=900, ignore_eos=True, priority="bulk")
        assert operator.purge("demo") >= 0
        assert operator.cancel_all("demo") >= 0
        assert waiting.wait(PATIENCE_S) == "cancelled"
        assert {job.wait(PATIENCE_S) for job in jobs} <= {"cancelled", "succeeded"}
    for ask in (lambda: list(client.jobs()), lambda: client.purge("demo"), lambda: client.job_counts()):
        with pytest.raises(RedisRefused, match=r"the rights of headrace-operator.*redis-users\.acl"):
            ask()
    assert client.job_details(waiting).owner is None
    assert client.reader.find_lost([waiting.id]) == []
    names = {command for user, command in denied(url) if user == "operator"} - {"client", "info"}
    assert not names, "all that an operator does is granted"


#: Redis 6.2 words it as the first, Redis 7 as the second; Redis 7 refuses DEBUG to everybody.
REFUSED = r"this user has no permissions|User \S+ has no permissions|DEBUG command not allowed"
SERVER = (
    ["FLUSHALL"],
    ["FLUSHDB"],
    ["CONFIG", "GET", "*"],
    ["CONFIG", "SET", "dir", "/tmp"],
    ["KEYS", "*"],
    ["SCAN", "0"],
    ["RANDOMKEY"],
    ["MONITOR"],
    ["SHUTDOWN"],
    ["SAVE"],
    ["DEBUG", "SLEEP", "0"],
    ["ACL", "LIST"],
    ["ACL", "SETUSER", "default", "on", "nopass", "~*", "+@all"],
    ["CLIENT", "LIST"],
    ["CLIENT", "KILL", "TYPE", "normal"],
    ["MODULE", "LIST"],
    ["REPLICAOF", "NO", "ONE"],
    ["MIGRATE", "127.0.0.1", "1", "x", "0", "1"],
    ["SCRIPT", "FLUSH"],
    ["INFO"],
    ["GET", "somebody-elses"],
    ["SET", "somebody-elses", "x"],
    ["SUBSCRIBE", "somebody-elses"],
    ["PUBLISH", "somebody-elses", "x"],
)
READERS = (
    ["LRANGE", QUEUE, "0", "-1"],
    ["LINDEX", QUEUE, "0"],
    ["RPOP", QUEUE],
    ["BRPOP", QUEUE, "1"],
    ["LMOVE", QUEUE, QUEUE, "LEFT", "RIGHT"],
    ["SORT", QUEUE],
    ["DUMP", QUEUE],
    ["HGETALL", keys.unacked()],
    ["HGET", keys.unacked(), "tag"],
    ["HSET", keys.unacked(), "tag", "x"],
    ["ZRANGE", keys.unacked_index(), "0", "-1"],
    ["DEL", QUEUE],
    ["RENAME", QUEUE, "x"],
    ["EVAL", "return 1", "0"],
    ["EVALSHA", "0" * 40, "0"],
    ["SCRIPT", "LOAD", "return 1"],
    ["SUBSCRIBE", "headrace:celery-task-meta-x"],
    ["PSUBSCRIBE", "*"],
    ["PUBLISH", "headrace:/0.celery.pidbox", "x"],
    ["HSCAN", keys.job("x"), "0"],
    ["SADD", "headrace:_kombu.binding.x", "x"],
    ["LRANGE", keys.submitted(), "0", "-1"],
    ["RPOP", keys.submitted()],
    ["ZRANGE", keys.jobs(""), "0", "-1"],
    ["ZRANGE", keys.owners(), "0", "-1"],
)


@pytest.mark.parametrize("command", [*SERVER, *READERS], ids=" ".join)
def test_a_client_cannot_run_commands_of_workers_or_administrators(url: Url, command: list[str]) -> None:
    with pytest.raises(redis.exceptions.ResponseError, match=REFUSED):
        connect(url("client")).execute_command(*command)


@pytest.mark.parametrize("command", [command for command in SERVER if command != ["INFO"]], ids=" ".join)
def test_a_worker_may_not(url: Url, command: list[str]) -> None:
    with pytest.raises(redis.exceptions.ResponseError, match=REFUSED):
        connect(url("worker")).execute_command(*command)


@pytest.mark.parametrize("command", ["'FLUSHALL'", "'CONFIG', 'GET', '*'", "'GET', 'somebody-elses'", "'KEYS', '*'"])
def test_a_script_has_the_permissions_of_the_worker(url: Url, command: str) -> None:
    with pytest.raises(redis.exceptions.ResponseError, match=r"can't run this command|can't access|not allowed"):
        connect(url("worker")).eval(f"return redis.call({command})", 0)


def test_nobody_gets_in_without_a_password(port: int) -> None:
    once = Retry(NoBackoff(), 0)
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=port, retry=once).ping()
    for user in ("headrace-client", "headrace-worker", "headrace-admin", "default"):
        for password in ("x", user, "CHANGE-ME", "CLIENT-PASSWORD-SHA256", "WORKER-PASSWORD-SHA256"):
            with pytest.raises(redis.exceptions.AuthenticationError):
                redis.Redis(port=port, username=user, password=password, retry=once).ping()


def test_a_wrong_password_is_an_error_that_says_so(port: int, url: Url, tmp_path: Path) -> None:
    wrong = f"redis://headrace-client:not-it-7312@127.0.0.1:{port}/0"
    with Client(redis_url=wrong) as made, pytest.raises(RedisUnreachable, match="user and password") as caught:
        made.submit("Hello.")
    assert "not-it" not in str(caught.value)
    with WorkerProcess(tmp_path / "worker.log", HEADRACE_REDIS_URL=wrong) as process:
        assert process.wait(PATIENCE_S) != 0
        assert "user and password" in process.text()
        assert "not-it" not in process.text()
        assert "Traceback" not in process.text()
    with Client(redis_url=url("admin").replace("admin", "client")) as made, pytest.raises(RedisUnreachable):
        made.submit("Hello.")


def test_the_workers_user_has_all_the_rights_that_are_asked_for_and_any_that_is_missing_is_named(url: Url) -> None:
    check_permissions(connect(url("worker")), ["demo"])
    admin, rules = connect(url("admin")), ACL.read_text().splitlines()[2].split()
    place = url("worker").replace(url("worker").split("@")[0], "redis://probed:probed")
    for command in required_commands(["demo"]):
        shown, name = command[:2], command[0].lower()
        if name == "evalsha":
            shown = (command[0], command[3])
        own = [rule for rule in rules[2:] if not rule.startswith("#")]
        admin.execute_command("ACL", "SETUSER", "probed", *own, ">probed", f"-{name}")
        with pytest.raises(MissingPermissions, match=r"config/redis-users\.acl") as caught:
            check_permissions(connect(place), ["demo"])
        assert " ".join(shown) in caught.value.commands
        assert all(missing.startswith(command[0]) for missing in caught.value.commands)
    admin.execute_command("ACL", "SETUSER", "probed", *own, ">probed", "resetkeys", "~headrace:job:*")
    with pytest.raises(MissingPermissions) as caught:
        check_permissions(connect(place), ["demo"])
    assert f"BRPOP {keys.hint('demo')}" in caught.value.commands
    assert not any("job:" in missing for missing in caught.value.commands)


def test_a_worker_without_a_right_refuses_to_start_and_one_that_loses_it_ends_and_no_job_is_lost(
    url: Url, tmp_path: Path, worker: WorkerProcess, client: Client
) -> None:
    """Without the right to write results, the message is neither acknowledged nor lost."""
    admin = connect(url("admin"))
    own = ACL.read_text().splitlines()[2].replace("#WORKER-PASSWORD-SHA256", ">losing").split()[2:]
    admin.execute_command("ACL", "SETUSER", "losing", *own)
    place = url("worker").replace(url("worker").split("@")[0], "redis://losing:losing")
    settings = {"HEADRACE_REDIS_URL": place, "HEADRACE_MODEL": "demo", "HEADRACE_SERVED_NAME": "losing"}
    with WorkerProcess(tmp_path / "w.log", HEADRACE_LEASE_S="3", **settings) as losing:
        losing.wait_ready()
        admin.execute_command("ACL", "SETUSER", "losing", "-set", "-setex")
        jobs = client.submit_many(["Hello."] * 3, model="losing", max_tokens=5, temperature=0)
        jobs.append(client.submit("Hello.", model="losing", max_tokens=5, temperature=0))
        assert losing.wait() == 1
        (said,) = losing.events("redis.forbidden")
        assert "SET headrace:celery-task-meta-" in said["hint"]
        assert "config/redis-users.acl" in said["hint"]
    assert admin.llen(keys.queue_lists("losing")[1]) == 2, "both messages are back"
    assert {job.status() for job in jobs} == {"queued"}
    assert [admin.hget(keys.job(job.id), "attempts") for job in jobs] == ["0"] * 4
    with WorkerProcess(tmp_path / "refused.log", **settings) as refused:
        assert refused.wait() == 1
        assert "SET headrace:celery-task-meta-" in refused.text()
        assert "Traceback" not in refused.text()
        assert not refused.events("message.accepted")


def test_a_right_that_is_missing_is_an_error_that_says_so(url: Url) -> None:
    connection = connect(url("admin"))
    connection.acl_setuser("narrow", enabled=True, passwords=["+narrow"], keys=["*"], commands=["+ping", "+llen"])
    with (
        Client(redis_url=url("client").replace(url("client").split("@")[0], "redis://narrow:narrow")) as made,
        pytest.raises(RedisRefused, match="the user's rights"),
    ):
        made.submit("Hello.")
