# SPDX-License-Identifier: Apache-2.0
"""Times the step of a peer, for bench_torch.py and bench_t5x.py."""

import json
import resource
import time
from collections.abc import Callable, Iterator

PHASES = ('sampling', 'teacher', 'student', 'optimizer')


def measure(
  work: dict,
  step: Callable[[int], Iterator[None]],
  setting: str,
  *,
  compiles: bool,
) -> None:
  """Runs a step repeatedly, and prints the figures as JSON.

  Args:
    work: see bench_step.py.
    step: number -> iterator that yields at the end of each of PHASES.
    setting: a description of the peer.
    compiles: whether the extra time of the first step is compile time.
  """
  laps = []
  for i in range(work['warmup'] + work['steps']):
    times = [time.perf_counter()]
    for _ in step(i):
      times.append(time.perf_counter())
    laps.append(
      {
        phase: end - start
        for phase, start, end in zip(PHASES, times, times[1:], strict=False)
      }
    )
  timed = laps[work['warmup'] :]
  steps = [sum(lap.values()) for lap in timed]
  peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(
    json.dumps(
      {
        'step': steps,
        'phases': {phase: [lap[phase] for lap in timed] for phase in PHASES},
        'compile': sum(laps[0].values()) - steps[0] if compiles else None,
        'peak_memory': peak_kib * 1024,
        'setting': setting,
      }
    )
  )
