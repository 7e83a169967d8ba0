"""The parts of the batch script that decide whether a job goes on after its training ended. Pure text.

They are shell and not Python because they run outside containers, where no Python is certain to be.
"""

from collections.abc import Sequence

from cluster.config import SlurmConfig

MAX_STRIKES = 2

_BEGIN = """
# Give up after {limit} restarts in a row without a new checkpoint; how the job came to restart does not matter.
newest() {{ ls -1 -- "$run/checkpoints" 2> /dev/null | grep -E '^step_[0-9]{{8,}}(-[0-9]+)?$' | sort | tail -n 1; }}
restarts=${{SLURM_RESTART_COUNT:-${{MIRRORLA_RESTARTS:-0}}}}
before=$(newest)
fruitless=0
if [ "$restarts" -gt 0 ] && [ -f "$job/started_from" ] && [ "$(cat "$job/started_from")" = "$before" ]; then
  fruitless=$(($(cat "$job/fruitless" 2> /dev/null || echo 0) + 1))
fi
printf '%s\\n' "$fruitless" > "$job/fruitless"
printf '%s\\n' "$before" > "$job/started_from"
if [ "$fruitless" -ge {limit} ]; then
  say "gives up: $fruitless restarts got no further than ${{before:-step 0}}; see mirrorla doctor $run"
  exit {code}
fi
rm -f -- "$job/first_failure"
say "start $((restarts + 1)) from ${{before:-step 0}}"
"""

_CAUSE = """
# srun reports how it ended the last process; the cause is how the first one ended, which launch noted.
if [ "$code" -eq 0 ]; then
  say "done"
  exit 0
fi
if [ -s "$job/first_failure" ] && read -r first rank host < "$job/first_failure" && [[ $first =~ ^[1-9][0-9]*$ ]]; then
  code=$first
  say "rank $rank on $host ended first, with code $code"
fi
"""

_REQUEUE = """
# Go on, or end with the training's own code. A node that failed its check {strikes} times is left out from then on.
case $code in
  {codes}) ;;
  *) say "ends with code $code: not one to go on after"; exit "$code" ;;
esac
bad=$(cut -d ' ' -f 1 -- "$job/strikes" 2> /dev/null | sort | uniq -c \\
  | while read -r count host; do [ "$count" -ge {strikes} ] && printf '%s,' "$host"; done)
if [ -n "$bad" ] && [ "$bad" != "${{MIRRORLA_EXCLUDED:-}}" ]; then
  say "goes on without ${{bad%,}} in a new job"
  env -u SLURM_RESTART_COUNT MIRRORLA_RESTARTS=$((restarts + 1)) MIRRORLA_EXCLUDED="$bad" \\
    sbatch --exclude={exclude}"${{bad%,}}"{array} "$script" && exit "$code"
elif scontrol requeue "$SLURM_JOB_ID"; then
  say "queued again after code $code"
  exit "$code"
fi
say "could not be queued again; to go on: sbatch $script"
exit "$code"
"""

_STOP = """
say "ends with code $code"
exit "$code"
"""


def begin(limit: int, code: int) -> str:
    """Before the training: count restarts without progress.

    Args:
        limit: so many end the job.
        code: its exit code then.
    """
    return _BEGIN.format(limit=limit, code=code)


def end(config: SlurmConfig, codes: Sequence[int]) -> str:
    """After the training: find the cause, then queue the job again or end it.

    Args:
        config: whether to go on at all; nodes already left out.
        codes: exit codes to go on after.
    """
    if not config.requeue or not codes:
        return _CAUSE + _STOP
    exclude = f"{config.exclude}," if config.exclude else ""
    array = ' --array="$SLURM_ARRAY_TASK_ID"' if config.array else ""
    patterns = "|".join(str(code) for code in sorted(codes))
    return _CAUSE + _REQUEUE.format(codes=patterns, strikes=MAX_STRIKES, exclude=exclude, array=array)
