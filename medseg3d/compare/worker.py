"""A process for one model: its memory is its own, and if it dies the others go on."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from medseg3d.compare.contenders import Conditions, Contender
from medseg3d.data.datasets import Case
from medseg3d.errors import in_words
from medseg3d.startup import quick_imports

if TYPE_CHECKING:
    from medseg3d.compare.measuring import Bench


class Failed(Exception):
    """What went wrong, in words for the user."""


class Worker:
    """A model in a process of its own, measured case after case; with ``own_process`` false, in this one.

    Use it in a ``with`` block: the process ends with it, at once if that is left by an error.
    """

    def __init__(self, contender: Contender, conditions: Conditions, own_process: bool = True) -> None:
        self._start = contender, conditions
        self._own_process = own_process
        self._bench: Bench | None = None
        self._process: Any = None
        self._line: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end(at_once=error is not None)

    def load(self) -> None:
        """Load the model.

        Raises:
            Failed: it cannot be.
        """
        if not self._own_process:
            self._bench = _in_words(_bench, *self._start)
            return
        context = multiprocessing.get_context("spawn")  # nothing of this process is in its memory
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, _messages(), *self._start), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self, case: Case, prediction: Path) -> dict[str, Any]:
        """See :meth:`medseg3d.compare.measuring.Bench.measure`; loads the model where that is not done.

        Raises:
            Failed: the case cannot be measured, or the process died of it.
        """
        if self._bench is None and self._process is None:
            self.load()
        if self._bench is not None:
            return _in_words(self._bench.measure, case, prediction)
        assert self._line is not None
        with suppress(ConnectionError):  # the process died meanwhile, which its answer tells
            self._line.send((case, prediction))
        return self._answer()

    def _answer(self) -> Any:
        assert self._line is not None
        try:
            answer, reason = self._line.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            code = self._process.exitcode
            self._end()
            why = " for want of memory, it may be" if code == -signal.SIGKILL else ""
            raise Failed(f"the model's process ended{why} (exit code {code})") from error
        if reason is not None:
            raise Failed(reason)
        return answer

    def _end(self, at_once: bool = False) -> None:
        if self._process is not None:
            if at_once:
                self._process.terminate()
            self._line.close()  # type: ignore[union-attr]  # which tells the process that nothing more comes
            self._process.join()
        self._process = self._line = self._bench = None


def _messages() -> tuple[int, list[Any]]:
    """What this process shows of logs and warnings, so that another can show the same."""
    return logging.getLogger().level, list(warnings.filters)


def _serve(line: Connection, messages: tuple[int, list[Any]], contender: Contender, conditions: Conditions) -> None:
    """What the process does: load, then measure what comes along the line until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends this one
    signal.signal(signal.SIGTERM, _leave)
    logging.basicConfig(level=messages[0], format="%(message)s")
    warnings.filters[:] = messages[1]  # type: ignore[index]
    try:
        with quick_imports(engines=contender.bundle.has_code):
            import medseg3d.compare.measuring  # noqa: F401
        bench = _in_words(_bench, contender, conditions)
    except Failed as failed:
        line.send((None, str(failed)))
        return
    with suppress(EOFError, ConnectionError):  # nothing more comes, or nobody is there
        line.send((None, None))
        while True:
            case, prediction = line.recv()
            answer: tuple[Any, str | None]
            try:
                answer = _in_words(bench.measure, case, prediction), None
            except Failed as failed:
                answer = None, str(failed)
            line.send(answer)


def _leave(number: int, _: Any) -> None:
    """End by an exception, on whose way half-written files are removed."""
    raise SystemExit(128 + number)


def _in_words(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # one bad case or model must not stop the others, whatever is wrong with it
        raise Failed(in_words(error)) from error


def _bench(contender: Contender, conditions: Conditions) -> Bench:
    from medseg3d.compare.measuring import Bench

    return Bench(contender, conditions)
