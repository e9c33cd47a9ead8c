"""python -m hub inspect DIR                 what a folder of weights holds, and what is wrong with it
python -m hub check FILE --images DIR     which samples of a file cannot be used, before a run finds out
python -m hub export CKPT OUT             a checkpoint in llava-hf's layout, for transformers
(--help after a command lists its flags)"""
import sys
from itertools import takewhile

from common.flags import UserError, parse, run
from hub.check import CheckFlags, print_check
from hub.export import ExportFlags, export
from hub.inspect import InspectFlags, inspect

COMMANDS = {"inspect": ("DIR", InspectFlags), "check": ("FILE", CheckFlags),
            "export": ("CKPT OUT", ExportFlags)}


def main() -> None:
    words = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    flags = sys.argv[1 + len(words):]
    if not words and flags and flags[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not words or words[0] not in COMMANDS:
        raise UserError("say python -m hub inspect DIR, check FILE --images DIR, or export CKPT "
                        "OUT; see --help")
    operands, config = COMMANDS[words[0]]
    usage = f"python -m hub {words[0]} {operands}"
    cfg = parse(config, flags, usage)                           # --help ends here
    match words:
        case ["inspect", folder]:
            print(inspect(folder, cfg.vision))
        case ["check", file]:
            print_check(file, cfg)
        case ["export", ckpt, out]:
            print(export(ckpt, out, cfg.vision, cfg.llm))
        case _:
            raise UserError(f"say {usage}; --help explains it")


if __name__ == "__main__":
    run(main)
