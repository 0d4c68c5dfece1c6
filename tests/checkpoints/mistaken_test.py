# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from gkd_jax.checkpoints import pretrained


def refusal(path):
  with pytest.raises(ValueError) as error:
    pretrained.open_checkpoint(path, 'TEACHER_CHECKPOINT_PATH')
  message = str(error.value)
  assert message.startswith('TEACHER_CHECKPOINT_PATH: ')
  return message


@pytest.mark.parametrize(
  'address, said',
  [
    (
      'https://huggingface.co/google/flan-t5-small',
      'hf download google/flan-t5-small --local-dir models/flan-t5-small',
    ),
    (
      'https://huggingface.co/google/flan-t5-small/tree/main',
      'hf download google/flan-t5-small --local-dir',
    ),
    ('hf://google/flan-t5-small', 'hf download google/flan-t5-small'),
    ('s3://b/m', 'aws s3 cp --recursive s3://b/m FOLDER'),
    ('http://example.org/m', 'http://, which gkd_jax does not read'),
    ('abfs://c@a/m', 'abfs://, which gkd_jax does not read'),
    ('file:///m', 'Use the path: /m'),
    ('google/flan-t5-small', 'hf download google/flan-t5-small'),
    ('t5-small', 'hf download t5-small --local-dir models/t5-small'),
  ],
)
def test_an_address_is_refused_with_what_to_do(address, said):
  assert said in refusal(address)


def test_a_path_in_an_existing_folder_is_no_name_of_the_hub(
  tmp_path, monkeypatch
):
  (tmp_path / 'runs').mkdir()
  monkeypatch.chdir(tmp_path)

  assert 'hf download' not in refusal('runs/teacher')


@pytest.mark.parametrize(
  'file, said',
  [
    ('m/model.safetensors', 'is a file. Give the folder of the checkpoint'),
    ('m/config.json', 'did you mean {folder}/m?'),
    ('m.zip', 'is an archive. Unpack it'),
  ],
)
def test_a_file_is_refused_with_its_folder(tmp_path, file, said):
  (tmp_path / 'm').mkdir()
  (tmp_path / file).touch()

  assert said.format(folder=tmp_path) in refusal(tmp_path / file)


@pytest.mark.parametrize('also', [(), ('config.json',)])
def test_an_adapter_is_refused_with_how_to_merge_it(tmp_path, also):
  (tmp_path / 'adapter_config.json').write_text(
    json.dumps({'peft_type': 'LORA', 'base_model_name_or_path': 'base/model'})
  )
  for name in also:
    (tmp_path / name).write_text('{"model_type": "t5"}')

  message = refusal(tmp_path)

  assert 'is an adapter (LORA) of base/model' in message
  assert 'merge_and_unload' in message


@pytest.mark.parametrize(
  'content, meant',
  [
    (['checkpoint-9/config.json', 'checkpoint-10/x'], 'checkpoint-10'),
    (['snapshots/abc/config.json', 'refs/x'], 'snapshots/abc'),
    (['models--a--b/snapshots/c/config.json'], 'models--a--b/snapshots/c'),
    (['inner/config.json', 'readme/x'], 'inner'),
  ],
)
def test_a_folder_around_a_checkpoint_is_refused_with_what_is_meant(
  tmp_path, content, meant
):
  for name in content:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()

  assert f'{tmp_path}/{meant}' in refusal(tmp_path)


def test_of_several_snapshots_main_is_meant(tmp_path):
  for name in ('aaa', 'bbb'):
    (tmp_path / 'snapshots' / name).mkdir(parents=True)
  (tmp_path / 'refs').mkdir()
  (tmp_path / 'refs' / 'main').write_text('aaa')

  assert f'{tmp_path}/snapshots/aaa?' in refusal(tmp_path)


@pytest.mark.parametrize(
  'file, said',
  [
    ('model.safetensors', 'has weights, but no config.json'),
    ('config.gin', 'is a run that has no checkpoint'),
  ],
)
def test_what_a_folder_lacks_is_named(tmp_path, file, said):
  (tmp_path / file).touch()

  assert said in refusal(tmp_path)
