# shellcheck shell=bash
# What batch scripts of SLURM do about signals, and at the end of their one step. They source this with their arguments.
#
#   run_step OPTION ... COMMAND ...      srun; sets `code`, the step's exit code
#   end_job MODULE ARGUMENT ...          ends the script: with `code`, or with 75 where the job was requeued
# `asked` is set once a signal was heard, also before this was read.
# shellcheck disable=SC2154

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  sed -n '1d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$0"
  exit $(($# < 1 ? 2 : 0))
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  printf 'error: this is no SLURM job\n  start it with sbatch\n' >&2
  exit 2
fi

signals=0 running='' helpers=() passing='' code=0 options=()
pass_on() {
  asked=1
  signals=$((signals + 1))
  if [[ -n $running && -z $passing ]]; then
    # srun drops a signal that comes before its tasks run; these take the first one, and leave the others
    while kill -USR1 "$running"; do sleep 10; done &>/dev/null &
    passing=1 helpers+=("$!")
  fi
}
# Once its time is over SLURM kills this script with all that is left, `KillWait` (30 s by default) after TERM.
leave_in_time() {
  sleep 15 &>/dev/null
  if [[ $(squeue --noheader --jobs="$job" --format=%r) == TimeLimit ]]; then
    printf 'its time is over: what goes on still is not waited for\n' >&2
    kill -KILL "$running"
  fi
}
terminate() {
  pass_on
  if [[ -n $running ]]; then
    leave_in_time &
    helpers+=("$!")
  fi
}
trap pass_on USR1
trap terminate TERM

while read -r option; do
  [[ -z $option ]] || options+=("$option")
done <<<"${LATHE_SRUN_OPTIONS:-}"
retries=${LATHE_RETRIES:-3}
if [[ ! $retries =~ ^[0-9]+$ ]]; then
  printf 'error: LATHE_RETRIES=%s is not a number of starts\n  set LATHE_RETRIES=3, or leave it out\n' "$retries" >&2
  exit 2
fi
export PYTHON=${PYTHON:-python}
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then # of sbatch; srun by itself takes one CPU for a task since 22.05
  export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
# sbatch passes on what an array's task has in its environment; then this is none of that array
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  known=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || known=''
  if [[ $known == *JobId=* && $known != *ArrayTaskId=* ]]; then
    unset "${!SLURM_ARRAY_@}"
  fi
fi
# of one task of an array alone: the last task's SLURM_JOB_ID stands for the whole array too
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# srun hears of a task's end on another node by one message, and waits for ever where a link was away just then. The
# controller knows: it lists the steps that go on, the script's own among them.
watch_step() {
  local known seen=''
  while sleep 60 &>/dev/null; do
    known=$(scontrol --oneliner show step "$job" 2>/dev/null) || continue
    if [[ $known =~ StepId=[0-9_]+\.[0-9] ]]; then
      seen=1
    elif [[ -n $seen && $known == *StepId=* ]]; then
      break
    fi
  done
  sleep 30 &>/dev/null # with what it may still hear
  printf 'all tasks of srun have ended, and it has not heard of it: it is killed\n' >&2
  kill -KILL "$running"
}

run_step() {
  if [[ -n $asked ]]; then # before there was anything to stop
    code=138
    return
  fi
  # A node whose ranks hang is killed 20 minutes after the first one has ended: longer than nodes wait for each other.
  srun --kill-on-bad-exit=0 --wait=1200 "${options[@]}" "$@" &
  running=$!
  if ((${SLURM_JOB_NUM_NODES:-1} > 1)); then
    watch_step &
    helpers+=("$!")
  fi
  [[ -z $asked ]] || pass_on
  local heard='' now
  while [[ $heard != "$signals" ]]; do # a trap ends `wait`, not the step
    heard=$signals
    now=0
    wait "$running" || now=$?
    ((now == 127 && heard > 0)) || code=$now # 127: it had been waited for
  done
  running=''
  ((${#helpers[@]} == 0)) || kill "${helpers[@]}" 2>/dev/null || true
}

# Jobs go on while their controller is away, as where it is updated; it is waited for some 15 to 45 minutes.
state_of_job() {
  local left=30
  until squeue --noheader --jobs="$job" --format='%T %r'; do
    left=$((left - 1))
    ((left > 0)) || return 1
    sleep 30
  done
}

end_job() {
  local record=$PWD/lathe-$job.attempts.json
  if ((code == 0)); then
    rm -f "$record"
    exit 0
  fi
  local decide=("$PYTHON" -m "$1" --code "$code" --job "$job" --retries "$retries" --record "$record" "${@:2}")
  if ((${#options[@]})); then # such as a container
    decide=(srun --nodes=1 --ntasks=1 --overlap "${options[@]}" "${decide[@]}")
  fi
  trap '' USR1 TERM # there is nothing left to stop, and SLURM sends TERM to all that a start has left
  local verdict=0 state
  "${decide[@]}" || verdict=$?
  # 75: at once; 76 to 80: the later, the more failures in a row have not brought it on
  ((verdict >= 75 && verdict <= 80)) || exit "$code"
  # Cancelled by its user it is COMPLETING, and stays cancelled. So it is when its time has run out meanwhile.
  if ! state=$(state_of_job); then
    printf 'error: SLURM has not told the state of job %s, which is not requeued\n  start it again by hand\n' "$job" >&2
    exit "$code"
  fi
  if [[ $state != 'RUNNING '* && $state != *' TimeLimit' ]]; then
    printf 'not requeued: SLURM is ending this job itself (%s)\n' "$state" >&2
    exit "$code"
  fi
  if ! scontrol requeue "$job"; then
    printf 'error: SLURM did not requeue job %s\n  submit it with --requeue, or start it again by hand\n' "$job" >&2
    exit "$code"
  fi
  if ((verdict > 75)); then
    local minutes=$((5 << (verdict - 76)))
    if scontrol update JobId="$job" StartTime="now+${minutes}minutes"; then
      printf 'not before %s minutes from now\n' "$minutes" >&2
    fi
  fi
  exit 75
}
