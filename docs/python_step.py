# A step of on-policy distillation from Python: 'student' and 'teacher' are
# folders that hold a run, a Hugging Face or a T5X checkpoint.
import gkd_jax
import jax
import numpy as np
import optax

student, params = gkd_jax.load_model('student')
teacher, teacher_params = gkd_jax.load_model('teacher', dtype='bfloat16')
optimizer = optax.adafactor(1e-3)
train_step = gkd_jax.make_train_step(
  student=student,
  teacher=teacher,
  policy=gkd_jax.policies.student(),  # the student writes the outputs
  objective=gkd_jax.Objective(gkd_jax.divergences.reverse_kl),
  optimizer=optimizer,
  student_sampler=gkd_jax.SamplerConfig(),
  teacher_sampler=gkd_jax.SamplerConfig(),
  ids=student.config.special_ids(num_ids=40),  # of your tokenizer
  seed=0,
)
train_step = jax.jit(train_step, donate_argnums=0)
state = gkd_jax.init_state(params, optimizer)
inputs = np.array([[17, 8, 25, 1], [30, 9, 1, 0]])  # end with EOS, then pad
targets = np.zeros((2, 8), int)  # not read; their length bounds the outputs
for _ in range(3):
  batch = gkd_jax.Batch(inputs, targets, targets)
  state, metrics = train_step(state, teacher_params, batch)
  print(f'step {state.step}: loss {metrics["loss"]:.3f}')
greedy = gkd_jax.SamplerConfig(temperature=0.0)
print(
  gkd_jax.generate(
    student, state.params, inputs, greedy, max_decode_len=8
  ).tokens
)
