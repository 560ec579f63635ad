"""Detection of clock jumps: simulated time that loops, a bag restarted, NTP steps."""

from __future__ import annotations

CLOCK_BACKWARDS = 'clock_backwards'
CLOCK_GAP = 'clock_gap'


class ClockWatch:
    """Tells a jump of the clock from its running, by the times it is shown.

    A step back is a jump unless it is as small as the corrections of a disciplined clock. A step
    forward is one when it is longer than `max_gap_s`, much longer than the time between two looks.
    """

    def __init__(self, max_gap_s: float = 2.0, correction_s: float = 0.02) -> None:
        """Start without a past; the largest step forward and back that are no jumps."""
        self.max_gap_ns = round(max_gap_s * 1e9)
        self.correction_ns = round(correction_s * 1e9)
        self.jumps = 0
        self._last_ns: int | None = None

    def observe(self, now_ns: int) -> str | None:
        """Show the present time; the kind of jump since the last look, or None."""
        last_ns, self._last_ns = self._last_ns, now_ns
        if last_ns is None or -self.correction_ns <= now_ns - last_ns <= self.max_gap_ns:
            return None
        self.jumps += 1
        return CLOCK_BACKWARDS if now_ns < last_ns else CLOCK_GAP
