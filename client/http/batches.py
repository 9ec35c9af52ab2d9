"""`/v1/batches`: files of requests, computed in the background by what `headrace batch` uses (`client.batch.run`).

What is known of a batch is on disk, and so are its rows that are done, each written when it ended. A server that starts
goes on with the batches that are not complete: jobs that are still queued or done in Redis are found again.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from headrace.client.batch.output import RowFile
from headrace.client.batch.run import Batch, BatchReport, DropBatch
from headrace.client.client import Client
from headrace.client.http.batch_objects import (
    OPEN,
    WINDOW_S,
    BatchState,
    Counts,
    Status,
    fault_object,
    read_batch_request,
)
from headrace.client.http.errors import ApiError, not_found
from headrace.client.http.file_store import LIFE_S, FileStore, read_all, write_json
from headrace.client.wire.errors import Fault, HeadraceError, InvalidBatch
from headrace.config import Settings

log = structlog.get_logger("headrace.http")

#: Rows of a batch; that of the OpenAI API.
MAX_ROWS = 50_000
#: Batches that are computed at a time, and that may wait.
AT_ONCE, MAX_OPEN = 2, 1_000
#: How often Redis is asked again when it was away.
RETRY_S = 0.5


class _Leave(Exception):
    """The server stops; the batch goes on when it starts again."""


class Batches:
    """All batches of a server, computed AT_ONCE at a time in threads of their own.

    Args:
        settings: of the clients that submit their rows.
    """

    def __init__(self, directory: Path, files: FileStore, settings: Settings) -> None:
        self._directory, self._files, self._settings = directory / "batches", files, settings
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.RLock()
        self._leaving = threading.Event()
        self._running: set[str] = set()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="headrace-batch")
        self._states = {state.id: state for state in read_all(self._directory, BatchState)}

    def start(self) -> None:
        """Go on with what is not complete."""
        for state in sorted(self._states.values(), key=lambda state: state.created_at):
            if state.status in OPEN:
                self._threads.submit(self._work, state.id)

    def stop(self) -> None:
        """Leave all batches as they are, and wait for the threads."""
        self._leaving.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    # --- what clients ask --------------------------------------------------------------------------------------------

    def create(self, body: Mapping[str, Any], owner: str) -> BatchState:
        """Accept a batch. Raises ApiError."""
        request = read_batch_request(body)
        file = self._files.get(request.input_file_id, owner)
        with self._files.path(file.id).open("rb") as opened:
            if opened.read(2) == b"\x1f\x8b":
                raise ApiError(
                    400, "invalid_file", "the file is zipped; JSON lines are expected", param="input_file_id"
                )
        self._files.check_room()
        if len(self._needed()) >= MAX_OPEN:
            raise ApiError(429, "too_many_batches", "too many batches are open; try again later", retry_after_s=60)
        now = int(time.time())
        state = BatchState(
            id=f"batch_{uuid.uuid4().hex}",
            input_file_id=file.id,
            created_at=now,
            expires_at=now + WINDOW_S,
            metadata=request.metadata,
            owner=owner,
            rows_id=self._files.new_id(),
            failures_id=self._files.new_id(),
        )
        self._save(state)
        self._threads.submit(self._work, state.id)
        return state

    def get(self, batch_id: str, owner: str) -> BatchState:
        """A batch of the owner's. Raises ApiError."""
        with self._lock:
            state = self._states.get(batch_id)
        if state is None or state.owner != owner:
            raise not_found("batch", batch_id[:80])
        return state

    def owned_by(self, owner: str) -> list[BatchState]:
        """The owner's batches, oldest first."""
        with self._lock:
            states = [state for state in self._states.values() if state.owner == owner]
        return sorted(states, key=lambda state: (state.created_at, state.id))

    def cancel(self, batch_id: str, owner: str) -> BatchState:
        """Ask for a batch to be ended; rows that are done stay. Raises ApiError if it has ended."""
        with self._lock:
            state = self.get(batch_id, owner)
            if state.status not in ("validating", "in_progress", "cancelling"):
                raise ApiError(409, "batch_ended", f"the batch is {state.status}; only one that goes on is cancelled")
            if state.status != "cancelling":
                state = self._update(batch_id, status="cancelling", cancelling_at=int(time.time()))
            if batch_id in self._running:
                return state
            return self._finish(batch_id, "cancelled")  # it waits for its turn, which may be long

    def uses(self, file_id: str) -> bool:
        """Whether a batch that goes on reads the file."""
        return file_id in self._needed()

    def sweep(self) -> None:
        """Delete files that have expired, and forget batches that are as old."""
        self._files.sweep(self._needed())
        with self._lock:
            ended = [state for state in self._states.values() if state.status not in OPEN]
            old = [state.id for state in ended if state.created_at + WINDOW_S + LIFE_S < time.time()]
            for batch_id in old:
                del self._states[batch_id]
        for batch_id in old:
            (self._directory / f"{batch_id}.json").unlink(missing_ok=True)

    def _needed(self) -> set[str]:
        with self._lock:
            return {state.input_file_id for state in self._states.values() if state.status in OPEN}

    # --- in a thread -------------------------------------------------------------------------------------------------

    def _work(self, batch_id: str) -> None:
        with self._lock:
            if self._states[batch_id].status not in OPEN or batch_id in self._running:
                return
            self._running.add(batch_id)
        try:
            self._compute(batch_id)
        except _Leave:
            return
        except InvalidBatch as error:
            self._fail(batch_id, [fault_object(fault) for fault in error.faults])
        except HeadraceError as error:
            log.error("batch.failed", batch=batch_id, error=error.code)
            self._fail(batch_id, [fault_object(Fault(0, "", "it cannot be computed"), error.code)])
        except Exception as error:
            log.error("batch.failed", batch=batch_id, error=type(error).__name__)
            self._fail(batch_id, [fault_object(Fault(0, "", "something failed here"), "internal_error")])
        finally:
            with self._lock:
                self._running.discard(batch_id)

    def _compute(self, batch_id: str) -> None:
        state = self._states[batch_id]
        rows, failures = self._files.path(state.rows_id), self._files.path(state.failures_id)
        with Client(settings=self._settings) as client:
            try:
                batch = self._checked_batch(client, state)
                batch.run(
                    rows,
                    errors=failures,
                    resume=True,
                    on_progress=lambda report: self._progress(batch_id, report),
                    tell=lambda message: log.warning("batch.waits", batch=batch_id, reason=message),
                )
            except DropBatch:
                ended: Status = "cancelled" if self._states[batch_id].status == "cancelling" else "expired"
                self._finish(batch_id, ended)
                return
        with self._lock:
            cancelled = self._states[batch_id].status == "cancelling"  # as its last row ended
            if not cancelled:
                self._update(batch_id, status="finalizing", finalizing_at=int(time.time()))
        self._finish(batch_id, "cancelled" if cancelled else "completed")

    def _checked_batch(self, client: Client, state: BatchState) -> Batch:
        """The rows, all checked. Models are looked at only once: their workers may be away when the server is back."""
        self._look(state.id)
        models = self._models(client, state.id) if state.in_progress_at is None else None
        source = self._files.path(state.input_file_id)
        batch = Batch(client, source, models=models, on_line=lambda line: self._look(state.id, line))
        if batch.checked.rows > MAX_ROWS:
            raise _too_long()
        if state.in_progress_at is None:
            counts = Counts(total=batch.checked.rows)
            self._update(state.id, status="in_progress", in_progress_at=int(time.time()), request_counts=counts)
        return batch

    def _models(self, client: Client, batch_id: str) -> set[str]:
        while True:
            try:
                return client.models()
            except HeadraceError:
                self._look(batch_id)
                time.sleep(RETRY_S)

    def _look(self, batch_id: str, line: int = 0) -> None:
        """Raises what ends the work on a batch before it is complete."""
        if self._leaving.is_set():
            raise _Leave
        if line > 2 * MAX_ROWS:  # blank lines are no rows, but there is an end to them
            raise _too_long()
        state = self._states[batch_id]
        if state.status == "cancelling" or time.time() > state.expires_at:
            raise DropBatch

    def _progress(self, batch_id: str, report: BatchReport) -> None:
        completed = report.before - report.failed_before + report.succeeded
        counts = Counts(total=report.rows, completed=completed, failed=report.failed_before + report.failed)
        with self._lock:
            state = self._states[batch_id]
            self._states[batch_id] = state.model_copy(update={"request_counts": counts})
        self._look(batch_id)

    # --- states ------------------------------------------------------------------------------------------------------

    def _finish(self, batch_id: str, status: Status, **more: Any) -> BatchState:
        """Make files of what was written. May be done twice, with a death in between."""
        state = self._states[batch_id]
        rows, failures = self._files.path(state.rows_id), self._files.path(state.failures_id)
        rows.with_name(f"{rows.name}.run").unlink(missing_ok=True)
        completed, usage = _count(rows)
        failed, _ = _count(failures)
        total = max(state.request_counts.total, completed + failed)
        return self._update(
            batch_id,
            status=status,
            **{f"{status}_at": int(time.time())},
            output_file_id=self._published(state.rows_id, state, "output"),
            error_file_id=self._published(state.failures_id, state, "error"),
            request_counts=Counts(total=total, completed=completed, failed=failed),
            usage=usage,
            **more,
        )

    def _published(self, file_id: str, state: BatchState, what: str) -> str | None:
        path = self._files.path(file_id)
        if not path.exists() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            return None
        self._files.publish(file_id, filename=f"{state.id}_{what}.jsonl", purpose="batch_output", owner=state.owner)
        return file_id

    def _fail(self, batch_id: str, errors: list[dict[str, Any]]) -> None:
        try:
            self._finish(batch_id, "failed", errors={"object": "list", "data": errors})
        except (OSError, HeadraceError) as error:  # the disk is full, say: it is tried again when the server starts
            log.error("batch.unsaved", batch=batch_id, error=type(error).__name__)

    def _update(self, batch_id: str, **changes: Any) -> BatchState:
        with self._lock:
            state = self._states[batch_id].model_copy(update=changes)
        self._save(state)
        return state

    def _save(self, state: BatchState) -> None:
        with self._lock:
            self._states[state.id] = state
            write_json(self._directory / f"{state.id}.json", state.model_dump())


def _too_long() -> InvalidBatch:
    return InvalidBatch([Fault(0, "input", f"a batch has at most {MAX_ROWS} rows; make several of it")])


def _count(path: Path) -> tuple[int, dict[str, Any]]:
    """Rows in an output file, and the tokens that they took."""
    written = RowFile(path)
    deque(written.scan(), 0)
    written.repair(without_failures=False)  # a death may have torn its end
    rows, totals = 0, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            response = json.loads(line)["response"]
            rows += 1
            for name in totals:
                totals[name] += response["body"]["usage"][name] if response else 0
    return rows, {
        "input_tokens": totals["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": totals["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": totals["total_tokens"],
    }
