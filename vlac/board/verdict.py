"""Whether a measurement may be quoted as this machine's: VALID, INVALID with reasons, or UNVERIFIED.

INVALID: throttling or under-voltage rose, the clock fell below 0.95 of what it was allowed, swap grew, it ended too
hot, or other work took more than a tenth of a core. UNVERIFIED: one of these cannot be read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac.board.summary import known
from vlac.tables import number

CLOCK, SWAP, OTHER = 0.95, 1 << 20, 0.10


def judge(board: Mapping[str, Any], runs: int) -> tuple[str, list[str]]:
    """(verdict, remarks) of a board's summary and a number of chunks."""
    wrong = [text for text in (_throttled(board), _clock(board), _swap(board), _heat(board), _others(board)) if text]
    remarks = [f"invalid: {text}" for text in wrong]
    if known(board.get("changed_meanwhile")):
        remarks.append(f"changed during the run: {', '.join(board['changed_meanwhile'])}")
    if runs < 100:
        remarks.append(
            f"p99 of {runs} runs lies between the two slowest; 100 or more runs (--runs) make it a percentile"
        )
    names = {
        "throttling": "throttling",
        "frequency_mhz": "clock",
        "swap_growth_bytes": "swap",
        "temperature_c": "temperature",
        "other_work": "other work",
    }
    unknown = [word for key, word in names.items() if not known(board.get(key))]
    if unknown:
        remarks.append(f"not checked, the machine does not tell: {', '.join(unknown)}")
    return ("INVALID" if wrong else "UNVERIFIED" if unknown else "VALID"), remarks


def _throttled(board: Mapping[str, Any]) -> str:
    throttling = board["throttling"]
    if not known(throttling) or not throttling["meaning"]:
        return ""
    return f"the board throttled or lacked voltage during the run: {', '.join(throttling['meaning'])}"


def _clock(board: Mapping[str, Any]) -> str:
    """Against the highest clock that is set; where a boost may end by design, against the run's own highest."""
    clock, limits = board["frequency_mhz"], board["clock_limits_mhz"]
    if not known(clock):
        return ""
    boosting = board["boost"] == "on" or not known(limits) or "max" not in limits
    top = clock["max"] if boosting else limits["max"]
    if clock["min"] >= CLOCK * top:
        return ""
    return f"clock moved: {number(clock['min'])} MHz during the run, of {number(top)}"


def _swap(board: Mapping[str, Any]) -> str:
    swap = board["swap_growth_bytes"]
    return f"swap grew by {swap / 1e6:.0f} MB" if known(swap) and swap > SWAP else ""


def _heat(board: Mapping[str, Any]) -> str:
    heat, limit = board["temperature_c"], board["heat_limit_c"]
    if not known(heat) or not known(limit) or max(heat["max"], heat["end"]) <= limit:
        return ""
    return f"temperature reached {number(max(heat['max'], heat['end']))} C (limit {number(limit)})"


def _others(board: Mapping[str, Any]) -> str:
    work = board["other_work"]
    if not known(work) or work["cores"] <= OTHER:
        return ""
    most = f"; most: {', '.join(work['most'])}" if work["most"] else ""
    return f"other work took {100 * work['cores']:.0f} % of a core{most}"
