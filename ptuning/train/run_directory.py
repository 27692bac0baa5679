"""The output directory of a run: one run at a time, and no run loses what an earlier one wrote.

`run.json` records the settings and training rows that decide the result. The same command finds
its own run and resumes it; another command is refused unless it asks to resume or to overwrite.
The lock is a POSIX record lock on `.run.lock`: it is released when its process ends, data-loading
workers do not inherit it, and NFS supports it (fcntl_locking(2)). On a file system without locks,
the directory is in use while the process named in the file is alive.
"""

import errno
import json
import logging
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import psutil

from ptuning.data.dataset import TokenDataset
from ptuning.storage import INFO_NAME, lock_file, write_atomically
from ptuning.train.checkpoints import (
    REMOVED,
    UNFINISHED,
    delete_checkpoint,
    fault_of,
    move_into_place,
    read_facts,
    why_not_resumable,
)
from ptuning.train.processes import check_shared_folder, in_main_process, is_main_process
from ptuning.tunings.artefact import MARKS

RECORD_NAME = "run.json"
# Settings that a checkpoint's optimizer state holds, whatever is typed.
STORED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
FORMAT_VERSION = 1
ARTEFACT_NAMES = (*(name for names in MARKS.values() for name in names), INFO_NAME)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LEFT_BEHIND = re.compile(rf"\.(checkpoint-\d+)({re.escape(UNFINISHED)}|{re.escape(REMOVED)})")
HALF_FILE = re.compile(r"\..+\.\d+\.tmp")  # what a killed write_atomically leaves

LOCK_NAME = ".run.lock"
HELD = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger("main")


class OutputDirectoryError(ValueError):
    """The output directory cannot be used as asked; nothing in it was changed."""


