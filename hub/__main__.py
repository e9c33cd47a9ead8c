"""python -m hub inspect DIR | check FILE --images DIR | export CKPT OUT"""
import sys

from common.flags import UserError, parse, run
from hub.export import Bases, export
from hub.inspect import inspect


def main() -> None:
    match sys.argv[1:]:
        case ["inspect", folder]:
            print(inspect(folder))
        case ["export", ckpt, out, *flags] if not out.startswith("-"):
            print(export(ckpt, out, **vars(parse(Bases, flags))))
        case ["-h" | "--help"]:
            print(__doc__)
        case _:
            raise UserError("say python weights.py inspect DIR, or python weights.py export CKPT OUT")


if __name__ == "__main__":
    run(main)
