# SPDX-License-Identifier: Apache-2.0
"""Against transformers itself, at real widths."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from etils import epath

from gkd_jax.checkpoints.formats import huggingface, tensors
from gkd_jax.data import vocabularies
from gkd_jax.decoding import beam_search, sampler
from tests import conftest, main_test
from tests.checkpoints.formats import huggingface_test as golden
from tests.main_test import gin_flags

torch = pytest.importorskip('torch', reason='needs torch: the extra [interop]')
transformers = pytest.importorskip(
  'transformers', reason='needs transformers: the extra [interop]'
)
from tests.checkpoints.formats import make_huggingface_fixtures as fixtures  # noqa: E402
from tests.data.tokenizer_json_test import write_gemma_tokenizer  # noqa: E402

pytestmark = pytest.mark.interop

# T5 1.1 small, and T5 1.0 small; two layers instead of 8 where it is as good.
SMALL = {'vocab_size': 32128, 'd_model': 512, 'd_kv': 64, 'num_heads': 6}
MODELS = {
  't5_1_1_small': (
    't5',
    SMALL
    | fixtures.UNTIED
    | {'d_ff': 1024, 'num_layers': 8, 'num_decoder_layers': 8},
  ),
  't5_1_0_small': (
    't5',
    SMALL
    | {'feed_forward_proj': 'relu', 'num_heads': 8, 'd_ff': 2048}
    | {'num_layers': 6, 'num_decoder_layers': 6},
  ),
  'mt5': ('mt5', SMALL | fixtures.UNTIED | {'d_ff': 1024}),
  'umt5': ('umt5', SMALL | {'feed_forward_proj': 'gated-gelu', 'd_ff': 1024}),
  'byt5': (
    't5',
    SMALL
    | fixtures.UNTIED
    | {'vocab_size': 384, 'd_ff': 3584, 'num_heads': 6}
    | {'num_layers': 4, 'num_decoder_layers': 2},
  ),
  'madlad': (
    't5',
    SMALL
    | fixtures.UNTIED
    | {'d_ff': 1024, 'pad_token_id': 1, 'eos_token_id': 2},
  ),
  'fred': ('t5', SMALL | fixtures.UNTIED | {'d_ff': 1024, 'eos_token_id': 2}),
  # With an eighth of the published vocabularies.
  't5gemma_s_s': (
    't5gemma',
    {
      'vocab_size': 32_000,
      'hidden_size': 512,
      'head_dim': 64,
      'query_pre_attn_scalar': 64,
      'intermediate_size': 1024,
      'num_attention_heads': 8,
      'num_key_value_heads': 8,
      'num_hidden_layers': 8,
      'sliding_window': 16,
    },
  ),
  # Six layers instead of 18: one of them has no window.
  't5gemma_2_270m_270m': (
    't5gemma2',
    {
      'vocab_size': 32_768,
      'hidden_size': 640,
      'head_dim': 256,
      'query_pre_attn_scalar': 256,
      'intermediate_size': 2048,
      'num_attention_heads': 4,
      'num_key_value_heads': 1,
      'num_hidden_layers': 6,
      'sliding_window': 16,
      'layer_types': [*5 * ['sliding_attention'], 'full_attention'],
      'image_ids': (31_999, 32_000, 32_001),
    },
  ),
}
LENGTH = 64
NUM_EXAMPLES = 48


@pytest.fixture(scope='module', params=MODELS)
def pair(request, tmp_path_factory):
  """A random model of transformers', and ours from the folder it saved."""
  kind, changes = MODELS[request.param]
  theirs = fixtures.make(kind, changes, as_initialised=True)
  folder = epath.Path(tmp_path_factory.mktemp(request.param))
  theirs.save_pretrained(folder)
  return theirs, golden.load(folder), folder


@pytest.fixture(scope='module')
def said(pair):
  """What transformers computes on some inputs."""
  theirs, _, _ = pair
  c = theirs.config
  ids = {
    'num_ids': c.vocab_size,
    'eos': c.eos_token_id,
    'pad': c.pad_token_id,
  }
  inputs = fixtures.inputs(3, 24, **ids)
  targets = fixtures.inputs(3, 20, seed=1, **ids)
  return inputs, targets, fixtures.what_it_says(theirs, inputs, targets, LENGTH)


@pytest.fixture
def all_ids(pair, monkeypatch):
  monkeypatch.setattr(golden, 'NUM_IDS', pair[0].config.vocab_size)


def test_logits_are_equal(pair, said):
  _, (model, params), _ = pair
  inputs, targets, want = said

  logits = jax.jit(model.apply)(
    {'params': params}, jnp.asarray(inputs), jnp.asarray(targets)
  )

  np.testing.assert_allclose(logits, want['logits'], atol=1e-4)


