# SPDX-License-Identifier: Apache-2.0
"""Distillation in T5X's own trainer; needs an importable t5x.

`GKDModel` replaces the model of an existing T5X run. It has the same parameters
and evaluates and predicts like that model; only the loss differs: a policy
writes the outputs, and an objective compares student and teacher on them. See
gin/t5x/gkd.gin.

The teacher is not part of T5X's train state. Closing over its parameters would
compile them into the program as constants. Instead, `trainer` gives T5X's
trainer a partitioner whose compiled steps take the teacher's parameters as one
more argument, sharded over the devices like the student's.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from t5x import metrics as t5x_metrics
from t5x import models
from t5x import trainer as t5x_trainer
from t5x.examples.t5 import network

from gkd_jax.batch import Batch
from gkd_jax.checkpoints import pretrained
from gkd_jax.data import vocabularies
from gkd_jax.distill import policies, rules, teachers
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.distill.state import Frozen
from gkd_jax.models import registry
from gkd_jax.models.interface import Model, ModelConfig
from gkd_jax.models.params import abstract_params
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import console

Params = Any
Metrics = dict[str, clu_metrics.Metric]


class GKDModel(models.EncoderDecoderModel):
  """A T5X model with a distillation loss.

  Examples are not packed: each output of the student has its own row. T5X's
  evaluation of the training loss always uses the dataset's outputs, so that
  steps are comparable.
  """

  def __init__(
    self,
    model: models.EncoderDecoderModel,
    method: Method,
    teacher_checkpoint_path: str | None = None,
  ):
    """Wraps the model of a T5X run.

    Args:
      model: with T5X's network of examples/t5; its loss (with z_loss and label
        smoothing) is not used.
      method: policy, teacher and divergence, without state. The loss is a mean
        by the objective's `reduction`; T5X sums the gradients of microbatches.
      teacher_checkpoint_path: see `pretrained.open_checkpoint`; read when the
        trainer is made. None only for a method without a teacher.

    Raises:
      ValueError: the network or the method is not supported.
    """
    super().__init__(
      module=model.module,
      input_vocabulary=model.input_vocabulary,
      output_vocabulary=model.output_vocabulary,
      optimizer_def=model.optimizer_def,
      decode_fn=model.decode_fn,
      feature_converter_cls=model.FEATURE_CONVERTER_CLS,
    )
    config = student_config(model.module)
    rules.check(rules.Setup(method, config.dropout_rate))
    step_lib.check_no_state(method)
    if method.credit is not None:
      raise ValueError(
        "Method.credit is set, but T5X's trainer does not support rewards. "
        'Train with gkd_jax.main, or leave Method.credit None.'
      )
    if isinstance(method.teacher, teachers.Several):
      raise ValueError(
        "Method.teacher is several teachers, which T5X's trainer does not "
        'support. Train with gkd_jax.main, or set one teacher.'
      )
    if method.needs_teacher_checkpoint and teacher_checkpoint_path is None:
      raise ValueError(
        'This method needs a teacher: set TEACHER_CHECKPOINT_PATH.'
      )
    self._model = model
    self._method = method
    self._teacher_checkpoint_path = teacher_checkpoint_path
    self._student = registry.make_model(config)
    self._ids = self._student.config.special_ids(
      model.output_vocabulary.vocab_size
    )
    self._teacher = None  # (model, parameters), while a step is traced

  def load_teacher(
    self, mesh: jax.sharding.Mesh
  ) -> tuple[Model, Params] | None:
    """Loads the teacher onto a mesh with the axes 'data' and 'model'."""
    if self._teacher_checkpoint_path is None:
      return None
    source = pretrained.open_checkpoint(
      self._teacher_checkpoint_path, 'TEACHER_CHECKPOINT_PATH'
    )
    pretrained.check_fits(
      source, vocabularies.describe(self.output_vocabulary), self._ids
    )
    console.log(f'Teacher: {source}')
    # The teacher computes in the student's dtype.
    config = dataclasses.replace(
      source.config, dtype=self._student.config.dtype
    )
    teacher = registry.make_model(config, partitioning.Placement(mesh))
    return teacher, source.load(abstract_params(teacher), None)

  @contextlib.contextmanager
  def with_teacher(
    self, teacher: Model | None, params: Params
  ) -> Iterator[None]:
    """Provides the teacher to `loss_fn` within a `with` block."""
    self._teacher = (teacher, params)
    try:
      yield
    finally:
      self._teacher = None

  def loss_fn(
    self,
    params: Params,
    batch: Mapping[str, jax.Array],
    dropout_rng: jax.Array | None,
  ) -> tuple[jax.Array, Metrics]:
    """Writes outputs and compares student and teacher on them.

    Args:
      params: the student's parameters.
      batch: from seqio's EncDecFeatureConverter without packing.
      dropout_rng: seeds dropout, sampling and the policy of this step or
        microbatch; None in evaluation, which is deterministic.

    Returns:
      The loss [] and clu metrics, as T5X expects them.
    """
    if 'decoder_segment_ids' in batch:
      raise ValueError(
        'Packed batches cannot be distilled: bind train/utils.DatasetConfig.'
        'pack = False and train_eval/utils.DatasetConfig.pack = False.'
      )
    if self._teacher is None:
      raise ValueError(
        'GKDModel has no teacher yet: set train_script.train.trainer_cls = '
        '@t5x_bridge.trainer, see gin/t5x/gkd.gin.'
      )
    student, method = self._student, self._method
    if dropout_rng is None:
      student = registry.make_model(
        dataclasses.replace(student.config, dropout_rate=0.0)
      )
      method = dataclasses.replace(method, policy=policies.dataset())
      seed = 0
    else:
      # Seeds a threefry key: T5X's generator may depend on the mesh.
      seed = jax.random.bits(dropout_rng, (), jnp.uint32)
    teacher, teacher_params = self._teacher
    batch_loss = step_lib.make_batch_loss(
      student=student, teacher=teacher, method=method, ids=self._ids
    )
    inputs = batch['encoder_input_tokens']
    loss, sums = batch_loss(
      flax.core.unfreeze(params),
      Frozen(teacher_params),
      Batch(
        inputs,
        batch['decoder_target_tokens'],
        batch['decoder_loss_weights'].astype(jnp.float32),
      ),
      step_lib.Rngs(
        *jax.random.split(jax.random.key(seed, impl='threefry2x32'), 3)
      ),
    )
    loss /= jnp.maximum(sums['count'], 1.0)
    return loss, _metrics(sums, batch['decoder_target_tokens'].size)

  def predict_batch_with_aux(self, params, batch, rng=None, **kwargs):
    """Calls the run's model, with the arguments that gin binds for it."""
    return self._model.predict_batch_with_aux(params, batch, rng, **kwargs)

  def score_batch(self, params, batch, return_intermediates=False):
    """Calls the run's model."""
    return self._model.score_batch(params, batch, return_intermediates)


