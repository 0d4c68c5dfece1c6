# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import batch
from tests import tiny


def test_decoder_inputs_are_the_start_id_then_all_tokens_but_the_last():
  tokens = jnp.array([[5, 6, 7, 1], [8, 1, 0, 0]], jnp.int32)

  inputs = batch.shift_right(tokens, start=0)

  np.testing.assert_array_equal(inputs, [[0, 5, 6, 7], [0, 8, 1, 0]])
  assert inputs.dtype == jnp.int32


def test_the_outputs_of_a_batch_are_the_datasets_targets_and_weights():
  tokens = jnp.array([[5, 1, 0]])
  weights = jnp.array([[1.0, 1.0, 0.0]])

  outputs = batch.Batch(jnp.array([[9, 9]]), tokens, weights).outputs

  np.testing.assert_array_equal(outputs.tokens, tokens)
  np.testing.assert_array_equal(outputs.weights, weights)


def test_pad_and_ids_beyond_the_tokenizer_are_masked_and_no_others():
  logits = jnp.arange(12.0).reshape(2, 6)

  masked = batch.mask_unused_ids(logits, tiny.special_ids(4))

  m = batch.MASKED_LOGIT
  np.testing.assert_array_equal(
    masked, [[m, 1, 2, 3, m, m], [m, 7, 8, 9, m, m]]
  )


def test_eos_can_always_be_said():
  # EOS is the id next to pad: an off-by-one here and no output would end.
  logits = batch.mask_unused_ids(jnp.zeros(4), tiny.special_ids(2))

  np.testing.assert_array_equal(jax.nn.softmax(logits), [0, 1, 0, 0])


def test_masked_ids_have_probability_0_though_all_others_are_unlikely():
  # Logits of a model stay far below 1e4; float32 exp is 0 below -104.
  logits = jnp.array([1e4, -1e4, -1e4 + 1, 1e4])

  probs = jax.nn.softmax(batch.mask_unused_ids(logits, tiny.special_ids(3)))

  assert probs[0] == 0.0 and probs[3] == 0.0
  # One rounding of the sum: 1e4 + 1 is exact in float32.
  np.testing.assert_allclose(probs[1:3].sum(), 1.0, rtol=1e-6)


def test_the_mask_is_finite_so_that_0_times_it_is_0():
  # In every dtype that logits come in.
  for dtype in (jnp.float32, jnp.bfloat16):
    masked = batch.mask_unused_ids(jnp.zeros(3, dtype), tiny.special_ids(2))

    assert masked.dtype == dtype
    np.testing.assert_array_equal(0.0 * masked, [0, 0, 0])


def test_masked_ids_get_no_gradient_whatever_their_logit():
  def nll(logits):
    return -jax.nn.log_softmax(
      batch.mask_unused_ids(logits, tiny.special_ids(3))
    )[1]

  grad = jax.grad(nll)(jnp.array([jnp.inf, 0.0, 0.0, jnp.nan]))

  np.testing.assert_array_equal(grad, [0.0, -0.5, 0.5, 0.0])
