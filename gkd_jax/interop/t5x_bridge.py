# SPDX-License-Identifier: Apache-2.0
"""Distillation in T5X's own trainer; needs an importable t5x.

`GKDModel` stands in for the model of an existing T5X run. It trains the same
parameters, evaluates and predicts as that model does; only its loss is another:
a policy of ours writes the outputs, an objective of ours compares student and
teacher on them. See gin/t5x/gkd.gin.

The teacher belongs to no train state: T5X neither trains nor saves it. What a
compiled function closes over would be built into the program as constants, all
of the teacher's numbers. So `trainer` gives T5X's trainer a partitioner whose
compiled steps take the teacher's parameters as one more argument, spread over
the devices as T5X spreads the student's.
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
from gkd_jax.distill import policies, rules
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
  """A T5X model with our loss.

  Nothing is packed: an output that the student writes has a row of its own.
  During T5X's training evaluation the dataset writes the outputs, whatever the
  policy, so that steps can be compared.
  """

  def __init__(
    self,
    model: models.EncoderDecoderModel,
    method: Method,
    teacher_checkpoint_path: str | None = None,
  ):
    """Takes over what a T5X run already has.

    Args:
      model: of that run, with T5X's network of examples/t5; its own loss, with
        z_loss and label smoothing, is not used.
      method: policy, teacher and divergence, without state. The loss is a mean,
        by its `reduction`; T5X adds up the gradients of microbatches.
      teacher_checkpoint_path: see `pretrained.open_checkpoint`; read when the
        trainer is made. Only a method that needs no teacher has None.

    Raises:
      ValueError: these do not fit together.
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
        "Method.credit is set, but T5X's trainer has no reward. Train with "
        'gkd_jax.main, or leave it None.'
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
    """Reads the teacher onto a mesh with the axes 'data' and 'model'."""
    if self._teacher_checkpoint_path is None:
      return None
    source = pretrained.open_checkpoint(
      self._teacher_checkpoint_path, 'TEACHER_CHECKPOINT_PATH'
    )
    pretrained.check_fits(
      source, vocabularies.describe(self.output_vocabulary), self._ids
    )
    console.log(f'Teacher: {source}')
    # It computes in the student's dtype.
    config = dataclasses.replace(
      source.config, dtype=self._student.config.dtype
    )
    teacher = registry.make_model(config, partitioning.Placement(mesh))
    return teacher, source.load(abstract_params(teacher), None)

  @contextlib.contextmanager
  def with_teacher(
    self, teacher: Model | None, params: Params
  ) -> Iterator[None]:
    """Says what `loss_fn` compares with, while it is called or traced."""
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
      params: the student's.
      batch: as seqio's EncDecFeatureConverter makes it without packing.
      dropout_rng: of this step or microbatch: of dropout, sampling and the
        policy's draws; None in evaluation, where nothing is drawn.

    Returns:
      The loss [] and T5X's kind of metrics.
    """
    if 'decoder_segment_ids' in batch:
      raise ValueError(
        'Packed batches cannot be distilled: bind train/utils.DatasetConfig.'
        'pack = False and train_eval/utils.DatasetConfig.pack = False.'
      )
    if self._teacher is None:
      raise ValueError(
        'GKDModel has no teacher yet: T5X must train with train_script.train.'
        'trainer_cls = @t5x_bridge.trainer, see gin/t5x/gkd.gin.'
      )
    student, method = self._student, self._method
    if dropout_rng is None:
      student = registry.make_model(
        dataclasses.replace(student.config, dropout_rate=0.0)
      )
      method = dataclasses.replace(method, policy=policies.dataset())
      seed = 0
    else:
      # Of our generator: T5X may have chosen one that draws differently on
      # another mesh.
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
    """As the model of the run does, with what gin has bound for it."""
    return self._model.predict_batch_with_aux(params, batch, rng, **kwargs)

  def score_batch(self, params, batch, return_intermediates=False):
    """As the model of the run does."""
    return self._model.score_batch(params, batch, return_intermediates)


def student_config(module: Any) -> ModelConfig:
  """Returns the shape of T5X's network: ours has the same parameters.

  Raises:
    ValueError: it is another network than that of examples/t5.
  """
  if not isinstance(module, network.Transformer):
    raise ValueError(
      f"GKDModel trains T5X's network t5x.examples.t5.network.Transformer; "
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
  """Returns the metrics of a microbatch, mergeable over those of many steps."""
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
  """Makes T5X's trainer, whose compiled steps know the teacher.

  Args:
    model: with our loss.
    partitioner: of the run.
    trainer_cls: of the run, called with all the rest.
    **kwargs: see `t5x.trainer.BaseTrainer`.
  """
  if not isinstance(model, GKDModel):
    raise ValueError(
      f'This trainer is for GKDModel, but MODEL is {type(model).__qualname__}. '
      'Give gin/t5x/gkd.gin after all other gin files.'
    )
  teacher = model.load_teacher(partitioner.mesh)
  return trainer_cls(
    model=model,
    partitioner=_WithTeacher(partitioner, model, *(teacher or (None, None))),
    **kwargs,
  )


@dataclasses.dataclass(frozen=True)
class _WithTeacher:
  """A partitioner whose functions get the teacher's parameters as they run.

  Attributes:
    partitioner: T5X's.
    model: whose `loss_fn` these functions call.
    teacher: its model.
    params: its parameters, on the devices.
  """

  partitioner: Any
  model: GKDModel
  teacher: Model | None
  params: Params

  def __getattr__(self, name):
    return getattr(self.partitioner, name)

  def partition(self, fn, in_axis_resources, out_axis_resources, **kwargs):
    """As T5X's does; the result is called without the teacher."""

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
    """As T5X's does."""
    return _Partitioned(
      self.partitioner.compile(partitioned.fn, *args, self.params), self.params
    )


@dataclasses.dataclass(frozen=True)
class _Partitioned:
  fn: Any
  params: Params

  def __call__(self, *args):
    return self.fn(*args, self.params)
