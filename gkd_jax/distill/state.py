# SPDX-License-Identifier: Apache-2.0
"""The state that a train step updates, and the frozen parameters it reads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gkd_jax.batch import Batch
from gkd_jax.distill.methods import Method
from gkd_jax.parallel import partitioning

Params = Any

# Folded into the seed for the heads' key; no step reaches this number.
_HEADS = 2**31 - 1


class Carried(NamedTuple):
  """State of policy, teacher and divergence; it has no gradient.

  It is saved, sharded and donated with the rest of the train state. () means
  that the part has no state.
  """

  policy: Any = ()
  teacher: Any = ()
  divergence: Any = ()


class TrainState(NamedTuple):
  """Everything that a step updates. Random keys derive from seed and `step`."""

  step: jax.Array  # [] int32, number of steps done
  params: Params  # the student's, with T5X's names
  opt_state: optax.OptState  # of `trained(params, heads)`
  heads: Params = ()  # the divergence's learnt parameters
  carried: Carried = Carried()


class Frozen(NamedTuple):
  """Parameters that no step changes."""

  teacher: Params = None  # of several checkpoints {name: parameters}
  reward: Params = None


class Trained(NamedTuple):
  """Parameters that the optimizer updates."""

  params: Params
  heads: Params = ()


def trained(params: Params, heads: Params) -> Params | Trained:
  """Returns the optimizer's parameters: without heads, `params` itself."""
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
    optimizer: any optax optimizer.
    method: initialises the state of its policy, teacher and divergence, and the
      divergence's heads; None: there is none of these.
    batch: arrays or ShapeDtypeStructs of the global batch; a policy with state
      needs their shapes.
    seed: seeds the heads.

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
        'This policy has state: pass `batch` (arrays or shapes) to init_state.'
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
  # Copies, because donated arrays must not share memory.
  return jax.tree.map(jnp.array, Carried(policy, teacher, divergence))


def after_evaluation(
  method: Method, state: TrainState, values: Mapping[str, float]
) -> TrainState:
  """Returns the state after an evaluation, which the policy may depend on.

  Args:
    method: its policy's `evaluated` runs on the host.
    state: of the evaluated step.
    values: {name: value}, equal on all hosts.
  """
  if method.policy.evaluated is None:
    return state
  old = state.carried.policy

  def place(before, after):
    if after is before:
      return before
    return jax.device_put(np.asarray(after, before.dtype), before.sharding)

  new = jax.tree.map(place, old, method.policy.evaluated(old, values))
  return state._replace(carried=state.carried._replace(policy=new))


def abstract_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  method: Method | None = None,
  *,
  batch: Batch | None = None,
) -> TrainState:
  """Returns shapes, dtypes and shardings of the initial state.

  Optimizer state and carried state with the names of parameters are sharded
  like these parameters; all other state is replicated.

  Args:
    params: abstract, with their shardings.
    optimizer: any optax optimizer.
    mesh: of the shardings.
    method: see `init_state`.
    batch: see `init_state`.
  """
  state = jax.eval_shape(
    lambda p: init_state(p, optimizer, method, batch=batch), params
  )
  return partitioning.shard_as_params(state, params, mesh)
