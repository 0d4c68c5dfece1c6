# SPDX-License-Identifier: Apache-2.0
"""The step of bench_step.py with T5X's network and decoding.

bench_step.py runs it with a Python that can import t5x. It reads the work as
JSON and prints the figures as JSON, without gkd_jax. T5X has no distillation:
this script combines its unmodified parts into four jitted programs per step.
"""

import functools
import json
import sys

import bench_peer
import jax
import jax.numpy as jnp
import optax
import seqio
from t5x import decoding, models
from t5x.examples.t5 import network

work = json.loads(sys.argv[1])
EOS_ID = 1


def model(shape: dict) -> models.EncoderDecoderModel:
  """Returns T5X's model of a T5 1.1 that never draws EOS."""
  sizes = (
    *('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim'),
    *('num_encoder_layers', 'num_decoder_layers'),
  )
  config = network.T5Config(
    **{name: shape[name] for name in sizes},
    dtype=work['dtype'],
    mlp_activations=('gelu', 'linear'),
    logits_via_embedding=False,
    dropout_rate=0.0,
  )

  def no_eos(logits, state):
    del state
    return logits.at[..., EOS_ID].set(-1e9)

  vocabulary = seqio.PassThroughVocabulary(shape['vocab_size'], EOS_ID)
  return models.EncoderDecoderModel(
    module=network.Transformer(config),
    input_vocabulary=vocabulary,
    output_vocabulary=vocabulary,
    optimizer_def=None,
    decode_fn=functools.partial(
      decoding.temperature_sample,
      temperature=1.0,
      topk=0,
      logit_callback_fn=no_eos,
    ),
  )


def divergence(student_logits, teacher_logits):
  """Returns [B, T], given logits [B, T, V]; the JSD has beta 0.5."""
  log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32))
  log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))

  def kl(log_a, log_b):
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)

  if work['divergence'] == 'forward_kl':
    return kl(log_p, log_q)
  if work['divergence'] == 'reverse_kl':
    return kl(log_q, log_p)
  log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
  return 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)


def main() -> None:
  """Measures, and prints the figures."""
  batch_size, length = work['batch'], work['targets']
  student, teacher = model(work['student']), model(work['teacher'])
  optimizer = optax.adamw(1e-4)
  inputs = jax.random.randint(
    jax.random.PRNGKey(0),
    (batch_size, work['inputs']),
    2,
    work['student']['vocab_size'],
  )
  shapes = {
    'encoder_input_tokens': inputs.shape,
    'decoder_input_tokens': (batch_size, length),
  }

  def init(model, seed):
    return jax.jit(
      lambda key: model.get_initial_variables(key, shapes)['params']
    )(jax.random.PRNGKey(seed))

  params, teacher_params = init(student, 1), init(teacher, 2)
  teacher_params = jax.tree.map(
    lambda x: x.astype(work['dtype']), teacher_params
  )
  opt_state = optimizer.init(params)

  def batch_of(tokens):
    return {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))),
      'decoder_target_tokens': tokens,
    }

  @jax.jit
  def sample(params, key):
    return student.predict_batch_with_aux(
      params, batch_of(jnp.ones((batch_size, length), jnp.int32)), rng=key
    )[0]

  @jax.jit
  def score(params, tokens):
    return teacher._compute_logits(params, batch_of(tokens))

  @jax.jit
  def gradient(params, teacher_logits, tokens):
    def loss(params):
      logits = student._compute_logits(params, batch_of(tokens))
      return divergence(logits, teacher_logits).mean()

    return jax.value_and_grad(loss)(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, opt_state, grads):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def step(i):
    nonlocal params, opt_state
    key = jax.random.PRNGKey(i)
    tokens = jax.block_until_ready(sample(params, key))
    yield
    logits = jax.block_until_ready(score(teacher_params, tokens))
    yield
    loss, grads = jax.block_until_ready(gradient(params, logits, tokens))
    yield
    params, opt_state = jax.block_until_ready(update(params, opt_state, grads))
    yield
    assert jnp.isfinite(loss)
    assert tokens.shape == (batch_size, length), tokens.shape
    assert not (tokens == EOS_ID).any()

  bench_peer.measure(
    work,
    step,
    f'T5X as shipped, jax {jax.__version__}: four programs, {work["dtype"]} '
    'activations, one-hot embedding',
    compiles=True,
  )


if __name__ == '__main__':
  main()
