# SPDX-License-Identifier: Apache-2.0
"""The process in which a sweep runs its points, one after another.

Later runs reuse imports, data and compiled programs of earlier ones.
`jobs` starts workers.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence

DONE = b'.'


def command(arguments: Sequence[str], log: str | os.PathLike) -> bytes:
  """Returns the line that makes a worker run gkd_jax.main with arguments.

  Args:
    arguments: of gkd_jax.main.
    log: file to which stdout and stderr are appended.
  """
  line = {'arguments': list(arguments), 'log': str(log)}
  return json.dumps(line).encode() + b'\n'


def serve(run: Callable[[Sequence[str]], None]) -> None:
  """Runs the commands on stdin until it is closed; replies DONE after each.

  A failed run ends the process with that run's exit status, after its error was
  written to the log. `jobs` gives the next run to a new process.

  Args:
    run: called with the arguments of gkd_jax.main.
  """
  commands, replies = os.fdopen(os.dup(0), 'rb'), os.dup(1)
  _redirect(os.devnull, os.O_RDONLY, 0)
  try:
    for line in commands:
      wanted = json.loads(line)
      for number in (1, 2):
        _redirect(wanted['log'], os.O_WRONLY | os.O_APPEND | os.O_CREAT, number)
      run(wanted['arguments'])
      gc.collect()  # arrays of this run would take memory from the next
      sys.stdout.flush()
      sys.stderr.flush()
      os.write(replies, DONE)
  except KeyboardInterrupt:
    sys.exit(130)


def _redirect(path: str, flags: int, number: int) -> None:
  """Redirects a file descriptor to a file, also for libraries in C++."""
  descriptor = os.open(path, flags, 0o666)
  os.dup2(descriptor, number)
  os.close(descriptor)
