"""Guards of ``scripts/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a bench that lost a nano is a failed run",
        "scripts/bench/books.py",
        "        if not still_open and ours == theirs:\n",
        "        if not still_open and ours.calls == theirs.calls:\n",
        "tests/scripts/bench/test_bench.py::test_a_lost_nano_is_a_failed_run",
    ),
    Mutation(
        "the bench waits until no call is open",
        "scripts/bench/books.py",
        "        if not still_open and ours == theirs:\n",
        "        if ours == theirs:\n",
        "tests/scripts/bench/test_bench.py::test_a_lost_nano_is_a_failed_run",
    ),
    Mutation(
        "the client's count of answers is the books'",
        "scripts/bench/books.py",
        "    if ours.calls != answered:\n",
        "    if ours.calls > answered:\n",
        "tests/scripts/bench/test_bench.py::test_a_lost_nano_is_a_failed_run",
    ),
    Mutation(
        "a bench whose books do not hold is a failed run",
        "scripts/bench/books.py",
        "    if wrong:\n",
        "    if len(wrong) > len(found):\n",
        "tests/scripts/bench/test_bench.py::test_a_lost_nano_is_a_failed_run",
    ),
    Mutation(
        "a check of the bench goes on until it can tell",
        "scripts/bench/reports/record.py",
        "        return self.low <= self._limit < self.high\n",
        "        return False\n",
        "tests/unit/bench/test_bench.py::test_rounds_go_on_until_they_tell",
    ),
    Mutation(
        "what a worker had used before it died stays counted",
        "scripts/bench/gauges.py",
        "(_exact_cpu_s(each.pid) or user_s + system_s) + sum(dead_s)",
        "(_exact_cpu_s(each.pid) or user_s + system_s)",
        "tests/unit/bench/test_gauges.py",
    ),
    Mutation(
        "an answer that is not whole is no answer",
        "scripts/bench/processes/load.py",
        """        if self._received[9:12] == b"200" and good:\n""",
        """        if self._received[9:12] == b"200":\n""",
        "tests/scripts/bench/test_bench.py::test_only_whole_answers_count",
    ),
    Mutation(
        "the bench loads this machine alone",
        "scripts/bench/command.py",
        """    if parts.hostname != "localhost" and not _is_loopback(parts.hostname or ""):\n""",
        "    if not parts.hostname:\n",
        "tests/unit/bench/test_bench.py::test_peers_are_on_this_machine",
    ),
    Mutation(
        "SIGTERM ends all that the bench has started",
        "scripts/bench/command.py",
        "        _stop_on_sigterm()\n",
        "",
        "tests/scripts/bench/test_bench.py::test_what_is_stopped_leaves_nothing_running",
    ),
    Mutation(
        "the walk asks the books after each step",
        "scripts/local/walk.py",
        "        if wrong:\n",
        "        if not checks:\n",
        "tests/scripts/local/test_dev.py",
    ),
    Mutation(
        "simulated payments are kept before anybody hears of them",
        "scripts/sim/payments/server.py",
        "                self._file.save()\n",
        "                pass\n",
        "tests/unit/sim/test_payment_pages.py",
    ),
    Mutation(
        "a stop is heard while a worker is replaced",
        "scripts/programs/serve.py",
        "        if self._stopping or (pid := os.fork()):\n            if not self._stopping:\n                self._workers[pid] = slot",
        "        if pid := os.fork():\n            self._workers[pid] = slot",
        "tests/faults/test_kill.py",
    ),
    Mutation(
        "short secrets stop the start",
        "scripts/programs/serve.py",
        "    require_long_secrets(settings)\n",
        "",
        "tests/unit/cli/test_start.py",
    ),
    Mutation(
        "there are no more connections than files",
        "scripts/programs/files.py",
        '"connections": min(limits.connections, share)',
        '"connections": limits.connections',
        "tests/unit/cli/test_start.py",
    ),
)
