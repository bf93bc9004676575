"""Tests of mpi_two_hosts.py: python3 -m unittest discover -s scripts -p 'test_*.py'"""

import unittest

from mpi_two_hosts import Cable


class TestCable(unittest.TestCase):
    def arrived(self, cable, count, size=100):
        """The packets of `count` that are put in at once and come out, after so much time that all are there."""
        for number in range(count):
            cable.put(0, number.to_bytes(size, "big"), 0.0)
        return [int.from_bytes(packet, "big") for packet in cable.take(0, 1e9)]

    def test_packets_come_after_the_delay_in_order(self):
        cable = Cable(0.02, 0.0, float("inf"), 0)
        for number, now in enumerate((0.0, 0.01)):
            cable.put(0, bytes([number]), now)
        self.assertEqual(cable.due(), 0.02)
        self.assertEqual(list(cable.take(0, 0.019)), [])
        self.assertEqual(list(cable.take(1, 1.0)), [])
        self.assertEqual(list(cable.take(0, 0.02)), [b"\0"])
        self.assertEqual(list(cable.take(0, 0.03)), [b"\1"])

    def test_the_seed_says_which_packets_are_lost(self):
        first, again, other = (self.arrived(Cable(0.0, 0.2, float("inf"), seed), 1000) for seed in (1, 1, 2))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)
        self.assertAlmostEqual(len(first), 800, delta=50)

    def test_a_packet_waits_for_those_before_it(self):
        cable = Cable(0.01, 0.0, 1e4, 0)  # 100 bytes in 10 ms
        for _ in range(2):
            cable.put(1, bytes(100), 0.0)
        self.assertAlmostEqual(cable.due(), 0.02)
        self.assertEqual(len(list(cable.take(1, 0.025))), 1)
        self.assertAlmostEqual(cable.due(), 0.03)

    def test_nothing_comes_through_a_cut_cable(self):
        cable = Cable(0.01, 0.0, float("inf"), 0)
        cable.put(0, b"on its way", 0.0)
        cable.cut = True
        cable.put(0, b"too late", 0.0)
        self.assertEqual(list(cable.take(0, 1.0)), [])


if __name__ == "__main__":
    unittest.main()
