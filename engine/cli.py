"""The `ramferry` command: a thin layer over the library and the control process."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import click

from engine.errors import MigrationError, UsageError, text_of

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_TERMINATED: Final = 128 + signal.SIGTERM
PR_SET_PDEATHSIG: Final = 1
LINE_CHARACTERS_MAX: Final = 1200  #: the longest line of our own names all parameters
GUEST_HELP: Final = (
    "ram:size=2G | workload:size=2G,... | qemu:qmp=PATH[,vhost-user=PID...] | "
    "process:pid=PID,path=PATH | handoff:PATH"
)
LONG_WORD: Final = re.compile(r"(\S{130})\S+")  #: our own messages repeat 100 characters of a word


def _version() -> str:
    try:
        return version("ramferry")
    except PackageNotFoundError:
        return "not installed"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="ramferry")
def cli() -> None:
    """Live migration of RAM, outside the VMM."""


@cli.command()
@click.option("--guest", required=True, metavar="SPEC", help=GUEST_HELP)
@click.option("--qmp", multiple=True, metavar="ADDRESS", help="unix:PATH or tcp:HOST:PORT")
@click.option("--hmp", multiple=True, metavar="ADDRESS", help="the same, for people (HMP)")
@click.option(
    "--incoming",
    metavar="URI",
    help="tcp:HOST:PORT | unix:PATH | file:PATH | exec:COMMAND | fd:NUMBER | defer",
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="a parameter")
@click.option("--state-dir", metavar="DIR", default="", help="a journal for the next start")
@click.option("--uuid", type=click.UUID, help="the machine's, for validate-uuid")
@click.option("--only-migratable", is_flag=True, help="refuse whatever would block a migration")
@click.option("--end-with", type=int, metavar="PID", help="end when this parent process ends")
def serve(
    guest: str,
    qmp: tuple[str, ...],
    hmp: tuple[str, ...],
    incoming: str | None,
    settings: tuple[str, ...],
    uuid: object,
    state_dir: str,
    end_with: int | None,
    only_migratable: bool,
) -> int:
    """Run one control process with one guest, as source or (with --incoming) destination."""
    from engine.control.serve import ServeOptions, run

    if end_with is not None:
        _end_with_parent(end_with)
    if not (qmp or hmp) and incoming in (None, "defer"):
        raise UsageError(
            "nobody could tell this process what to do; give it --qmp unix:PATH or --hmp unix:PATH"
        )
    options = ServeOptions(guest, qmp, incoming, settings, hmp, str(uuid or ""), state_dir)
    return run(dataclasses.replace(options, only_migratable=only_migratable))


def _end_with_parent(pid: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, however it ends.

    :raise UsageError: `pid` is not the parent, or not any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel cannot tell the end of the parent")
    if os.getppid() != pid:
        raise UsageError(f"--end-with {pid}: the parent process is {os.getppid()}")


@cli.command()
@click.option("--size", default="1G", show_default=True, help="RAM of the guest")
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 255))
@click.option(
    "--codec",
    default="none",
    show_default=True,
    type=click.Choice(["none", "lz4", "zstd", "zlib", "auto"]),
    help="compression of the channels; auto: what moves the most RAM per second",
)
@click.option("--postcopy", is_flag=True, help="after one round move the guest, its pages after it")
@click.option("--max-bandwidth", default="0", show_default=True, help="bytes/s, like 200M; 0: all")
@click.option(
    "--downtime-limit",
    default=300,
    show_default=True,
    type=click.IntRange(0, 2_000_000),
    help="milliseconds",
)
@click.option("--rate", default="200M", show_default=True, help="bytes/s the guest writes; 0: all")
@click.option(
    "--pattern",
    default="hotspot",
    show_default=True,
    type=click.Choice(["sweep", "random", "hotspot", "append"]),
)
@click.option(
    "--tracker",
    default="auto",
    show_default=True,
    help="how dirty pages are found",
    type=click.Choice(["auto", "uffd-wp", "guest-bitmap", "soft-dirty", "content-hash"]),
)
@click.option("--auto-converge", is_flag=True, help="throttle the guest if it writes too fast")
@click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout instead")
def demo(as_json: bool, **options: Any) -> int:  # fmt: skip
    """Migrate a guest that keeps writing, between two processes here, and check every page."""
    from engine.demo import DemoOptions, run_demo

    code: int = asyncio.run(run_demo(DemoOptions(**options), as_json=as_json))
    return code


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> int:
    """Measure, beside a real QEMU where there is one (needs the `perf` extra)."""
    try:
        suite: click.Command = importlib.import_module("perf.cli").bench
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"'ramferry bench' needs {exc.name}; install it with: pip install 'ramferry[perf]'"
        ) from exc
    return int(suite.main(list(arguments), "ramferry bench", standalone_mode=False) or 0)


@cli.command()
@click.argument("where", metavar="PATH")
@click.option("-c", "commands", multiple=True, metavar="LINE", help="run this and print its output")
def monitor(where: str, commands: tuple[str, ...]) -> int:
    """Talk to the human monitor (--hmp) at PATH, unix:PATH or tcp:HOST:PORT.

    With -c the exit code is 1 if the monitor refuses the line; Ctrl-C while a migration is waited
    for leaves it alone, Ctrl-D ends."""
    from engine.monitor import run_commands, run_interactive

    return run_commands(where, commands) if commands else run_interactive(where)


def _say(text: object) -> None:
    """One line on stderr."""
    click.echo(f"ramferry: {_cut(' '.join(str(text).split()))}", err=True)


def _cut(line: str) -> str:
    """A line that has an end; texts of others (click, the system) may repeat input without end."""
    line = LONG_WORD.sub(r"\1...", line)
    return line if len(line) <= LINE_CHARACTERS_MAX else line[:LINE_CHARACTERS_MAX] + "..."


def _run(command: Callable[[], Any]) -> int:
    """What the world does to a command ends in one line and an exit code, never a traceback."""
    try:
        return int(command() or 0)
    except click.ClickException as exc:
        text = io.StringIO()
        exc.show(text)
        click.echo("\n".join(_cut(line) for line in text.getvalue().splitlines()), err=True)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except asyncio.CancelledError:  # how a command that was told to end leaves its event loop
        _say("terminated")
        return EXIT_TERMINATED
    except UsageError as exc:
        _say(exc)
        return EXIT_USAGE
    except MigrationError as exc:
        _say(text_of(exc))
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED
    except OSError as exc:
        _say(str(exc) or text_of(exc))  # a deadline of asyncio's has no text
        return EXIT_FAILED


def main() -> None:
    """Entry point of the `ramferry` command."""
    sys.exit(_run(lambda: cli.main(standalone_mode=False)))


if __name__ == "__main__":
    main()
