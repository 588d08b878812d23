"""The command line: one verb, one function, one call into the library. Only here is anything printed or exited.

Imports of torch and MONAI wait until a verb needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from medseg3d.cli.adapting import adapt
from medseg3d.cli.arguments import argument_parser
from medseg3d.cli.comparing import compare
from medseg3d.cli.costs import flops
from medseg3d.cli.data import check
from medseg3d.cli.predicting import predict
from medseg3d.cli.terminal import ERROR, INTERRUPTED, OVER_MEMORY, USAGE, UsageError, say
from medseg3d.cli.verbs import doctor, evaluate, models, train
from medseg3d.errors import in_words, is_out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as some schedulers and Windows without a console do
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- for as long as it runs
    args, unknown = _parser().parse_known_args(_with_dashes(sys.argv[1:] if argv is None else argv))
    if unknown:  # parse_args would show the usage of medseg3d, not the verb's
        args.verb.error(f"unrecognized arguments: {' '.join(unknown)}; see {args.verb.prog} --help")
    args.own_process = argv is None
    _set_up_messages(args.verbose)
    with contextlib.suppress(ValueError):  # not in the main thread, where signals do not come
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed run cleans up as an interrupted one does
    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted; nothing half-written was left")
        return INTERRUPTED
    except UsageError as error:
        say(f"error: {error}")
        return USAGE
    except BrokenPipeError:  # such as `| head`; Python would flush and complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if args.verbose:
            traceback.print_exc()
        say(f"error: {in_words(error)}")
        return OVER_MEMORY if is_out_of_memory(error) else ERROR


def _parser() -> argparse.ArgumentParser:
    functions = (predict, evaluate, compare, adapt, train, models, check, flops, doctor)
    return argument_parser({function.__name__: function for function in functions})


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """Options may be spelled with underscores: --allow_non_hu is --allow-non-hu."""
    return [
        "=".join([arg.split("=", 1)[0].replace("_", "-"), *arg.split("=", 1)[1:]]) if arg.startswith("--") else arg
        for arg in argv
    ]


def _set_up_messages(verbose: bool) -> None:
    """Other libraries speak only of errors; of medseg3d itself all is told on request."""
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(message)s")
    logging.getLogger("medseg3d").setLevel(logging.DEBUG if verbose else logging.ERROR)
    if not verbose:
        warnings.filterwarnings("ignore")
