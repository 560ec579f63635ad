"""PDMS and EPDMS of open-loop plans, from the scoring rows of a scene set.

The scorer is the one of `spanvla score`; progress is measured against our own PDM-Closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from spanvla_ros.scoring.pdms import SCORER_VERSION, Scorer, Scores
from spanvla_ros.scoring.prepared import Version
from spanvla_ros.training.contestants import in_parallel, open_scenes
from spanvla_ros.training.data.scoring_rows import unpack_scene
from spanvla_ros.training.intervals import Estimate, mean_of
from spanvla_ros.types import SpanvlaError

VERSIONS: dict[str, Version] = {'pdms': 'v1', 'epdms': 'v2'}
SUB_SCORES = {
    'pdms': ('nc', 'dac', 'ep', 'ttc', 'comfort'),
    'epdms': ('nc', 'dac', 'ddc', 'tlc', 'ep', 'ttc', 'lk', 'hc'),
}
COLUMNS = tuple(
    name
    for total, parts in SUB_SCORES.items()
    for name in (total, *(f'{total}_{p}' for p in parts))
)
SCORED_WITH = {
    'scorer_version': SCORER_VERSION,
    'reference': 'pdm_closed',
    'human_filter': True,
    'extended_comfort': False,
}
CHUNK = 10

Table = dict[str, Float64[np.ndarray, ' n']]


@dataclass(frozen=True)
class ScoreJob:
    """Plans of several drivers `[drivers, n, t, 3]` for some rows of a scene set."""

    scenes: Path
    indices: tuple[int, ...]
    plans: Float64[np.ndarray, 'd n t 3']
    hz: int


def score_plans(
    scenes: Path, indices: np.ndarray, plans: Mapping[str, np.ndarray], hz: int, workers: int
) -> dict[str, Table]:
    """Every column of `COLUMNS` for every driver and row.

    Args:
        scenes: the scene set; all rows asked for hold a scoring row.
        indices: the rows.
        plans: plans in `base_link` `[n, t, 3]` by driver.
        hz: poses a second of the plans.
        workers: processes.

    Raises:
        SpanvlaError: a row cannot be scored; it is never scored 0 instead.
    """
    stacked = np.stack(list(plans.values()))
    jobs = [
        ScoreJob(scenes, tuple(indices[i : i + CHUNK].tolist()), stacked[:, i : i + CHUNK], hz)
        for i in range(0, len(indices), CHUNK)
    ]
    values = np.concatenate(list(in_parallel(do_scores, jobs, workers)), axis=1)
    return {
        name: {column: values[at, :, number] for number, column in enumerate(COLUMNS)}
        for at, name in enumerate(plans)
    }


def do_scores(job: ScoreJob) -> Float64[np.ndarray, 'd n c']:
    """The columns of a job's plans."""
    shards = open_scenes(job.scenes)
    found = []
    for at, index in enumerate(job.indices):
        try:
            scene = unpack_scene(shards.scoring(index))
            scores = [
                Scorer(scene, v).score(job.plans[:, at], hz=job.hz) for v in VERSIONS.values()
            ]
        except SpanvlaError as error:
            raise SpanvlaError(f'{shards.where(index)}: {error}') from error
        found.append([row_of(*both) for both in zip(*scores, strict=True)])
    return np.array(found).transpose(1, 0, 2)


def row_of(pdms: Scores, epdms: Scores) -> list[float]:
    """The columns of one plan."""
    row: list[float] = []
    for total, scores in (('pdms', pdms), ('epdms', epdms)):
        row.append(scores.total)
        row += [float(getattr(scores, part)) for part in SUB_SCORES[total]]
    return row


def score_measures(table: Table, drives: Sequence[str]) -> dict[str, Estimate]:
    """Mean of every column with its interval, in points of 100."""
    return {name: mean_of(100.0 * values, drives) for name, values in table.items()}


def score_differences(first: Table, second: Table, drives: Sequence[str]) -> dict[str, Estimate]:
    """Paired differences, first minus second, in points."""
    return {
        name: mean_of(100.0 * (values - second[name]), drives) for name, values in first.items()
    }
