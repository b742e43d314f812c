"""The log file of one attempt: what ran where with which settings, then everything that was logged, warned or printed."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from capture.config import Entry
from capture.errors import cannot_write
from capture.layout import RunDir
from capture.machine import gpu_lines
from capture.printable import without_logins
from capture.process import folder

PROMPTS_SHOWN = 3
OURS = ("capture", "cluster")


def header(entry: Entry, note: str = "") -> str:
    """The first lines of a log: versions, machine, GPUs with who holds their memory, settings."""
    versions = [f"python {platform.python_version()}"]
    for package in ("pairscope", "torch", "transformers", "safetensors", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    settings = entry.as_json()
    for key in ("prompts", "prompt_sources"):
        settings[key] = [*settings[key][:PROMPTS_SHOWN], f"... {len(settings[key])} in all"]
    lines = [
        f"entry {entry.name}: {entry.base_model} -> {entry.sft_model}",
        *([note] if note else []),
        ", ".join(versions),
        f"host {socket.gethostname()}, pid {os.getpid()}, {os.cpu_count()} cores, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
        f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}",
        *(gpu_lines() or ["no NVIDIA GPU seen"]),
        "settings " + json.dumps(settings, indent=1, ensure_ascii=False),
    ]
    return "\n".join(lines) + "\n\n"


class _OursAndWarnings(logging.Filter):
    """Lets through what our own packages say and what anyone warns of."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in OURS


@contextlib.contextmanager
def attempt_log(run: RunDir, path: str, first_lines: str, *, own_process: bool) -> Iterator[None]:
    """Collect this process's log records and warnings in the log file at `path` for the length of the block.

    own_process: also send file descriptors 1 and 2 and crash dumps there; for a worker process, never for a terminal.
    On a remote file system the file is written locally and uploaded at the end of the block. Raises StoreError where the
    log cannot be begun; that it cannot be gone on with must not hide how the attempt ended.
    """
    local = Path(path)
    try:
        if run.is_local:
            local.parent.mkdir(parents=True, exist_ok=True)
        else:
            local = folder() / "log"
        stream = local.open("a", encoding="utf-8", errors="replace", buffering=1)
    except OSError as error:
        raise cannot_write(f"'{local}'", error) from error
    try:
        try:
            stream.write(first_lines)
        except OSError as error:
            raise cannot_write(f"'{local}'", error) from error
        if own_process:
            _redirect(stream.fileno())
        with _records_go_to(stream):
            yield
    finally:
        with contextlib.suppress(OSError):
            stream.close()
        if not run.is_local:
            with contextlib.suppress(Exception):
                run.write_bytes(path, local.read_bytes())
            shutil.rmtree(local.parent, ignore_errors=True)


class _Formatter(logging.Formatter):
    """Tracebacks quote what libraries say, with the addresses that they asked."""

    def format(self, record: logging.LogRecord) -> str:
        return without_logins(super().format(record))


def _plain(record: logging.LogRecord) -> logging.LogRecord:
    """A record without logins, also for libraries that have handlers of their own."""
    with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: a handler's to tell
        record.msg, record.args = without_logins(record.getMessage()), None
    return record


class _Handler(logging.StreamHandler[TextIO]):
    """Writes records as long as there is room for them; a full disk is told by what cannot do without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextlib.contextmanager
def _records_go_to(stream: TextIO) -> Iterator[None]:
    """Add a handler for the length of the block: our records from INFO up, everyone's from WARNING up, Python's warnings."""
    handler = _Handler(stream)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_OursAndWarnings())
    # transformers stops its records from reaching the root logger, so it gets the handler as well
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    made = logging.getLogRecordFactory()
    logging.setLogRecordFactory(lambda *args, **more: _plain(made(*args, **more)))
    ours = {logger: logger.level for logger in map(logging.getLogger, OURS)}
    for logger in ours:
        logger.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.setLogRecordFactory(made)
        for logger in loggers:
            logger.removeHandler(handler)
        for logger, level in ours.items():
            logger.setLevel(level)


def _redirect(fd: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    faulthandler.enable(file=2)


def append_log(run: RunDir, path: str, text: str) -> None:
    """Add lines to a log from outside its worker: a driver's word on a worker that died. Never raises."""
    with contextlib.suppress(Exception):
        if run.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(text)
        else:
            before = run.read_bytes(path) if run.exists(path) else b""
            run.write_bytes(path, before + text.encode())
