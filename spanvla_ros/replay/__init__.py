"""`spanvla replay`: a recorded drive through planner and guardian, in lockstep."""

from spanvla_ros.replay.command import configure, run

__all__ = ['configure', 'run']
