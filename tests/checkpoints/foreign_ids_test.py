# SPDX-License-Identifier: Apache-2.0
"""T5s with other special ids than T5's own, from their folder and back.

The folders have the ids of MADLAD-400 (pad 1, start 0, EOS 2; 0 is a token) and
of FRED-T5 (pad and start 0, EOS 2). What they compute before training is
compared with transformers in formats/huggingface_test.py.
"""

import shutil

import jax
import numpy as np
import optax
import pytest
from etils import epath

import gkd_jax
from gkd_jax.checkpoints import checkpoint, export, pretrained
from gkd_jax.models.params import named_params
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models

FIXTURES = conftest.ROOT / 'tests/checkpoints/formats/huggingface_fixtures'
VOCABULARY = 'PassThroughVocabulary 40 ids'


@pytest.fixture(params=['madlad', 'fred'])
def name(request):
  return request.param


def a_batch(ids):
  """Rows that end with EOS, then pad; they begin with 0 where it is a token."""
  rng = np.random.default_rng(0)
  rows = rng.integers(3, ids.num_ids, (4, 6)).astype(np.int32)
  if ids.pad != 0:
    rows[:, 0] = 0
  for row, length in zip(rows, (3, 6, 4, 5), strict=True):
    row[length - 1] = ids.eos
    row[length:] = ids.pad
  return gkd_jax.Batch(rows, rows, np.float32(rows != ids.pad))


def test_a_student_is_trained_and_exported_with_its_ids(tmp_path):
  name = 'madlad'  # all of its ids are other ones
  student, params = gkd_jax.load_model(FIXTURES / name)
  teacher, teacher_params = gkd_jax.load_model(FIXTURES / name)
  ids = student.config.special_ids(num_ids=40)
  optimizer = optax.adam(1e-3)
  train_step = jax.jit(
    gkd_jax.make_train_step(
      student=student,
      teacher=teacher,
      method=gkd_jax.Method(
        policy=gkd_jax.policies.dataset(),
        objective=gkd_jax.Objective(gkd_jax.divergences.forward_kl),
      ),
      optimizer=optimizer,
      ids=ids,
      seed=0,
    )
  )
  state = gkd_jax.init_state(
    jax.tree.map(lambda x: 0.9 * np.asarray(x), params), optimizer
  )

  batch, losses = a_batch(ids), []
  for _ in range(8):
    state, metrics = train_step(state, gkd_jax.Frozen(teacher_params), batch)
    losses.append(float(metrics['loss']))
  checkpoints = checkpoint.Checkpoints(
    tmp_path / 'run', checkpoint.ModelDescription(student.config, VOCABULARY)
  )
  checkpoints.save(state, tiny.NoData(), train_seconds=0.0)
  checkpoints.close()
  export.export(tmp_path / 'run', 'huggingface', tmp_path / 'exported')

  assert losses[-1] < losses[0]
  exported, exported_params = gkd_jax.load_model(tmp_path / 'exported')
  assert exported.config == student.config
  want = named_params(state.params)
  for param_name, x in named_params(exported_params).items():
    np.testing.assert_array_equal(x, want[param_name])


def test_sampled_outputs_end_with_the_models_eos_then_pad(name):
  model, params = gkd_jax.load_model(FIXTURES / name)
  ids = model.config.special_ids(num_ids=40)

  drawn = gkd_jax.generate(
    model,
    params,
    np.tile(a_batch(ids).encoder_input_tokens, (16, 1)),
    gkd_jax.SamplerConfig(),
    rng=jax.random.key(0),
    max_decode_len=12,
  )

  tokens, written = np.asarray(drawn.tokens), np.asarray(drawn.weights) > 0.0
  ended = (tokens == ids.eos).any(axis=1)
  assert 0 < ended.sum() < len(tokens)
  assert (tokens[~written] == ids.pad).all()
  assert (tokens[written] != ids.pad).all()
  lengths = written.sum(axis=1)
  assert (tokens[np.arange(len(tokens)), lengths - 1] == ids.eos).tolist() == (
    ended.tolist()
  )


def test_a_model_with_other_ids_is_refused_as_teacher(name):
  source = pretrained.open_checkpoint(FIXTURES / name)

  with pytest.raises(ValueError, match='eos id: 2 in the checkpoint, 1 of'):
    pretrained.check_fits(source, VOCABULARY, tiny.special_ids(40))


def test_a_folder_whose_files_name_different_ids_is_refused(name, tmp_path):
  folder = epath.Path(tmp_path) / 'copy'
  shutil.copytree(FIXTURES / name, folder)
  (folder / 'generation_config.json').write_text('{"eos_token_id": [2, 7]}')
  with pytest.raises(ValueError, match=r'eos_token_id is \[2, 7\]; gkd_jax'):
    pretrained.open_checkpoint(folder)

  (folder / 'generation_config.json').write_text('{"eos_token_id": 7}')
  with pytest.raises(ValueError, match='eos_token_id is 2 in config.json, but'):
    pretrained.open_checkpoint(folder)


def test_t5x_holds_no_model_that_pads_with_another_id():
  with pytest.raises(ValueError, match='its pad_id is 1, theirs is always 0'):
    export.export(FIXTURES / 'madlad', 't5x', '/nowhere')
