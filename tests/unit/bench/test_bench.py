"""The bench's arithmetic: medians, ratios, what counts as a regression, the plot, who may be a peer."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from billing.errors import InputError
from scripts.bench.command import read_peers, read_workers
from scripts.bench.processes.upstream import (
    CHUNKS,
    BilledCalls,
    cost_nanousd,
    delays_s,
    plain_answer,
    stamp,
    stream_pieces,
    text_piece,
)
from scripts.bench.reports.plot import draw
from scripts.bench.reports.record import (
    Compared,
    compare_ratios,
    is_unsure,
    ratios_of,
    read_record,
    write_page,
    write_record,
)
from scripts.bench.reports.report import as_json, in_words
from scripts.bench.results import Measured, Options, Result
from scripts.bench.scenarios import EXTRA, NAMES, SCENARIOS, choose
from scripts.bench.stats import median_interval, percentile, ratios, spread


def measured(name: str = "plain-8", figure: str = "cpu_ms") -> Measured:
    found = Measured(name, "plain <calls>", 10)
    for floor, tuma in ((0.3, 0.6), (0.4, 1.2), (0.5, 1.25)):
        found.add("floor", {figure: floor})
        found.add("tuma", {figure: tuma})
    return found


def result(*scenarios: Measured) -> Result:
    machine = {"cpus": 2, "python": "3", "load_before": [1, 2, 3], "load_after": [1, 2, 3]}
    return Result(3, machine, list(scenarios))


def test_the_middle_and_the_ends() -> None:
    found = spread([5, 1, 9, 2])
    assert (found.median, found.least, found.most) == (3.5, 1, 9)
    assert str(spread([0.123456, 0.2, 1234.5])) == "0.20 (0.12…1,234)"
    with pytest.raises(ValueError, match="no rounds"):
        spread([])


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (99.1, 100), (100, 100)]
)
def test_percentiles_are_values_that_were_seen(percent: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == expected


def test_ratios_are_of_one_round() -> None:
    assert ratios([2, 6], [1, 2]) == [2, 3]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        ratios([1], [1, 2])


def test_where_a_median_lies() -> None:
    # Of the sign test's table: 5 values say it in 15 of 16 cases, 6 in 31 of 32, 9 without the ends in 246 of 256.
    assert median_interval([1.0] * 5) == (-math.inf, math.inf)
    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert median_interval(list(range(9))) == (1, 7)
    assert median_interval(list(range(9)), sure=0.99) == (0, 8)
    assert median_interval([], sure=0.5) == (-math.inf, math.inf)


def test_a_regression_is_more_than_15_percent() -> None:
    assert not Compared("a", 2.0, [2.3]).is_worse
    assert Compared("a", 2.0, [2.31]).is_worse
    assert not Compared("a", 2.0, [0.1]).is_worse
    found = measured()
    assert [each.name for each in compare_ratios({"plain-8.cpu_ms": 1, "b": 1}, [found])] == [
        "plain-8.cpu_ms"
    ]
    with pytest.raises(InputError, match="nothing that was measured"):
        compare_ratios({"b": 1}, [found])


@pytest.mark.parametrize(
    ("values", "unsure", "worse"),
    [
        ([2.0] * 5, True, False),  # too few
        ([2.0] * 6, False, False),
        ([2.5] * 6, False, True),
        ([2.0, 2.0, 2.0, 2.0, 2.0, 2.31], True, False),
        ([2.5, 2.5, 2.5, 2.5, 2.5, 2.29], True, True),  # the median says so, but who knows
        ([2.0] * 8 + [9.0], False, False),  # one of nine rounds may be anything
        ([2.5] * 8 + [1.0], False, True),
    ],
)
def test_rounds_go_on_until_they_tell(values: list[float], unsure: bool, worse: bool) -> None:
    compared = Compared("plain-8.beside_cpu_ms", 2.0, values)
    assert (compared.is_unsure, compared.is_worse) == (unsure, worse)
    found = Measured("plain-8", "", 10, {"floor": {"beside_cpu_ms": [1.0] * len(values)}})
    found.sides["tuma"] = {"beside_cpu_ms": values, "cpu_ms": [100.0]}
    assert is_unsure({"plain-8.beside_cpu_ms": 2.0}, found) is unsure
    assert not is_unsure({"another": 2.0}, found)


def test_memory_is_measured_once() -> None:
    assert not Compared("waiting.10.kib_per_stream", 2.0, [2.2]).is_unsure


def test_ratios_are_recorded_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    with pytest.raises(InputError, match="no recorded ratios"):
        read_record(path)
    found = result(measured(), measured("waiting", "kib_per_stream"), measured("settle", "settlements_per_s"))
    assert ratios_of(found) == {"plain-8.cpu_ms": 2.5, "waiting.10.kib_per_stream": 2.5}
    write_record(path, found, at="2026-11-25")
    write_record(path, result(measured("long-8")), at="2026-11-26")
    assert read_record(path) == {**ratios_of(found), "long-8.cpu_ms": 2.5}  # those of before stay
    told = json.loads(path.read_text())
    assert told["machine"]["cpus"] == 2
    assert set(told["scenarios"]) == {"plain-8", "waiting", "settle", "long-8"}
    write_record(path, result(measured("long-8")), at="2026-11-27", anew=True)
    assert read_record(path) == {"long-8.cpu_ms": 2.5}


def test_the_page_keeps_what_is_not_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    for _ in range(2):
        write_page(page, "a table", at="2026-11-26")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("```text\na table\n```") == 1
    page.write_text("no marks")
    with pytest.raises(InputError, match="no place"):
        write_page(page, "a table", at="2026-11-26")


def test_json_and_words_tell_the_same() -> None:
    found = result(measured())
    worse = [Compared("plain-8.cpu_ms", 2.0, [2.5] * 6)]
    told = as_json(found, worse)
    assert told["ok"] is False
    assert told["scenarios"][0]["sides"]["tuma"]["cpu_ms"] == {"median": 1.2, "least": 0.6, "most": 1.25}
    assert told["scenarios"][0]["ratios"] == {
        "tuma by floor": {"cpu_ms": {"median": 2.5, "least": 2.0, "most": 3.0}}
    }
    (judged,) = told["check"]
    assert {**judged, "rounds": 6, "ok": False, "low": 2.5, "high": 2.5} == judged
    assert as_json(found, [])["ok"] is True
    words = in_words(found, worse)
    assert "CPU ms per call" in words
    assert "1.20 (0.60…1.25)" in words
    assert "WORSE  plain-8.cpu_ms" in words


def test_the_plot_is_svg_with_a_bar_for_each_side() -> None:
    drawn = ET.fromstring(draw([measured(), measured("settle", "settlements_per_s")]))
    space = "{http://www.w3.org/2000/svg}"
    bars = [
        float(bar.attrib["width"]) for bar in drawn.findall(f"{space}rect") if bar.attrib["height"] == "14"
    ]
    assert len(bars) == 2
    assert bars[1] == pytest.approx(3 * bars[0], abs=0.2)
    texts = [text.text for text in drawn.findall(f"{space}text")]
    assert {"plain-8", "floor", "tuma"} <= set(texts)
    assert "settle" not in texts
    ET.fromstring(draw([Measured("a<b", "", 1, {"x&y": {"cpu_ms": [1.0]}})]))
    ET.fromstring(draw([]))


def test_scenarios_are_chosen_by_name_or_kind() -> None:
    assert choose(()) == set(NAMES) - set(EXTRA)
    assert choose((), everything=True) == set(NAMES)
    assert choose(("plain", "settle")) == {"plain-8", "plain-32", "settle"}
    with pytest.raises(InputError, match="nothing is called 'plian'"):
        choose(("plain", "plian"))
    assert [Options(choose(()), 1, share=0.0001).calls(each) for each in SCENARIOS] == [1] * len(SCENARIOS)


def test_numbers_of_workers() -> None:
    assert read_workers("1,2") == (1, 2)
    assert read_workers("4, 4") == (4,)
    for wrong in ("", "0", "1,", "two", "-1", "65"):
        with pytest.raises(InputError, match="written as"):
            read_workers(wrong)


def test_a_chunk_tells_when_it_was_written() -> None:
    for written in (0.0, 12.5, 99.99995, 12_345.678):
        chunks = text_piece(1, "bench/slow", stamp(written)) * 2
        assert delays_s(chunks, written + 0.25) == pytest.approx([0.25, 0.25], abs=2e-5)
    assert delays_s(b"".join(stream_pieces(1, "bench/fast")), 1.0) == []


def test_peers_are_on_this_machine() -> None:
    (peer,) = read_peers(["other=http://127.0.0.1:4000/v1/,sk-x"])
    assert (peer.name, peer.base_url, peer.keys, peer.pid) == (
        "other",
        "http://127.0.0.1:4000/v1",
        ("sk-x",),
        None,
    )
    head = peer.requests(SCENARIOS[0])[0].split("\r\n")
    assert head[0] == "POST /v1/chat/completions HTTP/1.1"
    assert "Authorization: Bearer sk-x" in head
    for wrong in ("other", "other=http://127.0.0.1/v1", "tuma=http://127.0.0.1/v1,k", "a=ftp://127.0.0.1,k"):
        with pytest.raises(InputError, match="written as"):
            read_peers([wrong])
    for away in (
        "a=https://example.com/v1,k",
        "a=http://10.0.0.1/v1,k",
        "a=http://localhost.example.com/v1,k",
    ):
        with pytest.raises(InputError, match="not on this machine"):
            read_peers([away])


def test_what_the_upstream_answers_is_what_it_bills() -> None:
    books = BilledCalls()
    for key in ("a", "b", "a"):
        number = books.begin(key)
        body = json.loads(plain_answer(number, "bench/fast").partition(b"\r\n\r\n")[2])
        pieces = stream_pieces(number, "bench/fast")
        last = json.loads(pieces[-1].partition(b"data: ")[2].partition(b"\n")[0])
        assert (
            round(body["usage"]["cost"] * 10**9)
            == round(last["usage"]["cost"] * 10**9)
            == cost_nanousd(number)
        )
        assert len(pieces) == CHUNKS + 1
    assert books.as_json("a") == {"calls": 2, "nanousd": cost_nanousd(1) + cost_nanousd(3)}
    assert books.as_json("nobody") == {"calls": 0, "nanousd": 0}
