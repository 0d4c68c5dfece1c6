# SPDX-License-Identifier: Apache-2.0
"""The work of bench_speculative.py with PyTorch and transformers, one row.

bench_speculative.py runs it with a Python that has torch and transformers. It
reads the work as JSON and prints the figures as JSON, without gkd_jax.
"""

import inspect
import json
import os
import sys
import time

work = json.loads(sys.argv[1])
os.environ['OMP_NUM_THREADS'] = str(os.cpu_count())

import torch  # noqa: E402
import transformers  # noqa: E402

EOS_ID = 1


def model(shape: dict) -> transformers.T5ForConditionalGeneration:
  """Returns a T5 1.1 with random weights, without dropout."""
  config = transformers.T5Config(
    **shape,
    dropout_rate=0.0,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    decoder_start_token_id=0,
  )
  made = transformers.T5ForConditionalGeneration(config).eval()
  made.generation_config.eos_token_id = None
  return made


class Oracle(transformers.T5ForConditionalGeneration):
  """Computes as always; then the token of `oracle` is the best one."""

  oracle: torch.Tensor  # [T]

  def forward(self, *args, decoder_input_ids=None, past_key_values=None, **kw):
    """See the base class."""
    past = 0
    if past_key_values is not None:
      past = past_key_values.get_seq_length()
    out = super().forward(
      *args,
      decoder_input_ids=decoder_input_ids,
      past_key_values=past_key_values,
      **kw,
    )
    num = out.logits.shape[1]
    at = torch.arange(past, past + num).clamp(max=len(self.oracle) - 1)
    out.logits[0, torch.arange(num), self.oracle[at]] = 1e6
    return out


# generate() reads which arguments a model takes.
Oracle.forward.__signature__ = inspect.signature(
  transformers.T5ForConditionalGeneration.forward
)


def main() -> None:
  """Measures, and prints the figures."""
  torch.manual_seed(0)
  target, draft = model(work['target']), model(work['draft'])
  draft.__class__ = Oracle
  inputs = torch.randint(2, work['target']['vocab_size'], (1, work['inputs']))
  length = work['targets']

  def write(**keywords):
    with torch.inference_mode():
      return target.generate(
        input_ids=inputs,
        do_sample=False,
        min_new_tokens=length,
        max_new_tokens=length,
        suppress_tokens=[EOS_ID],
        **keywords,
      )[0, 1:]

  tokens = write()

  def assisted(num, rate):
    torch.manual_seed(1)
    is_right = torch.rand(length) < rate
    draft.oracle = torch.where(is_right, tokens, tokens % 1000 + 2)
    config = draft.generation_config
    config.num_assistant_tokens = num
    config.num_assistant_tokens_schedule = 'constant'
    config.assistant_confidence_threshold = 0.0
    got = write(assistant_model=draft)
    assert (got == tokens).all(), 'assisted generation wrote other tokens'

  runs = {None: write} | {
    (num, rate): (lambda num=num, rate=rate: assisted(num, rate))
    for num in work['lengths']
    for rate in work['rates']
  }
  seconds = {key: [] for key in runs}
  for i in range(work['rounds'] + 1):
    for key, run in runs.items():
      start = time.perf_counter()
      run()
      if i:  # the first warms up
        seconds[key].append(time.perf_counter() - start)
  rows = []
  for key, of_key in seconds.items():
    num, rate = key or (None, None)
    rows.append(
      {
        'system': 'transformers',
        'rows': 1,
        'length': num,
        'rate': rate,
        'ms': 1e3 * min(of_key) / length,
        'speedup': min(seconds[None]) / min(of_key),
      }
    )
  print(json.dumps(rows))


if __name__ == '__main__':
  main()
