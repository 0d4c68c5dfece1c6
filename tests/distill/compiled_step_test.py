# SPDX-License-Identifier: Apache-2.0
"""Properties of the compiled step, read from its HLO."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.batch import Batch
from gkd_jax.distill import chunked_sums, divergences, policies
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

# No product of some of these is another.
B, S, T, V = 5, 11, 23, 1031
CHUNK_TOKENS = 20
STUDENT, STUDENT_PARAMS = tiny.model_and_params(
  0, vocab_size=V, num_heads=3, head_dim=8, num_decoder_layers=2
)
TEACHER, TEACHER_PARAMS = tiny.model_and_params(
  1, vocab_size=V, num_heads=3, head_dim=8, emb_dim=24
)
OPTIMIZER = optax.adamw(1e-3)
BATCH = Batch(
  jnp.full((B, S), 2), jnp.full((B, T), 2), jnp.ones((B, T), jnp.float32)
)


def jitted_step(policy):
  return tiny.jit_as_users_do(
    step_lib.make_train_step(
      student=STUDENT,
      teacher=TEACHER,
      method=Method(
        policy=policy,
        objective=Objective(
          functools.partial(divergences.generalized_jsd, beta=0.5),
          chunk_tokens=CHUNK_TOKENS,
        ),
      ),
      optimizer=OPTIMIZER,
      ids=tiny.special_ids(V),
      seed=0,
    ),
    donate_argnums=0,
  )


def start():
  # Donated: a copy, each time.
  return jax.tree.map(
    jnp.array, state_lib.init_state(STUDENT_PARAMS, OPTIMIZER)
  )


@pytest.fixture(scope='module')
def compiled():
  step = jitted_step(policies.student())
  return step.lower(start(), state_lib.Frozen(TEACHER_PARAMS), BATCH).compile()


@pytest.fixture(scope='module')
def program(compiled) -> str:
  return compiled.as_text()


def shapes(program: str) -> set[tuple[int, ...]]:
  """Shapes of all arrays of floating-point numbers in a program."""
  found = re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', program)
  return {tuple(int(n) for n in dims.split(',')) for dims in found}


def computations(program: str) -> dict[str, str]:
  """Functions of a program: {name: text}."""
  parts = re.split(r'\n(?=(?:ENTRY )?%[\w.\-]+ \()', program)
  return {
    match[1]: part
    for part in parts
    if (match := re.match(r'(?:ENTRY )?%([\w.\-]+) \(', part))
  }


def loop_body(program: str, shape: str) -> str:
  """Returns the text of the loop that carries an array, with its callees."""
  functions = computations(program)
  (body,) = {
    re.search(r'body=%([\w.\-]+)', line)[1]
    for line in program.splitlines()
    if ' while(' in line and shape in line
  }
  seen, todo = set(), [body]
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    todo += [
      called
      for called in re.findall(r'%([\w.\-]+)', functions[name])
      if called in functions
    ]
  return '\n'.join(functions[name] for name in seen)


def test_no_array_of_either_model_holds_all_logits(program):
  with_vocabulary = {shape for shape in shapes(program) if V in shape}

  # The weights and a chunk's logits are found, and nothing larger.
  positions = max(math.prod(s) // V for s in with_vocabulary)
  assert positions == max(24, CHUNK_TOKENS) < B * T


def test_no_array_holds_the_attention_between_all_of_many_inputs():
  length = 2048
  inputs = jnp.full((1, length), 2)
  batch = Batch(
    inputs, BATCH.decoder_target_tokens[:1], BATCH.decoder_loss_weights[:1]
  )

  step = jitted_step(policies.student())
  lowered = step.lower(start(), state_lib.Frozen(TEACHER_PARAMS), batch)
  program = lowered.compile().as_text()

  arrays = re.findall(r'\b[a-z]+\d*\[([\d,]+)\]', program)
  largest = max(math.prod(map(int, dims.split(','))) for dims in arrays)
  # That between a block of queries and all keys is found, for 3 heads.
  of_block = 3 * STUDENT.config.query_block * length
  assert of_block <= largest < 1.2 * of_block < length**2


def test_decoding_copies_no_cache(program):
  cache = f'f32[{B},3,{T},8]'
  body = loop_body(program, cache)

  # They are updated in place.
  assert len(re.findall(rf'= {re.escape(cache)}\S* dynamic-update', body)) >= 4
  for copying in ('copy', 'transpose', 'concatenate', 'select', 'broadcast'):
    assert not re.findall(rf'= {re.escape(cache)}\S* {copying}\(', body)


def test_decoding_computes_the_logits_of_one_position(program):
  body = loop_body(program, f'f32[{B},3,{T},8]')

  logits = {s for s in shapes(body) if V in s and s not in {(16, V), (V, 16)}}
  assert all(math.prod(s) == B * V or math.prod(s) == V for s in logits), logits


def test_decoding_does_not_project_the_inputs_again(program):
  body = loop_body(program, f'f32[{B},3,{T},8]')

  # Of all inputs [B, S, ...] it reads the keys and values of each head, and
  # computes what each weighs.
  assert {math.prod(s) // (B * S) for s in shapes(body) if S in s} <= {1, 3, 24}
  assert f'f32[{B},{S},16]' not in body


def test_nothing_goes_to_the_host_within_a_step(program):
  assert not re.findall(r' (?:infeed|outfeed|send|recv)\(', program)
  assert 'callback' not in program


def test_the_state_is_updated_in_place(compiled):
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(start()))

  # The step's number and the like may not be worth it.
  assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes


def loss_memory(length: int) -> int:
  """Returns the temporary bytes of the value and gradient of a loss."""
  objective = Objective(
    functools.partial(divergences.generalized_jsd, beta=0.5),
    chunk_tokens=CHUNK_TOKENS,
  )

  def loss(heads, hidden, tokens, weights):
    return chunked_sums.weighted_sums(
      objective.terms(tiny.special_ids(V)),
      step_lib.unembed(STUDENT),
      step_lib.unembed(TEACHER),
      objective.chunk_tokens,
      heads[0],
      hidden[0],
      heads[1],
      hidden[1],
      tokens,
      weights,
    )['loss']

  heads = (
    STUDENT.head_params(STUDENT_PARAMS),
    TEACHER.head_params(TEACHER_PARAMS),
  )
  hidden = tuple(np.ones((B, length, D), np.float32) for D in (16, 24))
  compiled = (
    tiny.jit_as_users_do(jax.value_and_grad(loss, argnums=(0, 1)))
    .lower(heads, hidden, np.ones((B, length), np.int32), np.ones((B, length)))
    .compile()
  )
  return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_the_loss_does_not_grow_as_the_logits_do():
  more_positions = B * (320 - 32)

  more = loss_memory(320) - loss_memory(32)

  # What is kept of a position is as wide as the models, 16 + 24, a few times;
  # its logits would be 2 * 1031 wide.
  assert more < 4 * more_positions * 4 * (16 + 24) < 4 * more_positions * V
