"""Times from logs and summary files."""

import json

import pytest

from dbcache.metrics.timings import Timings, ratio_heading, ratios


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_name_is_a_word_of_the_line(tmp_path):
    log = write(
        tmp_path, "x.log", "F8-Q1 time: 3\nF8: Time = 5.5e1\nsaved to out/F8.png, time: 45\n"
    )
    timings = Timings(log, ["TIME"])
    assert timings.figures("F8-Q1") == {"time": 3.0}
    assert timings.figures("F8") == {"time": 50.0}
    assert timings.figures("F") == {}


def test_a_tag_is_a_word_and_lines_may_have_to_hold_more(tmp_path):
    log = write(tmp_path, "x.log", "a runtime: 1, time: 2 warm\na time: 4\n")
    assert Timings(log, ["time"]).figures("a") == {"time": 3.0}
    assert Timings(log, ["time"], ["warm"]).figures("a") == {"time": 2.0}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '{"a": {"Seconds": 2, "n": 5}, "version": 1}'),
        ("x.json", '[{"name": "a", "seconds": 1}, {"name": "a", "seconds": 3}]'),
        ("x.jsonl", '{"name": "a", "seconds": 2}\n\n{"name": "ab", "seconds": 9}\n'),
    ],
)
def test_summary_files_are_read(name, text, tmp_path):
    timings = Timings(write(tmp_path, name, text), ["seconds"])
    assert timings.figures("a") == {"seconds": 2.0}
    assert timings.figures("b") == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", r"x\.json: must be JSON"),
        ("x.json", "[1]", r'every run must be an object with a "name", got 1'),
        ("x.json", '{"a": {"time": "fast"}}', r"must hold one of time with a number; has none"),
        ("x.log", "a time: fast", r"x\.log: must hold one of time with a number"),
    ],
)
def test_files_without_times_are_refused(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Timings(write(tmp_path, name, text), ["time"])


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs at least one tag"):
        Timings("x.log", [])
    with pytest.raises(ValueError, match=r"absent\.log: must be a text file"):
        Timings(str(tmp_path / "absent.log"), ["time"])
    path = write(tmp_path, "x.json", json.dumps({"a": {"time": 1}}))
    with pytest.raises(ValueError, match="chooses lines of a log, this is JSON"):
        Timings(path, ["time"], ["warm"])


def test_ratios_are_baseline_over_run():
    figures = {"a": {"time": 6.0, "flops": 9.0}, "b": {"time": 2.0}, "c": {}}
    assert ratios(figures, "a") == {"a": {"time": 1, "flops": 1}, "b": {"time": 3}, "c": {}}
    with pytest.raises(ValueError, match="must be one of a, b, got 'c'"):
        ratios(figures, "c")
    with pytest.raises(ValueError, match="time of b must be above 0, got 0"):
        ratios({"a": {"time": 1.0}, "b": {"time": 0.0}}, "a")


def test_fewer_operations_are_not_called_a_speed_up():
    assert ratio_heading("time") == "speed-up"
    assert ratio_heading("tflops") == "tflops ratio"
