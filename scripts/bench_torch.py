# SPDX-License-Identifier: Apache-2.0
"""The step of bench_step.py with PyTorch and Hugging Face transformers.

bench_step.py runs it with a Python that has torch, transformers and trl. It
reads the work as JSON and prints the figures as JSON, without gkd_jax.
"""

import json
import os
import sys

work = json.loads(sys.argv[1])
# One thread per core, bound to it; set before torch starts threads.
os.environ['OMP_NUM_THREADS'] = str(os.cpu_count())
os.environ['GOMP_CPU_AFFINITY'] = f'0-{os.cpu_count() - 1}'

import bench_peer  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402

DTYPE = getattr(torch, work['dtype'])
BETAS = {'forward_kl': 0.0, 'generalized_jsd': 0.5, 'reverse_kl': 1.0}
EOS_ID = 1


def model(shape: dict) -> transformers.T5ForConditionalGeneration:
  """Returns a T5 1.1 with random weights, without dropout."""
  config = transformers.T5Config(
    vocab_size=shape['vocab_size'],
    d_model=shape['emb_dim'],
    d_kv=shape['head_dim'],
    d_ff=shape['mlp_dim'],
    num_layers=shape['num_encoder_layers'],
    num_decoder_layers=shape['num_decoder_layers'],
    num_heads=shape['num_heads'],
    dropout_rate=0.0,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    decoder_start_token_id=0,
  )
  made = transformers.T5ForConditionalGeneration(config)
  return made.to(DTYPE).eval()


def main() -> None:
  """Measures, and prints the figures."""
  torch.manual_seed(0)
  student, teacher = model(work['student']), model(work['teacher'])
  teacher.requires_grad_(False)
  optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
  length = work['targets']
  inputs = torch.randint(
    2, work['student']['vocab_size'], (work['batch'], work['inputs'])
  )

  def step(i):
    del i
    with torch.inference_mode():
      tokens = student.generate(
        inputs,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
      )
    tokens = tokens.clone()
    yield
    with torch.inference_mode():
      teacher_logits = teacher(
        input_ids=inputs, decoder_input_ids=tokens[:, :-1]
      ).logits
    teacher_logits = teacher_logits.clone()
    yield
    logits = student(
      input_ids=inputs, decoder_input_ids=tokens[:, :-1], use_cache=False
    ).logits
    loss = GKDTrainer.generalized_jsd_loss(
      logits, teacher_logits, beta=BETAS[work['divergence']]
    )
    loss.backward()
    yield
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    yield
    assert torch.isfinite(loss)
    assert tokens.shape == (work['batch'], length + 1), tokens.shape
    assert not (tokens[:, 1:] == EOS_ID).any()

  bench_peer.measure(
    work,
    step,
    f'torch {torch.__version__}, transformers {transformers.__version__}: '
    f'eager, {student.config._attn_implementation} attention, dynamic cache, '
    'fused AdamW, threads bound to cores',
    compiles=False,
  )


if __name__ == '__main__':
  main()