def test_greedy_outputs_are_equal_token_for_token(pair, said, all_ids):
  _, ours, _ = pair
  inputs, _, want = said

  written = golden.write(*ours, sampler.GREEDY, inputs, LENGTH)

  got, want = (
    golden.until_eos(x, ours[0].config.eos_id)
    for x in (written, want['greedy'])
  )
  assert got == want


def test_beam_outputs_are_equal(pair, said, all_ids):
  _, ours, _ = pair
  inputs, _, want = said
  beam = beam_search.BeamConfig(fixtures.NUM_BEAMS, alpha=0.0)

  written = golden.write(*ours, beam, inputs, LENGTH)

  got, want = (
    golden.until_eos(x, ours[0].config.eos_id) for x in (written, want['beam'])
  )
  assert got == want


@pytest.mark.parametrize('max_shard_bytes', [10**10, 10**7])
def test_what_we_write_loads_without_a_missing_or_unexpected_key(
  pair, tmp_path, max_shard_bytes
):
  theirs, _, folder = pair
  config, arrays = huggingface.open_folder(folder)
  params = {name: tensors.read_all(x) for name, x in arrays.items()}

  huggingface.save(
    epath.Path(tmp_path),
    config,
    params,
    source=folder,
    max_shard_bytes=max_shard_bytes,
  )

  loaded, report = type(theirs).from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report.values()), report
  was, now = theirs.state_dict(), loaded.state_dict()
  assert was.keys() == now.keys()
  assert all(torch.equal(was[key], now[key]) for key in was)
  assert described(loaded.config) == {
    **described(theirs.config),
    '_name_or_path': str(tmp_path),
    'architectures': [type(theirs).__name__],
    'transformers_version': transformers.__version__,
  }


def described(config):
  """Returns the fields of a config, without those that loading a file sets."""
  return without_dtype(config.to_dict()) | {
    'decoder_start_token_id': getattr(config, 'decoder_start_token_id', None)
    or config.bos_token_id
  }


def without_dtype(values):
  if not isinstance(values, dict):
    return values
  return {k: without_dtype(v) for k, v in values.items() if k != 'dtype'}


# --- From a Hugging Face teacher to a Hugging Face student --------------------


# With a window that is shorter than the words, and a layer without one.
T5GEMMA = (
  '--gin_file=gin/models/t5gemma.gin',
  *gin_flags(WINDOW=4, FULL_PERIOD=2),
)
T5GEMMA_LAYERS = gin_flags(NUM_ENCODER_LAYERS=2, NUM_DECODER_LAYERS=2)


@pytest.fixture(scope='module', params=['t5', 't5gemma 1', 't5gemma 2'])
def exported(request, run_main, tmp_path_factory):
  """A student of cmudict_g2p, distilled from one folder into another."""
  folder = tmp_path_factory.mktemp('distilled')
  family, _, version = request.param.partition(' ')
  model, layers = (), ()
  if family == 't5gemma':
    model = (*T5GEMMA, f'--gin.VERSION={version}')
    layers = T5GEMMA_LAYERS

  def run(*arguments, **macros):
    finished = run_main(*arguments, *gin_flags(**macros))
    assert finished.code == 0, finished.err

  def export(name):
    run(
      '--run_mode=export',
      CHECKPOINT_PATH=folder / name,
      EXPORT_FORMAT='huggingface',
      OUTPUT_DIR=folder / f'{name}_exported',
    )
    return folder / f'{name}_exported'

  settings = (*model, *main_test.SMALL, *layers)
  run(main_test.TEACHER, *settings, MODEL_DIR=folder / 'teacher')
  run(
    main_test.FORWARD_KL,
    *settings,
    MODEL_DIR=folder / 'student',
    TEACHER_CHECKPOINT_PATH=export('teacher'),
    INITIAL_CHECKPOINT_PATH=None,
  )
  return export('student')


def test_predictions_of_a_distilled_student_are_equal(
  exported, run_main, tmp_path
):
  finished = run_main(
    '--run_mode=infer',
    main_test.INFER,
    *gin_flags(
      CHECKPOINT_PATH=exported,
      INFER_OUTPUT_DIR=tmp_path,
      INFER_NUM_EXAMPLES=NUM_EXAMPLES,
    ),
  )
  assert finished.code == 0, finished.err
  lines = (tmp_path / 'predictions_test.jsonl').read_text().splitlines()
  ours = [json.loads(line) for line in lines]

  vocabulary = seqio.ByteVocabulary()
  inputs = [[*vocabulary.encode(line['inputs']), 1] for line in ours]
  width = max(map(len, inputs))
  tokens = torch.tensor([row + [0] * (width - len(row)) for row in inputs])
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  assert [tokenizer(line['inputs']).input_ids for line in ours] == inputs
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported)
  written = model.generate(
    input_ids=tokens,
    attention_mask=tokens != 0,
    max_new_tokens=16,
    do_sample=False,
    suppress_tokens=sorted(
      {0, model.config.decoder_start_token_id}
      | {*range(vocabulary.vocab_size, 384)}
    ),
  )

  theirs = [
    vocabulary.decode(row) for row in golden.until_eos(written[:, 1:], 1)
  ]
  assert [line['prediction'] for line in ours] == theirs


