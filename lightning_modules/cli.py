"""The composition root: every verb of `mirrorla`, with imports inside the verb so that help costs nothing."""

import sys
from collections.abc import Callable, Sequence

from lightning_modules import exit_codes
from lightning_modules.errors import is_users_mistake, nearest, one_line

Verb = Callable[[str, Sequence[str]], int]


def _train(verb: str, argv: Sequence[str]) -> int:
    if verb == "predict" and argv and argv[0].endswith((".onnx", ".pt2", ".safetensors")):
        from lightning_modules.export_predict import run as predict_exported

        return predict_exported(argv)
    from lightning_modules import stop_signals

    stop_signals.install()  # before torch is imported: a signal during the start is remembered, too
    from lightning_modules.training_cli import run

    return run(verb, argv)


def _shards(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.shards_cli import run

    return run(verb, argv)


def _health(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.health_cli import run

    return run(verb, argv)


def _checkpoints(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.checkpoints_cli import run

    return run(verb, argv)


def _cluster(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.cluster_cli import run

    return run(verb, argv)


def _export(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.export_cli import run

    return run(verb, argv)


def _explain(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.explain_cli import run

    return run(verb, argv)


def _bench(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.bench_cli import run

    return run(verb, argv)


def _ablate(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.ablate_cli import run

    return run(verb, argv)


def _models(verb: str, argv: Sequence[str]) -> int:
    from lightning_modules.models_cli import run

    return run(verb, argv)


VERBS: dict[str, Verb] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "predict": _train,
    "shards": _shards,
    "ablate": _ablate,
    "bench": _bench,
    "models": _models,
    "plan": _cluster,
    "submit": _cluster,
    "rehearse": _cluster,
    "logs": _cluster,
    "cancel": _cluster,
    "status": _health,
    "doctor": _health,
    "checkpoints": _checkpoints,
    "export": _export,
    "explain": _explain,
}

HELP = f"""usage: mirrorla VERB [options]

  fit        train:            mirrorla fit --config digits/classification
             continue a run:   mirrorla fit --config digits/classification --ckpt_path last
  validate   evaluate on the validation split
  test       evaluate on the test split (on the validation split where there is none)
  predict    write predictions into the run directory: a table, annotated pictures and COCO json, or class maps
  shards     pack, index, verify or describe data: mirrorla shards --help
  ablate     train with every combination of settings and seeds, and compare: mirrorla ablate --help
  bench      measure attention, backbone, checkpoint or loader beside their rivals: mirrorla bench --help
  models     list the variants and hosts, or all their kinds of attention: parameters, GMACs: mirrorla models --help
  status     what a run is doing: mirrorla status RUN (or a folder of runs)
  doctor     what is wrong with a run, and the mend: mirrorla doctor RUN
  checkpoints  list, verify, prune or convert a run's checkpoints: mirrorla checkpoints RUN --verify
  export     write a trained network for other programs: mirrorla export RUN --format onnx|torch-export|safetensors
  explain    draw where a trained network looks in an image and what its mirrors do: mirrorla explain RUN IMAGE
  plan       say what a job on a SLURM cluster would be: mirrorla plan --help
  submit     hand it to sbatch: mirrorla submit --slurm slurm/debug --config digits/classification
  rehearse   the whole life of such a job, on a private SLURM cluster on this machine
  logs       what a run's job wrote, or one rank: mirrorla logs RUN --rank 3
  cancel     end a run's job: mirrorla cancel RUN

Options of a verb: mirrorla VERB --help. --config takes a path or a packaged name, may be repeated, and later ones
override earlier ones; every key is also an option: --trainer.max_steps 2 --data.batch_size 64 --model.optim.lr 1e-3.

Exit codes; after "again" the same command with --ckpt_path last goes on:
{exit_codes.table()}
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
