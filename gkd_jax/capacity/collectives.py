# SPDX-License-Identifier: Apache-2.0
"""Collective operations of a compiled program.

They are parsed from the optimized HLO text, because XLA's cost analysis does
not report them.
"""

import collections
import re
from collections.abc import Iterable
from typing import NamedTuple

_KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
# The parsed parts of `%name = shape kind(operands), attributes`.
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.+?) '
  r'(?P<opcode>[a-z][a-z0-9-]*)\((?P<rest>.*)$'
)
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|branch_computations|true_computation|'
  r'false_computation)=(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.-]+))'
)
_ARRAY = re.compile(r'\b(?P<type>pred|bf16|[sufc]\d+)\[(?P<sizes>[\d,]*)\]')
_OP_NAME = re.compile(r'op_name="(?P<name>[^"]*)"')


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    kind: 'all-gather', 'all-reduce', ...
    op_name: JAX's name of the operation; if the compiler dropped it, that of
      the enclosing loop.
    in_decode_loop: whether it runs for each sampled token.
    times: number of executions per step if all outputs have full length.
    received: bytes that a device receives from others per execution.

  A loop of data-dependent length counts as `max_decode_len` iterations.
  """

  kind: str
  op_name: str
  in_decode_loop: bool
  times: int
  received: float


class _Computation(NamedTuple):
  # (kind, op_name, bytes, what identifies it)
  collectives: list[tuple[str, str, float, str]]
  # (name, times, in a loop of unknown length, op_name)
  calls: list[tuple[str, int, bool, str]]


def find(text: str, max_decode_len: int) -> list[Collective]:
  """Returns the collectives of a program.

  Args:
    text: the optimized HLO, `compiled.as_text()`.
    max_decode_len: iterations of loops of data-dependent length. Such loops in
      the scope 'sampling' are decode loops.

  Returns:
    Each collective of the program, once.
  """
  computations, entry = _parse(text)
  found: dict[str, Collective] = {}
  visited = collections.deque([(entry, 1, False, '')])
  while visited:
    name, times, in_decode_loop, caller = visited.popleft()
    computation = computations.get(name)
    if computation is None:
      continue
    for kind, op_name, received, identity in computation.collectives:
      one = Collective(kind, op_name or caller, in_decode_loop, times, received)
      # The compiler may split a collective into parts at several places, some
      # of them in loops; the place that is executed least often counts.
      if one.times < found.setdefault(identity, one).times:
        found[identity] = one
    for callee, trips, is_unknown, op_name in computation.calls:
      repeats = max_decode_len if is_unknown else trips
      visited.append(
        (
          callee,
          times * repeats,
          in_decode_loop or (is_unknown and 'sampling' in (op_name or caller)),
          op_name or caller,
        )
      )
  return list(found.values())


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  lines: dict[str, list[str]] = {}
  entry, current = '', None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = lines.setdefault(match['name'], [])
      if match['entry']:
        entry = match['name']
    elif current is not None:
      current.append(line)
  parts = re.search(r'^HloModule .*\bnum_partitions=(\d+)', text)
  num_devices = int(parts[1]) if parts else 1
  return {
    name: _computation(body, lines, num_devices) for name, body in lines.items()
  }, entry


def _computation(
  body: Iterable[str], lines: dict[str, list[str]], num_devices: int
) -> _Computation:
  collectives_, calls = [], []
  for line in body:
    match = _INSTRUCTION.match(line)
    if match is None:
      continue
    opcode, rest = match['opcode'], match['rest']
    named = _OP_NAME.search(rest)
    op_name = named['name'] if named else ''
    kind = opcode.removesuffix('-start')
    if kind in _KINDS:
      channel = re.search(r'channel_id=(\d+)', rest)
      # All collectives that JAX's shard_map asks for have channel 1.
      is_unique = channel is not None and '/shard_map/' not in op_name
      collectives_.append(
        (
          kind,
          op_name,
          _received(opcode, match['shape'], rest, num_devices),
          channel[1] if is_unique else match['name'],
        )
      )
      continue
    callees = [
      callee.strip().lstrip('%')
      for called in _CALLED.finditer(rest)
      for callee in (called['several'] or called['one']).split(',')
    ]
    trips = _trips(rest, lines) if opcode == 'while' else 1
    calls += [
      (callee, trips or 1, trips is None, op_name) for callee in callees
    ]
  return _Computation(collectives_, calls)


def _trips(rest: str, lines: dict[str, list[str]]) -> int | None:
  """Returns a loop's number of iterations; None if it depends on data."""
  if known := re.search(r'known_trip_count[^\d]*(\d+)', rest):
    return int(known[1])
  condition, body = (
    '\n'.join(lines[re.search(rf'{name}=%?([\w.-]+)', rest)[1]])
    for name in ('condition', 'body')
  )
  # Counts from 0: ROOT %lt = pred[] compare(%counter, %limit), direction=LT
  end = re.search(
    r'ROOT .* compare\(%([\w.-]+), %([\w.-]+)\), direction=LT', condition
  )
  if end is None or (limit := _constant(end[2], condition)) is None:
    return None
  # The increment is 1 unless the loop was unrolled.
  step = None
  index = re.search(
    rf'%{re.escape(end[1])} = .* get-tuple-element\(.*index=(\d+)', condition
  )
  results = re.search(r'ROOT .* tuple\((.*?)\)(?:, \w+=|$)', body, re.MULTILINE)
  if index and results:
    counter = re.findall(r'%([\w.-]+)', results[1])[int(index[1])]
    added = re.search(
      rf'%{re.escape(counter)} = .* add\(%[\w.-]+, %([\w.-]+)\)', body
    )
    step = added and _constant(added[1], body)
  return -(-limit // (step or 1))


def _constant(name: str, computation: str) -> int | None:
  match = re.search(
    rf'%{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)', computation
  )
  return match and int(match[1])


def _received(opcode: str, shape: str, rest: str, num_devices: int) -> float:
  """Returns the bytes that a device receives from other devices."""
  kind = opcode.removesuffix('-start')
  sizes = [
    _num_bytes(array)
    for array in _ARRAY.finditer(shape)
    if array[0] != 'u32[]'  # the context of an asynchronous start
  ]
  if opcode != kind and kind != 'all-reduce':
    sizes = sizes[len(sizes) // 2 :]  # drops the operands before the results
  size = sum(sizes)
  if kind == 'collective-permute':
    return size
  num = _group_size(rest) or num_devices
  if kind == 'all-reduce':  # a reduce-scatter, then an all-gather
    return 2.0 * size * (num - 1) / num
  if kind == 'reduce-scatter':
    return size * (num - 1.0)
  return size * (num - 1) / num


def _num_bytes(array: re.Match) -> int:
  bits = 8 if array['type'] == 'pred' else int(re.sub(r'\D', '', array['type']))
  num = 1
  for size in filter(None, array['sizes'].split(',')):
    num *= int(size)
  return num * max(bits // 8, 1)


def _group_size(rest: str) -> int | None:
  """Returns the number of devices in a replica group; None: all devices."""
  # mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, [2,4]<=[8], or {{0,1},{2,3}}
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    num = 1
    for axis in re.findall(r"'([^']+)'", match[2]):
      num *= int(sizes[axis])
    return num
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
    return int(match[1])
  if match := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
    return len(match[1].split(','))
  return None
