"""Detection of clock jumps: simulated time that loops, a bag restarted, NTP steps."""

from __future__ import annotations

CLOCK_BACKWARDS = 'clock_backwards'
CLOCK_GAP = 'clock_gap'


class ClockWatch:
    """Tells a jump of the clock from its running, by the times it is shown.

    A step back of any size is a jump, since a clock that runs never does it. A step forward is
    one when it is longer than `max_gap_s`, much longer than the period between two looks.
    """

    def __init__(self, max_gap_s: float = 2.0) -> None:
        """Start without a past; `max_gap_s` is the longest believable step forward."""
        self.max_gap_ns = int(max_gap_s * 1e9)
        self.jumps = 0
        self._last_ns: int | None = None

    def observe(self, now_ns: int) -> str | None:
        """Show the present time; the kind of jump since the last look, or None."""
        last_ns, self._last_ns = self._last_ns, now_ns
        if last_ns is None or 0 <= now_ns - last_ns <= self.max_gap_ns:
            return None
        self.jumps += 1
        return CLOCK_BACKWARDS if now_ns < last_ns else CLOCK_GAP
