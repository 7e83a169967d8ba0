"""The composition root: every verb of `mirrorla`, with imports inside the verb so that help costs nothing."""

import sys
from collections.abc import Callable, Sequence

from lightning_modules.errors import UsageError, is_users_mistake, nearest, one_line

Verb = Callable[[str, Sequence[str]], int]


def _train(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules import stop_signals

    stop_signals.install()  # before torch is imported: a signal during the start is remembered, too
    from lightning_modules.training_cli import run

    return run(verb, argv)


def _shards(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.shards_cli import run

    return run(verb, argv)


def _models(verb: str, argv: Sequence[str]) -> int:
    from mirrorla.complexity import variant_table

    if argv:
        raise UsageError(f"{argv[0]!r} is not understood; `mirrorla models` takes no options")
    sys.stdout.write(variant_table().rstrip() + "\n")
    return 0


VERBS: dict[str, Verb] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "predict": _train,
    "shards": _shards,
    "models": _models,
}

HELP = """usage: mirrorla VERB [options]

  fit        train:            mirrorla fit --config digits/classification
             continue a run:   mirrorla fit --config digits/classification --ckpt_path last
  validate   evaluate on the validation split
  test       evaluate on the test split (on the validation split where there is none)
  predict    write predictions.csv into the run directory
  shards     pack, index, verify or describe data: mirrorla shards --help
  models     list the variants: parameters, GMACs, attention

Options of a verb: mirrorla VERB --help. --config takes a path or a packaged name, may be repeated, and later ones
override earlier ones; every key is also an option: --trainer.max_steps 2 --data.batch_size 64 --model.optim.lr 1e-3.
Exit codes: 0 done, 1 failed while running, 2 refused before running, 130 / 143 / 138 stopped by SIGINT / SIGTERM /
SIGUSR1 with a checkpoint committed (continue with --ckpt_path last).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: words after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0 done, 1 failed while running, 2 refused, 128 + n stopped by signal n.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"mirrorla {version('mirrorla')}\n")
        return 0
    return _run_verb(words[0], words[1:])


def _run_verb(verb: str, argv: Sequence[str]) -> int:
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(VERBS)}"
        return _refuse("mirrorla", f"there is no verb {verb!r}; {hint}", 2)
    try:
        return VERBS[verb](verb, argv)
    except KeyboardInterrupt:
        return _refuse(f"mirrorla {verb}", "interrupted", 130)
    except Exception as error:
        if not is_users_mistake(error):
            raise
        return _refuse(f"mirrorla {verb}", one_line(error), getattr(error, "exit_code", 2))


def _refuse(command: str, message: str, code: int) -> int:
    sys.stderr.write(f"{command}: error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
