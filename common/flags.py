"""Dataclass fields → command-line flags, and errors that are for people."""
import argparse
import dataclasses
import difflib
import os
import sys
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, and what to do."""


def option(default, help: str, group: str | None = None):
    """A dataclass field with a help text: `batch: int = option(8, "samples a step", "run")`.

    group: the heading in --help under which this flag and those after it stand. Where None is the default, the text
    says what unset means."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


def add_flag(parser, field: dataclasses.Field, kind) -> None:
    """Add one field as a flag. `Literal[...]` becomes choices, `bool` a --flag, `bool | None` --flag and --no-flag,
    `list[X]` one value or more. `X | None` may stay unset. A field of one letter is a -n too."""
    names = ["--" + field.name.replace("_", "-")]
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
    """Return an instance of the dataclass `cls` from the command line. Its docstring is the head of --help.

    Raises UserError for an unknown flag, an invalid choice or an invalid number."""
    parser = argparse.ArgumentParser(program, usage="%(prog)s [flags]", description=cls.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group, flags = parser, []
    for field, kind in zip(dataclasses.fields(cls), get_type_hints(cls).values()):
        if field.metadata.get("group"):
            group = parser.add_argument_group(field.metadata["group"])
        add_flag(group, field, kind)
        flags.append("--" + field.name.replace("_", "-"))

    def fail(message: str):
        for given in sys.argv[1:] if argv is None else argv:
            near = difflib.get_close_matches(given.split("=")[0], flags, 1)
            if given.startswith("--") and near and near[0] != given.split("=")[0]:
                message += f" (did you mean {near[0]}?)"
        raise UserError(message + "; --help lists the flags")
    parser.error = fail
    return cls(**vars(parser.parse_args(argv)))


def run(main) -> None:
    """Call main(). A UserError ends the program with its one line and exit code 2, without a traceback."""
    rank = ""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        rank = f"[rank {os.environ['RANK']}] "
    try:
        main()
    except UserError as e:
        sys.stdout.flush()
        print(f"{rank}error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
