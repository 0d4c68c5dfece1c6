# SPDX-License-Identifier: Apache-2.0
"""T5 in float64 NumPy, written from its description: slow, plain, no JAX.

Written from Raffel et al. (2020), arXiv:1910.10683, section 2.1, Shazeer
(2020), arXiv:2002.05202 (the gated feed-forward block of T5 1.1), and the
names of parameters in T5X's checkpoints. Imports nothing from `gkd_jax`.

Unlike the model under test, this works on one example at a time, has no
padding (the caller cuts it off), and knows no cache, mask or batch.
"""

import math

import numpy as np

EPSILON = 1e-6  # of RMSNorm, in T5X


def logits(
  params, inputs, targets, *, num_heads, num_buckets=32, max_distance=128
):
  """Next-token logits of one example.

  Args:
    params: nested dict, T5X's names. Whether the model is T5 1.0 or 1.1 shows
      in it: 1.0 has one `wi`, and no `logits_dense`.
    inputs: S ids, without padding.
    targets: T ids.
    num_heads: of every attention.
    num_buckets: of relative positions.
    max_distance: from which on distances share a bucket.

  Returns:
    [T, V] float64; row t predicts targets[t] from targets[:t].
  """
  params = _float64(params)
  embedding = params['token_embedder']['embedding']
  encoder, decoder = params['encoder'], params['decoder']
  buckets = {'num_buckets': num_buckets, 'max_distance': max_distance}

  x = embedding[list(inputs)]
  bias = _position_bias(
    encoder['relpos_bias'], len(x), bidirectional=True, **buckets
  )
  for layer in _layers(encoder):
    h = _rms_norm(x, layer['pre_attention_layer_norm'])
    x = x + _attention(h, h, layer['attention'], num_heads, bias)
    x = x + _mlp(_rms_norm(x, layer['pre_mlp_layer_norm']), layer['mlp'])
  encoded = _rms_norm(x, encoder['encoder_norm'])

  beginning_of_sequence = 0
  x = embedding[[beginning_of_sequence, *targets[:-1]]]
  bias = _position_bias(
    decoder['relpos_bias'], len(x), bidirectional=False, **buckets
  )
  for layer in _layers(decoder):
    h = _rms_norm(x, layer['pre_self_attention_layer_norm'])
    x = x + _attention(
      h, h, layer['self_attention'], num_heads, bias, causal=True
    )
    h = _rms_norm(x, layer['pre_cross_attention_layer_norm'])
    x = x + _attention(
      h, encoded, layer['encoder_decoder_attention'], num_heads
    )
    x = x + _mlp(_rms_norm(x, layer['pre_mlp_layer_norm']), layer['mlp'])
  x = _rms_norm(x, decoder['decoder_norm'])

  if 'logits_dense' in decoder:
    return x @ decoder['logits_dense']['kernel']
  return x @ embedding.T / math.sqrt(embedding.shape[1])


def bucket(distance_ahead, *, bidirectional, num_buckets, max_distance):
  """The bucket of one distance, key position minus query position.

  In whole numbers, so that no rounding can move a limit between buckets: entry
  k of the logarithmic part starts at the distance d for which

      d / exact = (max_distance / exact) ** (k / num_logarithmic).
  """
  first = 0
  if bidirectional:
    num_buckets //= 2
    if distance_ahead > 0:
      first = num_buckets
    distance = abs(distance_ahead)
  else:
    distance = max(0, -distance_ahead)
  exact = num_buckets // 2
  if distance < exact:
    return first + distance
  num_logarithmic = num_buckets - exact
  k = 0
  while (
    k + 1 < num_logarithmic
    and distance**num_logarithmic * exact ** (k + 1)
    >= max_distance ** (k + 1) * exact**num_logarithmic
  ):
    k += 1
  return first + exact + k


def _float64(params):
  if hasattr(params, 'items'):
    return {name: _float64(value) for name, value in params.items()}
  return np.asarray(params, np.float64)


def _layers(stack):
  number = sum(name.startswith('layers_') for name in stack)
  return [stack[f'layers_{i}'] for i in range(number)]


def _rms_norm(x, norm):
  rms = np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON)
  return x / rms * norm['scale']


def _attention(x, kv, weights, num_heads, bias=None, causal=False):
  head_dim = weights['query']['kernel'].shape[1] // num_heads
  heads = []
  for head in range(num_heads):
    part = slice(head * head_dim, (head + 1) * head_dim)
    query = x @ weights['query']['kernel'][:, part]
    key = kv @ weights['key']['kernel'][:, part]
    value = kv @ weights['value']['kernel'][:, part]
    scores = query @ key.T  # no 1 / sqrt(head_dim) in T5
    if bias is not None:
      scores = scores + bias[head]
    if causal:
      ahead = np.arange(len(kv))[None, :] > np.arange(len(x))[:, None]
      scores = np.where(ahead, -np.inf, scores)
    heads.append(_softmax(scores) @ value)
  return np.concatenate(heads, axis=1) @ weights['out']['kernel']


def _mlp(x, weights):
  if 'wi' in weights:
    hidden = np.maximum(x @ weights['wi']['kernel'], 0.0)
  else:
    hidden = _gelu(x @ weights['wi_0']['kernel'])
    hidden = hidden * (x @ weights['wi_1']['kernel'])
  return hidden @ weights['wo']['kernel']


def _gelu(x):
  # The tanh approximation, which is what T5 1.1 was trained with.
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _softmax(scores):
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def _position_bias(relpos_bias, length, **kwargs):
  """Returns the bias [H, length, length] of the attention logits."""
  table = relpos_bias['rel_embedding']
  buckets = [
    [bucket(key - query, **kwargs) for key in range(length)]
    for query in range(length)
  ]
  return table[:, buckets]
