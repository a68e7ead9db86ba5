"""What a trace says of a page's frames: only of that page, only between its marks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.frames import BEGIN, END, MAIN, TASK, Frames, frames_of

PAGE, OTHER = 7, 8
MS = 1000


def event(name: str, ms: float, pid: int = PAGE, **more: Any) -> dict[str, Any]:
    return {"name": name, "ts": 1_000_000 + ms * MS, "pid": pid, "tid": 1, "ph": "X", **more}


def frame(state: str, ms: float, pid: int = PAGE, smooth: bool = True) -> dict[str, Any]:
    return event("Frame", ms, pid, args={"frame_reporter": {"state": state, "affects_smoothness": smooth}})


def task(ms: float, wall_ms: float, cpu_ms: float) -> dict[str, Any]:
    return event(TASK, ms, dur=wall_ms * MS, tdur=cpu_ms * MS)


def test_frames_of_the_page_between_its_marks_count() -> None:
    found = frames_of(
        [
            {"name": "thread_name", "ts": 0, "pid": PAGE, "tid": 1, "ph": "M", "args": {"name": MAIN}},
            frame("STATE_DROPPED", -5),
            task(-4, 50, 50),
            event(BEGIN, 0),
            task(0, 10, 5),
            frame("STATE_PRESENTED_ALL", 16),
            frame("STATE_DROPPED", 30, OTHER),
            frame("STATE_DROPPED", 32, smooth=False),
            frame("STATE_NO_UPDATE_DESIRED", 48),
            task(100, 40, 3),
            frame("STATE_DROPPED", 110),
            task(280, 20, 17),
            frame("STATE_DROPPED", 290),
            event(END, 300),
            frame("STATE_DROPPED", 301),
        ]
    )
    # Of two dropped frames the page computed longer than one lasts around the last; around the other it waited.
    assert found == Frames(
        shown=1,
        dropped=2,
        dropped_by_page=1,
        busy=pytest.approx(25 / 300),
        task_cpu_ms=17,
        task_wall_ms=40,
        tasks_over_a_frame=1,
    )
