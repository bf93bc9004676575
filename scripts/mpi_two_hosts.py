#!/usr/bin/env python3
"""Starts a program by mpirun on two hosts: network namespaces of this machine, joined by a cable that delays and loses packets.

    program -- host 1 -- TUN device -- Cable, in this process -- TUN device -- host 2 -- program

The seed says which packets are lost, in the order in which they come. With --cut-when the cable loses everything once a
file is there. A line then tells how long the program's processes took to end.

Wants root, /dev/net/tun, iproute2 and OpenMPI. The exit status is mpirun's; after a cut 0, or 1 if processes are left; 77 if
this machine forbids to make hosts.

usage: mpi_two_hosts.py [--delay MS] [--loss SHARE] [--gbit N] [--seed N] [--cut-when FILE] -- PROGRAM [ARGUMENT ..]
"""

import argparse
import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

FORBIDDEN = 77
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
LARGEST = 1 << 16  # bytes of a packet
PATIENCE = 60  # seconds for the processes to end after a cut


class Cable:
    """Packets on their way in both directions."""

    def __init__(self, delay, loss, rate, seed):
        self.delay, self.loss, self.rate = delay, loss, rate
        self.draw = random.Random(seed).random
        self.cut = False
        self.put_in, self.lost = 0, 0
        self.packets = (deque(), deque())  # due, bytes
        self.free = [0.0, 0.0]  # when the last packet of a direction has left

    def put(self, direction, packet, now):
        """Takes a packet, or loses it."""
        self.put_in += 1
        if self.cut or self.draw() < self.loss:
            self.lost += 1
            return
        self.free[direction] = max(self.free[direction], now) + len(packet) / self.rate
        self.packets[direction].append((self.free[direction] + self.delay, packet))

    def take(self, direction, now):
        """The packets of a direction that have come."""
        packets = self.packets[direction]
        while packets and packets[0][0] <= now:
            _, packet = packets.popleft()
            if not self.cut:
                yield packet

    def due(self):
        """When the next packet comes."""
        return min((packets[0][0] for packets in self.packets if packets), default=float("inf"))


class Host:
    """A network namespace, which lives as long as this process does."""

    def __init__(self, number):
        self.address = f"10.9.0.{number}"
        # `cat` ends when this process has ended, however it did.
        self.holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.namespace = f"/proc/{self.holder.pid}/ns/net"
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(self.namespace) == own:
            if self.holder.poll() is not None:
                raise PermissionError("unshare: no network namespaces")
            time.sleep(0.01)
        self.device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        name = f"csl{os.getpid() % 10**6}-{number}"
        fcntl.ioctl(self.device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
        run("ip", "link", "set", name, "netns", str(self.holder.pid))
        for line in (
            f"addr add {self.address}/24 dev {name}",
            f"link set {name} up txqueuelen 10000",
            "link set lo up",
        ):
            run(*self.enter(), "ip", *line.split())

    def enter(self):
        """The words that make a command run on this host."""
        return "nsenter", f"--net={self.namespace}"

    def processes(self):
        """Process ids on this host and what each executes."""
        found, own = {}, os.readlink(self.namespace)
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/net") == own:
                    found[int(folder.name)] = os.readlink(folder / "exe")
            except OSError:  # ended meanwhile
                pass
        return found

    def remove(self):
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.holder.wait()
        os.close(self.device)


def run(*command):
    subprocess.run(command, check=True)


def mpirun(hosts, agent, program):
    """mpirun on the first host. The agent takes the place of ssh: `agent 10.9.0.2 COMMAND`."""
    cases = (f"{host.address}) exec {' '.join(host.enter())} sh -c \"$*\";;" for host in hosts)
    agent.write_text("\n".join(["#!/bin/sh", "host=$1; shift", "case $host in", *cases, "esac", ""]))
    agent.chmod(0o700)
    network = {"pml": "ob1", "btl": "tcp,self", "plm_rsh_agent": agent}
    network |= {f"{layer}_tcp_if_include": "10.9.0.0/24" for layer in ("btl", "oob")}
    network = [word for name, value in network.items() for word in ("--mca", name, str(value))]
    addresses = ",".join(host.address for host in hosts)
    command = [*hosts[0].enter(), "mpirun", "--allow-run-as-root", "--bind-to", "none", *network]
    return subprocess.Popen([*command, "--host", addresses, "-n", str(len(hosts)), *program])


def carry(hosts, cable, seconds):
    """Moves the packets that come within so many seconds."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        devices = [host.device for host in hosts]
        ready, _, _ = select.select(devices, [], [], max(0, min(cable.due(), end) - now))
        for device in ready:
            try:
                while True:
                    packet = os.read(device, LARGEST)
                    cable.put(devices.index(device), packet, time.monotonic())
            except BlockingIOError:
                pass
        for direction, device in enumerate(reversed(devices)):
            for packet in cable.take(direction, time.monotonic()):
                os.write(device, packet)


def train(hosts, cable, options, agent):
    """Exit status of the run."""
    job = mpirun(hosts, agent, options.program)
    executable = os.path.realpath(options.program[0])
    left = lambda: any(path == executable for host in hosts for path in host.processes().values())
    while job.poll() is None:
        carry(hosts, cable, 0.02)
        if options.cut_when is None or not options.cut_when.exists():
            continue
        cable.cut, start = True, time.monotonic()
        while left():
            if time.monotonic() > start + PATIENCE:
                print(f"error: processes are left {PATIENCE} s after the cut", file=sys.stderr)
                return 1
            carry(hosts, cable, 0.1)
        print(f"the processes ended {time.monotonic() - start:.0f} s after the cut", file=sys.stderr)
        # mpirun itself may wait for the host that it lost, until TCP gives it up. It passes on first what the ranks said.
        carry(hosts, cable, 0.5)
        job.kill()
        job.wait()
        return 0
    return job.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.0, help="of a packet, ms")
    parser.add_argument("--loss", type=float, default=0.0, help="share of the packets")
    parser.add_argument("--gbit", type=float, default=float("inf"), help="bandwidth of a direction, Gb/s")
    parser.add_argument("--seed", type=int, default=0, help="says which packets are lost")
    parser.add_argument("--cut-when", type=Path, metavar="FILE", help="cuts the cable once the file is there")
    parser.add_argument("program", nargs="+", help="program and arguments")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    hosts = []
    try:
        for number in (1, 2):
            hosts.append(Host(number))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"this machine forbids to make hosts: {error}", file=sys.stderr)
        return FORBIDDEN
    cable = Cable(options.delay / 1e3, options.loss, options.gbit * 1e9 / 8, options.seed)
    try:
        with tempfile.TemporaryDirectory() as folder:
            status = train(hosts, cable, options, Path(folder) / "agent")
            print(f"{cable.lost} of {cable.put_in} packets were lost", file=sys.stderr)
            return status
    finally:
        for host in hosts:
            host.remove()


if __name__ == "__main__":
    sys.exit(main())