def student_config(module: Any) -> ModelConfig:
  """Returns our config with the same parameters as T5X's network.

  Raises:
    ValueError: the network is not that of examples/t5.
  """
  if not isinstance(module, network.Transformer):
    raise ValueError(
      "GKDModel trains T5X's network t5x.examples.t5.network.Transformer; "
      f'{type(module).__module__}.{type(module).__qualname__} has other '
      'parameters. (A teacher may have the layout of scalable_t5.)'
    )
  c = module.config
  return registry.make_config(
    't5',
    vocab_size=c.vocab_size,
    emb_dim=c.emb_dim,
    num_heads=c.num_heads,
    head_dim=c.head_dim,
    mlp_dim=c.mlp_dim,
    num_encoder_layers=c.num_encoder_layers,
    num_decoder_layers=c.num_decoder_layers,
    mlp_activations=tuple(c.mlp_activations),
    logits_via_embedding=c.logits_via_embedding,
    dropout_rate=c.dropout_rate,
    dtype=jnp.dtype(c.dtype).name,
  )


def _metrics(sums: dict[str, jax.Array], num_tokens: int) -> Metrics:
  """Returns clu metrics of a microbatch, which merge over steps."""
  sequences = sums['sequences']
  rate = t5x_metrics.TimeRate.from_model_output
  return {
    **{
      name: clu_metrics.Average(total=sums[name], count=sums['count'])
      for name in ('loss', 'nll', 'divergence')
      if name in sums
    },
    **{
      name: clu_metrics.Average(total=sums[name], count=sequences)
      for name in ('on_policy', 'truncated')
    },
    'target_tokens': t5x_metrics.AveragePerStep(total=sums['target_tokens']),
    'timing/seconds': t5x_metrics.Time(),
    'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(),
    'timing/seqs_per_second': rate(numerator=sequences),
    'timing/target_tokens_per_second': rate(numerator=jnp.array(num_tokens)),
  }


def trainer(
  model: GKDModel,
  partitioner: Any,
  trainer_cls: Any = t5x_trainer.Trainer,
  **kwargs,
) -> t5x_trainer.BaseTrainer:
  """Returns a T5X trainer whose compiled steps take the teacher's parameters.

  Args:
    model: the GKDModel to train.
    partitioner: the run's partitioner.
    trainer_cls: the run's trainer class, called with all other arguments.
    **kwargs: see `t5x.trainer.BaseTrainer`.
  """
  if not isinstance(model, GKDModel):
    raise ValueError(
      'This trainer requires GKDModel, but MODEL is '
      f'{type(model).__qualname__}. Pass gin/t5x/gkd.gin after all other gin '
      'files.'
    )
  teacher = model.load_teacher(partitioner.mesh)
  return trainer_cls(
    model=model,
    partitioner=_WithTeacher(partitioner, model, *(teacher or (None, None))),
    **kwargs,
  )


@dataclasses.dataclass(frozen=True)
class _WithTeacher:
  """A partitioner that passes the teacher's parameters to compiled functions.

  Attributes:
    partitioner: T5X's partitioner.
    model: the GKDModel whose `loss_fn` these functions call.
    teacher: the teacher's model.
    params: the teacher's parameters, on the devices.
  """

  partitioner: Any
  model: GKDModel
  teacher: Model | None
  params: Params

  def __getattr__(self, name):
    return getattr(self.partitioner, name)

  def partition(self, fn, in_axis_resources, out_axis_resources, **kwargs):
    """See T5X's `partition`; callers do not pass the teacher."""

    def with_teacher(*args):
      *args, params = args
      with self.model.with_teacher(self.teacher, params):
        return fn(*args)

    shardings = jax.tree.map(lambda x: x.sharding, self.params)
    return _Partitioned(
      self.partitioner.partition(
        with_teacher,
        in_axis_resources=(*in_axis_resources, shardings),
        out_axis_resources=out_axis_resources,
        **kwargs,
      ),
      self.params,
    )

  def compile(self, partitioned, *args):
    """See T5X's `compile`."""
    return _Partitioned(
      self.partitioner.compile(partitioned.fn, *args, self.params), self.params
    )


@dataclasses.dataclass(frozen=True)
class _Partitioned:
  fn: Any
  params: Params

  def __call__(self, *args):
    return self.fn(*args, self.params)
