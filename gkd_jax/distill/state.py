# SPDX-License-Identifier: Apache-2.0
"""What a step changes, and what it only reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gkd_jax.batch import Batch
from gkd_jax.distill.methods import Method
from gkd_jax.parallel import partitioning

Params = Any

# No step has this number: heads are drawn with a key of their own.
_HEADS = 2**31 - 1


class Carried(NamedTuple):
  """State that methods carry from step to step; it has no gradient.

  Saved, sharded and donated with the rest of the state; () has no leaves.
  """

  policy: Any = ()
  teacher: Any = ()
  divergence: Any = ()


class TrainState(NamedTuple):
  """Everything that changes from step to step. Nothing random is stored."""

  step: jax.Array  # [] int32, number of updates done
  params: Params  # the student's, with T5X's names
  opt_state: optax.OptState  # of `trained(params, heads)`
  heads: Params = ()  # parameters that a method learns beside the student
  carried: Carried = Carried()


class Frozen(NamedTuple):
  """Parameters that no step changes."""

  teacher: Params = None
  reward: Params = None


class Trained(NamedTuple):
  """Parameters that have a gradient."""

  params: Params
  heads: Params = ()


def trained(params: Params, heads: Params) -> Params | Trained:
  """Returns what the optimizer updates: without heads the parameters alone."""
  return Trained(params, heads) if jax.tree.leaves(heads) else params


def init_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  method: Method | None = None,
  *,
  batch: Batch | None = None,
  seed: int = 0,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    params: of the student.
    optimizer: of the run.
    method: its policy, teacher and divergence may carry state, and its
      divergence may have heads; None: no part does.
    batch: arrays, or their shapes and dtypes, of the global batch; read by a
      policy with state.
    seed: of the heads.

  Raises:
    ValueError: the policy has state and no batch is given.
  """
  heads, carried = (), Carried()
  if method is not None:
    divergence = method.objective.divergence
    if divergence is not None and divergence.init_heads is not None:
      rng = jax.random.fold_in(jax.random.key(seed), _HEADS)
      heads = divergence.init_heads(rng)
    carried = _init_carried(params, method, batch)
  opt_state = optimizer.init(trained(params, heads))
  return TrainState(jnp.int32(0), params, opt_state, heads, carried)


def _init_carried(params, method, batch) -> Carried:
  policy = teacher = divergence = ()
  if method.policy.init is not None:
    if batch is None:
      raise ValueError(
        'This policy has state: init_state needs `batch`, the shapes of a '
        'batch.'
      )
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch
    )
    policy = method.policy.init(shapes)
  if method.teacher.init is not None:
    teacher = method.teacher.init(params)
  of_divergence = method.objective.divergence
  if of_divergence is not None and of_divergence.init is not None:
    divergence = of_divergence.init()
  # Copies: a state is donated, so no two of its arrays may share memory.
  return jax.tree.map(jnp.array, Carried(policy, teacher, divergence))


def abstract_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  method: Method | None = None,
  *,
  batch: Batch | None = None,
) -> TrainState:
  """Returns shapes, dtypes and shardings of a state, without making it.

  Args:
    params: abstract, with their shardings.
    optimizer: its state is sharded as the parameters are, and so is carried
      state with the parameters' names; all other state is replicated.
    mesh: that these lie on.
    method: see `init_state`.
    batch: see `init_state`.
  """
  state = jax.eval_shape(
    lambda p: init_state(p, optimizer, method, batch=batch), params
  )
  return partitioning.shard_as_params(state, params, mesh)
