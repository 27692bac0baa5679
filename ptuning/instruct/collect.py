"""Collect new tasks in waves of requests, from prompts to rows; a killed run continues exactly.

A wave's prompts show seeds and rows of earlier waves. Each completion is saved as it arrives, and
the rows follow from settings and completions alone: a run that is started again computes them anew
and asks only for what is missing.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from ptuning.completions.journal import Journal, to_line
from ptuning.completions.source import Ask, Completion, Source
from ptuning.data.conversion import ContractRow
from ptuning.data.raw_file import number_of
from ptuning.data.similarity import Pool
from ptuning.engine.request import Sampling
from ptuning.instruct.blocks import Block, Task, read_blocks
from ptuning.instruct.filters import blocked_pattern, fault_of
from ptuning.instruct.templates import TEMPLATES, Template
from ptuning.output import Progress
from ptuning.storage import write_atomically, write_json

MAX_WAVE = 8  # requests, or as many as are in work at once
LONGEST_COMPLETION = 3072  # tokens, as published
TOKENS_PER_TASK = 150
MAX_TASKS = 20  # per request, as published
NUM_SIMILAR = 10  # texts named in a row
MAX_IDLE = 24  # requests in a row that add no row, before the run ends


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the rows; each field is the flag of the same name. None: by the context."""

    template: str
    examples: int = 3
    machine_examples: int = 1
    tasks_per_request: int | None = None
    topics: Sequence[str] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    concurrency: int = 5
    rouge_threshold: float = 0.7
    blocklist: Sequence[str]
    seed: int = 42


