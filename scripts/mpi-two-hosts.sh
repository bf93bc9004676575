#!/usr/bin/env bash
# Runs one training on two hosts, which are network namespaces of this machine joined by a cable. Then it cuts the cable in
# the middle of a step. Wants root, iproute2 and OpenMPI.
#
#   cargo build --release --features cli,mpi && scripts/mpi-two-hosts.sh
#
# RATE=1gbit in the environment slows the cable down. A delay would want the kernel's netem.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$PWD/target/release/candle-sam-lora
work=$(mktemp -d)
# The names of the hosts belong to this run.
host() { echo "csl$$-$1"; }

clean_up() {
  pkill -f "finetune --output $work" || true
  for number in 1 2; do ip netns delete "$(host $number)" 2>/dev/null || true; done
  rm -rf "$work"
}
trap clean_up EXIT

for number in 1 2; do ip netns add "$(host $number)"; done
ip link add cable1 netns "$(host 1)" type veth peer name cable2 netns "$(host 2)"
for number in 1 2; do
  ip -n "$(host $number)" addr add "10.9.0.$number/24" dev "cable$number"
  ip -n "$(host $number)" link set "cable$number" up
  ip -n "$(host $number)" link set lo up
  if [ -n "${RATE:-}" ]; then
    tc -n "$(host $number)" qdisc add dev "cable$number" root tbf rate "$RATE" burst 256kb latency 100ms
  fi
done

# Takes the place of ssh: `agent 10.9.0.2 command`.
cat > "$work/agent" <<AGENT
#!/bin/sh
number=\${1##*.}
shift
exec ip netns exec "csl$$-\$number" sh -c "\$*"
AGENT
chmod +x "$work/agent"

finetune=(--batch 1 --prompts 2 --overlays 1 --lora-dropout 0.1)
on_two_hosts() {
  ip netns exec "$(host 1)" env RAYON_NUM_THREADS=1 mpirun --allow-run-as-root --bind-to none \
    --mca plm_rsh_agent "$work/agent" --mca btl tcp,self \
    --mca btl_tcp_if_include 10.9.0.0/24 --mca oob_tcp_if_include 10.9.0.0/24 \
    --host 10.9.0.1:1,10.9.0.2:1 -n 2 "$program" "$@"
}

"$program" finetune --output "$work/alone" --steps 4 --accumulate 2 "${finetune[@]}" --quiet
on_two_hosts finetune --output "$work/two" --steps 4 "${finetune[@]}" --quiet
diff -r "$work/alone" "$work/two"
echo "two hosts write the bytes of one process"

# mpirun itself may wait for the host that it lost; the processes of the run must not.
on_two_hosts finetune --output "$work/cut" --steps 100000 --wait 3 "${finetune[@]}" --quiet 2> "$work/said" &
until [ -f "$work/cut/state.previous.safetensors" ]; do sleep 0.2; done
ip -n "$(host 1)" link set cable1 down
for second in $(seq 20); do
  pgrep -f "^$program finetune --output $work/cut" > /dev/null || break
  sleep 1
done
if pgrep -af "^$program finetune --output $work/cut"; then
  echo "error: processes are left $second s after the cable was cut" >&2
  exit 1
fi
grep "which did not come; the job ends" "$work/said"
pkill -KILL -f "mpirun .*--output $work/cut" || true
echo "the processes ended $second s after the cable was cut"