class RunDirectory:
    """An output directory. As a context manager it is locked for this run; reading needs no lock.

    A run that trains calls `choose` before it reads rows, `start` when it has them, and `begin`
    right before its first step, which is the first change of an earlier run's files. Every process
    calls the same methods; the main process decides and writes. `rows` is the fingerprint of the
    training rows, "" for a run that does not train.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows = ""
        self._settings: dict[str, Any] = {}
        self._requested: str | None = None
        self._checkpoint: Path | None = None
        self._overwrites = False
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Make and lock the directory; OutputDirectoryError if it is in use or not writable."""
        with ExitStack() as held:
            in_main_process(lambda: self._open(held))
            check_shared_folder(self.path, LOCK_NAME)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Unlock the directory, and remove it if this run made it and wrote nothing."""
        self._held.close()

    def _open(self, held: ExitStack) -> None:
        try:
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            held.callback(_remove_empty, missing)
            self.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(run_lock(self.path))
        except OSError as error:
            raise OutputDirectoryError(
                f"--output_dir is {self.path}, which cannot be written ({error.strerror}); give "
                "another folder."
            ) from error
        self._sweep()

    # ---- What a run starts from ----

    def choose(
        self, settings: Mapping[str, object], *, requested: str | None = None, overwrite: bool
    ) -> None:
        """Find the checkpoint to resume, before rows are read.

        settings are the flags that decide the result, as JSON values; requested is
        --resume_from_checkpoint, overwrite --overwrite_output_dir. OutputDirectoryError if the
        directory holds another run, FileNotFoundError if it lacks the requested checkpoint.
        """
        self._settings = json.loads(json.dumps(settings))
        self._requested, self._overwrites = requested, overwrite
        self._checkpoint = in_main_process(self._choose)
        if self._checkpoint is not None and requested is not None:
            self._keep_stored_settings(self._checkpoint)

    def _keep_stored_settings(self, checkpoint: Path) -> None:
        """Warn of flags that a checkpoint's optimizer state overrides, and record its values."""
        then = self.recorded() if checkpoint.parent.resolve() == self.path.resolve() else {}
        for name in STORED if then else ():
            old, new = then.get(name), self._settings.get(name)
            if old != new and is_main_process():
                logger.warning(
                    "--%s %s has no effect: the checkpoint continues with %s. To train with "
                    "another, start a new run from its weights: --init_from %s",
                    *(name, _shown(new), "its own" if old is None else _shown(old), checkpoint),
                )
            self._settings[name] = old

    def _choose(self) -> Path | None:
        wanted = str(self._requested or "").lower()
        if wanted not in ("", "auto", "true"):
            checkpoint = Path(str(self._requested))
            if reason := why_not_resumable(checkpoint):
                raise FileNotFoundError(
                    f"--resume_from_checkpoint is {checkpoint}, which cannot be resumed: {reason}. "
                    "Give another checkpoint-N folder, or 'auto' for the newest intact one in "
                    "--output_dir; --init_from starts a new training from the weights alone."
                )
            return checkpoint
        if wanted:
            if self._newest_resumable is not None:
                return self._newest_resumable
            if wanted == "true":
                raise FileNotFoundError(
                    f"--resume_from_checkpoint is {self._requested}, but {self.path} has no intact "
                    "checkpoint-N; leave the flag out to start over."
                )
        if self._overwrites or not (self.all_checkpoints() or self.holds_a_model()):
            return None
        if changed := self._changed_settings():
            raise self._refusal(changed)
        if self._newest_resumable is None and (self.holds_a_model() or self.checkpoints()):
            raise self._refusal("the same command wrote it, and it left nothing to resume from")
        return self._newest_resumable

    def start(self, rows: str, *, rows_per_step: int, processes: int) -> Path | None:
        """Return the checkpoint to resume and log it; None to start at step 0.

        rows is the fingerprint of the training rows. OutputDirectoryError if the checkpoint was
        trained on other rows; a warning if the resume cannot be exact.
        """
        self.rows, checkpoint = rows, self._checkpoint
        if checkpoint is not None:
            in_main_process(lambda: self._check_facts(checkpoint, rows_per_step, processes))
        elif self._requested:
            logger.info("%s has no intact checkpoint to resume from: starting over", self.path)
        return checkpoint

    def _check_facts(self, checkpoint: Path, rows_per_step: int, processes: int) -> None:
        facts = read_facts(checkpoint)
        if facts["rows"] != self.rows:
            trained, given = facts["rows"], self.rows
            if not self._requested:
                raise self._refusal(
                    f"it was trained on different rows ({_rows(trained)}; now {_rows(given)})",
                    rows_differ=True,
                )
            raise OutputDirectoryError(
                f"{checkpoint} was trained on different rows than --train_file now "
                f"gives; resume with the old file and lengths, or start a new "
                f"training from its weights: --init_from {checkpoint} with another --output_dir."
            )
        where = f"{checkpoint}{'' if self._requested else ', which the same command wrote'}"
        how = "" if self._requested else "; to start over, add --overwrite_output_dir"
        logger.info("Resuming %s (step %d of %d)%s", where, facts["step"], facts["max_steps"], how)
        then, now = (facts["rows_per_step"], facts["processes"]), (rows_per_step, processes)
        if then != now:
            text = "%s was written with %d rows per step by %d processes, and this run has "
            text += "%d and %d: it resumes, but not bit for bit"
            logger.warning(text, checkpoint, *then, *now)

    def begin(self) -> None:
        """Replace an earlier run if asked to, and record this one in run.json."""
        if not is_main_process():
            return
        if self._overwrites and self._checkpoint is None:
            old = self.all_checkpoints()
            for folder in old:
                delete_checkpoint(folder)
            if old:
                logger.info("Removed the earlier run's checkpoints in %s: %d", self.path, len(old))
        record = {"format_version": FORMAT_VERSION, "rows": self.rows, "settings": self._settings}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path / RECORD_NAME, text.encode())

    def holds_a_model(self) -> bool:
        """Return whether the result of a training is here, checkpoints aside."""
        return any((self.path / name).is_file() for name in ARTEFACT_NAMES)

    def recorded(self) -> dict[str, Any]:
        """Return the settings in run.json; empty if it cannot be read."""
        try:
            record = json.loads((self.path / RECORD_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        known = isinstance(record, dict) and record.get("format_version") == FORMAT_VERSION
        return dict(record["settings"]) if known else {}

    def _changed_settings(self) -> str:
        """Say which settings differ from those in run.json; "" for none."""
        then, now = self.recorded(), self._settings
        if not then:
            return f"its settings are not known, as it has no {RECORD_NAME} that can be read"
        return ", ".join(
            f"--{name} was {_shown(then.get(name))} and is {_shown(now.get(name))}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        )

    def _refusal(self, why: str, *, rows_differ: bool = False) -> OutputDirectoryError:
        """Return an error that says what is in the directory, why it stays, and what to type."""
        found, resume = "a trained model", ""
        if folders := self.checkpoints() or self.all_checkpoints():
            found = folders[-1].name
            with suppress(ValueError):
                facts = read_facts(folders[-1])
                found += f" (step {facts['step']} of {facts['max_steps']})"
                is_longer = "--max_steps" in why or "--num_train_epochs" in why
                unfinished = facts["step"] < facts["max_steps"] or is_longer
                if rows_differ or (facts["resumable"] and unfinished):
                    add = "give its own training file and lengths with" if rows_differ else "add"
                    resume = f"to continue it, {add} --resume_from_checkpoint auto; "
        return OutputDirectoryError(
            f"--output_dir {self.path} holds {found} of an earlier run: {why}. To keep it, give "
            f"another folder (--output_dir, or NAME=... before bash train.sh); {resume}to replace "
            "it, add --overwrite_output_dir."
        )

    # ---- Checkpoints ----

    def checkpoints(self) -> list[Path]:
        """Return the intact checkpoints, oldest step first."""
        return [folder for folder in self.all_checkpoints() if fault_of(folder) is None]

    def all_checkpoints(self) -> list[Path]:
        """Return every checkpoint-N, intact or not, oldest step first."""
        found = filter(Path.is_dir, self.path.glob("checkpoint-*"))
        folders = [path for path in found if CHECKPOINT.fullmatch(path.name)]
        return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))

    @cached_property
    def _newest_resumable(self) -> Path | None:
        for checkpoint in reversed(self.all_checkpoints()):
            reason = why_not_resumable(checkpoint)
            if reason is None:
                return checkpoint
            logger.warning("%s is skipped: %s", checkpoint, reason)
        return None

    def last_sound(self) -> Path | None:
        """Return the newest intact checkpoint that was not written at a skipped step."""
        sound = [folder for folder in self.checkpoints() if read_facts(folder)["sound"]]
        return sound[-1] if sound else None

    def rotate(self, limit: int | None, *, keep: Collection[Path] = ()) -> list[Path]:
        """Delete the oldest intact checkpoints above limit and return them; None or 0 keeps all.

        The newest, the newest sound one and those in `keep` always stay.
        """
        if not limit or limit < 0:
            return []
        intact = self.checkpoints()
        kept = [*keep, *intact[-1:], *filter(None, [self.last_sound()])]
        protected = {path.resolve() for path in kept}
        surplus = max(0, len(intact) - max(limit, len(protected)))
        old = [folder for folder in intact if folder.resolve() not in protected][:surplus]
        for folder in old:
            delete_checkpoint(folder)
        return old

    def _sweep(self) -> None:
        """Delete what a killed run left under temporary names, but for a complete checkpoint."""
        for path in sorted(self.path.iterdir()):
            if HALF_FILE.fullmatch(path.name) and path.is_file():
                path.unlink()
            elif match := LEFT_BEHIND.fullmatch(path.name):
                checkpoint = self.path / match[1]
                is_complete = match[2] == UNFINISHED and fault_of(path, thorough=True) is None
                if is_complete and not checkpoint.exists():
                    move_into_place(path, checkpoint)
                    logger.info("Recovered %s, complete but not yet renamed", checkpoint)
                else:
                    shutil.rmtree(path)
                    logger.info("Removed %s, which a stopped run left unfinished", path)


def fingerprint_rows(rows: TokenDataset | None) -> str:
    """Return a short checksum of the training rows in their order; "" without any."""
    if rows is None:
        return ""
    checksum = 0
    for part in (rows.arrays.offsets, rows.arrays.context_lengths, rows.arrays.ids):
        checksum = zlib.crc32(part.tobytes(), checksum)
    return f"{len(rows)}-{checksum:08x}"


def _rows(fingerprint: str) -> str:
    count, _, checksum = fingerprint.partition("-")
    return f"{count} rows, checksum {checksum}"


def _shown(value: object) -> str:
    """Write a setting as it is typed."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty
        for folder in folders:
            folder.rmdir()


# ---- The lock ----


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; OutputDirectoryError if another run holds it."""
    path = directory / LOCK_NAME
    descriptor = _open_locked(path)
    mark = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "process_start": _process_start(os.getpid()),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(mark).encode())
        yield
    finally:
        if os.name != "nt":  # Windows deletes no open file; there the unlocked file stays
            path.unlink(missing_ok=True)  # while the lock is still held
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Open and lock the lock file; the file of a killed run is used again."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with ExitStack() as failed:
            failed.callback(os.close, descriptor)
            if not _is_free(descriptor):
                mark = _read_mark(descriptor)
                who = "another run"
                if mark:
                    place = f"process {mark['pid']} on {mark['host']}"
                    who = f"a run started {mark['started']} ({place})"
                raise OutputDirectoryError(
                    f"--output_dir {path.parent} is being written by {who}; wait for it, stop it "
                    f"(kill -INT {mark.get('pid', 'PID')} saves first), or give another "
                    f"--output_dir. If that process is certainly gone, delete {path}."
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    failed.pop_all()
                    return descriptor
        # Its holder deleted the file between our two calls: try again.


def _is_free(descriptor: int) -> bool:
    """Lock without waiting; return whether this process now has the lock."""
    try:
        lock_file(descriptor)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return not _is_running(_read_mark(descriptor))
        if error.errno not in HELD:
            raise
        return False
    return True


def _read_mark(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        mark = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}  # a run that has just made the file, or was killed doing so
    return mark if isinstance(mark, dict) and {"pid", "host", "started"} <= set(mark) else {}


def _is_running(mark: dict[str, Any]) -> bool:
    """Return whether the process of a mark is alive; one on another host counts as alive."""
    if not mark or mark["pid"] == os.getpid():
        return False
    if mark["host"] != socket.gethostname():
        return True
    same_start = mark.get("process_start") in (None, _process_start(mark["pid"]))
    return same_start and psutil.pid_exists(mark["pid"])


def _process_start(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; None if /proc does not say.

    It tells a process from a later one with the same number, whatever happens to the clock.
    """
    with suppress(OSError):
        content = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return content.rpartition(")")[2].split()[19]  # field 22 of proc_pid_stat(5)
    return None
