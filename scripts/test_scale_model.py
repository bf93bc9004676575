"""Tests of scale_model.py: python3 -m unittest discover -s scripts -p 'test_*.py'"""

import unittest

import scale_model
from scale_model import SMALL, Network


class ScaleModel(unittest.TestCase):
    network = Network(latency=1e-3, peer=1e-4, bandwidth=1e8, memory=float("inf"))

    def test_one_rank_exchanges_nothing(self):
        self.assertEqual(scale_model.step_time(self.network, 1, 1 << 30, 2.0, 0.5), 2.0)

    def test_chunks_cross_the_network_twice_however_many_ranks(self):
        for ranks in (16, 1024):
            *_, sent, _ = scale_model.coefficients(ranks, 10**9)
            self.assertLessEqual(sent, 2 * 10**9)
            self.assertGreater(sent, 1.8 * 10**9)

    def test_small_gradients_take_one_exchange_a_part(self):
        size = SMALL // 4
        self.assertEqual(scale_model.coefficients(4, size, parts=3), (3, 9, 9 * size, 12 * size))
        self.assertEqual(scale_model.coefficients(4, size + 4, parts=3)[0], 7)

    def test_large_chunks_make_more_trips_over_the_wire(self):
        self.assertEqual(scale_model.trips(2, SMALL // 2), 2)
        self.assertEqual(scale_model.trips(2, 2_359_296), 10)
        self.assertEqual(scale_model.trips(64, 2_359_296), 6)
        slow = Network(0.0, 0.0, float("inf"), float("inf"), wire=0.02)
        self.assertAlmostEqual(slow.exchange(2, 2_359_296), 0.2)

    def test_paper_and_simulation_agree(self):
        for ranks in (2, 8, 64, 256):
            arguments = (self.network, ranks, 10**6, 1.0, 0.1, 2)
            simulated = scale_model.simulated_step_time(*arguments)
            self.assertAlmostEqual(scale_model.step_time(*arguments) / simulated, 1.0, delta=0.01)

    def rows(self, network):
        exchange = lambda ranks, small: network.exchange(ranks, 4, small=small)
        return [
            {"ranks": ranks, "bytes": 4, "whole_s": exchange(ranks, True), "chunks_s": exchange(ranks, False)}
            for ranks in (2, 4)
        ]

    def test_the_fit_finds_the_latencies_that_made_the_rows(self):
        large = {"ranks": 2, "bytes": 10**6, "whole_s": 9.0, "chunks_s": 9.0}
        found = scale_model.fit([*self.rows(Network(1e-3, 1e-4, 1e12, 1e12)), large])
        self.assertAlmostEqual(found.latency, 1e-3, delta=1e-8)
        self.assertAlmostEqual(found.peer, 1e-4, delta=1e-8)

    def test_a_cost_is_not_negative(self):
        found = scale_model.fit(self.rows(Network(-1e-5, 1e-4, 1e12, 1e12)))
        self.assertEqual(found.latency, 0.0)
        self.assertGreater(found.peer, 0.0)
        # One number of ranks cannot tell the two apart.
        found = scale_model.fit(self.rows(Network(1e-3, 1e-4, 1e12, 1e12))[:1])
        self.assertGreater(found.latency + found.peer, 0.0)

    def test_the_rest_of_a_step_is_the_cost_of_adding(self):
        row = {"ranks": "2", "parts": "4", "latency_us": "0", "gbit": "inf", "spread": "0"}
        rows = [
            row | {"bytes": str(size), "exchange_s": self.network.exchange(2, size, 2) + 3 * size / rate}
            for size, rate in ((10**6, 5e9), (10**8, 1e9))
        ]
        found = scale_model.with_memory(self.network, [*rows, rows[0] | {"gbit": "1"}, rows[0] | {"ranks": "4"}])
        self.assertAlmostEqual(found.memory, 5e9, delta=1.0)
        self.assertAlmostEqual(found.fresh, 1e9, delta=1.0)

    def test_faster_networks_and_longer_parts_scale_better(self):
        slow, fast = (Network(1e-4, 1e-6, bandwidth, float("inf")) for bandwidth in (1e8, 1e10))
        of = lambda network, compute: scale_model.efficiency(network, 64, 4 * 10**8, compute)
        self.assertLess(of(slow, 0.1), of(fast, 0.1))
        self.assertLess(of(slow, 0.1), of(slow, 10.0))

    def test_rows_of_several_ranks_know_the_compute_of_one(self):
        row = {"model": "bytes", "bytes": "8", "compute_ms": "100", "parts": "2", "compute_s": "0.2", "update_s": "0"}
        (found,) = scale_model.with_base([row | {"ranks": "1"}, row | {"ranks": "2", "compute_s": "0.3"}])
        self.assertAlmostEqual(found["base_s"], 0.1)

    def test_largest_of_normal_numbers(self):
        # Known expectations: 1 / sqrt(pi) of two, 1.0294 of four.
        for ranks, expected in ((2, 0.5642), (4, 1.0294)):
            self.assertAlmostEqual(scale_model.largest_normal(ranks), expected, delta=0.03)


if __name__ == "__main__":
    unittest.main()