@dataclass
class Tally:
    """What became of the requests; ended: why there are fewer rows than asked for.

    retries are those of this process alone; the other counts include what it continues.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    made: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    ended: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        tokens = self.prompt_tokens + self.completion_tokens
        return (
            f"{number_of(self.requests, 'request')} ({self.retries} retried in this run), "
            f"{tokens:,} tokens: {number_of(self.made, 'task')} made, {self.kept:,} kept, dropped: "
            f"{dropped or 'none'}"
        )


class Collector:
    """One run: settings, seeds, a source of completions, and the files next to `out`.

    A subclass may ask for other things: see `_wave`, `_context`, `_has_enough` and `_fault`.
    """

    templates: Mapping[str, Template] = TEMPLATES
    max_idle: float = MAX_IDLE

    def __init__(
        self, settings: Settings, seeds: Sequence[Task], source: Source, out: Path
    ) -> None:
        """Read what an earlier run of the same command has saved; ValueError for another one's."""
        self.settings, self.seeds, self.source, self.out = settings, list(seeds), source, out
        self.template = self.templates[settings.template]
        context = source.context_length or 2 * LONGEST_COMPLETION
        length = settings.max_new_tokens or min(LONGEST_COMPLETION, context // 2)
        by_length = max(1, min(MAX_TASKS, length // TOKENS_PER_TASK))
        self.tally = Tally()
        self.rows: list[ContractRow] = []
        self.report_path = out.with_suffix(".report.json")
        self._num_saved: int | None = None  # rows in `out`; None: it may be of an earlier run
        self._blocked = blocked_pattern(settings.blocklist)
        self._pool = Pool([task.instruction for task in self.seeds])
        unset = [name for name, value in asdict(settings).items() if value is None]
        self._saved: dict[tuple[int, int], Completion] = {}  # by request and stage
        self._num_tokens = 0  # of them
        self._journal = Journal(
            journal_of(out),
            asdict(settings)
            | {
                "concurrency": max(MAX_WAVE, settings.concurrency),  # as many share a wave
                "max_new_tokens": length,
                "tasks_per_request": settings.tasks_per_request or by_length,
                "model": source.name,
                "api": source.kind,
                "template_hash": self.template.digest,
                "seeds": hashlib.sha256(repr(self.seeds).encode()).hexdigest()[:12],
            },
            self._keep,
            adopted=unset,  # what an endpoint says of its context may change
            at_least=["concurrency"],
        )
        self._identity = self._journal.identity
        self.max_new_tokens: int = self._identity["max_new_tokens"]
        self.num_tasks: int = self._identity["tasks_per_request"] if self.template.labels else 1

    def collect(self, num_rows: int, *, max_requests: int | None = None) -> Tally:
        """Collect until there are num_rows rows, max_requests are used, or no more come.

        `out` gets one row of the row contract per line; the counts go to `report_path`.
        """
        tally = self.tally
        try:
            self._collect(num_rows, max_requests)
        finally:
            tally.retries = self.source.num_retries
            report = asdict(tally) | {"dropped": dict(tally.dropped.most_common())}
            write_json(self.report_path, report | {"settings": self._identity})
        return tally

    @property
    def num_saved(self) -> int:
        """Requests whose completions are saved."""
        return len({request for request, _ in self._saved})

    def _keep(
        self,
        request: int,
        stage: int,
        text: str | None,
        finish_reason: str,
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        """Take a completion as it is in the journal."""
        self._num_tokens += prompt_tokens + completion_tokens
        completion = Completion(text, finish_reason, prompt_tokens, completion_tokens)
        self._saved[request, stage] = completion

    def _collect(self, num_rows: int, max_requests: int | None) -> None:
        tally = self.tally
        last_kept = 0  # requests when the newest row was kept
        with Progress(num_rows, f"generating with {self.source.name}") as progress:
            while tally.kept < num_rows and not tally.ended:
                left = (max_requests or 10**9) - tally.requests
                wave = self._wave(num_rows, min(self._identity["concurrency"], left))
                prompts = {request: self._prompt(request) for request in wave}
                for request, completions in self._complete(prompts, progress):
                    before = tally.kept
                    self._take(request, completions, num_rows)
                    progress.update(tally.kept - before)
                    last_kept = tally.requests if tally.kept > before else last_kept
                self._save_rows()
                if tally.requests == max_requests and tally.kept < num_rows:
                    tally.ended = f"--max_requests {max_requests} is used up"
                elif not wave or tally.requests - last_kept >= self.max_idle:
                    tally.ended = (
                        f"the last {tally.requests - last_kept} requests added none (see what was "
                        "dropped); give other seeds, a higher --rouge_threshold, or another model"
                    )

    def _wave(self, num_rows: int, size: int) -> list[int]:
        """Return the numbers of the next requests, at most size; none ends the run."""
        needed = -(-(num_rows - self.tally.kept) // self.num_tasks)
        return [self.tally.requests + number for number in range(min(size, needed))]

    def _context(self, request: int) -> tuple[Sequence[Task], Sequence[str]]:
        """Return the new tasks that a request may show, and the topics of which it names one."""
        made = [Task(*(row["meta"][name] for name in Task._fields)) for row in self.rows]
        return made, self.settings.topics

    def _has_enough(self, request: int, num_rows: int) -> bool:
        """Return whether no more of a request's tasks are needed."""
        return self.tally.kept == num_rows

    def _fault(self, request: int, task: Task) -> str | None:
        """Return the first rule that a complete task breaks; None if it breaks none."""
        return fault_of(task, self.template, self._blocked)

    def _complete(
        self, prompts: Mapping[int, str], progress: Progress
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Return the completions of each request of a wave, in order: two of a magpie one."""
        saved = self._saved
        self._ask(prompts, 0, progress)
        if not self.template.labels:
            questions = {request: _question(saved[request, 0]) for request in prompts}
            self._ask({n: text for n, text in questions.items() if text}, 1, progress)
        for request in prompts:
            yield request, [saved[request, n] for n in (0, 1) if (request, n) in saved]

    def _ask(self, prompts: Mapping[int, str], stage: int, progress: Progress) -> None:
        """Ask for what is missing of a wave, and save each completion as it arrives.

        A source that repeats itself is asked for the whole wave: its batches, and so its
        completions to the last bit, are those of a run that was not interrupted.
        """
        none = Completion(None)  # a malformed reply of an earlier run is asked for again
        missing = [n for n in prompts if self._saved.get((n, stage), none).text is None]
        asks = [
            Ask(request, prompt, Random(f"{self.settings.seed}:{request}:{stage}").getrandbits(31))
            for request, prompt in prompts.items()
            if request in missing or (missing and self.source.repeats)
        ]
        if asks:
            self._save_rows()
        for request, completion in self.source.complete(
            asks, Sampling(self.settings.temperature, self.settings.top_p), self.max_new_tokens
        ):
            if request in missing:
                self._journal.add(request, stage, *completion[:4])
            progress.bar.set_postfix_str(f"{self._num_tokens:,} tokens")

    def _prompt(self, request: int) -> str:
        """Return a request's prompt; one that does not fit shows fewer tasks."""
        settings, keys = self.settings, Random(f"{self.settings.seed}:{request}")
        shown = [self.seeds[index] for index in _draw(len(self.seeds), settings.examples, keys)]
        made, topics = self._context(request)
        shown += [made[index] for index in _draw(len(made), settings.machine_examples, keys)]
        topics = [topics[index] for index in _draw(len(topics), 1, keys)]
        shown = [shown[index] for index in _draw(len(shown), len(shown), keys)]
        while True:
            prompt = self.template.prompt(shown, self.num_tasks, *topics)
            length, context = self.source.num_tokens(prompt), self.source.context_length
            if length is None or context is None or length + self.max_new_tokens <= context:
                return prompt
            if not shown:
                raise ValueError(
                    f"the prompt has {length} tokens and --max_new_tokens is "
                    f"{self.max_new_tokens}, but {self.source.name} has {context} for both; ask "
                    "for fewer."
                )
            del shown[len(shown) // 2 if length > 2 * context else -1 :]

    def _take(self, request: int, completions: Sequence[Completion], num_rows: int) -> None:
        """Count a request's tasks and keep those that are fit, until there are num_rows."""
        tally = self.tally
        tally.requests += 1
        tally.prompt_tokens += sum(one.prompt_tokens for one in completions)
        tally.completion_tokens += sum(one.completion_tokens for one in completions)
        for number, (task, fault) in enumerate(self._read(completions), 1):
            if self._has_enough(request, num_rows):
                return
            tally.made += 1
            fault = fault or self._fault(request, task)
            scores = np.zeros(0) if fault else self._pool.scores(task.instruction)
            if fault is None and scores.max(initial=0.0) > self.settings.rouge_threshold:
                fault = "duplicate"
            if fault is None:
                tally.kept += 1
                self.rows.append(self._to_row(request, number, task, scores))
                self._pool.add(task.instruction)
            else:
                tally.dropped[fault] += 1

    def _read(self, completions: Sequence[Completion]) -> list[Block]:
        if any(completion.text is None for completion in completions):
            return [Block(Task("", "", ""), "malformed_reply")]
        first, *answers = completions
        is_cut = completions[-1].finish_reason == "length"
        if self.template.labels:
            return read_blocks(str(first.text), is_cut=is_cut, fields=self.template.fields)[0]
        task = Task(_question(first), "", "".join(str(one.text) for one in answers).strip())
        missing = "cut_off" if is_cut else "missing_field" if not answers else "empty_output"
        return [Block(task, missing if is_cut or not task.output else None)]

    def _to_row(self, request: int, number: int, task: Task, scores: np.ndarray) -> ContractRow:
        """Return a row of the contract; meta says what it was made by and what it is similar to."""
        nearest = np.argsort(-scores, kind="stable")[:NUM_SIMILAR]
        meta = {
            **task._asdict(),
            "most_similar": {self._pool.texts[n]: round(float(scores[n]), 4) for n in nearest},
            "avg_similarity": round(float(scores.mean()), 6) if len(scores) else 0.0,
            "request": request,
            "model": self.source.name,
            "template": f"{self.template.name}:{self.template.digest}",
        }
        return ContractRow(
            id=f"{self.out.stem}:{request}.{number}",
            prompt=f"{task.instruction}\n{task.input}" if task.input else task.instruction,
            response=task.output,
            history=[],
            source=f"generate:{self.template.name}",
            meta=meta,
        )

    def _save_rows(self) -> None:
        """Append the new rows; the first time, write the file anew from the saved completions."""
        if self._num_saved is None:
            write_atomically(self.out, b"".join(map(to_line, self.rows)))
        else:
            with self.out.open("ab") as file:
                for row in self.rows[self._num_saved :]:
                    file.write(to_line(row))
                    file.flush()
        self._num_saved = len(self.rows)


def journal_of(out: Path) -> Path:
    """Return the file of completions that belongs to a file of rows."""
    return out.with_suffix(".requests.jsonl")


def _draw(size: int, wanted: int, keys: Random) -> list[int]:
    """Draw wanted of size things without repeats, or all of them, in a random order."""
    order = [keys.random() for _ in range(size)]  # random() alone: Python promises to keep it
    return sorted(range(size), key=order.__getitem__)[:wanted]


def _question(completion: Completion) -> str:
    """Return the question at the beginning of a magpie completion; "" without a whole one."""
    question, is_whole, _ = (completion.text or "").partition("\n答：")
    return question.strip() if is_whole or completion.finish_reason != "length" else ""
