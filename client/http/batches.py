"""Batches of `/v1/batches`: validated and computed in background threads with `client.batch.run`.

The state of each batch is on disk, and each row is written to its output file when it is done. A server that restarts
resumes incomplete batches: it finds their jobs in Redis, whether queued or finished.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from headrace.client.batch.check import MAX_FAULTS
from headrace.client.batch.errors import Fault, InvalidBatch, OutputRefused, is_disk_full
from headrace.client.batch.run import Batch, BatchReport, DropBatch
from headrace.client.client import Client
from headrace.client.http.batch_objects import (
    CANCELLABLE_STATUSES,
    OPEN_STATUSES,
    WINDOW_S,
    BatchRequest,
    BatchState,
    RequestCounts,
    Status,
    fault_object,
)
from headrace.client.http.batch_usage import count_rows
from headrace.client.http.errors import ApiError, not_found
from headrace.client.http.file_store import RETENTION_S, FileStore, load_all, write_json
from headrace.client.wire.errors import HeadraceError
from headrace.client.wire.job_index import owned_by
from headrace.config import Settings

log = structlog.get_logger("headrace.http")

#: Rows of one batch; the OpenAI API has the same limit.
MAX_ROWS = 50_000
#: Batches that run at the same time, and batches that may be open (running or waiting for a thread).
MAX_CONCURRENT, MAX_OPEN = 2, 1_000
#: Seconds between attempts to reach Redis.
REDIS_RETRY_S = 0.5
#: Seconds between attempts to continue a batch after the disk was full.
DISK_RETRY_S = 5.0
GZIP_MAGIC = b"\x1f\x8b"


class _ServerStopping(Exception):
    """Raised in a batch's thread when the server stops; the batch stays open and is resumed at the next start."""


