"""Dataclass fields → command-line flags, and errors that are for people."""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import signal
import sys
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, what to do."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option(default, help: str, group: str | None = None, least: float = 0, most: float | None = None):
    """A dataclass field with a help text: `batch: int = option(8, "samples a step", "run")`.

    group: the heading in --help of this flag and those after it. least, most: the numbers allowed.
    If the default is None, the text says what unset means."""
    metadata = {"help": help, "group": group, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


def add_flag(parser, field: dataclasses.Field, kind) -> None:
    """Add one field as a flag. `Literal[...]` becomes choices, `bool` --flag, `bool | None` also
    --no-flag, `list[X]` one value or more. `X | None` may stay unset. A field n is a -n too."""
    names = [flag(field.name)]
    if len(field.name) == 1:
        names.append("-" + field.name)
    optional = get_origin(kind) in (Union, UnionType)
    if optional:
        kind = get_args(kind)[0]
    text = field.metadata.get("help", "")
    if field.default not in (None, False):
        text += f" (default: {field.default})"
    settings = {"default": field.default, "help": text.replace("%", "%%")}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction if optional else "store_true"
    elif get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif get_origin(kind) is list:
        settings.update(type=get_args(kind)[0], nargs="+")
    else:
        settings["type"] = kind
    if kind in (int, float):
        settings["metavar"] = "N" if kind is int else "X"
    parser.add_argument(*names, **settings)


def parse(cls, argv: list[str] | None = None, program: str | None = None):
    """Return an instance of the dataclass `cls`, whose docstring is the head of --help, from the
    command line. Raises UserError for an unknown flag, an invalid choice or an invalid number."""
    parser = argparse.ArgumentParser(
        program, usage="%(prog)s [flags]", description=inspect.getdoc(cls), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    group, flags = parser, []
    for field, kind in zip(dataclasses.fields(cls), get_type_hints(cls).values()):
        if field.metadata.get("group"):
            group = parser.add_argument_group(field.metadata["group"])
        add_flag(group, field, kind)
        flags.append(flag(field.name))

    words = sys.argv[1:] if argv is None else argv
    for word in words:
        if word.encode(errors="replace").decode() != word:      # other bytes come as half characters
            raise UserError(f"{word!r} is not UTF-8 text, which every flag must be")

    def fail(message: str):
        for word in words:
            given = word.split("=")[0]
            near = difflib.get_close_matches(given, flags, 1)
            if given.startswith("--") and near and near[0] != given:
                message += f" (did you mean {near[0]}?)"
        raise UserError(message + "; --help lists the flags")
    parser.error = fail
    config = cls(**vars(parser.parse_args(argv)))
    check_values(config)
    return config


def check_values(config) -> None:
    """Raise UserError for a number below or above what its option allows, and for an empty text."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == "" or isinstance(value, list) and "" in value:
            raise UserError(f"{flag(field.name)} is empty: give it a value (is a shell variable unset?)")
        if type(value) in (int, float):
            largest = 2**31 - 1 if type(value) is int else sys.float_info.max
            least, most = field.metadata.get("least", 0), field.metadata.get("most")
            allowed = f"from {least} to {most or largest}"
            if most is None and value < least:
                allowed = f"{least} or more"
            if not least <= value <= (most or largest):
                raise UserError(f"{flag(field.name)} must be {allowed}, not {value}")


def explain(e: BaseException) -> str | None:
    """Return one line on an error of the user, the machine or its files; None for a bug."""
    text = " ".join(str(e).split())
    if isinstance(e, UserError):
        return text[:2000]
    if isinstance(e, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        advice = "lower --micro-batch or --batch-size, or shorten the input"
        return f"not enough memory ({text[:100]}): {advice}"
    if isinstance(e, UnicodeError):
        return f"a file is not UTF-8 text ({text[:200]}): download it again"
    if isinstance(e, RecursionError):
        return "a file is nested too deeply to be read"
    if isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        advice = "look at this path, its permissions and the room on its disk"
        return f"{where}{e.strerror or text[:200]}: {advice}"
    if type(e).__name__ == "PanicException":                    # of the tokenizers library
        return f"the tokenizer cannot read a text ({text[:200]}): download its files again"
    if isinstance(e, SafetensorError):
        return f"a safetensors file cannot be used ({text[:200]}): download it again"
    return None


def open_streams() -> None:
    """Let a command print everywhere: ? for × on a terminal that has none, nothing where a shell
    closed the stream (>&-)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):                  # a pipe that is closed already
                stream.reconfigure(errors="replace")


def run(main) -> None:
    """Call main() and end the command. What a user can mend ends it with one line and exit code 2,
    without a traceback; a closed pipe (`| head`) silently, with the code of its signal."""
    rank = ""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        rank = f"[rank {os.environ['RANK']}] "
    open_streams()
    code, line = 0, None
    try:
        main()
        sys.stdout.flush()
    except SystemExit as e:                                     # of --help
        code = e.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except BaseException as e:
        code, line = 2, explain(e)
        if line is None:
            raise
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)            # Python writes once more at its end
    if line:
        print(f"{rank}error: {line}", file=sys.stderr, flush=True)
    if code:
        sys.exit(code)
