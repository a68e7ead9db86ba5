"""What Chromium's own trace says of a page's frames: which were dropped, and whether the page's work was the cause.

A dropped frame is one that had something new to show and did not show it. The page is the cause where its main thread
computed for longer than a frame lasts; a thread that waits for a core does not compute, and its clock stands still.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from tests.support.browser import Browser, Page

FRAME_MS = 1000 / 60
BEGIN, END = "watched-begin", "watched-end"
"""Marks between which a page is watched; by the first the trace knows which page that is."""
# Frames of the compositor, tasks of every thread with their processor time, and marks of pages.
CATEGORIES = ["cc", "benchmark", "toplevel", "blink.user_timing", "disabled-by-default-devtools.timeline.frame"]
BUFFER_KIB = 400_000
MAIN = "CrRendererMain"
TASK = "ThreadControllerImpl::RunTask"

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Frames:
    """How the frames of a page ended, and what its main thread did.

    Attributes:
        shown: Frames with something new that reached the screen.
        dropped: Frames with something new that did not, in their time.
        dropped_by_page: Of them, those while the main thread computed for longer than a frame lasts.
        busy: Share of the time in which the main thread computed.
        task_cpu_ms: Processor time of its longest task.
        task_wall_ms: And how long the longest took, time without a core included.
        tasks_over_a_frame: Tasks with more processor time than a frame has.
    """

    shown: int
    dropped: int
    dropped_by_page: int
    busy: float
    task_cpu_ms: float
    task_wall_ms: float
    tasks_over_a_frame: int


def start_trace(chromium: Browser) -> None:
    """Begins a trace of all pages."""
    config = {"recordMode": "recordUntilFull", "traceBufferSizeInKb": BUFFER_KIB, "includedCategories": CATEGORIES}
    chromium.call("Tracing.start", transferMode="ReportEvents", traceConfig=config)


def mark(page: Page, name: str) -> None:
    """Puts ``BEGIN`` or ``END`` into the trace."""
    page.eval(f"performance.mark('{name}') && 1")


def end_trace(chromium: Browser, page: Page) -> Frames:
    """Ends it; what it says of the page between its marks."""
    chromium.events.clear()
    chromium.call("Tracing.end")
    while "Tracing.tracingComplete" not in chromium.events:
        page.eval("1")
    assert not chromium.events["Tracing.tracingComplete"][0]["dataLossOccurred"], "the trace's buffer is too small"
    return frames_of([event for part in chromium.events["Tracing.dataCollected"] for event in part["value"]])


def frames_of(events: list[Event]) -> Frames:
    """Reads a trace, times in it being microseconds."""
    begin, end = (next(event for event in events if event["name"] == name) for name in (BEGIN, END))
    process = begin["pid"]
    # What has no time describes the process.
    own = [event for event in events if event["pid"] == process and not 0 < event["ts"] < begin["ts"]]
    own = [event for event in own if event["ts"] <= end["ts"]]
    main = next(event["tid"] for event in own if event["name"] == "thread_name" and event["args"]["name"] == MAIN)
    tasks = [event for event in own if event["name"] == TASK and event["tid"] == main and event["ph"] == "X"]
    tasks.sort(key=lambda task: float(task["ts"]))
    ends = [(event["ts"], report) for event in own if (report := event.get("args", {}).get("frame_reporter"))]
    shown = sum(report["state"].startswith("STATE_PRESENTED") for _, report in ends)
    dropped = [at for at, report in ends if report["state"] == "STATE_DROPPED" and report["affects_smoothness"]]
    computed = [task.get("tdur", 0) / 1000 for task in tasks]
    return Frames(
        shown=shown,
        dropped=len(dropped),
        dropped_by_page=sum(_computed_ms(tasks, at) > FRAME_MS for at in dropped),
        busy=1000 * sum(computed) / (tasks[-1]["ts"] + tasks[-1]["dur"] - tasks[0]["ts"]),
        task_cpu_ms=max(computed),
        task_wall_ms=max(task["dur"] for task in tasks) / 1000,
        tasks_over_a_frame=sum(ms > FRAME_MS for ms in computed),
    )


def _computed_ms(tasks: list[Event], at: float) -> float:
    """Processor time of the tasks that touch the frame which began at ``at``, or the one before it."""
    begin, end = at - 1000 * FRAME_MS, at + 1000 * FRAME_MS
    first = bisect_left(tasks, begin, key=lambda task: float(task["ts"] + task["dur"]))
    last = bisect_left(tasks, end, key=lambda task: float(task["ts"]))
    return float(sum(task.get("tdur", 0) for task in tasks[first:last])) / 1000