# --- Added tokens -------------------------------------------------------------

TEXTS = (
  *('the fox <sep> { dog }', '{x}', 'the<sep>dog', 'x  {  e\n f', ' <sep>'),
  *('<sep><sep2>', 'a\u00a0{b', '{ "the": 1 }', 'ü <sep', ''),
)


def test_texts_with_added_tokens_are_split_and_joined_as_there(tmp_path):
  path = tmp_path / 'spiece.model'
  conftest.train_sentencepiece(
    path,
    ['the fox dog'] * 9,
    vocab_size=16,
    hard_vocab_limit=False,
    model_type='unigram',
  )
  number = vocabularies.sentencepiece(path, 0).vocab_size
  added = {
    str(number + i): {'content': token, 'special': token[0] == '<'}
    for i, token in enumerate(['<sep>', '{', '}', '\n', '<sep2>', 'ü'])
  }
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'T5Tokenizer',
        'extra_ids': 0,
        'added_tokens_decoder': {
          number: values | {'normalized': False}
          for number, values in added.items()
        },
      }
    )
  )
  (tmp_path / 'config.json').write_text('{"model_type": "t5"}')

  ours = vocabularies.sentencepiece(path, 0)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

  assert ours.vocab_size == len(theirs)
  for text in TEXTS:
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text) == ids
    if ours.unk_id not in ids:  # ours writes ⁇ for it
      assert ours.decode(ids) == theirs.decode(ids)


# --- From a folder of T5Gemma 2 with its tokenizer.json, and back -------------


def test_a_t5gemma_2_is_distilled_with_its_own_tokenizer(run_main, tmp_path):
  words = ['the fox', 'a dog', 'the dog jumps', 'over', 'the fox jumps']
  shape = {'num_key_value_heads': 1, 'vocab_size': 320}
  for seed, name in enumerate(['student', 'teacher']):
    model = fixtures.make(
      't5gemma2', shape | {'image_ids': (317, 318, 319)}, seed=seed
    )
    model.save_pretrained(tmp_path / name)
    write_gemma_tokenizer(tmp_path / name, words * 9)
  lines = [json.dumps({'inputs': w, 'targets': w[::-1]}) for w in words]
  (tmp_path / 'words.jsonl').write_text('\n'.join(lines))

  def run(*arguments, **macros):
    finished = run_main(
      *arguments,
      '--gin_file=gin/vocabularies/tokenizer_json.gin',
      *gin_flags(
        VOCABULARY_PATH=tmp_path / 'student' / 'tokenizer.json', **macros
      ),
    )
    assert finished.code == 0, finished.err
    return finished.err

  task = {
    'JSON_LINES_FILES': dict.fromkeys(
      ('train', 'test'), str(tmp_path / 'words.jsonl')
    ),
    'TASK_FEATURE_LENGTHS': {'inputs': 24, 'targets': 24},
  }
  run(
    '--gin_file=configs/from_pretrained.gin',
    '--gin_file=gin/tasks/json_lines.gin',
    **task,
    INITIAL_CHECKPOINT_PATH=tmp_path / 'student',
    TEACHER_CHECKPOINT_PATH=tmp_path / 'teacher',
    MODEL_DIR=tmp_path / 'run',
    TRAIN_STEPS=3,
    WARMUP_STEPS=0,
    BATCH_SIZE=4,
    EVAL=None,
  )
  finished = run_main(
    '--run_mode=export',
    *gin_flags(
      CHECKPOINT_PATH=tmp_path / 'run',
      EXPORT_FORMAT='huggingface',
      OUTPUT_DIR=tmp_path / 'exported',
    ),
  )
  assert finished.code == 0, finished.err

  loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    tmp_path / 'exported'
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
  model, params = golden.load(epath.Path(tmp_path / 'exported'))
  given = tokenizer(words, padding=True, return_tensors='pt')
  inputs = given.input_ids.numpy()
  targets = np.full((len(words), 5), 9)
  with torch.no_grad():
    want = loaded(
      input_ids=given.input_ids,
      attention_mask=given.attention_mask,
      labels=torch.tensor(targets),
    ).logits
  logits = jax.jit(model.apply)(
    {'params': params}, jnp.asarray(inputs), jnp.asarray(targets)
  )
  np.testing.assert_allclose(logits, want, atol=1e-4)
  before = golden.load(epath.Path(tmp_path / 'student'))[1]
  table = params['token_embedder']['embedding']
  assert not np.array_equal(table, before['token_embedder']['embedding'])
