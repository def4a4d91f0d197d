"""Guards of ``billing/monitoring/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "an alert's end does not overtake its beginning",
        "billing/monitoring/alerts.py",
        "e.alert_id = d.alert_id AND e.id < d.id",
        "e.id IS NULL",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "a user's event is passed on once",
        "billing/monitoring/alerts.py",
        "              AND NOT EXISTS (SELECT FROM alert_messages m WHERE m.event_id = e.id)\n",
        "",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "a condition that comes again at once has not ended",
        "billing/monitoring/alerts.py",
        'if place not in found and row["over"]:',
        "if place not in found:",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "a message that was not taken is tried again",
        "billing/monitoring/alerts.py",
        "        except AlertNotTakenError as error:\n            why = str(error)[:_ERROR_MAX]\n        else:\n",
        "        except AlertNotTakenError as error:\n            why = str(error)[:_ERROR_MAX]\n        if True:\n",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "rows are compared with what was sealed",
        "billing/monitoring/audit.py",
        '    if leaf != sealed[row["id"]]:\n',
        "    if False:\n",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "columns are compared with the line",
        "billing/monitoring/audit.py",
        "if name not in line or name not in fields or line[name] != fields[name]",
        "if name not in line",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "removed rows are found",
        "billing/monitoring/audit.py",
        "for row_id in sealed.keys() - seen:",
        "for row_id in set[int]():",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "inserted rows are found",
        "billing/monitoring/audit.py",
        '        return "it was not there when the block was sealed"',
        "        return None",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "blocks follow each other",
        "billing/monitoring/audit.py",
        'elif block["previous"] != head.digest:',
        "elif False:",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "a noted head is compared",
        "billing/monitoring/audit.py",
        'and expected.digest != block["digest"]',
        "and False",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "a cut tail shows against a noted head",
        "billing/monitoring/audit.py",
        "verdict.head.number < expected.number",
        "False",
        "tests/billing/monitoring/test_audit.py",
    ),
    Mutation(
        "a cursor's statement stays with a session",
        "billing/monitoring/audit.py",
        "            self._database.session() as connection,",
        "            self._database.connection() as connection,",
        "tests/faults/test_pooler.py::test_locks_are_kept_and_nothing_is_left_behind",
    ),
)
