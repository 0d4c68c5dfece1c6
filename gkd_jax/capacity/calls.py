# SPDX-License-Identifier: Apache-2.0
"""Counts what a policy, a credit and a reward call in a step, by tracing them.

The functions that a step gives to a policy or a credit are replaced by others
that compute nothing and leave their names in the traced program. A loop of
fixed length counts as often as it runs, a loop of unknown length once. Of the
branches of a condition the costliest counts: the count is of a step that takes
it.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import extend

from gkd_jax.batch import Batch, Outputs
from gkd_jax.decoding import pair, sampler
from gkd_jax.distill import credit as credit_lib
from gkd_jax.distill import policies, rewards

# Names of the functions in the traced program begin with this.
_MARK = 'gkd_jax_called_'

Weigh = Callable[[Counter], float]  # calls -> their cost


def of_policy(
  policy: policies.Policy, batch: Batch, carried: Any, weigh: Weigh
) -> Counter[str]:
  """Returns how often a policy calls each function of `policies.Draw`.

  Args:
    policy: whose `write` is traced.
    batch: shapes and dtypes.
    carried: likewise of the policy's state.
    weigh: chooses among the branches of a condition.
  """
  num_rows, length = batch.decoder_target_tokens.shape
  tokens = _shape((num_rows, length), jnp.int32)
  floats = _shape((num_rows, length), jnp.float32)
  drawn = sampler.Rollout(tokens, floats, floats)
  by_student = _shape((num_rows, length), bool)

  def write(key_data, batch, carried, step):
    return policy.write(
      policies.Draw(
        jax.random.wrap_key_data(key_data),
        batch,
        jnp.arange(num_rows),
        _several(_stand_in('sample_student', drawn)),
        _several(_stand_in('sample_teacher', drawn)),
        carried,
        _stand_in('sample_pair', pair.PairRollout(drawn, by_student)),
        step,
        _stand_in('compare', policies.Comparison(floats, tokens)),
      )
    )

  key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  return _count(weigh, write, key_data, batch, carried, _shape((), jnp.int32))


def of_credit(
  credit: credit_lib.Credit,
  num_rows: int,
  length: int,
  *,
  all_by_student: bool,
  has_teacher: bool,
  weigh: Weigh,
  outputs_per_input: int = 1,
) -> Counter[str]:
  """Returns how often a credit calls each function of `credit.Evidence`.

  Args:
    credit: whose `assign` is traced.
    num_rows: outputs in a microbatch.
    length: T.
    all_by_student: see `credit.Evidence`.
    has_teacher: whether log-probabilities are also those of a teacher.
    weigh: chooses among the branches of a condition.
    outputs_per_input: see `credit.Evidence`.
  """
  rows = _shape((num_rows,), jnp.float32)
  tokens = _shape((num_rows, length), jnp.int32)
  floats = _shape((num_rows, length), jnp.float32)
  author = _shape((num_rows, length), jnp.int8)
  outputs = Outputs(tokens, floats)
  log_probs = credit_lib.LogProbs(
    floats,
    floats if has_teacher else None,
    floats if credit.needs_lse else None,
  )

  def assign(rollouts, coefficients_BT):
    return credit.assign(
      credit_lib.Evidence(
        rollouts,
        jnp.arange(num_rows),
        _stand_in('log_probs', log_probs),
        _stand_in('compute_rewards', rows),
        _stand_in('sample_greedy', outputs),
        all_by_student,
        coefficients_BT,
        outputs_per_input,
      )
    )

  rollouts = policies.Rollouts(outputs, author, floats)
  return _count(weigh, assign, rollouts, floats)


class ModelCall(NamedTuple):
  """A call of a model: its method, and the shapes of the arrays."""

  method: str
  shapes: tuple[tuple[int, ...], ...]


def of_reward(
  make_reward_fn: Callable[[Any], rewards.RewardFn],
  model: Any,
  params: Any,
  **sizes: Any,
) -> list[ModelCall]:
  """Returns the calls of a reward's model for one batch of outputs.

  Args:
    make_reward_fn: model -> reward function.
    model: of the reward; None: it has none.
    params: shapes and dtypes of its parameters.
    **sizes: batch_size and lengths, see `rewards.check_reward_fn`.
  """
  if model is None:
    return []
  recorder = _Recorder(model)
  reward_fn = make_reward_fn(recorder)
  rewards.check_reward_fn(reward_fn, params, **sizes)
  return recorder.calls


class _Recorder:
  """A model that records its calls."""

  def __init__(self, model):
    self._model = model
    self.calls = []

  def __getattr__(self, name):
    return getattr(self._model, name)

  def apply(self, variables, *args, method, **keywords):
    shapes = tuple(x.shape for x in args if hasattr(x, 'shape'))
    self.calls.append(ModelCall(method, shapes))
    return self._model.apply(variables, *args, method=method, **keywords)


def _shape(shape, dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _stand_in(name: str, shapes: Any) -> Callable[..., Any]:
  """Returns a function that returns zeros and leaves its name in a program."""

  def zeros():
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  zeros.__name__ = _MARK + name
  marked = jax.jit(zeros)
  return lambda *args, **keywords: marked()


def _several(sample: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a stand-in that writes `num_outputs` of each input.

  They are counted as one rollout: a step of the loop reads the weights once.
  """

  def samples(*, num_outputs=1, **keywords):
    return jax.tree.map(
      lambda x: jnp.repeat(x, num_outputs, axis=0), sample(**keywords)
    )

  return samples


def _count(weigh: Weigh, function, *args) -> Counter[str]:
  jaxpr = jax.make_jaxpr(function)(*args)
  return _calls(weigh, jaxpr.jaxpr)


def _calls(weigh: Weigh, jaxpr) -> Counter[str]:
  """Returns the marked functions in a program, and how often each is called."""
  calls = Counter()
  for equation in jaxpr.eqns:
    name = str(equation.params.get('name', ''))
    if name.startswith(_MARK):
      calls[name.removeprefix(_MARK)] += 1
      continue
    inner = [
      _calls(weigh, x) for x in extend.core.jaxprs_in_params(equation.params)
    ]
    if equation.primitive.name == 'cond':
      inner = [max(inner, key=weigh)]
    total = functools.reduce(lambda a, b: a + b, inner, Counter())
    times = equation.params.get('length', 1)  # of a scan
    calls.update({name: times * number for name, number in total.items()})
  return calls
