"""Dataclass fields → command-line flags, and errors that are for people."""
import argparse
import dataclasses
import difflib
import os
import sys
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints


class UserError(Exception):
    """Something the user can mend: its text is one line that says what is wrong, where, and what to do."""


def option(default, help: str):
    """A dataclass field with a help text: `batch: int = option(8, "samples a step")`."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse(cls, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from the command line; its docstring is the help's head.

    `Literal[...]` becomes choices, `bool` a --flag, `bool | None` --flag and --no-flag, `list[X]` one value or more;
    `X | None` may stay unset; a field of one letter is a -n too.
    Raises UserError for an unknown flag, a choice or a number that is none."""
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags = []
    for f, kind in zip(dataclasses.fields(cls), get_type_hints(cls).values()):
        flags.append("--" + f.name.replace("_", "-"))
        options = {"default": f.default, "help": f.metadata.get("help", " ")}
        kind, optional = (get_args(kind)[0], True) if get_origin(kind) in (Union, UnionType) else (kind, False)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction if optional else "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            options.update(type=get_args(kind)[0], nargs="+")
        else:
            options["type"] = kind
        parser.add_argument(flags[-1], *["-" + f.name] * (len(f.name) == 1), **options)

    def fail(message: str):
        for wrong in argv if argv is not None else sys.argv[1:]:
            near = difflib.get_close_matches(wrong.split("=")[0], flags, 1)
            if wrong.startswith("--") and near and near[0] != wrong.split("=")[0]:
                message += f" (did you mean {near[0]}?)"
        raise UserError(message + "; --help lists the flags")
    parser.error = fail
    return cls(**vars(parser.parse_args(argv)))


def run(main) -> None:
    """Calls main(); a UserError ends the program with its one line and exit code 2, without a traceback."""
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    try:
        main()
    except UserError as e:
        sys.stdout.flush()
        print(f"{rank}error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
