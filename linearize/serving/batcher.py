"""Continuous batching: one thread steps all running sequences together, each with its row of the state.

A state has a fixed size, so a slot is a row: sequences join after their prompt was read and leave when they end, and
nothing is paged, padded or evicted. Prompts are read in pieces between steps, so that a long one holds nobody up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from linearize.errors import DataError, LinearizeError
from linearize.program import Program
from linearize.runtime.model import LinearizedModel
from linearize.runtime.state import State
from linearize.serving.job import Job

PIECE = 256


class Full(LinearizeError):
    """All slots and all places in the queue are taken."""


class Batcher:
    """Runs jobs on `model`: `slots` at once, `queue` waiting. `close` ends the thread and fails what is left."""

    def __init__(self, model: LinearizedModel, slots: int = 16, queue: int = 64) -> None:
        model.engine.check_stateful()
        self.model, self.slots, self.queue = model, slots, queue
        self.together = rows_are_independent(model.program)
        self.waiting: deque[Job] = deque()
        self.reading: Job | None = None
        self.running: list[Job] = []
        self.state: State | None = None
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="linearize-batcher", daemon=True)
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none.

        Raises:
            Full: there is no place for them now.
            DataError: a prompt is empty, or does not fit the model's positions with what may follow.
        """
        limit = self.model.program.max_positions
        for job in jobs:
            if not job.prompt:
                raise DataError("the prompt has no tokens")
            if limit is not None and len(job.prompt) + job.max_tokens > limit:
                wanted = f"{len(job.prompt)} tokens and {job.max_tokens} more"
                raise DataError(f"{wanted} pass the model's {limit} positions")
        with self.changed:
            if self.closed or self.busy + len(jobs) > self.slots + self.queue:
                raise Full(f"{len(self.running)} sequences run and {len(self.waiting)} wait; try again shortly")
            self.waiting.extend(jobs)
            self.changed.notify()

    @property
    def busy(self) -> int:
        return len(self.running) + len(self.waiting) + (self.reading is not None)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                with torch.no_grad():
                    self._read_a_piece()
                    self._step()
            except Exception as error:  # one request must not end the service: all that were in the step hear of it
                self._fail(error)
        self._fail(Full("the server is shutting down"))

    def _wait(self) -> bool:
        """Until there is work; whether to go on."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.busy)
            return not self.closed

    def _fail(self, error: Exception) -> None:
        with self.changed:
            jobs = [*self.running, *([self.reading] if self.reading else [])]
            jobs += self.waiting if self.closed else []
            self.running, self.reading, self.state = [], None, None
            if self.closed:
                self.waiting.clear()
        for job in jobs:
            job.finish(error)

    def _read_a_piece(self) -> None:
        """A piece of the oldest waiting prompt, if there is a slot for it; after its last piece it runs."""
        with self.changed:
            while self.reading is None and self.waiting and len(self.running) < self.slots:
                job = self.waiting.popleft()
                if job.cancelled:
                    job.finish()
                else:
                    self.reading = job
        job_ = self.reading
        if job_ is None:
            return
        piece = torch.tensor([job_.prompt[job_.read : job_.read + PIECE]])
        job_.read += PIECE
        logits, job_.state = self.model.step(piece, job_.state, logits_to_keep=1)
        if job_.read < len(job_.prompt) and not job_.cancelled:
            return
        self.reading = None
        token = job_.pick(logits[:, -1])
        if not job_.cancelled:
            job_.hear(token)
        if job_.done:
            job_.finish()
            return
        job_.prompt = [token]  # what is fed next; the prompt itself is in the state
        self._join(job_)

    def _join(self, job: Job) -> None:
        assert job.state is not None
        if self.together:
            self.state = job.state if self.state is None else joined(self.state, job.state)
            job.state = None
        self.running.append(job)

    def _step(self) -> None:
        """One token for every running sequence, after those that were cancelled have left."""
        self._leave([job for job in self.running if job.done])
        if not self.running:
            return
        if not self.together:
            for job in self.running:
                assert job.state is not None
                logits, job.state = self.model.decode(torch.tensor(job.prompt, device=self.model.device), job.state)
                job.prompt = [job.pick(logits)]
        else:
            assert self.state is not None
            last = torch.tensor([job.prompt[0] for job in self.running], device=self.model.device)
            logits, self.state = self.model.decode(last, self.state)
            likely = logits.argmax(-1).tolist()
            for row, job in enumerate(self.running):
                job.prompt = [job.pick(logits[row : row + 1]) if job.sampling.do_sample else likely[row]]
        for job in self.running:
            if not job.cancelled:
                job.hear(job.prompt[0])
        self._leave([job for job in self.running if job.done])

    def _leave(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        rows = [row for row, job in enumerate(self.running) if job not in jobs]
        if self.state is not None:
            self.state = self.state.take(torch.tensor(rows)) if rows else None
        self.running = [self.running[row] for row in rows]
        for job in jobs:
            job.finish()


def joined(state: State, more: State) -> State:
    """The rows of both. What is not a row's own (the count of tokens) is of the first: nothing reads it, see below."""
    tensors = [
        torch.cat([state[spec.name], more[spec.name]]) if spec.batched else state[spec.name] for spec in state.specs
    ]
    return State(state.specs, tensors, 0)


def rows_are_independent(program: Program) -> bool:
    """Whether rows that have read different numbers of tokens may be stepped in one batch: no cache that grows with
    them, and no position that is counted for the whole batch."""
    states = [node for node in program.placeholders() if "state" in node.meta]
    if any(node.meta["state"].grows is not None for node in states):
        return False
    shared = [node for node in states if not node.meta["state"].batched]
    output = next(node for node in program.graph.nodes if node.op == "output")
    return all(set(user.users) <= {output} for node in shared for user in node.users)
