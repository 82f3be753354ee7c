"""The terminal display: plain lines, redrawn lines, honest rates."""

from __future__ import annotations

import io
import re
import threading

import pytest

from audiolm.pipeline.progress import ProgressBoard, duration, short


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self) -> list[str]:
        """The lines on the terminal, from newlines and the two escapes that the board uses."""
        lines = [""]
        for part in re.split(r"(\x1b\[\d+F|\x1b\[J|\n)", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part == "\x1b[J":
                pass  # the lines below went with the cursor
            elif part.startswith("\x1b["):
                up = int(part[2:-1])
                del lines[len(lines) - 1 - up:]
                lines.append("")
            else:
                lines[-1] += part
        return [line for line in lines if line]


@pytest.fixture
def clock():
    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    return Clock()


def test_plain_lines_at_start_end_and_every_ten_seconds(clock):
    out = io.StringIO()
    board = ProgressBoard(out, clock)
    board.start("acoustic_tokens")
    for second in range(25):
        clock.now += 1
        board.update("acoustic_tokens", 60.0 * (second + 1), 6000.0, "audio s")
    board.end("acoustic_tokens", "DONE", 25.0, "12 shards")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b" not in out.getvalue()
    assert lines[0].startswith("acoustic_tokens") and "60 audio h/h" in lines[1] and "left" in lines[1]
    assert "DONE" in lines[3] and "25 s" in lines[3] and "12 shards" in lines[3]


def test_a_rate_never_counts_work_that_was_there_at_the_start(clock):
    out = io.StringIO()
    board = ProgressBoard(out, clock)
    board.start("codec")
    board.update("codec", 900, 1000, "steps")  # resumed at 900
    for i in range(1, 6):
        clock.now += 2
        board.update("codec", 900 + 10 * i, 1000, "steps", "loss 2.1")
    line = out.getvalue().splitlines()[-1]
    assert "5 steps/s" in line and "loss 2.1" in line and "95%" in line and "10 s left" in line


def test_the_rate_follows_the_last_half_minute(clock):
    out = io.StringIO()
    board = ProgressBoard(out, clock)
    board.start("lm")
    done = 0
    for rate in [1000] * 60 + [10] * 60:
        clock.now += 1
        done += rate
        board.update("lm", done, 1_000_000, "tokens")
    assert "10 tokens/s" in out.getvalue().splitlines()[-1]


def test_another_phase_of_a_step_starts_its_rate_anew(clock):
    out = io.StringIO()
    board = ProgressBoard(out, clock)
    board.start("kmeans")
    board.update("kmeans", 0, 100, "clips")
    clock.now += 1
    board.update("kmeans", 100, 100, "clips")
    clock.now += 10
    board.update("kmeans", 5, 50, "iterations")
    assert "iterations/s" not in out.getvalue()


def test_a_terminal_keeps_one_line_a_running_step_and_leaves_finished_ones(clock):
    out = Terminal()
    board = ProgressBoard(out, clock)
    board.say("hello")
    board.start("codec")
    board.start("masked_model")
    for i in range(20):
        clock.now += 1
        board.update("codec", i, 20, "steps", f"loss {i}")
        board.update("masked_model", i, 20, "steps")
    clock.now += 1
    board.update("codec", 20, 20, "steps", "loss 20")
    screen = out.screen()
    assert screen[0] == "hello" and len(screen) == 3
    assert "loss 20" in screen[1] and screen[2].startswith("masked_model")
    board.end("codec", "DONE", 20.0)
    screen = out.screen()
    assert [s.split()[0] for s in screen] == ["hello", "codec", "masked_model"] and "DONE" in screen[1]
    board.end("masked_model", "FAILED", 21.0, "no such file")
    assert [s.split()[:2] for s in out.screen()[1:]] == [["codec", "DONE"], ["masked_model", "FAILED"]]


def test_many_threads_write_whole_lines():
    out = io.StringIO()
    board = ProgressBoard(out)

    def work(name):
        board.start(name)
        for i in range(200):
            board.update(name, i, 200, "steps")
            if i % 50 == 0:
                board.say(f"{name} says {i}")
        board.end(name, "DONE", 1.0)

    threads = [threading.Thread(target=work, args=(f"step{i}",)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 * (1 + 4 + 1) and all(re.match(r"step\d(:| +DONE| says)", line) for line in lines)


@pytest.mark.parametrize("seconds, text", [(3.21, "3.2 s"), (75, "75 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"),
                                           (200_000, "2 d 7 h")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_large_counts_are_shortened():
    assert [short(x) for x in (0.5, 7, 8123, 81234, 2_500_000)] == ["0.5", "7", "8123", "81.2k", "2.5M"]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_store_that_does_not_answer_is_named_with_the_reason_while_it_lasts(clock, stream):
    out = stream()
    board = ProgressBoard(out, clock)
    board.start("codec")
    board.waits("a", "s3://b/x", "503 SlowDown")
    board.waits("b", "s3://b/y", "ConnectTimeoutError: y")
    clock.now += 12
    board.waits("a", "s3://b/x", None)
    if stream is Terminal:
        assert out.screen()[0].endswith("waiting, 12 s, ConnectTimeoutError: y (s3://b/y)")
    else:
        assert out.getvalue().splitlines()[-1] == "store: waiting, 503 SlowDown (s3://b/x)"
    board.waits("b", "s3://b/y", None)
    assert "store: waited 12 s, ConnectTimeoutError: y (s3://b/y)\n" in out.getvalue()
    assert stream is not Terminal or out.screen()[-1].startswith("codec")