class Batches:
    """All batches of a server; at most MAX_CONCURRENT of them run, each in a thread.

    Args:
        directory: parent of the directory in which the states are stored.
        settings: settings of the clients that submit the rows.
    """

    def __init__(self, directory: Path, files: FileStore, settings: Settings) -> None:
        self._directory, self._files, self._settings = directory / "batches", files, settings
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._running: set[str] = set()
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="headrace-batch")
        self._states = {state.id: state for state in load_all(self._directory, BatchState)}

    def start(self) -> None:
        """Resume batches that a previous server left incomplete, and delete what it left of files that nobody has."""
        if len(self._states) == sum(1 for _ in self._directory.glob("*.json")):  # else one may name files
            open_states = [state for state in self._states.values() if state.status in OPEN_STATUSES]
            written = {file_id for state in open_states for file_id in (state.rows_id, state.failures_id)}
            self._files.delete_unnamed(keep=written)
        for state in sorted(self._states.values(), key=lambda state: (state.created_at, state.created_ns)):
            if state.status in OPEN_STATUSES:
                self._threads.submit(self._run, state.id)

    def stop(self) -> None:
        """Interrupt all running batches, to be resumed at the next start, and wait for their threads."""
        self._stopping.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    # --- requests ----------------------------------------------------------------------------------------------------

    def create(self, request: BatchRequest, owner: str) -> BatchState:
        """Accept a batch. Raises ApiError."""
        self._files.check_space()
        with self._lock, self._files.reading(request.input_file_id, owner) as file:
            state = self._create(request.model_copy(update={"input_file_id": file.id}), owner)
        self._threads.submit(self._run, state.id)
        return state

    def _create(self, request: BatchRequest, owner: str) -> BatchState:
        with self._files.path(request.input_file_id).open("rb") as opened:
            if opened.read(2) == GZIP_MAGIC:
                message = "the file is gzip-compressed; upload it as uncompressed JSON lines"
                raise ApiError(400, "invalid_file", message, param="input_file_id")
        if len(self._input_files()) >= MAX_OPEN:
            raise ApiError(429, "too_many_batches", "too many batches are open; try again later", retry_after_s=60)
        state = BatchState.new(request, owner=owner, rows_id=self._files.new_id(), failures_id=self._files.new_id())
        try:
            self._write(state)  # before it is in any list: what cannot be stored is not accepted
        except OSError as error:
            raise ApiError(507, "no_room", f"the batch cannot be stored: {error.strerror}") from error
        self._states[state.id] = state
        return state

    def get(self, batch_id: str, owner: str) -> BatchState:
        """Find a batch. Raises ApiError if it does not exist or has another owner."""
        with self._lock:
            state = self._states.get(batch_id)
        if state is None or state.owner != owner:
            raise not_found("batch", batch_id[:80])
        return state

    def owned_by(self, owner: str) -> list[BatchState]:
        """All batches of one owner, the oldest first."""
        with self._lock:
            states = [state for state in self._states.values() if state.owner == owner]
        return sorted(states, key=lambda state: (state.created_at, state.created_ns, state.id))

    def cancel(self, batch_id: str, owner: str) -> BatchState:
        """Start to cancel a batch; rows that are done are kept. Raises ApiError if the batch has ended."""
        with self._lock:
            state = self.get(batch_id, owner)
            if state.status not in CANCELLABLE_STATUSES:
                raise ApiError(
                    409, "batch_ended", f"the batch is {state.status}; only a running batch can be cancelled"
                )
            if state.status != "cancelling":
                try:
                    state = self._update(batch_id, status="cancelling", cancelling_at=int(time.time()))
                except OSError as error:  # for example a full disk; it is cancelled unless the server ends before
                    log.error("batch.unsaved", batch=batch_id, error=type(error).__name__)
                    state = self._states[batch_id]
            if batch_id in self._running:
                return state
            try:
                return self._finish(batch_id, "cancelled")  # it waits for a thread, which may take long
            except OSError:
                return state  # the thread will finish it

    def uses(self, file_id: str) -> bool:
        """Whether an open batch reads the file."""
        return file_id in self._input_files()

    def delete_file(self, file_id: str) -> None:
        """Delete a file. Raises ApiError if an open batch reads it."""
        with self._lock:  # `create` holds it from finding the file until the batch is open
            if self.uses(file_id):
                message = "a batch that is not complete reads the file; cancel it first"
                raise ApiError(409, "file_in_use", message, param="id")
            self._files.delete(file_id)

    def delete_expired(self) -> None:
        """Delete expired files, and batches that ended so long ago that their files have expired."""
        with self._lock:
            self._files.delete_expired(keep=self._input_files())
            ended = [state for state in self._states.values() if state.status not in OPEN_STATUSES]
            expired = [state.id for state in ended if state.created_at + WINDOW_S + RETENTION_S < time.time()]
            for batch_id in expired:
                del self._states[batch_id]
        for batch_id in expired:
            (self._directory / f"{batch_id}.json").unlink(missing_ok=True)

    def _input_files(self) -> set[str]:
        """Input files of open batches."""
        with self._lock:
            return {state.input_file_id for state in self._states.values() if state.status in OPEN_STATUSES}

    # --- running a batch, in its thread ------------------------------------------------------------------------------

    def _run(self, batch_id: str) -> None:
        with self._lock:
            if self._states[batch_id].status not in OPEN_STATUSES or batch_id in self._running:
                return
            self._running.add(batch_id)
        try:
            while not self._compute_unless_full(batch_id):
                if self._stopping.wait(DISK_RETRY_S):
                    return
        except _ServerStopping:
            return
        except InvalidBatch as error:
            self._fail(batch_id, [fault_object(fault) for fault in error.by_line()[:MAX_FAULTS]])
        except HeadraceError as error:
            log.error("batch.failed", batch=batch_id, error=error.code)
            reason = getattr(error.__cause__, "strerror", None) if isinstance(error, OutputRefused) else None
            message = f"the output cannot be written: {reason}" if reason else "the batch cannot be computed"
            self._fail(batch_id, [fault_object(Fault(0, "", message), error.code)])
        except Exception as error:
            log.error("batch.failed", batch=batch_id, error=type(error).__name__)
            self._fail(batch_id, [fault_object(Fault(0, "", "internal server error"), "internal_error")])
        finally:
            with self._lock:
                self._running.discard(batch_id)

    def _compute_unless_full(self, batch_id: str) -> bool:
        """Compute the batch. Returns False if the disk is full; the rows that are written, and the jobs, are kept."""
        try:
            self._compute(batch_id)
        except Exception as error:
            if not is_disk_full(error):
                raise
            message = "the server has no room for the output; the batch continues when there is room"
            errors = {"object": "list", "data": [fault_object(Fault(0, "", message), "no_room")]}
            with self._lock:
                known = self._states[batch_id].errors == errors
                self._states[batch_id] = self._states[batch_id].model_copy(update={"errors": errors})
            if not known:
                log.warning("batch.waits", batch=batch_id, reason="no room on the disk")
            return False
        return True

    def _compute(self, batch_id: str) -> None:
        state = self._states[batch_id]
        rows, failures = self._files.path(state.rows_id), self._files.path(state.failures_id)
        with owned_by(state.owner), Client(settings=self._settings) as client:
            try:
                batch = self._validate(client, state)
                batch.run(
                    rows,
                    errors=failures,
                    resume=True,
                    on_progress=lambda report: self._record_progress(batch_id, report),
                    notify=lambda message: log.warning("batch.waits", batch=batch_id, reason=message),
                )
            except DropBatch:
                self._finish(batch_id, "cancelled" if self._states[batch_id].status == "cancelling" else "expired")
                return
        with self._lock:
            cancelled = self._states[batch_id].status == "cancelling"  # requested while the last row was computed
            if not cancelled:
                self._update(batch_id, status="finalizing", finalizing_at=int(time.time()))
        self._finish(batch_id, "cancelled" if cancelled else "completed")

    def _validate(self, client: Client, state: BatchState) -> Batch:
        """Check all rows. Raises InvalidBatch.

        The models of rows are checked only the first time: when a server resumes, their workers may be restarting.
        """
        self._check_interrupted(state.id)
        models, adapters = None, state.adapters
        if state.in_progress_at is None:
            models, adapters = self._served_models(client, state.id)
        source, on_line = self._files.path(state.input_file_id), partial(self._check_interrupted, state.id)
        names: dict[str, Any] = {"models": models, "adapters": adapters, "endpoint": state.endpoint}
        batch = Batch(client, source, answer_mistakes=True, on_line=on_line, **names)
        if batch.checked.rows > MAX_ROWS:
            raise _too_many_rows()
        if state.in_progress_at is None:
            counts = RequestCounts(total=batch.checked.rows)
            with self._lock:
                self._check_interrupted(state.id)  # it may have been cancelled after its last row was checked
                started = {"in_progress_at": int(time.time()), "request_counts": counts, "adapters": adapters}
                self._update(state.id, status="in_progress", **started)
        return batch

    def _served_models(self, client: Client, batch_id: str) -> tuple[set[str], dict[str, list[str]]]:
        """The models that rows may name, and their adapters. Retries until Redis can be reached."""
        while True:
            try:
                return client.models(), {model: sorted(names) for model, names in client.adapters().items()}
            except HeadraceError:
                self._check_interrupted(batch_id)
                time.sleep(REDIS_RETRY_S)

    def _check_interrupted(self, batch_id: str, line: int = 0) -> None:
        """Raises an exception if the batch must not continue: stopped, cancelled, expired, or its file is too long."""
        if self._stopping.is_set():
            raise _ServerStopping
        if line > 2 * MAX_ROWS:  # blank lines are not rows, but they are limited too
            raise _too_many_rows()
        state = self._states[batch_id]
        if state.status == "cancelling" or time.time() > state.expires_at:
            raise DropBatch

    def _record_progress(self, batch_id: str, report: BatchReport) -> None:
        completed = report.before - report.failed_before + report.succeeded
        counts = RequestCounts(total=report.rows, completed=completed, failed=report.failed_before + report.failed)
        with self._lock:
            state = self._states[batch_id]
            errors = None if report.succeeded or report.failed else state.errors  # it waited for room, and has it now
            self._states[batch_id] = state.model_copy(update={"request_counts": counts, "errors": errors})
        self._check_interrupted(batch_id)

    # --- states ------------------------------------------------------------------------------------------------------

    def _finish(self, batch_id: str, status: Status, **more: Any) -> BatchState:
        """Publish the output files and store the final state. Idempotent: a crash in between repeats it."""
        state = self._states[batch_id]
        rows, failures = self._files.path(state.rows_id), self._files.path(state.failures_id)
        rows.with_name(f"{rows.name}.run").unlink(missing_ok=True)
        completed, usage = count_rows(rows)
        failed, _ = count_rows(failures)
        total = max(state.request_counts.total, completed + failed)
        return self._update(
            batch_id,
            status=status,
            **{f"{status}_at": int(time.time())},
            output_file_id=self._publish(state.rows_id, state, "output"),
            error_file_id=self._publish(state.failures_id, state, "error"),
            request_counts=RequestCounts(total=total, completed=completed, failed=failed),
            usage=usage,
            **{"errors": None, **more},
        )

    def _publish(self, file_id: str, state: BatchState, suffix: str) -> str | None:
        """Make an output file visible to its owner. Returns None, and deletes the file, if it is empty."""
        path = self._files.path(file_id)
        if not path.exists() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            return None
        self._files.publish(
            file_id,
            filename=f"{state.id}_{suffix}.jsonl",
            purpose="batch_output",
            owner=state.owner,
            retention_s=state.output_retention_s,
        )
        return file_id

    def _fail(self, batch_id: str, errors: list[dict[str, Any]]) -> None:
        try:
            self._finish(batch_id, "failed", errors={"object": "list", "data": errors})
        except (OSError, HeadraceError) as error:  # for example a full disk; the next start of the server tries again
            log.error("batch.unsaved", batch=batch_id, error=type(error).__name__)

    def _update(self, batch_id: str, **changes: Any) -> BatchState:
        with self._lock:
            self._states[batch_id] = state = self._states[batch_id].model_copy(update=changes)
            self._write(state)
        return state

    def _write(self, state: BatchState) -> None:
        write_json(self._directory / f"{state.id}.json", state)


def _too_many_rows() -> InvalidBatch:
    return InvalidBatch([Fault(0, "input", f"a batch has at most {MAX_ROWS} rows; split it into several batches")])
