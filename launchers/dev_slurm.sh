#!/usr/bin/env bash
# A real Slurm of one node on this machine, to try a sweep on, and for the tests (Debian 12 and the like).
#
#   eval "$(launchers/dev_slurm.sh up)"     start it, and point sbatch, squeue, … of this shell at it
#   launchers/dev_slurm.sh down             cancel its jobs and stop it
#
# As root it installs slurm-wlm and munge with apt-get where they are missing; where they are there, any user may start
# one. All of it lies in DEV_SLURM_DIR, and its ports on 127.0.0.1; a configuration in /etc is not touched. There is no
# accounting database, so no sacct: prefpipe does not need it.
#
# The node claims 8 CPUs and 32 GB for each real core, so that hydra/launcher=slurm_cpu fits as it is, and as many of
# its jobs run at once as there are cores. Nothing is enforced. DEV_SLURM_CPUS=N claims another number.
set -euo pipefail

dir=${DEV_SLURM_DIR:-${TMPDIR:-/tmp}/prefpipe-dev-slurm-$(id -u)}
port=${DEV_SLURM_PORT:-16817} # of the controller; the node's is the next one
conf=$dir/slurm.conf
host=$(hostname -s)
PATH=$PATH:/usr/sbin:/sbin

say() { echo "dev_slurm: $*" >&2; }
die() { say "$*"; exit 1; }

install() {
  local missing=() package guard=/usr/sbin/policy-rc.d
  for package in slurm-wlm munge; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
  if [ ${#missing[@]} = 0 ]; then return; fi
  [ "$(id -u)" = 0 ] || die "${missing[*]} missing, and only root can install them: apt-get install ${missing[*]}"
  say "installing ${missing[*]}"
  # The packages would start services of their own, with a configuration that is not there.
  if [ ! -e $guard ]; then
    printf '#!/bin/sh\nexit 101\n' >$guard
    chmod +x $guard
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

configure() {
  local cores memory
  cores=$(nproc)
  memory=$((32768 * cores))
  mkdir -p "$dir"/{ctld,slurmd,log,pid,munge}
  chmod 755 "$dir"
  chmod 700 "$dir/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
  # cred_expire: a job that is queued again waits as long for its old credential, 2 minutes by default.
  cat >"$conf" <<END
ClusterName=dev
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=cred_expire=20,socket=$dir/munge/socket
CredType=cred/munge
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/slurmd
SlurmctldPidFile=$dir/pid/slurmctld.pid
SlurmdPidFile=$dir/pid/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,default_queue_depth=1000
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
InactiveLimit=0
KillWait=5
MinJobAge=600
MaxArraySize=${DEV_SLURM_MAX_ARRAY_SIZE:-1001}
AccountingStorageType=accounting_storage/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=${DEV_SLURM_CPUS:-$((8 * cores))} RealMemory=$memory State=UNKNOWN
PartitionName=dev Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$dir/cgroup.conf"
}

wait_for() { # what, command …: for half a minute
  local what=$1 try
  shift
  for try in $(seq 120); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.25
  done
  tail -n 20 "$dir"/log/* >&2
  down
  die "$what"
}

node_is_idle() { [ "$(sinfo --noheader --format=%t)" = idle ]; }

start() { # name, command …: a daemon that outlives this shell; its pid is kept, to stop it and nothing else
  local name=$1
  shift
  setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/pid/$name.started"
}

up() {
  down
  install
  rm -rf "$dir"
  configure
  export SLURM_CONF=$conf
  start munged munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  wait_for "munge does not answer" munge --no-input --socket="$dir/munge/socket"
  start slurmctld slurmctld -D
  wait_for "the controller does not answer" bash -c 'scontrol ping | grep -q "is UP"'
  start slurmd slurmd -D -N "$host"
  wait_for "the node does not come up" node_is_idle
  say "up: $(sinfo --noheader --format='%D node, %c CPUs, %m MB'), logs in $dir/log"
  echo "export SLURM_CONF=$conf"
}

down() {
  local name pid
  if [ ! -d "$dir/pid" ]; then return; fi
  if [ -s "$dir/pid/slurmd.started" ]; then
    # Jobs end before the daemon that watches over them.
    SLURM_CONF=$conf timeout 10 scancel --user="$(id -un)" >/dev/null 2>&1 || true
    for _ in $(seq 40); do
      [ -n "$(SLURM_CONF=$conf timeout 10 squeue --noheader 2>/dev/null)" ] || break
      sleep 0.25
    done
  fi
  for name in slurmd slurmctld munged; do
    pid=$(cat "$dir/pid/$name.started" 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$name" ]; then
      kill "$pid"
      for _ in $(seq 60); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.25
      done
      kill -KILL "$pid" 2>/dev/null || true
    fi
    rm -f "$dir/pid/$name.started"
  done
  say "down"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  *) die "usage: eval \"\$($0 up)\", or $0 down" ;;
esac
