"""Guards of ``proxy/live/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a feed that does not agree with its wallet is mended",
        "proxy/live/watchers.py",
        "            if reading is not None and not reading.agrees:\n                reading = await self._mend(wallet_id, seq)\n",
        "",
        "tests/proxy/live/test_feed.py::test_a_feed_that_does_not_agree_is_mended",
    ),
    Mutation(
        "a gap is told",
        "proxy/live/watchers.py",
        "    if not reading.whole or not reading.agrees:\n",
        "    if False:\n",
        "tests/proxy/live/test_feed.py::test_a_gap_is_told",
    ),
    Mutation(
        "a watcher that catches up goes live when it has all that was handed out",
        "proxy/live/watcher.py",
        "            if not self._live and not self._house.has_caught_up(self):\n",
        "            if self.position is None:\n",
        "tests/proxy/live/test_feed.py::test_what_was_missed_comes_in_pages",
    ),
    Mutation(
        "a watcher's queue is bounded",
        "proxy/live/watcher.py",
        '                if len(self._frames) >= self._queue_max:\n                    self.end("slow")\n                    return\n',
        "",
        "tests/proxy/live/test_feed.py::test_a_slow_reader_is_dropped",
    ),
    Mutation(
        "a key that expires ends its watchers",
        "proxy/live/watchers.py",
        "        watcher.recheck_at_s = min(next_at_s, caller.good_until_s)\n",
        "        watcher.recheck_at_s = next_at_s\n",
        "tests/proxy/live/test_feed.py::test_what_expires_ends_the_feed",
    ),
    Mutation(
        "watchers stay watched for as long as they listen",
        "proxy/live/watchers.py",
        "                    await self._feeds.watch(some)\n",
        "                    pass\n",
        "tests/proxy/live/test_feed.py::test_a_watched_wallet_stays_watched",
    ),
    Mutation(
        "a user's watchers are counted over all their keys",
        "proxy/live/watchers.py",
        "            (self._counts_of_users[caller.user_id], settings.watchers_per_user),\n",
        "",
        "tests/proxy/account/test_rates.py::test_watchers_are_counted_per_user",
    ),
)
