"""Guards of ``proxy/telemetry/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a scrape shows only what was published before",
        "proxy/telemetry/metrics.py",
        "readings = [self.publish(),",
        "readings = [self.meters.take(),",
        "tests/proxy/telemetry/test_metrics.py",
    ),
    Mutation(
        "a worker's replacement goes on from its counters",
        "proxy/telemetry/metrics.py",
        "            meters.carry(slot.before())\n",
        "",
        "tests/proxy/telemetry/test_metrics.py",
    ),
    Mutation(
        "a worker that died has nothing open",
        "proxy/telemetry/shared_counters.py",
        "return reading if taken else Reading(reading.counters, reading.histograms)",
        "return reading",
        "tests/proxy/telemetry/test_metrics.py",
    ),
    Mutation(
        "a torn write is not read",
        "proxy/telemetry/shared_counters.py",
        "if turn and zlib.crc32(text) == checksum:",
        "if turn:",
        "tests/proxy/telemetry/test_metrics.py",
    ),
    Mutation(
        "a call's line waits for its settlement",
        "proxy/telemetry/request_log.py",
        "            call.on_ended = done.tell\n",
        "            done.tell()\n",
        "tests/proxy/telemetry/test_request_log.py",
    ),
)
